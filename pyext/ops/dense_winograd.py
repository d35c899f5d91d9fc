"""Winograd's 3×3 convolution, backends of `conv2d`: fewer multiplications, on weights that packing transforms."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernelpress.ops.backends.cpu import cpu_implementation
from kernelpress.ops.backends.kernel import Kernel
from kernelpress.ops.calls import packing
from kernelpress.ops.registry import Problem

__all__ = ["WINOGRAD"]

_ROOT2 = 2**0.5
_POINTS: dict[int, tuple[float, ...]] = {2: (0.0, 1.0, -1.0), 4: (0.0, 1 / _ROOT2, -1 / _ROOT2, _ROOT2, -_ROOT2)}
"""By the tile's outputs; ∞ is one more. The kernel's transforms are those of the same points."""


@dataclass(frozen=True)
class _Transforms:
    """The matrices of `Y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A` (Lavin and Gray, arXiv 1509.09308), in float64."""

    weight: Tensor
    """G: `[tile + 2, 3]`"""
    growth: float
    """Largest factor by which sums of magnitudes grow in both other transforms, in both dimensions."""


@functools.cache
def _transforms(tile: int) -> _Transforms:
    points = torch.tensor(_POINTS[tile], dtype=torch.float64)
    finite = len(points)
    weight, reads = torch.zeros(finite + 1, 3, dtype=torch.float64), torch.zeros(finite + 1, dtype=torch.float64)
    weight[finite, 2] = 1
    for i, p in enumerate(points):
        others = torch.cat([points[:i], points[i + 1 :]])
        weight[i] = p ** torch.arange(3) / (p - others).prod()
        reads[i] = _coefficients(others).abs().sum()
    reads[finite] = _coefficients(points).abs().sum()
    writes = (points.abs() ** torch.arange(tile)[:, None]).sum(1)
    writes[-1] += 1
    return _Transforms(weight, float((reads.max() * writes.max()) ** 2))


def _coefficients(roots: Tensor) -> Tensor:
    """Of the monic polynomial with these roots, the highest power first."""
    found = torch.ones(1, dtype=torch.float64)
    for root in roots:
        found = torch.cat([found, found.new_zeros(1)]) - torch.cat([found.new_zeros(1), root * found])
    return found


def _packed(weight: Tensor, scale: Tensor | None, tile: int) -> Tensor:
    """`[ceil(C_out / P), tile + 2, tile + 2, C_in, P]`, panels of weights transformed in float64."""
    transform = _transforms(tile).weight

    def transformed(w: Tensor) -> Tensor:
        return torch.einsum("ar,ncrs,bs->ncab", transform, w.double(), transform).float()

    return packing.panels(weight, scale, name=f"winograd {tile}", transform=transformed)


def _input_limit(tile: int, options: Any, x: Tensor, weight: Tensor, bias: Any, scale: Tensor | None, *_: Any) -> float:
    sums = _packed(weight, scale, tile).double().abs().sum(dim=3)
    return torch.finfo(torch.float32).max / (_transforms(tile).growth * float(sums.max().clamp_min(1e-30)))


def _reason(problem: Problem) -> str | None:
    options, kernel = problem.options, problem["weight"].shape[2:]
    for name, wanted, got in (
        ("a 3×3 kernel", (3, 3), tuple(kernel)),
        ("stride 1", (1, 1), options.stride),
        ("dilation 1", (1, 1), options.dilation),
        ("groups = 1", 1, options.groups),
    ):
        if got != wanted:
            return f"Winograd's convolution has {name}, got {got}"
    return None


def _sizes(tile: int, problem: Problem, spacing: Mapping[str, int]) -> tuple[int, ...]:
    batch, c_in, in_h, in_w = problem["x"].shape
    _, c_out, out_h, out_w = problem.shape
    sizes = (tile, batch, in_h, in_w, c_in, out_h, out_w, c_out, *problem.options.padding)
    return (*sizes, spacing["x"], spacing["residual"], spacing["y"])


def _operands(tile: int, options: Any, x: Any, weight: Any, bias: Any, scale: Any, residual: Any) -> tuple[Any, ...]:
    return (x, _packed(weight, scale, tile), packing.vector(bias), residual)


def _kernel(tile: int) -> Kernel:
    return Kernel(
        "winograd_conv2d",
        functools.partial(_operands, tile),
        functools.partial(_sizes, tile),
        supports=_reason,
        dtypes=(torch.float32,),
        input_limit=functools.partial(_input_limit, tile),
    )


WINOGRAD = tuple(cpu_implementation(_kernel(tile), f"winograd{tile}") for tile in (4, 2))
"""The entries of `conv2d`. An automatic choice comes to neither, as `cpu` runs whatever they run."""
