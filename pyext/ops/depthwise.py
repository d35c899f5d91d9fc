"""Depthwise convolution: `depthwise_conv2d`."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from kernelpress.kernels import reference
from kernelpress.ops.backends.cpu import cpu_implementation
from kernelpress.ops.backends.cuda import CudaKernel, cuda_implementation, float_vector
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
from kernelpress.ops.layout import PIXELS
from kernelpress.ops.registry import NativeKernel, Operator, Problem, Tensors
from kernelpress.ops.signature import IntOrPair

__all__ = ["check_depthwise_weight", "depthwise_conv2d"]


class DepthwiseOptions(NamedTuple):
    """Keyword arguments of `depthwise_conv2d`."""

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    activation: str = "identity"


def check_depthwise_weight(name: str, weight: TensorSpec, channels: int) -> None:
    """`[C · multiplier, 1, KH, KW]` for `C` channels. Raises `ValueError`."""
    because = f"C = {channels} channels of x"
    check_weight(name, weight, "[C · multiplier, 1, KH, KW]", (None, 1, None, None), because)
    if weight.shape[0] % channels != 0:
        raise ValueError(f"{name}: expected [C · multiplier, 1, KH, KW] with {because}, got {describe(weight.shape)}")


def _shape(tensors: tuple[TensorSpec | None, ...], options: DepthwiseOptions) -> tuple[int, ...]:
    x, weight, bias, scale, residual = tensors
    assert x is not None
    assert weight is not None
    check_input(x)
    check_activation("activation", options.activation)
    check_depthwise_weight("weight", weight, x.shape[1])
    c_out = weight.shape[0]
    check_vector("bias", bias, c_out)
    check_vector("scale", scale, c_out)
    size = conv_output_size(x, weight.shape[2:], options.stride, options.padding, options.dilation)
    shape = (x.shape[0], c_out, *size)
    check_same_shape("residual", residual, shape)
    return shape


def _operands(tensors: Tensors, options: DepthwiseOptions) -> tuple[Tensor | None, ...]:
    x, weight, bias, scale, residual = tensors
    assert weight is not None
    return (x, packing.depthwise(weight, scale), packing.vector(bias), residual)


def _cuda_operands(tensors: Tensors, options: DepthwiseOptions) -> tuple[Tensor | None, ...]:
    x, weight, bias, scale, residual = tensors
    assert weight is not None
    return (x, packing.depthwise(weight, None), float_vector(bias), float_vector(scale), residual)


def _geometry(problem: Problem, spacings: tuple[int, ...], y_spacing: int) -> tuple[int, ...]:
    x, weight, *_ = problem.tensors
    assert x is not None
    assert weight is not None
    options = problem.options
    batch, channels, in_h, in_w = x.shape
    return (
        *(batch, in_h, in_w, channels, weight.shape[0] // channels, *problem.shape[2:]),
        *(spacings[0], spacings[4], y_spacing),
        *weight.shape[2:],
        *options.stride,
        *options.padding,
        *options.dilation,
    )


def _sizes(problem: Problem, spacings: tuple[int, ...], y_spacing: int) -> tuple[int, ...]:
    activation = reference.ACTIVATIONS.index(problem.options.activation)
    return (*_geometry(problem, spacings, y_spacing), activation)


_KERNEL = NativeKernel(
    name="depthwise_conv2d",
    layouts=(PIXELS, None, None, None, PIXELS),
    supports=lambda problem: None,
    operands=_operands,
    sizes=_sizes,
)

_CUDA = CudaKernel(
    name="depthwise_conv2d",
    layouts=(PIXELS, None, None, None, PIXELS),
    supports=lambda problem: None,
    operands=_cuda_operands,
    sizes=_geometry,
)

_TRITON = TritonKernel(family="depthwise", name="depthwise_conv2d", layouts=_CUDA.layouts, operands=_cuda_operands)

_DEPTHWISE = publish(
    Operator(
        name="depthwise_conv2d",
        schema=(
            "(Tensor x, Tensor weight, Tensor? bias=None, Tensor? scale=None, Tensor? residual=None, *, "
            "SymInt[2] stride=[1,1], SymInt[2] padding=[0,0], SymInt[2] dilation=[1,1], "
            'str activation="identity", str backend="auto") -> Tensor'
        ),
        tensors=("x", "weight", "bias", "scale", "residual"),
        options=DepthwiseOptions,
        out=PIXELS,
        shape=_shape,
        reference=reference.depthwise_conv2d,
        macs=lambda shapes, options, shape: math.prod(shape) * math.prod(shapes[1][2:]),
        implementations=(
            cuda_implementation("depthwise_conv2d", _CUDA),
            triton_implementation("depthwise_conv2d", _TRITON),
            cpu_implementation("depthwise_conv2d", _KERNEL),
            onednn_implementation("depthwise_conv2d"),
            reference_implementation("depthwise_conv2d", reference.depthwise_conv2d),
        ),
        native=_KERNEL,
    )
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

    Returns: `[N, C · multiplier, H_out, W_out]`, channels_last. Other options and errors as of `conv2d`.
    """
    options = (stride, padding, dilation, activation)
    return call(_DEPTHWISE, (x, weight, bias, scale, residual), options, backend)
