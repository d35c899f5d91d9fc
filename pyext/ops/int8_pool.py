"""The mean of int8 images: `int8_global_avg_pool2d`. Their largest values are those of `max_pool2d`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kernelpress.kernels import reference
from kernelpress.ops.backends.cpu import cpu_implementation
from kernelpress.ops.backends.kernel import Kernel
from kernelpress.ops.calls.dispatch import op
from kernelpress.ops.checks import TensorSpec, check_dtype, check_image
from kernelpress.ops.int8_checks import (
    check_output,
    check_scale,
    check_zero_point,
    half_reason,
    output_dtype,
    output_scalars,
)
from kernelpress.ops.layout import IMAGES_OR_ROWS
from kernelpress.ops.registry import Problem

__all__ = ["int8_global_avg_pool2d"]

_MOST_POSITIONS = 2**23
"""Whose sum fits an int32: 255 · 2²³."""


def _shape(options: Any, x: TensorSpec) -> tuple[int, ...]:
    check_image(x)
    height, width = x.shape[2:]
    if height * width > _MOST_POSITIONS:
        raise ValueError(
            f"x: expected at most {_MOST_POSITIONS} positions, so that their sum fits an int32, got {height} × {width}"
        )
    check_scale("input_scale", options.input_scale)
    check_zero_point("input_zero_point", options.input_zero_point)
    check_output(options)
    return (x.shape[0], x.shape[1], *((1, 1) if options.keepdim else ()))


def _dtypes(names: Sequence[str], tensors: Sequence[TensorSpec | None], options: Any) -> torch.dtype:
    check_dtype("x", tensors[0], (torch.int8,))
    return output_dtype(options)


def _sizes(problem: Problem, spacing: Mapping[str, int]) -> tuple[int, ...]:
    batch, channels, height, width = problem["x"].shape
    return (batch, height * width, channels, spacing["x"], spacing["y"], int(problem.dtype == torch.int8))


_CPU = Kernel(
    "int8_global_avg_pool2d",
    lambda options, x: (x,),
    _sizes,
    supports=half_reason,
    dtypes=(torch.int8,),
    scalars=lambda problem: (
        *(float(problem.options.input_scale), float(problem.options.input_zero_point)),
        *output_scalars(problem),
    ),
)


@op(
    out=IMAGES_OR_ROWS,
    shape=_shape,
    reference=reference.int8_global_avg_pool2d,
    dtypes=_dtypes,
    implementations=(cpu_implementation(_CPU),),
)
def int8_global_avg_pool2d(
    x: Tensor,
    *,
    input_scale: float,
    input_zero_point: int = 0,
    keepdim: bool = False,
    output_scale: float | None = None,
    output_zero_point: int = 0,
    output_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean over the positions of every channel of an int8 image, summed exactly.

    Args:
        x: `[N, C, H, W]` int8; channels_last, or a channel slice of it, is read without a copy.
        keepdim: whether the positions stay as dimensions of one element.
        output_scale, output_zero_point, output_dtype: as of `int8_matmul`.

    Returns: `[N, C]`, with `keepdim` `[N, C, 1, 1]`. Errors as of `int8_matmul`.
    """
