"""Depthwise convolution: `depthwise_conv2d`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kernelpress.kernels import reference
from kernelpress.ops.backends.cpu import cpu_implementation
from kernelpress.ops.backends.cuda import cuda_implementation
from kernelpress.ops.backends.kernel import PLANES, Kernel, float_vector, window
from kernelpress.ops.backends.onednn import ONEDNN
from kernelpress.ops.backends.triton import triton_implementation
from kernelpress.ops.calls import packing
from kernelpress.ops.calls.dispatch import op
from kernelpress.ops.checks import TensorSpec, check_depthwise_weight, check_epilogue, check_input, convolved
from kernelpress.ops.layout import DENSE, PIXELS
from kernelpress.ops.registry import Problem
from kernelpress.ops.signature import IntOrPair

__all__ = ["depthwise_conv2d", "depthwise_sizes"]


def _shape(options: Any, x: TensorSpec, weight: TensorSpec, *epilogue: TensorSpec | None) -> tuple[int, ...]:
    check_input(x)
    check_depthwise_weight("weight", weight, x.shape[1])
    return check_epilogue(options, convolved(x, weight, options), weight.shape[0], *epilogue)


def depthwise_sizes(problem: Problem, spacing: Mapping[str, int]) -> tuple[int, ...]:
    """Images, channel multiplier, outputs, spacings, window: as every depthwise kernel takes them."""
    x, weight = problem["x"], problem["weight"]
    batch, channels, in_h, in_w = x.shape
    return (
        *(batch, in_h, in_w, channels, weight.shape[0] // channels, *problem.shape[2:]),
        *(spacing["x"], spacing["residual"], spacing["y"]),
        *window(weight.shape[2:], problem.options),
    )


_CPU = Kernel(
    "depthwise_conv2d",
    lambda options, x, weight, bias, scale, residual: (
        *(x, packing.depthwise(weight, scale), packing.vector(bias), residual),
    ),
    depthwise_sizes,
    dtypes=(torch.float32,),
)

_PLANES = Kernel(
    "depthwise_planes",
    lambda options, x, weight, bias, scale, residual: (
        *(x, packing.filters(weight, scale), packing.vector(bias), residual),
    ),
    lambda problem, spacing: (
        *(problem["x"].shape[0], *problem["x"].shape[2:], problem["x"].shape[1]),
        *(problem["weight"].shape[0] // problem["x"].shape[1], *problem.shape[2:]),
        *window(problem["weight"].shape[2:], problem.options),
    ),
    layouts=PLANES,
    dtypes=(torch.float32,),
    out=DENSE,
)

_CUDA = Kernel(
    "depthwise_conv2d",
    lambda options, x, weight, bias, scale, residual: (
        *(x, packing.depthwise(weight, None), float_vector(bias), float_vector(scale), residual),
    ),
    depthwise_sizes,
)


@op(
    out=PIXELS,
    shape=_shape,
    reference=reference.depthwise_conv2d,
    macs=lambda options, shape, x, weight, *_: math.prod(shape) * math.prod(weight[2:]),
    implementations=(
        cuda_implementation(_CUDA),
        triton_implementation("depthwise", _CUDA),
        cpu_implementation(_CPU),
        ONEDNN,
        cpu_implementation(_PLANES, "planes"),
    ),
)
def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    activation: str = "identity",
    backend: str = "auto",
) -> Tensor:
    """Depthwise convolution with its epilogue: every channel by its own `multiplier` filters.

    Args:
        x: `[N, C, H, W]`; channels_last, or a channel slice of it, is read without a copy.
        weight: `[C · multiplier, 1, KH, KW]`; output channel `o` reads input channel `o // multiplier`.
        bias, scale: `[C · multiplier]`.
        residual: of the output's shape.
        stride, padding, dilation: pixels, one integer or (height, width).

    Backend `"planes"` is a CPU kernel on contiguous x and residual, and gives contiguous memory.

    Returns: `[N, C · multiplier, H_out, W_out]`, channels_last. Other options and errors as of `conv2d`.
    """
