"""The head of every mobile network in one call: a dense convolution, a depthwise one and a 1×1, by rows in cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from kernelpress.kernels import reference
from kernelpress.ops.backends.cpu import cpu_implementation
from kernelpress.ops.backends.reference import reference_implementation
from kernelpress.ops.calls import packing
from kernelpress.ops.calls.dispatch import call, publish
from kernelpress.ops.checks import (
    TensorSpec,
    check_activation,
    check_input,
    check_vector,
    check_weight,
    conv_output_size,
)
from kernelpress.ops.layout import PIXELS
from kernelpress.ops.registry import NativeKernel, Operator, Problem, Tensors
from kernelpress.ops.signature import IntOrPair

__all__ = ["separable_stem"]


class StemOptions(NamedTuple):
    """Keyword arguments of `separable_stem`."""

    stem_stride: tuple[int, ...] = (1, 1)
    stem_padding: tuple[int, ...] = (0, 0)
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    stem_activation: str = "identity"
    depthwise_activation: str = "identity"
    activation: str = "identity"


def _hidden_size(x: Any, stem_weight: Any, options: StemOptions) -> tuple[int, int]:
    size = zip(x[2:], stem_weight[2:], options.stem_stride, options.stem_padding, strict=True)
    height, width = ((n + 2 * padding - kernel) // stride + 1 for n, kernel, stride, padding in size)
    return height, width


def _shape(tensors: tuple[TensorSpec | None, ...], options: StemOptions) -> tuple[int, ...]:
    x, stem_weight, stem_bias, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias = tensors
    assert x is not None
    assert stem_weight is not None
    assert depthwise_weight is not None
    assert pointwise_weight is not None
    check_input(x)
    for name in ("stem_activation", "depthwise_activation", "activation"):
        check_activation(name, getattr(options, name))
    channels = x.shape[1]
    because = f"C_in = {channels} channels of x"
    check_weight("stem_weight", stem_weight, "[C, C_in, KH, KW]", (None, channels, None, None), because)
    hidden = stem_weight.shape[0]
    check_vector("stem_bias", stem_bias, hidden)
    because = f"C = {hidden} channels of stem_weight"
    check_weight("depthwise_weight", depthwise_weight, "[C, 1, KH, KW]", (hidden, 1, None, None), because)
    check_vector("depthwise_bias", depthwise_bias, hidden)
    check_weight("pointwise_weight", pointwise_weight, "[C_out, C, 1, 1]", (None, hidden, 1, 1), because)
    c_out = pointwise_weight.shape[0]
    check_vector("pointwise_bias", pointwise_bias, c_out)
    size = conv_output_size(x, stem_weight.shape[2:], options.stem_stride, options.stem_padding, (1, 1))
    between = TensorSpec((x.shape[0], hidden, *size), x.stride, x.dtype)
    size = conv_output_size(between, depthwise_weight.shape[2:], options.stride, options.padding, (1, 1))
    return (x.shape[0], c_out, *size)


def _operands(tensors: Tensors, options: Any) -> tuple[Tensor | None, ...]:
    x, stem_weight, stem_bias, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias = tensors
    assert stem_weight is not None
    assert depthwise_weight is not None
    assert pointwise_weight is not None
    return (
        x,
        packing.panels(stem_weight, None),
        packing.vector(stem_bias),
        packing.depthwise(depthwise_weight, None),
        packing.vector(depthwise_bias),
        packing.panels(pointwise_weight, None),
        packing.vector(pointwise_bias),
    )


def _sizes(problem: Problem, spacings: tuple[int, ...], y_spacing: int) -> tuple[int, ...]:
    x, stem_weight, _, depthwise_weight, *_ = problem.tensors
    assert x is not None
    assert stem_weight is not None
    assert depthwise_weight is not None
    options = problem.options
    batch, c_in, in_h, in_w = x.shape
    _, c_out, out_h, out_w = problem.shape
    return (
        *(batch, in_h, in_w, c_in),
        *_hidden_size(x.shape, stem_weight.shape, options),
        *(stem_weight.shape[0], out_h, out_w, c_out),
        *x.stride,
        y_spacing,
        *(*stem_weight.shape[2:], *options.stem_stride, *options.stem_padding, 1, 1),
        *(*depthwise_weight.shape[2:], *options.stride, *options.padding, 1, 1),
        reference.ACTIVATIONS.index(options.stem_activation),
        reference.ACTIVATIONS.index(options.depthwise_activation),
        reference.ACTIVATIONS.index(options.activation),
    )


def _macs(shapes: Sequence[Any], options: Any, shape: Sequence[int]) -> int:
    x, stem_weight, _, depthwise_weight = shapes[:4]
    batch, c_out, out_h, out_w = shape
    stem = batch * math.prod(_hidden_size(x, stem_weight, options)) * math.prod(stem_weight)
    return int(stem + batch * out_h * out_w * stem_weight[0] * (math.prod(depthwise_weight[2:]) + c_out))


_KERNEL = NativeKernel(
    name="separable_stem",
    layouts=(None,) * 7,
    supports=lambda problem: None,
    operands=_operands,
    sizes=_sizes,
)

_SEPARABLE_STEM = publish(
    Operator(
        name="separable_stem",
        schema=(
            "(Tensor x, Tensor stem_weight, Tensor? stem_bias, Tensor depthwise_weight, Tensor? depthwise_bias, "
            "Tensor pointwise_weight, Tensor? pointwise_bias=None, *, "
            "SymInt[2] stem_stride=[1,1], SymInt[2] stem_padding=[0,0], "
            "SymInt[2] stride=[1,1], SymInt[2] padding=[0,0], "
            'str stem_activation="identity", str depthwise_activation="identity", str activation="identity", '
            'str backend="auto") -> Tensor'
        ),
        tensors=(
            "x",
            "stem_weight",
            "stem_bias",
            "depthwise_weight",
            "depthwise_bias",
            "pointwise_weight",
            "pointwise_bias",
        ),
        options=StemOptions,
        out=PIXELS,
        shape=_shape,
        reference=reference.separable_stem,
        macs=_macs,
        implementations=(
            cpu_implementation("separable_stem", _KERNEL),
            reference_implementation("separable_stem", reference.separable_stem),
        ),
        native=_KERNEL,
    )
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
    options = (
        *(stem_stride, stem_padding, stride, padding),
        *(stem_activation, depthwise_activation, activation),
    )
    tensors = (
        *(x, stem_weight, stem_bias, depthwise_weight, depthwise_bias),
        *(pointwise_weight, pointwise_bias),
    )
    return call(_SEPARABLE_STEM, tensors, options, backend)
