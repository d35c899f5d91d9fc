"""Depthwise-separable blocks in one call: `separable_conv2d` and `inverted_residual`.

The depthwise result stays in cache; it never reaches main memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from kernelpress.kernels import reference
from kernelpress.ops.backends.cpu import cpu_implementation
from kernelpress.ops.backends.cuda import CudaDevice, CudaKernel, cuda_implementation, float_vector, tf32_reason
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
)
from kernelpress.ops.layout import PIXELS
from kernelpress.ops.registry import NativeKernel, Operator, Problem, Tensors
from kernelpress.ops.signature import IntOrPair

__all__ = ["inverted_residual", "separable_conv2d"]

Specs = tuple[TensorSpec | None, ...]


class SeparableOptions(NamedTuple):
    """Keyword arguments of `separable_conv2d`."""

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    depthwise_activation: str = "identity"
    activation: str = "identity"


class InvertedResidualOptions(NamedTuple):
    """Keyword arguments of `inverted_residual`."""

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    expand_activation: str = "identity"
    depthwise_activation: str = "identity"
    activation: str = "identity"


def _check_depthwise(weight: TensorSpec, channels: int, of: str) -> None:
    form, because = "[C, 1, KH, KW]", f"C = {channels} channels of {of}"
    check_weight("depthwise_weight", weight, form, (channels, 1, None, None), because)


def _separable_shape(tensors: Specs, options: SeparableOptions) -> tuple[int, ...]:
    x, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias, residual = tensors
    assert x is not None
    assert depthwise_weight is not None
    assert pointwise_weight is not None
    check_input(x)
    check_activation("depthwise_activation", options.depthwise_activation)
    check_activation("activation", options.activation)
    channels = x.shape[1]
    _check_depthwise(depthwise_weight, channels, "x")
    check_vector("depthwise_bias", depthwise_bias, channels)
    because = f"C = {channels} depthwise channels"
    check_weight("pointwise_weight", pointwise_weight, "[C_out, C, 1, 1]", (None, channels, 1, 1), because)
    c_out = pointwise_weight.shape[0]
    check_vector("pointwise_bias", pointwise_bias, c_out)
    size = conv_output_size(x, depthwise_weight.shape[2:], options.stride, options.padding, options.dilation)
    shape = (x.shape[0], c_out, *size)
    check_same_shape("residual", residual, shape)
    return shape


def _separable_operands(tensors: Tensors, options: Any) -> tuple[Tensor | None, ...]:
    x, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias, residual = tensors
    assert depthwise_weight is not None
    assert pointwise_weight is not None
    return (
        x,
        packing.depthwise(depthwise_weight, None),
        packing.vector(depthwise_bias),
        packing.panels(pointwise_weight, None),
        packing.vector(pointwise_bias),
        residual,
    )


def _separable_cuda_operands(tensors: Tensors, options: Any) -> tuple[Tensor | None, ...]:
    x, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias, residual = tensors
    assert depthwise_weight is not None
    assert pointwise_weight is not None
    return (
        x,
        packing.depthwise(depthwise_weight, None),
        float_vector(depthwise_bias),
        packing.contiguous(pointwise_weight),
        float_vector(pointwise_bias),
        residual,
    )


def _in_vectors(*elements: int, size: int) -> int:
    """Bytes of so many elements, in whole vectors of 16 bytes."""
    return -(-math.prod(elements) * size // 16) * 16


def _separable_workspace(problem: Problem, device: CudaDevice) -> int:
    """The depthwise result, for where the kernels run one after the other."""
    x, *_ = problem.tensors
    assert x is not None
    return _in_vectors(problem.shape[0], x.shape[1], *problem.shape[2:], size=x.dtype.itemsize)


def _separable_geometry(problem: Problem, spacings: tuple[int, ...], y_spacing: int) -> tuple[int, ...]:
    x, depthwise_weight, *_ = problem.tensors
    assert x is not None
    assert depthwise_weight is not None
    options = problem.options
    batch, channels, in_h, in_w = x.shape
    _, c_out, out_h, out_w = problem.shape
    return (
        *(batch, in_h, in_w, channels, out_h, out_w, c_out),
        *(spacings[0], spacings[5], y_spacing),
        *depthwise_weight.shape[2:],
        *options.stride,
        *options.padding,
        *options.dilation,
        reference.ACTIVATIONS.index(options.depthwise_activation),
    )


def _separable_sizes(problem: Problem, spacings: tuple[int, ...], y_spacing: int) -> tuple[int, ...]:
    activation = reference.ACTIVATIONS.index(problem.options.activation)
    return (*_separable_geometry(problem, spacings, y_spacing), activation)


def _separable_macs(shapes: Sequence[Any], options: Any, shape: Sequence[int]) -> int:
    batch, c_out, out_h, out_w = shape
    channels = shapes[1][0]
    return int(batch * out_h * out_w * channels * (math.prod(shapes[1][2:]) + c_out))


_SEPARABLE_KERNEL = NativeKernel(
    name="separable_conv2d",
    layouts=(PIXELS, None, None, None, None, PIXELS),
    supports=lambda problem: None,
    operands=_separable_operands,
    sizes=_separable_sizes,
)

_SEPARABLE_CUDA = CudaKernel(
    name="separable_conv2d",
    layouts=(PIXELS, None, None, None, None, PIXELS),
    supports=tf32_reason,
    operands=_separable_cuda_operands,
    sizes=_separable_geometry,
    workspace=_separable_workspace,
    has_workspace=True,
)

_SEPARABLE_TRITON = TritonKernel(
    family="separable",
    name="separable_conv2d",
    layouts=_SEPARABLE_CUDA.layouts,
    operands=_separable_cuda_operands,
)

_SEPARABLE = publish(
    Operator(
        name="separable_conv2d",
        schema=(
            "(Tensor x, Tensor depthwise_weight, Tensor? depthwise_bias, Tensor pointwise_weight, "
            "Tensor? pointwise_bias=None, Tensor? residual=None, *, "
            "SymInt[2] stride=[1,1], SymInt[2] padding=[0,0], SymInt[2] dilation=[1,1], "
            'str depthwise_activation="identity", str activation="identity", str backend="auto") -> Tensor'
        ),
        tensors=("x", "depthwise_weight", "depthwise_bias", "pointwise_weight", "pointwise_bias", "residual"),
        options=SeparableOptions,
        out=PIXELS,
        shape=_separable_shape,
        reference=reference.separable_conv2d,
        macs=_separable_macs,
        implementations=(
            cuda_implementation("separable_conv2d", _SEPARABLE_CUDA),
            triton_implementation("separable_conv2d", _SEPARABLE_TRITON),
            cpu_implementation("separable_conv2d", _SEPARABLE_KERNEL),
            reference_implementation("separable_conv2d", reference.separable_conv2d),
        ),
        native=_SEPARABLE_KERNEL,
    )
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
    options = (stride, padding, dilation, depthwise_activation, activation)
    tensors = (x, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias, residual)
    return call(_SEPARABLE, tensors, options, backend)


def _inverted_shape(tensors: Specs, options: InvertedResidualOptions) -> tuple[int, ...]:
    x, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias, residual = tensors
    assert x is not None
    assert expand_weight is not None
    assert depthwise_weight is not None
    assert project_weight is not None
    check_input(x)
    check_activation("expand_activation", options.expand_activation)
    check_activation("depthwise_activation", options.depthwise_activation)
    check_activation("activation", options.activation)
    channels = x.shape[1]
    because = f"C_in = {channels} channels of x"
    check_weight("expand_weight", expand_weight, "[C_hidden, C_in, 1, 1]", (None, channels, 1, 1), because)
    hidden = expand_weight.shape[0]
    check_vector("expand_bias", expand_bias, hidden)
    _check_depthwise(depthwise_weight, hidden, "expand_weight")
    check_vector("depthwise_bias", depthwise_bias, hidden)
    because = f"C_hidden = {hidden} channels of expand_weight"
    check_weight("project_weight", project_weight, "[C_out, C_hidden, 1, 1]", (None, hidden, 1, 1), because)
    c_out = project_weight.shape[0]
    check_vector("project_bias", project_bias, c_out)
    size = conv_output_size(x, depthwise_weight.shape[2:], options.stride, options.padding, options.dilation)
    shape = (x.shape[0], c_out, *size)
    check_same_shape("residual", residual, shape)
    return shape


def _inverted_operands(tensors: Tensors, options: Any) -> tuple[Tensor | None, ...]:
    x, expand_weight, expand_bias, *rest = tensors
    assert expand_weight is not None
    _, *others = _separable_operands((None, *rest), options)
    return (x, packing.panels(expand_weight, None), packing.vector(expand_bias), *others)


def _inverted_cuda_operands(tensors: Tensors, options: Any) -> tuple[Tensor | None, ...]:
    x, expand_weight, expand_bias, *rest = tensors
    assert expand_weight is not None
    _, *others = _separable_cuda_operands((None, *rest), options)
    return (x, packing.contiguous(expand_weight), float_vector(expand_bias), *others)


def _inverted_workspace(problem: Problem, device: CudaDevice) -> int:
    """The expanded map and the depthwise result, for where the kernels run one after the other."""
    x, expand_weight, *_ = problem.tensors
    assert x is not None
    assert expand_weight is not None
    batch, hidden, size = x.shape[0], expand_weight.shape[0], x.dtype.itemsize
    return sum(_in_vectors(batch, hidden, *pixels, size=size) for pixels in (x.shape[2:], problem.shape[2:]))


def _inverted_geometry(problem: Problem, spacings: tuple[int, ...], y_spacing: int) -> tuple[int, ...]:
    x, expand_weight, _, depthwise_weight, *_ = problem.tensors
    assert x is not None
    assert expand_weight is not None
    assert depthwise_weight is not None
    options = problem.options
    batch, c_in, in_h, in_w = x.shape
    _, c_out, out_h, out_w = problem.shape
    return (
        *(batch, in_h, in_w, c_in, expand_weight.shape[0], out_h, out_w, c_out),
        *(spacings[0], spacings[7], y_spacing),
        *depthwise_weight.shape[2:],
        *options.stride,
        *options.padding,
        *options.dilation,
        reference.ACTIVATIONS.index(options.expand_activation),
        reference.ACTIVATIONS.index(options.depthwise_activation),
    )


def _inverted_sizes(problem: Problem, spacings: tuple[int, ...], y_spacing: int) -> tuple[int, ...]:
    activation = reference.ACTIVATIONS.index(problem.options.activation)
    return (*_inverted_geometry(problem, spacings, y_spacing), activation)


def _inverted_macs(shapes: Sequence[Any], options: Any, shape: Sequence[int]) -> int:
    batch, c_in, in_h, in_w = shapes[0]
    hidden = shapes[1][0]
    expand = batch * in_h * in_w * c_in * hidden
    return int(expand + _separable_macs((None, shapes[3]), options, shape))


_INVERTED_KERNEL = NativeKernel(
    name="inverted_residual",
    layouts=(PIXELS, None, None, None, None, None, None, PIXELS),
    supports=lambda problem: None,
    operands=_inverted_operands,
    sizes=_inverted_sizes,
)

_INVERTED_CUDA = CudaKernel(
    name="inverted_residual",
    layouts=(PIXELS, None, None, None, None, None, None, PIXELS),
    supports=tf32_reason,
    operands=_inverted_cuda_operands,
    sizes=_inverted_geometry,
    workspace=_inverted_workspace,
    has_workspace=True,
)

_INVERTED_TRITON = TritonKernel(
    family="separable",
    name="inverted_residual",
    layouts=_INVERTED_CUDA.layouts,
    operands=_inverted_cuda_operands,
)

_INVERTED = publish(
    Operator(
        name="inverted_residual",
        schema=(
            "(Tensor x, Tensor expand_weight, Tensor? expand_bias, Tensor depthwise_weight, Tensor? depthwise_bias, "
            "Tensor project_weight, Tensor? project_bias=None, Tensor? residual=None, *, "
            "SymInt[2] stride=[1,1], SymInt[2] padding=[0,0], SymInt[2] dilation=[1,1], "
            'str expand_activation="identity", str depthwise_activation="identity", str activation="identity", '
            'str backend="auto") -> Tensor'
        ),
        tensors=(
            "x",
            "expand_weight",
            "expand_bias",
            "depthwise_weight",
            "depthwise_bias",
            "project_weight",
            "project_bias",
            "residual",
        ),
        options=InvertedResidualOptions,
        out=PIXELS,
        shape=_inverted_shape,
        reference=reference.inverted_residual,
        macs=_inverted_macs,
        implementations=(
            cuda_implementation("inverted_residual", _INVERTED_CUDA),
            triton_implementation("inverted_residual", _INVERTED_TRITON),
            cpu_implementation("inverted_residual", _INVERTED_KERNEL),
            reference_implementation("inverted_residual", reference.inverted_residual),
        ),
        native=_INVERTED_KERNEL,
    )
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
    options = (stride, padding, dilation, expand_activation, depthwise_activation, activation)
    tensors = (
        *(x, expand_weight, expand_bias, depthwise_weight, depthwise_bias),
        *(project_weight, project_bias, residual),
    )
    return call(_INVERTED, tensors, options, backend)
