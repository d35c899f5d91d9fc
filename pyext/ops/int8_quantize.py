"""Between floating and int8 tensors: `quantize`, `dequantize`, `quantize_rows`; int8 ones combined: `int8_add`,
`int8_gate`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernelpress.kernels import reference
from kernelpress.ops.backends.cpu import cpu_implementation
from kernelpress.ops.backends.cuda import cuda_implementation, data_type
from kernelpress.ops.backends.kernel import Kernel
from kernelpress.ops.backends.triton import triton_implementation
from kernelpress.ops.calls.dispatch import op
from kernelpress.ops.checks import TensorSpec, check_activation, check_dtype, check_image, describe
from kernelpress.ops.int8_checks import (
    FLOATS,
    check_output,
    check_scale,
    check_zero_point,
    half_reason,
    output_dtype,
    output_scalars,
)
from kernelpress.ops.layout import IMAGES_ANYHOW_OR_ROWS, IMAGES_OR_ROWS, ROWS
from kernelpress.ops.registry import Problem

__all__ = ["dequantize", "int8_add", "int8_gate", "quantize", "quantize_rows"]

_INT8 = (torch.int8,)


def _elementwise_shape(x: TensorSpec) -> tuple[int, ...]:
    if not x.shape:
        raise ValueError("x: expected at least one dimension, got a scalar")
    return tuple(x.shape)


def _affine_shape(options: Any, x: TensorSpec) -> tuple[int, ...]:
    check_scale("scale", options.scale)
    check_zero_point("zero_point", options.zero_point)
    return _elementwise_shape(x)


def _quantize_dtypes(names: Sequence[str], tensors: Sequence[TensorSpec | None], options: Any) -> torch.dtype:
    check_dtype("x", tensors[0], FLOATS)
    return torch.int8


def _dequantize_dtypes(names: Sequence[str], tensors: Sequence[TensorSpec | None], options: Any) -> torch.dtype:
    check_dtype("x", tensors[0], _INT8)
    chosen: torch.dtype = options.output_dtype
    if chosen not in FLOATS:
        raise TypeError(f"output_dtype: expected {' or '.join(map(str, FLOATS))}, got {chosen}")
    return chosen


def _elementwise_sizes(problem: Problem, spacing: Mapping[str, int]) -> tuple[int, ...]:
    """Pixels of `[N, C, H, W]`, rows of any other shape; channels; spacings."""
    shape = problem.shape
    channels = shape[1] if len(shape) == 4 else shape[-1]
    given = [spacing[name] for name in problem.operator.tensors]
    return (math.prod(shape) // channels, channels, *given, spacing["y"])


def _sizes_and_dtype(problem: Problem, spacing: Mapping[str, int]) -> tuple[int, ...]:
    return (*_elementwise_sizes(problem, spacing), data_type(problem.dtype))


def _affine_scalars(problem: Problem) -> tuple[float, ...]:
    return (float(problem.options.scale), float(problem.options.zero_point))


def _as_they_come(options: Any, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tensors


_EITHER = {"x": IMAGES_OR_ROWS, "other": IMAGES_OR_ROWS}

_QUANTIZE_CUDA = Kernel("quantize", _as_they_come, _elementwise_sizes, layouts=_EITHER, scalars=_affine_scalars)


def _quantize_sizes(problem: Problem, spacing: Mapping[str, int]) -> tuple[int, ...]:
    """Of an image as it lies; rows are an image of one column."""
    x, shape = problem["x"], problem.shape
    if len(shape) == 4:
        return (*(shape[0], shape[1], *shape[2:]), *x.stride, spacing["y"])
    rows = math.prod(shape[:-1])
    return (1, shape[-1], rows, 1, 0, 1, spacing["x"], shape[-1], spacing["y"])


_QUANTIZE_CPU = replace(
    _QUANTIZE_CUDA, sizes=_quantize_sizes, layouts={"x": IMAGES_ANYHOW_OR_ROWS}, dtypes=(torch.float32,)
)


@op(
    out=IMAGES_OR_ROWS,
    shape=_affine_shape,
    reference=reference.quantize,
    dtypes=_quantize_dtypes,
    implementations=(
        cuda_implementation(_QUANTIZE_CUDA),
        triton_implementation("int8_quantize", _QUANTIZE_CUDA),
        cpu_implementation(_QUANTIZE_CPU),
    ),
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


_DEQUANTIZE_CUDA = Kernel(
    "dequantize", _as_they_come, _sizes_and_dtype, layouts=_EITHER, dtypes=_INT8, scalars=_affine_scalars
)
_DEQUANTIZE_CPU = replace(_DEQUANTIZE_CUDA, sizes=_elementwise_sizes, supports=half_reason)


@op(
    out=IMAGES_OR_ROWS,
    shape=_affine_shape,
    reference=reference.dequantize,
    dtypes=_dequantize_dtypes,
    implementations=(
        cuda_implementation(_DEQUANTIZE_CUDA),
        triton_implementation("int8_quantize", _DEQUANTIZE_CUDA),
        cpu_implementation(_DEQUANTIZE_CPU),
    ),
)
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


def _check_pair(options: Any, other: str) -> None:
    """The scales and zero points of x and of the other tensor, the activation and the result."""
    check_activation("activation", options.activation)
    for name in ("input", other):
        check_scale(f"{name}_scale", getattr(options, f"{name}_scale"))
        check_zero_point(f"{name}_zero_point", getattr(options, f"{name}_zero_point"))
    check_output(options)


def _pair_scalars(problem: Problem, other: str) -> tuple[float, ...]:
    names = ("input_scale", "input_zero_point", f"{other}_scale", f"{other}_zero_point")
    return (*(float(getattr(problem.options, name)) for name in names), *output_scalars(problem))


def _add_shape(options: Any, x: TensorSpec, other: TensorSpec) -> tuple[int, ...]:
    shape = _elementwise_shape(x)
    _check_pair(options, "other")
    if len(other.shape) != len(shape) or any(a != b for a, b in zip(other.shape, shape, strict=True)):
        raise ValueError(f"other: expected the shape of x, {describe(shape)}, got {describe(other.shape)}")
    return shape


def _add_dtypes(names: Sequence[str], tensors: Sequence[TensorSpec | None], options: Any) -> torch.dtype:
    for name, t in zip(names, tensors, strict=True):
        check_dtype(name, t, (torch.int8,))
    return output_dtype(options)


_ADD_CUDA = Kernel(
    "int8_add",
    _as_they_come,
    _sizes_and_dtype,
    layouts=_EITHER,
    dtypes=_INT8,
    scalars=partial(_pair_scalars, other="other"),
)
_ADD_CPU = replace(
    _ADD_CUDA,
    sizes=lambda problem, spacing: (*_elementwise_sizes(problem, spacing), int(problem.dtype == torch.int8)),
    supports=half_reason,
)


@op(
    out=IMAGES_OR_ROWS,
    shape=_add_shape,
    reference=reference.int8_add,
    dtypes=_add_dtypes,
    implementations=(
        cuda_implementation(_ADD_CUDA),
        triton_implementation("int8_quantize", _ADD_CUDA),
        cpu_implementation(_ADD_CPU),
    ),
)
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


def _gate_shape(options: Any, x: TensorSpec, gate: TensorSpec) -> tuple[int, ...]:
    check_image(x)
    _check_pair(options, "gate")
    wanted = (*x.shape[:2], 1, 1)
    if len(gate.shape) != 4 or any(a != b for a, b in zip(gate.shape, wanted, strict=True)):
        raise ValueError(f"gate: expected {describe(wanted)}, one value per channel of x, got {describe(gate.shape)}")
    return tuple(x.shape)


def _gate_sizes(problem: Problem, spacing: Mapping[str, int]) -> tuple[int, ...]:
    batch, channels, height, width = problem.shape
    spacings = (spacing["x"], spacing["gate"], spacing["y"])
    return (batch, height * width, channels, *spacings, int(problem.dtype == torch.int8))


_GATE_CPU = Kernel(
    "int8_gate",
    _as_they_come,
    _gate_sizes,
    layouts={"x": IMAGES_OR_ROWS, "gate": IMAGES_OR_ROWS},
    dtypes=_INT8,
    scalars=partial(_pair_scalars, other="gate"),
    supports=half_reason,
)


@op(
    out=IMAGES_OR_ROWS,
    shape=_gate_shape,
    reference=reference.int8_gate,
    dtypes=_add_dtypes,
    implementations=(cpu_implementation(_GATE_CPU),),
)
def int8_gate(
    x: Tensor,
    gate: Tensor,
    *,
    input_scale: float,
    gate_scale: float,
    input_zero_point: int = 0,
    gate_zero_point: int = 0,
    activation: str = "identity",
    output_scale: float | None = None,
    output_zero_point: int = 0,
    output_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Product of an int8 image with one int8 value a channel, each of its own scale and zero point, and an activation:
    the last step of squeeze-and-excitation.

    Args:
        x: `[N, C, H, W]`; channels_last, or a channel slice of it, is read without a copy.
        gate: `[N, C, 1, 1]`.

    Results and errors as of `int8_add`.
    """


def _rows_shape(options: Any, x: TensorSpec) -> tuple[int, ...]:
    if not x.shape or x.shape[-1] == 0:
        raise ValueError(f"x: expected [..., C] with at least one channel, got {describe(x.shape)}")
    return tuple(x.shape)


def _rows_sizes(problem: Problem, spacing: Mapping[str, int]) -> tuple[int, ...]:
    *rows, channels = problem.shape
    return (math.prod(rows), channels, spacing["x"], int(problem.options.symmetric))


_ROWS_CUDA = Kernel("quantize_rows", _as_they_come, _rows_sizes, layouts={"x": ROWS})


@op(
    out=ROWS,
    shape=_rows_shape,
    reference=reference.quantize_rows,
    dtypes=_quantize_dtypes,
    further=lambda shape: ((shape[:-1], torch.float32), (shape[:-1], torch.int32)),
    has_gradient=False,
    implementations=(
        cuda_implementation(_ROWS_CUDA),
        triton_implementation("int8_quantize", _ROWS_CUDA),
        cpu_implementation(replace(_ROWS_CUDA, dtypes=(torch.float32,))),
    ),
)
def quantize_rows(x: Tensor, *, symmetric: bool = False, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """int8 values of every row of `x` by a scale and a zero point of its own, for `int8_matmul`.

    Args:
        x: `[..., C]`, float32, float16 or bfloat16.
        symmetric: zero points 0 and a range of ±127, instead of the range from the row's least to its largest value
            (0 always among them) on all 256.

    Returns: values `[..., C]` int8, `scale: [...]` float32, `zero_point: [...]` int32, all contiguous. They have no
        gradient. The scale of a row with a NaN is NaN. Errors as of `int8_matmul`.
    """
