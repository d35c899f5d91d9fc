"""Depthwise-separable blocks in one call: `separable_conv2d`, `inverted_residual`, `separable_stem`.

The depthwise result stays in cache; it never reaches main memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kernelpress.kernels import reference
from kernelpress.ops.backends.cpu import cpu_implementation
from kernelpress.ops.backends.cuda import CudaDevice, cuda_implementation
from kernelpress.ops.backends.kernel import Kernel, activation_index, float_vector, tf32_reason, window
from kernelpress.ops.backends.triton import triton_implementation
from kernelpress.ops.calls import packing
from kernelpress.ops.calls.dispatch import op
from kernelpress.ops.checks import (
    TensorSpec,
    check_activation,
    check_input,
    check_same_shape,
    check_vector,
    check_weight,
    conv_output_size,
)
from kernelpress.ops.layout import PIXELS
from kernelpress.ops.registry import Problem
from kernelpress.ops.signature import IntOrPair

__all__ = ["inverted_residual", "separable_conv2d", "separable_stem"]


def _check_activations(options: Any) -> None:
    for name in options._fields:
        if name.endswith("activation"):
            check_activation(name, getattr(options, name))


def _check_depthwise(weight: TensorSpec, bias: TensorSpec | None, channels: int, of: str) -> None:
    because = f"C = {channels} channels of {of}"
    check_weight("depthwise_weight", weight, "[C, 1, KH, KW]", (channels, 1, None, None), because)
    check_vector("depthwise_bias", bias, channels)


def _separable_shape(options: Any, *tensors: Any) -> tuple[int, ...]:
    x, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias, residual = tensors
    check_input(x)
    _check_activations(options)
    channels = x.shape[1]
    _check_depthwise(depthwise_weight, depthwise_bias, channels, "x")
    because = f"C = {channels} depthwise channels"
    check_weight("pointwise_weight", pointwise_weight, "[C_out, C, 1, 1]", (None, channels, 1, 1), because)
    c_out = pointwise_weight.shape[0]
    check_vector("pointwise_bias", pointwise_bias, c_out)
    size = conv_output_size(x, depthwise_weight.shape[2:], options.stride, options.padding, options.dilation)
    shape = (x.shape[0], c_out, *size)
    check_same_shape("residual", residual, shape)
    return shape


def _activations(options: Any, *names: str) -> tuple[int, ...]:
    return tuple(activation_index(getattr(options, name)) for name in names)


def _separable_sizes(problem: Problem, spacing: Mapping[str, int]) -> tuple[int, ...]:
    batch, channels, in_h, in_w = problem["x"].shape
    _, c_out, out_h, out_w = problem.shape
    return (
        *(batch, in_h, in_w, channels, out_h, out_w, c_out),
        *(spacing["x"], spacing["residual"], spacing["y"]),
        *window(problem["depthwise_weight"].shape[2:], problem.options),
        *_activations(problem.options, "depthwise_activation"),
    )


def _in_vectors(*elements: int, size: int) -> int:
    """Bytes of so many elements, in whole vectors of 16 bytes."""
    return -(-math.prod(elements) * size // 16) * 16


def _separable_workspace(problem: Problem, device: CudaDevice) -> int:
    """The depthwise result, for where the kernels run one after the other."""
    x = problem["x"]
    return _in_vectors(problem.shape[0], x.shape[1], *problem.shape[2:], size=x.dtype.itemsize)


def _separable_macs(options: Any, shape: Sequence[int], x: Any, depthwise_weight: Any, *_: Any) -> int:
    batch, c_out, out_h, out_w = shape
    return int(batch * out_h * out_w * depthwise_weight[0] * (math.prod(depthwise_weight[2:]) + c_out))


_SEPARABLE_CPU = Kernel(
    "separable_conv2d",
    lambda options, x, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias, residual: (
        x,
        *(packing.depthwise(depthwise_weight, None), packing.vector(depthwise_bias)),
        *(packing.panels(pointwise_weight, None), packing.vector(pointwise_bias)),
        residual,
    ),
    _separable_sizes,
    dtypes=(torch.float32,),
)

_SEPARABLE_CUDA = Kernel(
    "separable_conv2d",
    lambda options, x, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias, residual: (
        x,
        *(packing.depthwise(depthwise_weight, None), float_vector(depthwise_bias)),
        *(packing.contiguous(pointwise_weight), float_vector(pointwise_bias)),
        residual,
    ),
    _separable_sizes,
    supports=tf32_reason,
    workspace=_separable_workspace,
)


@op(
    out=PIXELS,
    shape=_separable_shape,
    reference=reference.separable_conv2d,
    macs=_separable_macs,
    implementations=(
        cuda_implementation(_SEPARABLE_CUDA),
        triton_implementation("separable", _SEPARABLE_CUDA),
        cpu_implementation(_SEPARABLE_CPU),
    ),
)
def separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    depthwise_activation: str = "identity",
    activation: str = "identity",
    backend: str = "auto",
) -> Tensor:
    """Depthwise convolution, its activation, then a 1×1 convolution with the epilogue (MobileNet, arXiv:1704.04861).

    Args:
        x: `[N, C, H, W]`; channels_last, or a channel slice of it, is read without a copy.
        depthwise_weight: `[C, 1, KH, KW]`; `depthwise_bias: [C]`.
        pointwise_weight: `[C_out, C, 1, 1]`; `pointwise_bias: [C_out]`.
        residual: of the output's shape.
        stride, padding, dilation: of the depthwise convolution.

    Returns: `[N, C_out, H_out, W_out]`, channels_last. Other options and errors as of `conv2d`.
    """


def _inverted_shape(options: Any, *tensors: Any) -> tuple[int, ...]:
    x, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias, residual = tensors
    check_input(x)
    _check_activations(options)
    channels = x.shape[1]
    because = f"C_in = {channels} channels of x"
    check_weight("expand_weight", expand_weight, "[C_hidden, C_in, 1, 1]", (None, channels, 1, 1), because)
    hidden = expand_weight.shape[0]
    check_vector("expand_bias", expand_bias, hidden)
    _check_depthwise(depthwise_weight, depthwise_bias, hidden, "expand_weight")
    because = f"C_hidden = {hidden} channels of expand_weight"
    check_weight("project_weight", project_weight, "[C_out, C_hidden, 1, 1]", (None, hidden, 1, 1), because)
    c_out = project_weight.shape[0]
    check_vector("project_bias", project_bias, c_out)
    size = conv_output_size(x, depthwise_weight.shape[2:], options.stride, options.padding, options.dilation)
    shape = (x.shape[0], c_out, *size)
    check_same_shape("residual", residual, shape)
    return shape


def _inverted_sizes(problem: Problem, spacing: Mapping[str, int]) -> tuple[int, ...]:
    batch, c_in, in_h, in_w = problem["x"].shape
    _, c_out, out_h, out_w = problem.shape
    return (
        *(batch, in_h, in_w, c_in, problem["expand_weight"].shape[0], out_h, out_w, c_out),
        *(spacing["x"], spacing["residual"], spacing["y"]),
        *window(problem["depthwise_weight"].shape[2:], problem.options),
        *_activations(problem.options, "expand_activation", "depthwise_activation"),
    )


def _inverted_workspace(problem: Problem, device: CudaDevice) -> int:
    """The expanded map and the depthwise result, for where the kernels run one after the other."""
    x = problem["x"]
    batch, hidden, size = x.shape[0], problem["expand_weight"].shape[0], x.dtype.itemsize
    return sum(_in_vectors(batch, hidden, *pixels, size=size) for pixels in (x.shape[2:], problem.shape[2:]))


def _inverted_macs(
    options: Any, shape: Sequence[int], x: Any, expand_weight: Any, _: Any, depthwise_weight: Any, *others: Any
) -> int:
    expand = x[0] * x[2] * x[3] * math.prod(expand_weight)
    return int(expand + _separable_macs(options, shape, x, depthwise_weight))


_INVERTED_CPU = Kernel(
    "inverted_residual",
    lambda options, x, weight, bias, *separable: (
        *(x, packing.panels(weight, None), packing.vector(bias)),
        *_SEPARABLE_CPU.operands(options, None, *separable)[1:],
    ),
    _inverted_sizes,
    dtypes=(torch.float32,),
)

_INVERTED_CUDA = Kernel(
    "inverted_residual",
    lambda options, x, weight, bias, *separable: (
        *(x, packing.contiguous(weight), float_vector(bias)),
        *_SEPARABLE_CUDA.operands(options, None, *separable)[1:],
    ),
    _inverted_sizes,
    supports=tf32_reason,
    workspace=_inverted_workspace,
)


@op(
    out=PIXELS,
    shape=_inverted_shape,
    reference=reference.inverted_residual,
    macs=_inverted_macs,
    implementations=(
        cuda_implementation(_INVERTED_CUDA),
        triton_implementation("separable", _INVERTED_CUDA),
        cpu_implementation(_INVERTED_CPU),
    ),
)
def inverted_residual(
    x: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    expand_activation: str = "identity",
    depthwise_activation: str = "identity",
    activation: str = "identity",
    backend: str = "auto",
) -> Tensor:
    """Expand 1×1, depthwise, project 1×1 with the epilogue (MobileNet V2, arXiv:1801.04381).

    Args:
        x: `[N, C_in, H, W]`; channels_last, or a channel slice of it, is read without a copy.
        expand_weight: `[C_hidden, C_in, 1, 1]`; `expand_bias: [C_hidden]`.
        depthwise_weight: `[C_hidden, 1, KH, KW]`; `depthwise_bias: [C_hidden]`.
        project_weight: `[C_out, C_hidden, 1, 1]`; `project_bias: [C_out]`.
        residual: of the output's shape; the block's own input where it has a skip connection.
        stride, padding, dilation: of the depthwise convolution. Its padding stands for zeros after the expansion.

    Returns: `[N, C_out, H_out, W_out]`, channels_last. Other options and errors as of `conv2d`.
    """


def _hidden_size(x: Any, stem_weight: Any, options: Any) -> tuple[int, int]:
    size = zip(x[2:], stem_weight[2:], options.stem_stride, options.stem_padding, strict=True)
    height, width = ((n + 2 * padding - kernel) // stride + 1 for n, kernel, stride, padding in size)
    return height, width


def _stem_shape(options: Any, *tensors: Any) -> tuple[int, ...]:
    x, stem_weight, stem_bias, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias = tensors
    check_input(x)
    _check_activations(options)
    channels = x.shape[1]
    because = f"C_in = {channels} channels of x"
    check_weight("stem_weight", stem_weight, "[C, C_in, KH, KW]", (None, channels, None, None), because)
    hidden = stem_weight.shape[0]
    check_vector("stem_bias", stem_bias, hidden)
    _check_depthwise(depthwise_weight, depthwise_bias, hidden, "stem_weight")
    because = f"C = {hidden} channels of stem_weight"
    check_weight("pointwise_weight", pointwise_weight, "[C_out, C, 1, 1]", (None, hidden, 1, 1), because)
    c_out = pointwise_weight.shape[0]
    check_vector("pointwise_bias", pointwise_bias, c_out)
    size = conv_output_size(x, stem_weight.shape[2:], options.stem_stride, options.stem_padding, (1, 1))
    between = TensorSpec((x.shape[0], hidden, *size), x.stride, x.dtype)
    size = conv_output_size(between, depthwise_weight.shape[2:], options.stride, options.padding, (1, 1))
    return (x.shape[0], c_out, *size)


def _stem_sizes(problem: Problem, spacing: Mapping[str, int]) -> tuple[int, ...]:
    x, stem_weight, options = problem["x"], problem["stem_weight"], problem.options
    batch, c_in, in_h, in_w = x.shape
    _, c_out, out_h, out_w = problem.shape
    return (
        *(batch, in_h, in_w, c_in),
        *_hidden_size(x.shape, stem_weight.shape, options),
        *(stem_weight.shape[0], out_h, out_w, c_out),
        *(*x.stride, spacing["y"]),
        *(*stem_weight.shape[2:], *options.stem_stride, *options.stem_padding, 1, 1),
        *window(problem["depthwise_weight"].shape[2:], options),
        *_activations(options, "stem_activation", "depthwise_activation"),
    )


def _stem_macs(
    options: Any, shape: Sequence[int], x: Any, stem_weight: Any, _: Any, depthwise_weight: Any, *others: Any
) -> int:
    stem = x[0] * math.prod(_hidden_size(x, stem_weight, options)) * math.prod(stem_weight)
    return int(stem + _separable_macs(options, shape, x, depthwise_weight))


_STEM_CPU = Kernel(
    "separable_stem",
    lambda options, x, weight, bias, *separable: (
        *(x, packing.panels(weight, None), packing.vector(bias)),
        *_SEPARABLE_CPU.operands(options, None, *separable, None)[1:-1],
    ),
    _stem_sizes,
    layouts={},
    dtypes=(torch.float32,),
)


@op(
    out=PIXELS,
    shape=_stem_shape,
    reference=reference.separable_stem,
    macs=_stem_macs,
    implementations=(cpu_implementation(_STEM_CPU),),
)
def separable_stem(
    x: Tensor,
    stem_weight: Tensor,
    stem_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None = None,
    *,
    stem_stride: IntOrPair = 1,
    stem_padding: IntOrPair = 0,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    stem_activation: str = "identity",
    depthwise_activation: str = "identity",
    activation: str = "identity",
    backend: str = "auto",
) -> Tensor:
    """Dense convolution, depthwise convolution, 1×1 convolution, each with bias and activation (MobileNet,
    arXiv:1704.04861, the first three layers of its Table 1).

    Args:
        x: `[N, C_in, H, W]`, any memory format.
        stem_weight: `[C, C_in, KH, KW]`; `stem_bias: [C]`; `stem_stride` and `stem_padding` are its own.
        depthwise_weight: `[C, 1, KH, KW]`; `depthwise_bias: [C]`.
        pointwise_weight: `[C_out, C, 1, 1]`; `pointwise_bias: [C_out]`.
        stride, padding: of the depthwise convolution.

    Returns: `[N, C_out, H_out, W_out]`, channels_last. Other options and errors as of `conv2d`.
    """
