"""How far results may lie from the original's, and how far they do."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["INT8_TOLERANCE", "TOLERANCES", "TURNED_SHARE", "relative_error", "tolerance_of"]

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

TURNED_SHARE = 0.01
"""Largest share of the elements of a comparison, an index or a rounding that may turn over, where the floats decided on
are within 10 × the tolerance of the original's, element by element; or 10 × the tolerance where that is more. Of normal
floats 0.8 % lie within 1 % of a threshold in the middle. Orders (sort, topk) have no such bound: elements change places
with their equals."""

INT8_TOLERANCE = 5e-3
"""Of int8 values: one that lies between two steps may be rounded to either, but few do. Tensors of a typical size
(30, root mean square) stay below it if one value in fifty is off by a step."""


def tolerance_of(dtype: torch.dtype | None) -> float:
    """The largest relative error of values of `dtype` unless another is asked for; that of float64 for what are no
    floats."""
    if dtype is None or not dtype.is_floating_point:
        return TOLERANCES[torch.float64]
    return TOLERANCES.get(dtype, TOLERANCES[torch.float32])


def relative_error(result: Tensor, expected: Tensor) -> float:
    """‖result − expected‖ / ‖expected‖ in float64; infinite where shape, dtype or the places of NaN and ±∞ differ,
    where int8 values differ by more than one step, and values of other dtypes at all."""
    if result.shape != expected.shape or result.dtype != expected.dtype or result.layout != expected.layout:
        return float("inf")
    if expected.layout != torch.strided:
        result, expected = result.to_dense(), expected.to_dense()
    if expected.is_complex():
        result, expected = (torch.view_as_real(t.resolve_conj()) for t in (result, expected))
    if expected.dtype == torch.int8:
        steps = result.int() - expected.int()
        if bool((steps.abs() > 1).any()):
            return float("inf")
    elif not expected.dtype.is_floating_point:
        return 0.0 if torch.equal(result, expected) else float("inf")
    wide = torch.promote_types(expected.dtype, torch.float32)
    a, b = result.detach().to(wide), expected.detach().to(wide)
    norm = _norm(b)
    if not math.isfinite(norm):
        finite = torch.isfinite(b)
        if not torch.equal(torch.isfinite(a), finite) or not torch.equal(
            a[~finite].nan_to_num(), b[~finite].nan_to_num()
        ):
            return float("inf")
        a, b = a[finite], b[finite]
        norm = _norm(b)
    difference = _norm(a - b)
    error = difference / norm if norm > 0 else difference
    return error if error == error else float("inf")


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))
