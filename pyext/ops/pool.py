"""Pooling: `global_avg_pool2d` and `max_pool2d`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kernelpress.kernels import reference
from kernelpress.ops.backends.cpu import cpu_implementation
from kernelpress.ops.backends.kernel import Kernel, int8_kernel
from kernelpress.ops.calls.dispatch import op
from kernelpress.ops.checks import (
    TensorSpec,
    check_image,
    check_input,
    check_pair,
    conv_output_size,
    describe,
    floating_or_int8,
)
from kernelpress.ops.layout import DENSE, PIXELS
from kernelpress.ops.registry import Problem
from kernelpress.ops.signature import IntOrPair

__all__ = ["global_avg_pool2d", "max_pool2d"]


def _global_shape(options: Any, x: TensorSpec) -> tuple[int, ...]:
    check_image(x)
    return (x.shape[0], x.shape[1])


def _global_sizes(problem: Problem, spacing: Mapping[str, int]) -> tuple[int, ...]:
    batch, channels, height, width = problem["x"].shape
    return (batch, height * width, channels, spacing["x"])


_GLOBAL_CPU = Kernel("global_avg_pool2d", lambda options, x: (x,), _global_sizes, dtypes=(torch.float32,))


@op(
    out=DENSE,
    shape=_global_shape,
    reference=reference.global_avg_pool2d,
    implementations=(cpu_implementation(_GLOBAL_CPU),),
)
def global_avg_pool2d(x: Tensor, *, backend: str = "auto") -> Tensor:
    """Mean over the positions of every channel: `x: [N, C, H, W]` → `[N, C]`. Errors as of `conv2d`."""


def _max_shape(options: Any, x: TensorSpec) -> tuple[int, ...]:
    check_input(x)
    kernel, padding = options.kernel_size, options.padding
    check_pair("kernel_size", kernel, 1)
    size = conv_output_size(x, kernel, options.stride, padding, (1, 1))
    if 2 * padding[0] > kernel[0] or 2 * padding[1] > kernel[1]:
        raise ValueError(f"padding: expected at most half of kernel_size {describe(kernel)}, got {describe(padding)}")
    return (x.shape[0], x.shape[1], *size)


def _max_sizes(problem: Problem, spacing: Mapping[str, int]) -> tuple[int, ...]:
    batch, channels, in_h, in_w = problem["x"].shape
    options = problem.options
    return (
        *(batch, in_h, in_w, channels, *problem.shape[2:], spacing["x"], spacing["y"]),
        *(*options.kernel_size, *options.stride, *options.padding),
    )


_MAX_CPU = Kernel(
    "max_pool2d",
    lambda options, x: (x,),
    _max_sizes,
    dtypes=(torch.float32, torch.int8),
    specialise=int8_kernel("int8_max_pool2d"),
)


@op(
    out=PIXELS,
    shape=_max_shape,
    reference=reference.max_pool2d,
    dtypes=floating_or_int8,
    implementations=(cpu_implementation(_MAX_CPU),),
)
def _max_pool2d(
    x: Tensor, *, kernel_size: IntOrPair, stride: IntOrPair, padding: IntOrPair = 0, backend: str = "auto"
) -> Tensor:
    """`max_pool2d` with the stride that it has."""


def max_pool2d(
    x: Tensor,
    *,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    backend: str = "auto",
) -> Tensor:
    """Largest value under every window; padding counts as −∞, NaN wins.

    Args:
        x: `[N, C, H, W]`, floating or int8; channels_last, or a channel slice of it, is read without a copy.
        kernel_size, padding: pixels, one integer or (height, width); the padding at most half of the kernel.
        stride: `kernel_size` where None.

    Returns: `[N, C, H_out, W_out]`, channels_last. Errors as of `conv2d`.
    """
    step = kernel_size if stride is None else stride
    return _max_pool2d(x, kernel_size=kernel_size, stride=step, padding=padding, backend=backend)
