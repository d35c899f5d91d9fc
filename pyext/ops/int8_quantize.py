"""Between floating and int8 tensors: `quantize`, `dequantize`, `int8_add`."""

from __future__ import annotations

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
from kernelpress.ops.checks import TensorSpec, check_activation, check_dtype, describe
from kernelpress.ops.int8_checks import FLOATS, check_output, check_scale, check_zero_point, output_dtype
from kernelpress.ops.layout import IMAGES_OR_ROWS
from kernelpress.ops.registry import Operator

__all__ = ["dequantize", "int8_add", "quantize"]

Specs = tuple[TensorSpec | None, ...]


class QuantizeOptions(NamedTuple):
    """Keyword arguments of `quantize`."""

    scale: float
    zero_point: int = 0


class DequantizeOptions(NamedTuple):
    """Keyword arguments of `dequantize`."""

    scale: float
    zero_point: int = 0
    output_dtype: torch.dtype = torch.float32


class AddOptions(NamedTuple):
    """Keyword arguments of `int8_add`."""

    input_scale: float
    other_scale: float
    input_zero_point: int = 0
    other_zero_point: int = 0
    activation: str = "identity"
    output_scale: float | None = None
    output_zero_point: int = 0
    output_dtype: torch.dtype | None = None


def _shape_of_x(x: TensorSpec | None) -> tuple[int, ...]:
    assert x is not None
    if not x.shape:
        raise ValueError("x: expected at least one dimension, got a scalar")
    return tuple(x.shape)


def _affine_shape(tensors: Specs, options: QuantizeOptions | DequantizeOptions) -> tuple[int, ...]:
    check_scale("scale", options.scale)
    check_zero_point("zero_point", options.zero_point)
    return _shape_of_x(tensors[0])


def _quantize_dtypes(names: Sequence[str], tensors: Sequence[TensorSpec | None], options: Any) -> torch.dtype:
    check_dtype("x", tensors[0], FLOATS)
    return torch.int8


def _dequantize_dtypes(names: Sequence[str], tensors: Sequence[TensorSpec | None], options: Any) -> torch.dtype:
    check_dtype("x", tensors[0], (torch.int8,))
    chosen: torch.dtype = options.output_dtype
    if chosen not in FLOATS:
        raise TypeError(f"output_dtype: expected {' or '.join(map(str, FLOATS))}, got {chosen}")
    return chosen


_QUANTIZE = publish(
    Operator(
        name="quantize",
        schema='(Tensor x, *, float scale, SymInt zero_point=0, str backend="auto") -> Tensor',
        tensors=("x",),
        options=QuantizeOptions,
        out=IMAGES_OR_ROWS,
        shape=_affine_shape,
        reference=reference.quantize,
        macs=lambda shapes, options, shape: 0,
        implementations=(
            cuda_implementation("quantize", int8_cuda.QUANTIZE),
            triton_implementation("quantize", int8_triton.QUANTIZE),
            reference_implementation("quantize", reference.quantize),
        ),
        native=None,
        dtypes=_quantize_dtypes,
    )
)

_DEQUANTIZE = publish(
    Operator(
        name="dequantize",
        schema=(
            '(Tensor x, *, float scale, SymInt zero_point=0, ScalarType output_dtype=float32, str backend="auto") '
            "-> Tensor"
        ),
        tensors=("x",),
        options=DequantizeOptions,
        out=IMAGES_OR_ROWS,
        shape=_affine_shape,
        reference=reference.dequantize,
        macs=lambda shapes, options, shape: 0,
        implementations=(
            cuda_implementation("dequantize", int8_cuda.DEQUANTIZE),
            triton_implementation("dequantize", int8_triton.DEQUANTIZE),
            reference_implementation("dequantize", reference.dequantize),
        ),
        native=None,
        dtypes=_dequantize_dtypes,
    )
)


def _add_shape(tensors: Specs, options: AddOptions) -> tuple[int, ...]:
    x, other = tensors
    shape = _shape_of_x(x)
    assert other is not None
    check_activation("activation", options.activation)
    for name in ("input", "other"):
        check_scale(f"{name}_scale", getattr(options, f"{name}_scale"))
        check_zero_point(f"{name}_zero_point", getattr(options, f"{name}_zero_point"))
    check_output(options)
    if len(other.shape) != len(shape) or any(a != b for a, b in zip(other.shape, shape, strict=True)):
        raise ValueError(f"other: expected the shape of x, {describe(shape)}, got {describe(other.shape)}")
    return shape


def _add_dtypes(names: Sequence[str], tensors: Sequence[TensorSpec | None], options: Any) -> torch.dtype:
    for name, t in zip(names, tensors, strict=True):
        check_dtype(name, t, (torch.int8,))
    return output_dtype(options)


_ADD = publish(
    Operator(
        name="int8_add",
        schema=(
            "(Tensor x, Tensor other, *, float input_scale, float other_scale, SymInt input_zero_point=0, "
            'SymInt other_zero_point=0, str activation="identity", float? output_scale=None, '
            'SymInt output_zero_point=0, ScalarType? output_dtype=None, str backend="auto") -> Tensor'
        ),
        tensors=("x", "other"),
        options=AddOptions,
        out=IMAGES_OR_ROWS,
        shape=_add_shape,
        reference=reference.int8_add,
        macs=lambda shapes, options, shape: 0,
        implementations=(
            cuda_implementation("int8_add", int8_cuda.ADD),
            triton_implementation("int8_add", int8_triton.ADD),
            reference_implementation("int8_add", reference.int8_add),
        ),
        native=None,
        dtypes=_add_dtypes,
    )
)


def quantize(x: Tensor, *, scale: float, zero_point: int = 0, backend: str = "auto") -> Tensor:
    """int8 values of a floating tensor, rounded half to even and saturated: `clamp(round(x / scale) + zero_point)`.

    Args:
        x: float32, float16 or bfloat16; `[N, C, H, W]`, or of any other rank.
        scale: the step between two int8 values, between 2^-126 and 2^126.
        zero_point: the int8 value that stands for 0.

    Returns: int8 of the shape of `x`, channels_last where it is `[N, C, H, W]`, else contiguous. NaN becomes the zero
        point. It has no gradient. Errors as of `int8_matmul`.
    """
    return call(_QUANTIZE, (x,), (scale, zero_point), backend)


def dequantize(
    x: Tensor,
    *,
    scale: float,
    zero_point: int = 0,
    output_dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """`(x − zero_point) · scale` of an int8 tensor, in float32, then cast to `output_dtype`.

    Returns: float32, float16 or bfloat16; layout and errors as of `quantize`.
    """
    return call(_DEQUANTIZE, (x,), (scale, zero_point, output_dtype), backend)


def int8_add(
    x: Tensor,
    other: Tensor,
    *,
    input_scale: float,
    other_scale: float,
    input_zero_point: int = 0,
    other_zero_point: int = 0,
    activation: str = "identity",
    output_scale: float | None = None,
    output_zero_point: int = 0,
    output_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sum of two int8 tensors of one shape, each of its own scale and zero point, and an activation.

    With an `output_scale` the result is int8 again, else `output_dtype` (float32 where None). Layout as of `quantize`,
    errors as of `int8_matmul`.
    """
    options = (
        *(input_scale, other_scale, input_zero_point, other_zero_point, activation),
        *(output_scale, output_zero_point, output_dtype),
    )
    return call(_ADD, (x, other), options, backend)
