"""What the int8 ops share: checks of scales, zero points and output dtypes, and how kernels take them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from kernelpress.ops.checks import TensorSpec, check_same_shape, describe
from kernelpress.ops.registry import Problem

__all__ = [
    "FLOATS",
    "INT8_DEPTH_LIMIT",
    "check_depth",
    "check_output",
    "check_residual",
    "check_scale",
    "check_zero_point",
    "half_reason",
    "output_dtype",
    "output_scalars",
]

INT8_DEPTH_LIMIT = 65536
"""Products in one sum: 255 · 128 · 65536 still fits an int32."""

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""What is quantized, and what the ops give back."""


def check_scale(name: str, scale: float) -> None:
    """A positive finite number whose inverse is finite in float32 as well. Raises `ValueError`."""
    if not (math.isfinite(scale) and 2.0**-126 <= scale < 2.0**126):
        raise ValueError(f"{name}: expected a positive scale between 2^-126 and 2^126, got {scale}")


def check_zero_point(name: str, zero_point: int) -> None:
    """A value of int8. Raises `ValueError`."""
    if not -128 <= zero_point <= 127:
        raise ValueError(f"{name}: expected an integer between -128 and 127, got {zero_point}")


def check_output(options: Any) -> None:
    """`output_scale` and `output_zero_point` of an int8 output. Raises `ValueError`."""
    if options.output_scale is not None:
        check_scale("output_scale", options.output_scale)
    check_zero_point("output_zero_point", options.output_zero_point)


def output_dtype(options: Any) -> torch.dtype:
    """int8 where there is an `output_scale`, else `output_dtype`, float32 where that is None. Raises `TypeError`."""
    wanted: torch.dtype | None = options.output_dtype
    if options.output_scale is not None:
        if wanted not in (None, torch.int8):
            raise TypeError(f"output_dtype: expected torch.int8 with output_scale, got {wanted}")
        return torch.int8
    if wanted is None:
        return torch.float32
    if wanted not in FLOATS:
        hint = "; an int8 output needs an output_scale" if wanted == torch.int8 else ""
        raise TypeError(f"output_dtype: expected {' or '.join(map(str, FLOATS))}, got {wanted}{hint}")
    return wanted


def output_scalars(problem: Problem) -> tuple[float, float]:
    """Scale and zero point of the output, which a floating one does not read."""
    scale = problem.options.output_scale
    return (1.0 if scale is None else float(scale), float(problem.options.output_zero_point))


def half_reason(problem: Problem) -> str | None:
    """Why the CPU's kernels do not give this output, else None."""
    return f"the kernel gives torch.float32 or torch.int8, not {problem.dtype}" if problem.dtype in FLOATS[1:] else None


def check_residual(residual: TensorSpec | None, shape: Sequence[int], options: Any) -> None:
    """Absent, or of the output's shape, with the scale and zero point of its dtype. Raises `ValueError`."""
    check_scale("residual_scale", options.residual_scale)
    check_zero_point("residual_zero_point", options.residual_zero_point)
    check_same_shape("residual", residual, shape)
    is_affine = options.residual_scale != 1.0 or options.residual_zero_point != 0
    if residual is not None and residual.dtype != torch.int8 and is_affine:
        raise ValueError(
            "residual_scale: expected 1.0, and residual_zero_point 0, for a floating residual, "
            f"got {options.residual_scale} and {options.residual_zero_point}"
        )


def check_depth(weight: TensorSpec) -> None:
    """A sum that an int32 holds whatever its terms are. Raises `ValueError`."""
    depth = math.prod(weight.shape[1:])
    if depth > INT8_DEPTH_LIMIT:
        raise ValueError(
            f"weight: expected at most {INT8_DEPTH_LIMIT} values per output channel, so that their sum fits an int32, "
            f"got {describe(weight.shape)}"
        )
