"""Dense convolutions and the linear layer: `conv2d`, `pointwise_conv2d`, `linear`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from kernelpress.kernels import reference
from kernelpress.ops.backends.cpu import cpu_implementation
from kernelpress.ops.backends.cuda import (
    CudaDevice,
    CudaKernel,
    cuda_implementation,
    device_of,
    float_vector,
    tf32_reason,
)
from kernelpress.ops.backends.cudnn import cudnn_implementation
from kernelpress.ops.backends.onednn import onednn_implementation
from kernelpress.ops.backends.reference import reference_implementation
from kernelpress.ops.backends.triton import TritonKernel, triton_implementation
from kernelpress.ops.calls import packing
from kernelpress.ops.calls.dispatch import call, publish
from kernelpress.ops.checks import (
    TensorSpec,
    check_activation,
    check_input,
    check_same_shape,
    check_vector,
    check_weight,
    conv_output_size,
    describe,
)
from kernelpress.ops.layout import DENSE, PIXELS, ROWS
from kernelpress.ops.registry import NativeKernel, Operator, Problem, Tensors
from kernelpress.ops.signature import IntOrPair

__all__ = ["conv2d", "linear", "pointwise_conv2d"]

Specs = tuple[TensorSpec | None, ...]


class ConvOptions(NamedTuple):
    """Keyword arguments of `conv2d`."""

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    activation: str = "identity"


class EpilogueOptions(NamedTuple):
    """Keyword arguments of `pointwise_conv2d` and `linear`."""

    activation: str = "identity"


def _conv2d_shape(tensors: Specs, options: ConvOptions) -> tuple[int, ...]:
    x, weight, bias, scale, residual = tensors
    assert x is not None
    assert weight is not None
    check_input(x)
    check_activation("activation", options.activation)
    channels, groups = x.shape[1], options.groups
    if groups < 1 or channels % groups != 0:
        raise ValueError(f"groups: expected a divisor of the {channels} channels of x, got {groups}")
    because = f"{channels} channels of x in {groups} groups"
    check_weight("weight", weight, "[C_out, C_in / groups, KH, KW]", (None, channels // groups, None, None), because)
    c_out = weight.shape[0]
    if c_out % groups != 0:
        raise ValueError(f"weight: expected C_out divisible by groups = {groups}, got {describe(weight.shape)}")
    check_vector("bias", bias, c_out)
    check_vector("scale", scale, c_out)
    size = conv_output_size(x, weight.shape[2:], options.stride, options.padding, options.dilation)
    shape = (x.shape[0], c_out, *size)
    check_same_shape("residual", residual, shape)
    return shape


def _conv2d_reason(problem: Problem) -> str | None:
    groups = problem.options.groups
    if groups == 1:
        return None
    x = problem.tensors[0]
    assert x is not None
    if groups == x.shape[1]:
        return f"the native conv2d has groups = 1, got {groups}; with one group per channel, call depthwise_conv2d"
    return f"the native conv2d has groups = 1, got {groups}"


def _dense_operands(tensors: Tensors, options: Any) -> tuple[Tensor | None, ...]:
    x, weight, bias, scale, residual = tensors[:5]
    assert weight is not None
    return (x, packing.panels(weight, scale), packing.vector(bias), residual, *tensors[5:])


def _conv2d_sizes(problem: Problem, spacings: tuple[int, ...], y_spacing: int) -> tuple[int, ...]:
    x, weight, *_ = problem.tensors
    assert x is not None
    assert weight is not None
    options = problem.options
    batch, c_in, in_h, in_w = x.shape
    _, c_out, out_h, out_w = problem.shape
    return (
        *(batch, in_h, in_w, c_in, out_h, out_w, c_out),
        *x.stride,
        *(spacings[4], y_spacing),
        *weight.shape[2:],
        *options.stride,
        *options.padding,
        *options.dilation,
        reference.ACTIVATIONS.index(options.activation),
    )


_CONV2D_KERNEL = NativeKernel(
    name="conv2d",
    layouts=(None, None, None, None, PIXELS),
    supports=_conv2d_reason,
    operands=_dense_operands,
    sizes=_conv2d_sizes,
)

_CONV2D = publish(
    Operator(
        name="conv2d",
        schema=(
            "(Tensor x, Tensor weight, Tensor? bias=None, Tensor? scale=None, Tensor? residual=None, *, "
            "SymInt[2] stride=[1,1], SymInt[2] padding=[0,0], SymInt[2] dilation=[1,1], SymInt groups=1, "
            'str activation="identity", str backend="auto") -> Tensor'
        ),
        tensors=("x", "weight", "bias", "scale", "residual"),
        options=ConvOptions,
        out=PIXELS,
        shape=_conv2d_shape,
        reference=reference.conv2d,
        macs=lambda shapes, options, shape: math.prod(shape) * math.prod(shapes[1][1:]),
        implementations=(
            cudnn_implementation("conv2d"),
            cpu_implementation("conv2d", _CONV2D_KERNEL),
            onednn_implementation("conv2d"),
            reference_implementation("conv2d", reference.conv2d),
        ),
        native=_CONV2D_KERNEL,
    )
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
        backend: `"auto"`, `"cuda"`, `"cudnn"`, `"cpu"`, `"onednn"` or `"reference"`.

    Returns: `[N, C_out, H_out, W_out]`, channels_last.
    Raises: `ValueError` or `TypeError` naming a bad argument; `RuntimeError` where the backend asked for cannot run.
    """
    options = (stride, padding, dilation, groups, activation)
    return call(_CONV2D, (x, weight, bias, scale, residual), options, backend)


def _pointwise_shape(tensors: Specs, options: EpilogueOptions) -> tuple[int, ...]:
    x, weight, bias, scale, residual, input_scale = tensors
    assert x is not None
    assert weight is not None
    check_input(x)
    check_activation("activation", options.activation)
    batch, channels, height, width = x.shape
    check_weight("weight", weight, "[C_out, C_in, 1, 1]", (None, channels, 1, 1), f"C_in = {channels} channels of x")
    c_out = weight.shape[0]
    check_vector("bias", bias, c_out)
    check_vector("scale", scale, c_out)
    if input_scale is not None and (
        len(input_scale.shape) != 2 or input_scale.shape[0] != batch or input_scale.shape[1] != channels
    ):
        raise ValueError(f"input_scale: expected [{batch}, {channels}], got {describe(input_scale.shape)}")
    shape = (batch, c_out, height, width)
    check_same_shape("residual", residual, shape)
    return shape


def _pointwise_sizes(problem: Problem, spacings: tuple[int, ...], y_spacing: int) -> tuple[int, ...]:
    x = problem.tensors[0]
    assert x is not None
    batch, c_in, height, width = x.shape
    activation = reference.ACTIVATIONS.index(problem.options.activation)
    return (batch, height * width, c_in, problem.shape[1], spacings[0], spacings[4], y_spacing, activation)


_POINTWISE_KERNEL = NativeKernel(
    name="pointwise_conv2d",
    layouts=(PIXELS, None, None, None, PIXELS, DENSE),
    supports=lambda problem: None,
    operands=_dense_operands,
    sizes=_pointwise_sizes,
)


def _gemm_operands(tensors: Tensors, options: Any) -> tuple[Tensor | None, ...]:
    x, weight, bias, scale, residual = tensors[:5]
    assert weight is not None
    input_scale = tensors[5] if len(tensors) > 5 else None
    return (x, packing.contiguous(weight), float_vector(bias), float_vector(scale), residual, input_scale)


def _gemm_sizes(problem: Problem, spacings: tuple[int, ...], y_spacing: int) -> tuple[int, ...]:
    x = problem.tensors[0]
    assert x is not None
    if problem.layout is PIXELS:
        batch, c_in, height, width = x.shape
        positions, c_out = height * width, problem.shape[1]
    else:
        batch, positions, c_in, c_out = 1, math.prod(x.shape[:-1]), x.shape[-1], problem.shape[-1]
    workspace = _gemm_workspace(problem, device_of(problem))
    return (batch, positions, c_in, c_out, spacings[0], spacings[4], y_spacing, workspace)


def _gemm_workspace(problem: Problem, device: CudaDevice) -> int:
    """Partial sums of as many parts of K as multiprocessors could share, where the largest tiles leave some idle."""
    x = problem.tensors[0]
    assert x is not None
    channels = problem.layout.channels
    c_in, c_out = x.shape[channels], problem.shape[channels]
    rows = math.prod(problem.shape) // c_out
    tiles = -(-rows // _LARGEST_TILE[0]) * -(-c_out // _LARGEST_TILE[1])
    splits = min(device.multiprocessors // tiles, c_in * x.dtype.itemsize // _LEAST_SPLIT_BYTES, _MOST_SPLITS)
    return splits * rows * -(-c_out // 4) * 16 if splits > 1 else 0


_LARGEST_TILE = (256, 128)
_LEAST_SPLIT_BYTES = 512
_MOST_SPLITS = 16

_POINTWISE_CUDA = CudaKernel(
    name="pointwise_conv2d",
    layouts=(PIXELS, None, None, None, PIXELS, DENSE),
    supports=tf32_reason,
    operands=_gemm_operands,
    sizes=_gemm_sizes,
    workspace=_gemm_workspace,
    has_workspace=True,
)

_POINTWISE_TRITON = TritonKernel(
    family="dense", name="pointwise_conv2d", layouts=_POINTWISE_CUDA.layouts, operands=_gemm_operands
)

_POINTWISE = publish(
    Operator(
        name="pointwise_conv2d",
        schema=(
            "(Tensor x, Tensor weight, Tensor? bias=None, Tensor? scale=None, Tensor? residual=None, "
            'Tensor? input_scale=None, *, str activation="identity", str backend="auto") -> Tensor'
        ),
        tensors=("x", "weight", "bias", "scale", "residual", "input_scale"),
        options=EpilogueOptions,
        out=PIXELS,
        shape=_pointwise_shape,
        reference=reference.pointwise_conv2d,
        macs=lambda shapes, options, shape: math.prod(shape) * shapes[1][1],
        implementations=(
            cuda_implementation("pointwise_conv2d", _POINTWISE_CUDA),
            triton_implementation("pointwise_conv2d", _POINTWISE_TRITON),
            cpu_implementation("pointwise_conv2d", _POINTWISE_KERNEL),
            onednn_implementation("pointwise_conv2d"),
            reference_implementation("pointwise_conv2d", reference.pointwise_conv2d),
        ),
        native=_POINTWISE_KERNEL,
    )
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
    return call(_POINTWISE, (x, weight, bias, scale, residual, input_scale), (activation,), backend)


def _linear_shape(tensors: Specs, options: EpilogueOptions) -> tuple[int, ...]:
    x, weight, bias, scale, residual = tensors
    assert x is not None
    assert weight is not None
    check_activation("activation", options.activation)
    if not x.shape or x.shape[-1] == 0:
        raise ValueError(f"x: expected [..., C_in] with at least one channel, got {describe(x.shape)}")
    channels = x.shape[-1]
    check_weight("weight", weight, "[C_out, C_in]", (None, channels), f"C_in = {channels} channels of x")
    check_vector("bias", bias, weight.shape[0])
    check_vector("scale", scale, weight.shape[0])
    shape = (*x.shape[:-1], weight.shape[0])
    check_same_shape("residual", residual, shape)
    return shape


def _linear_sizes(problem: Problem, spacings: tuple[int, ...], y_spacing: int) -> tuple[int, ...]:
    x = problem.tensors[0]
    assert x is not None
    activation = reference.ACTIVATIONS.index(problem.options.activation)
    rows = math.prod(x.shape[:-1])
    return (1, rows, x.shape[-1], problem.shape[-1], spacings[0], spacings[4], y_spacing, activation)


def _linear_operands(tensors: Tensors, options: Any) -> tuple[Tensor | None, ...]:
    return (*_dense_operands(tensors, options), None)


_LINEAR_KERNEL = NativeKernel(
    name="pointwise_conv2d",
    layouts=(ROWS, None, None, None, ROWS),
    supports=lambda problem: None,
    operands=_linear_operands,
    sizes=_linear_sizes,
)


def _linear_macs(shapes: Sequence[Any], options: Any, shape: Sequence[int]) -> int:
    return math.prod(shape) * int(shapes[1][1])


_LINEAR_CUDA = dataclasses.replace(_POINTWISE_CUDA, layouts=(ROWS, None, None, None, ROWS))

_LINEAR_TRITON = TritonKernel(
    family="dense",
    name="linear",
    layouts=_LINEAR_CUDA.layouts,
    operands=lambda t, options: _gemm_operands(t, options)[:5],
)

_LINEAR = publish(
    Operator(
        name="linear",
        schema=(
            "(Tensor x, Tensor weight, Tensor? bias=None, Tensor? scale=None, Tensor? residual=None, *, "
            'str activation="identity", str backend="auto") -> Tensor'
        ),
        tensors=("x", "weight", "bias", "scale", "residual"),
        options=EpilogueOptions,
        out=ROWS,
        shape=_linear_shape,
        reference=reference.linear,
        macs=_linear_macs,
        implementations=(
            cuda_implementation("linear", _LINEAR_CUDA),
            triton_implementation("linear", _LINEAR_TRITON),
            cpu_implementation("linear", _LINEAR_KERNEL),
            reference_implementation("linear", reference.linear),
        ),
        native=_LINEAR_KERNEL,
    )
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
    return call(_LINEAR, (x, weight, bias, scale, residual), (activation,), backend)
