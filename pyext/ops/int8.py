"""Matrix product and convolutions of int8 tensors: `int8_matmul`, `int8_conv2d`, `int8_depthwise_conv2d`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelpress.kernels import reference
from kernelpress.ops import int8_cuda, int8_triton
from kernelpress.ops.backends.cuda import cuda_implementation
from kernelpress.ops.backends.reference import reference_implementation
from kernelpress.ops.backends.triton import triton_implementation
from kernelpress.ops.calls.dispatch import call, publish
from kernelpress.ops.checks import (
    TensorSpec,
    check_activation,
    check_dtype,
    check_input,
    check_vector,
    check_weight,
    conv_output_size,
    describe,
)
from kernelpress.ops.depthwise import check_depthwise_weight
from kernelpress.ops.int8_checks import (
    check_depth,
    check_output,
    check_residual,
    check_scale,
    check_zero_point,
    output_dtype,
)
from kernelpress.ops.layout import PIXELS, ROWS
from kernelpress.ops.registry import Operator
from kernelpress.ops.signature import IntOrPair

__all__ = ["int8_conv2d", "int8_depthwise_conv2d", "int8_matmul"]

Specs = tuple[TensorSpec | None, ...]

_QUANTIZATION = (
    "float input_scale=1.0, SymInt input_zero_point=0, float residual_scale=1.0, SymInt residual_zero_point=0, "
    'str activation="identity", float? output_scale=None, SymInt output_zero_point=0, ScalarType? output_dtype=None, '
    'str backend="auto") -> Tensor'
)


class Int8MatmulOptions(NamedTuple):
    """Keyword arguments of `int8_matmul`."""

    input_scale: float = 1.0
    input_zero_point: int = 0
    residual_scale: float = 1.0
    residual_zero_point: int = 0
    activation: str = "identity"
    output_scale: float | None = None
    output_zero_point: int = 0
    output_dtype: torch.dtype | None = None


class Int8ConvOptions(NamedTuple):
    """Keyword arguments of `int8_conv2d` and `int8_depthwise_conv2d`."""

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    input_scale: float = 1.0
    input_zero_point: int = 0
    residual_scale: float = 1.0
    residual_zero_point: int = 0
    activation: str = "identity"
    output_scale: float | None = None
    output_zero_point: int = 0
    output_dtype: torch.dtype | None = None


_ALLOWED = {
    "x": torch.int8,
    "weight": torch.int8,
    "weight_scale": torch.float32,
    "bias": torch.float32,
    "row_scale": torch.float32,
    "row_zero_point": torch.int32,
}


def _dtypes(names: Sequence[str], tensors: Sequence[TensorSpec | None], options: Any) -> torch.dtype:
    out = output_dtype(options)
    for name, t in zip(names, tensors, strict=True):
        check_dtype(name, t, (_ALLOWED.get(name, out),))
    return out


def _check_epilogue(tensors: Specs, options: Any, shape: tuple[int, ...], c_out: int) -> None:
    _, weight, weight_scale, bias, residual = tensors[:5]
    assert weight is not None
    check_depth(weight)
    check_vector("weight_scale", weight_scale, c_out)
    check_vector("bias", bias, c_out)
    check_activation("activation", options.activation)
    check_scale("input_scale", options.input_scale)
    check_zero_point("input_zero_point", options.input_zero_point)
    check_output(options)
    check_residual(residual, shape, options)


def _check_rows(name: str, vector: TensorSpec | None, rows: tuple[int, ...]) -> None:
    if vector is not None and (
        len(vector.shape) != len(rows) or any(a != b for a, b in zip(vector.shape, rows, strict=True))
    ):
        raise ValueError(f"{name}: expected {describe(rows)}, one value per row of x, got {describe(vector.shape)}")


def _matmul_shape(tensors: Specs, options: Int8MatmulOptions) -> tuple[int, ...]:
    x, weight, *_, row_scale, row_zero_point = tensors
    assert x is not None
    assert weight is not None
    if not x.shape or x.shape[-1] == 0:
        raise ValueError(f"x: expected [..., C_in] with at least one channel, got {describe(x.shape)}")
    channels, rows = x.shape[-1], tuple(x.shape[:-1])
    check_weight("weight", weight, "[C_out, C_in]", (None, channels), f"C_in = {channels} channels of x")
    _check_rows("row_scale", row_scale, rows)
    _check_rows("row_zero_point", row_zero_point, rows)
    if row_scale is not None and options.input_scale != 1.0:
        raise ValueError(f"input_scale: expected 1.0 beside row_scale, got {options.input_scale}")
    if row_zero_point is not None and options.input_zero_point != 0:
        raise ValueError(f"input_zero_point: expected 0 beside row_zero_point, got {options.input_zero_point}")
    shape = (*rows, weight.shape[0])
    _check_epilogue(tensors, options, shape, weight.shape[0])
    return shape


_MATMUL = publish(
    Operator(
        name="int8_matmul",
        schema=(
            "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, Tensor? residual=None, "
            "Tensor? row_scale=None, Tensor? row_zero_point=None, *, " + _QUANTIZATION
        ),
        tensors=("x", "weight", "weight_scale", "bias", "residual", "row_scale", "row_zero_point"),
        options=Int8MatmulOptions,
        out=ROWS,
        shape=_matmul_shape,
        reference=reference.int8_matmul,
        macs=lambda shapes, options, shape: math.prod(shape) * int(shapes[1][1]),
        implementations=(
            cuda_implementation("int8_matmul", int8_cuda.MATMUL),
            triton_implementation("int8_matmul", int8_triton.MATMUL),
            reference_implementation("int8_matmul", reference.int8_matmul),
        ),
        native=None,
        dtypes=_dtypes,
    )
)


def int8_matmul(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    row_scale: Tensor | None = None,
    row_zero_point: Tensor | None = None,
    *,
    input_scale: float = 1.0,
    input_zero_point: int = 0,
    residual_scale: float = 1.0,
    residual_zero_point: int = 0,
    activation: str = "identity",
    output_scale: float | None = None,
    output_zero_point: int = 0,
    output_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Linear layer of int8 tensors, summed exactly: `activation((x − zero_point) · weightᵀ · scale + bias + residual)`.

    Args:
        x: `[..., C_in]` int8, affine: it stands for `(x − zero_point) · scale`.
        weight: `[C_out, C_in]` int8; weight_scale: `[C_out]` float32.
        bias: `[C_out]` float32.
        residual: `[..., C_out]` of the output's dtype.
        row_scale, row_zero_point: `[...]` float32 and int32, a scale and a zero point for each row of `x` (as
            `quantize_rows` gives them) in place of `input_scale` and `input_zero_point`.
        residual_scale, residual_zero_point: of an int8 residual.
        output_scale, output_zero_point: with a scale, the output is int8: rounded half to even, saturated.
        output_dtype: float32 (where None), float16 or bfloat16 of an output without `output_scale`.

    Returns: `[..., C_out]`, contiguous; `kernels.reference.int8_epilogue` tells where it is rounded. An int8 output has
        no gradient.
    Raises: `ValueError` or `TypeError` naming a bad argument; `RuntimeError` where the backend asked for cannot run.
    """
    options = (
        *(input_scale, input_zero_point, residual_scale, residual_zero_point, activation),
        *(output_scale, output_zero_point, output_dtype),
    )
    return call(_MATMUL, (x, weight, weight_scale, bias, residual, row_scale, row_zero_point), options, backend)


def _conv_shape(tensors: Specs, options: Int8ConvOptions) -> tuple[int, ...]:
    x, weight, *_ = tensors
    assert x is not None
    assert weight is not None
    check_input(x)
    channels = x.shape[1]
    because = f"C_in = {channels} channels of x"
    check_weight("weight", weight, "[C_out, C_in, KH, KW]", (None, channels, None, None), because)
    return _convolved(tensors, options)


def _depthwise_shape(tensors: Specs, options: Int8ConvOptions) -> tuple[int, ...]:
    x, weight, *_ = tensors
    assert x is not None
    assert weight is not None
    check_input(x)
    check_depthwise_weight("weight", weight, x.shape[1])
    return _convolved(tensors, options)


def _convolved(tensors: Specs, options: Int8ConvOptions) -> tuple[int, ...]:
    x, weight, *_ = tensors
    assert x is not None
    assert weight is not None
    size = conv_output_size(x, weight.shape[2:], options.stride, options.padding, options.dilation)
    shape = (x.shape[0], weight.shape[0], *size)
    _check_epilogue(tensors, options, shape, weight.shape[0])
    return shape


_CONV_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, Tensor? residual=None, *, "
    "SymInt[2] stride=[1,1], SymInt[2] padding=[0,0], SymInt[2] dilation=[1,1], " + _QUANTIZATION
)
_CONV_TENSORS = ("x", "weight", "weight_scale", "bias", "residual")

_CONV2D = publish(
    Operator(
        name="int8_conv2d",
        schema=_CONV_SCHEMA,
        tensors=_CONV_TENSORS,
        options=Int8ConvOptions,
        out=PIXELS,
        shape=_conv_shape,
        reference=reference.int8_conv2d,
        macs=lambda shapes, options, shape: math.prod(shape) * math.prod(shapes[1][1:]),
        implementations=(
            cuda_implementation("int8_conv2d", int8_cuda.CONV2D),
            triton_implementation("int8_conv2d", int8_triton.CONV2D),
            reference_implementation("int8_conv2d", reference.int8_conv2d),
        ),
        native=None,
        dtypes=_dtypes,
    )
)

_DEPTHWISE = publish(
    Operator(
        name="int8_depthwise_conv2d",
        schema=_CONV_SCHEMA,
        tensors=_CONV_TENSORS,
        options=Int8ConvOptions,
        out=PIXELS,
        shape=_depthwise_shape,
        reference=reference.int8_depthwise_conv2d,
        macs=lambda shapes, options, shape: math.prod(shape) * math.prod(shapes[1][2:]),
        implementations=(
            cuda_implementation("int8_depthwise_conv2d", int8_cuda.DEPTHWISE),
            triton_implementation("int8_depthwise_conv2d", int8_triton.DEPTHWISE),
            reference_implementation("int8_depthwise_conv2d", reference.int8_depthwise_conv2d),
        ),
        native=None,
        dtypes=_dtypes,
    )
)


def int8_conv2d(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    input_scale: float = 1.0,
    input_zero_point: int = 0,
    residual_scale: float = 1.0,
    residual_zero_point: int = 0,
    activation: str = "identity",
    output_scale: float | None = None,
    output_zero_point: int = 0,
    output_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """2-D convolution of int8 tensors, summed exactly, with its epilogue; padding stands for 0.

    Args:
        x: `[N, C_in, H, W]` int8; channels_last, or a channel slice of it, is read without a copy.
        weight: `[C_out, C_in, KH, KW]` int8; weight_scale: `[C_out]` float32.
        bias: `[C_out]` float32.
        residual: of the output's shape and dtype.
        stride, padding, dilation: pixels, one integer or (height, width).

    Returns: `[N, C_out, H_out, W_out]`, channels_last. Other options and errors as of `int8_matmul`.
    """
    options = (
        *(stride, padding, dilation, input_scale, input_zero_point, residual_scale, residual_zero_point, activation),
        *(output_scale, output_zero_point, output_dtype),
    )
    return call(_CONV2D, (x, weight, weight_scale, bias, residual), options, backend)


def int8_depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    input_scale: float = 1.0,
    input_zero_point: int = 0,
    residual_scale: float = 1.0,
    residual_zero_point: int = 0,
    activation: str = "identity",
    output_scale: float | None = None,
    output_zero_point: int = 0,
    output_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Depthwise convolution of int8 tensors, summed exactly, with its epilogue; padding stands for 0.

    Args:
        x: `[N, C, H, W]` int8.
        weight: `[C · multiplier, 1, KH, KW]` int8; output channel `o` reads input channel `o // multiplier`.
        weight_scale: `[C · multiplier]` float32.

    Returns: `[N, C · multiplier, H_out, W_out]`, channels_last. Other arguments and errors as of `int8_conv2d`.
    """
    options = (
        *(stride, padding, dilation, input_scale, input_zero_point, residual_scale, residual_zero_point, activation),
        *(output_scale, output_zero_point, output_dtype),
    )
    return call(_DEPTHWISE, (x, weight, weight_scale, bias, residual), options, backend)
