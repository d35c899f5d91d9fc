"""Dense convolutions and the linear layer: `conv2d`, `pointwise_conv2d`, `linear`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernelpress.kernels import reference
from kernelpress.ops.backends.cpu import cpu_implementation
from kernelpress.ops.backends.cuda import CudaDevice, cuda_implementation, device_of
from kernelpress.ops.backends.cudnn import CUDNN
from kernelpress.ops.backends.kernel import IMAGES, ROWS_OF_CHANNELS, Kernel, float_vector, tf32_reason, window
from kernelpress.ops.backends.onednn import ONEDNN
from kernelpress.ops.backends.triton import triton_implementation
from kernelpress.ops.calls import packing
from kernelpress.ops.calls.dispatch import op
from kernelpress.ops.checks import (
    TensorSpec,
    check_epilogue,
    check_grouped_weight,
    check_input,
    check_weight,
    convolved,
    describe,
)
from kernelpress.ops.dense_winograd import WINOGRAD
from kernelpress.ops.layout import DENSE, PIXELS, ROWS
from kernelpress.ops.registry import Problem
from kernelpress.ops.signature import IntOrPair

__all__ = ["conv2d", "linear", "pointwise_conv2d", "split_workspace"]


def _conv2d_shape(options: Any, x: TensorSpec, weight: TensorSpec, *epilogue: TensorSpec | None) -> tuple[int, ...]:
    check_input(x)
    check_grouped_weight(x, weight, options.groups)
    return check_epilogue(options, convolved(x, weight, options), weight.shape[0], *epilogue)


def _conv2d_reason(problem: Problem) -> str | None:
    groups = problem.options.groups
    if groups == 1:
        return None
    hint = "; with one group per channel, call depthwise_conv2d" if groups == problem["x"].shape[1] else ""
    return f"the native conv2d has groups = 1, got {groups}{hint}"


def _conv2d_sizes(problem: Problem, spacing: Mapping[str, int]) -> tuple[int, ...]:
    x, weight = problem["x"], problem["weight"]
    batch, c_in, in_h, in_w = x.shape
    _, c_out, out_h, out_w = problem.shape
    return (
        *(batch, in_h, in_w, c_in, out_h, out_w, c_out),
        *(*x.stride, spacing["residual"], spacing["y"]),
        *window(weight.shape[2:], problem.options),
    )


_CONV2D_CPU = Kernel(
    "conv2d",
    lambda options, x, weight, bias, scale, residual: (
        *(x, packing.panels(weight, scale), packing.vector(bias), residual),
    ),
    _conv2d_sizes,
    layouts={"residual": PIXELS},
    supports=_conv2d_reason,
    dtypes=(torch.float32,),
)


@op(
    out=PIXELS,
    shape=_conv2d_shape,
    reference=reference.conv2d,
    macs=lambda options, shape, x, weight, *_: math.prod(shape) * math.prod(weight[1:]),
    implementations=(CUDNN, cpu_implementation(_CONV2D_CPU), ONEDNN, *WINOGRAD),
)
def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    activation: str = "identity",
    backend: str = "auto",
) -> Tensor:
    """2-D convolution with its epilogue: `activation(conv(x, weight) · scale + bias + residual)`.

    Args:
        x: `[N, C_in, H, W]`, any memory format.
        weight: `[C_out, C_in / groups, KH, KW]`.
        bias, scale: `[C_out]`.
        residual: of the output's shape.
        stride, padding, dilation: pixels, one integer or (height, width).
        activation: a name of `kernelpress.kernels.reference.ACTIVATIONS`.
        backend: `"auto"`, `"cuda"`, `"cudnn"`, `"cpu"`, `"onednn"`, `"winograd4"`, `"winograd2"` or `"reference"`.

    `"winograd4"` and `"winograd2"` are F(4×4, 3×3) and F(2×2, 3×3) on the CPU, for 3×3 kernels of stride 1: 4 and 2.25
    times fewer multiplications, on packed weights 4 and 1.8 times as large. Rounding errors of the first are about
    twice those of `"cpu"`, of the second half of them. A value of x that is not finite, or so large (beyond 10³⁰ or so)
    that sums overflow, spreads to all outputs of the tiles that read it, and infinity becomes NaN, as in cuDNN. They
    run only where they are asked for.

    Returns: `[N, C_out, H_out, W_out]`, channels_last.
    Raises: `ValueError` or `TypeError` naming a bad argument; `RuntimeError` where the backend asked for cannot run.
    """


def _pointwise_shape(options: Any, *tensors: Any) -> tuple[int, ...]:
    x, weight, bias, scale, residual, input_scale = tensors
    check_input(x)
    batch, channels, height, width = x.shape
    check_weight("weight", weight, "[C_out, C_in, 1, 1]", (None, channels, 1, 1), f"C_in = {channels} channels of x")
    if input_scale is not None and (
        len(input_scale.shape) != 2 or input_scale.shape[0] != batch or input_scale.shape[1] != channels
    ):
        raise ValueError(f"input_scale: expected [{batch}, {channels}], got {describe(input_scale.shape)}")
    c_out = weight.shape[0]
    return check_epilogue(options, (batch, c_out, height, width), c_out, bias, scale, residual)


def _product_sizes(problem: Problem, spacing: Mapping[str, int]) -> tuple[int, ...]:
    """Of a product with rows of x, or with the pixels of its images."""
    shape, channels = problem["x"].shape, problem.layout.channels
    batch, positions = (shape[0], shape[2] * shape[3]) if channels == 1 else (1, math.prod(shape[:-1]))
    sizes = (batch, positions, shape[channels], problem.shape[channels])
    return (*sizes, spacing["x"], spacing["residual"], spacing["y"])


_POINTWISE_CPU = Kernel(
    "pointwise_conv2d",
    lambda options, x, weight, bias, scale, residual, input_scale=None: (
        *(x, packing.panels(weight, scale), packing.vector(bias), residual, input_scale),
    ),
    _product_sizes,
    layouts={**IMAGES, "input_scale": DENSE},
    dtypes=(torch.float32,),
)

_LARGEST_TILE = (256, 128)
_LEAST_SPLIT_BYTES = 512
_MOST_SPLITS = 16


def split_workspace(rows: int, c_out: int, depth_bytes: int, device: CudaDevice) -> int:
    """Partial sums of as many parts of K as multiprocessors could share, where the largest tiles leave some idle."""
    tiles = -(-rows // _LARGEST_TILE[0]) * -(-c_out // _LARGEST_TILE[1])
    splits = min(device.multiprocessors // tiles, depth_bytes // _LEAST_SPLIT_BYTES, _MOST_SPLITS)
    return splits * rows * -(-c_out // 4) * 16 if splits > 1 else 0


def _product_workspace(problem: Problem, device: CudaDevice) -> int:
    x, channels = problem["x"], problem.layout.channels
    c_out = problem.shape[channels]
    return split_workspace(math.prod(problem.shape) // c_out, c_out, x.shape[channels] * x.dtype.itemsize, device)


_POINTWISE_CUDA = Kernel(
    "pointwise_conv2d",
    lambda options, x, weight, bias, scale, residual, input_scale=None: (
        *(x, packing.contiguous(weight), float_vector(bias), float_vector(scale), residual, input_scale),
    ),
    lambda problem, spacing: (*_product_sizes(problem, spacing), _product_workspace(problem, device_of(problem))),
    layouts=_POINTWISE_CPU.layouts,
    supports=tf32_reason,
    workspace=_product_workspace,
)


@op(
    out=PIXELS,
    shape=_pointwise_shape,
    reference=reference.pointwise_conv2d,
    macs=lambda options, shape, x, weight, *_: math.prod(shape) * weight[1],
    implementations=(
        cuda_implementation(_POINTWISE_CUDA),
        triton_implementation("dense", _POINTWISE_CUDA),
        cpu_implementation(_POINTWISE_CPU),
        ONEDNN,
    ),
)
def pointwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    input_scale: Tensor | None = None,
    *,
    activation: str = "identity",
    backend: str = "auto",
) -> Tensor:
    """1×1 convolution with its epilogue: `activation((weight · (x · input_scale)) · scale + bias + residual)`.

    Args:
        x: `[N, C_in, H, W]`; channels_last, or a channel slice of it, is read without a copy.
        weight: `[C_out, C_in, 1, 1]`.
        bias, scale: `[C_out]`.
        residual: `[N, C_out, H, W]`.
        input_scale: `[N, C_in]`, as squeeze-and-excitation makes it.

    Returns: `[N, C_out, H, W]`, channels_last. Options and errors as of `conv2d`.
    """


def _linear_shape(options: Any, x: TensorSpec, weight: TensorSpec, *epilogue: TensorSpec | None) -> tuple[int, ...]:
    if not x.shape or x.shape[-1] == 0:
        raise ValueError(f"x: expected [..., C_in] with at least one channel, got {describe(x.shape)}")
    channels = x.shape[-1]
    check_weight("weight", weight, "[C_out, C_in]", (None, channels), f"C_in = {channels} channels of x")
    return check_epilogue(options, (*x.shape[:-1], weight.shape[0]), weight.shape[0], *epilogue)


@op(
    out=ROWS,
    shape=_linear_shape,
    reference=reference.linear,
    macs=lambda options, shape, x, weight, *_: math.prod(shape) * weight[1],
    implementations=(
        cuda_implementation(replace(_POINTWISE_CUDA, layouts=ROWS_OF_CHANNELS)),
        triton_implementation(
            "dense",
            _POINTWISE_CUDA,
            name="linear",
            layouts=ROWS_OF_CHANNELS,
            operands=lambda options, *tensors: _POINTWISE_CUDA.operands(options, *tensors)[:-1],
        ),
        cpu_implementation(replace(_POINTWISE_CPU, layouts=ROWS_OF_CHANNELS)),
    ),
)
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str = "identity",
    backend: str = "auto",
) -> Tensor:
    """Linear layer with its epilogue: `activation((x · weightᵀ) · scale + bias + residual)`.

    Args:
        x: `[..., C_in]`.
        weight: `[C_out, C_in]`.
        bias, scale: `[C_out]`.
        residual: `[..., C_out]`.

    Returns: `[..., C_out]`, contiguous. Options and errors as of `conv2d`.
    """
