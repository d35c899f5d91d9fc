"""Between floats and int8, and what the int8 products end in."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from kernelpress.kernels.reference.activation import activate

__all__ = ["dequantize", "int8_add", "int8_epilogue", "int8_gate", "int8_output", "quantize", "quantize_rows"]

_SMALLEST_SCALE = 2.0**-126
"""The smallest normal float32: its inverse is finite."""


def _single(value: float) -> float:
    """The float32 nearest to a number."""
    number: float = struct.unpack("f", struct.pack("f", value))[0]
    return number


def _fused_multiply_add(a: Tensor, b: Tensor | float, c: Tensor) -> Tensor:
    """`a · b + c` of float32 numbers, rounded to float32 at the end only, as the instruction does."""
    factor = b.double() if isinstance(b, Tensor) else _single(b)
    return (a.double() * factor + c.double()).float()


def _saturated(x: Tensor, inverse_scale: float | Tensor, zero_point: int | Tensor) -> Tensor:
    rounded = torch.round(x * inverse_scale).nan_to_num(0.0) + zero_point
    return rounded.clamp(-128, 127).to(torch.int8)


def quantize(x: Tensor, *, scale: float, zero_point: int = 0) -> Tensor:
    """`clamp(round(x / scale) + zero_point)` as int8, half to even; NaN becomes the zero point.

    It multiplies by `1 / scale` rounded to float32, as PyTorch's `quantized_decomposed.quantize_per_tensor` does.
    """
    return _saturated(x.float(), 1.0 / scale, zero_point)


def quantize_rows(x: Tensor, *, symmetric: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Every row of `x: [..., C]` by its own range: int8 values, `scale: [...]` float32, `zero_point: [...]` int32.

    The range always holds 0. A row with a NaN has a scale that is NaN.
    """
    x = x.float()
    if symmetric:
        scale = (x.abs().amax(-1) * _single(1 / 127)).clamp(min=_SMALLEST_SCALE)
        inverse = 1.0 / scale
        zero_point = torch.zeros_like(scale)
    else:
        low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
        scale = ((high - low) * _single(1 / 255)).clamp(min=_SMALLEST_SCALE)
        inverse = 1.0 / scale
        zero_point = (-128 - torch.round(low * inverse).nan_to_num(0.0)).clamp(-128, 127)
    return _saturated(x, inverse[..., None], zero_point[..., None]), scale, zero_point.to(torch.int32)


def dequantize(x: Tensor, *, scale: float, zero_point: int = 0, output_dtype: torch.dtype = torch.float32) -> Tensor:
    """`(x − zero_point) · scale` of int8 values, in float32, then cast."""
    return ((x.float() - zero_point) * scale).to(output_dtype)


def int8_output(value: Tensor, output_scale: float | None, zero_point: int, dtype: torch.dtype | None) -> Tensor:
    """Quantized where there is an `output_scale`, else cast: to float32 where `dtype` is None."""
    if output_scale is None:
        return value.to(torch.float32 if dtype is None else dtype)
    return quantize(value, scale=output_scale, zero_point=zero_point)


def int8_epilogue(
    accumulator: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    residual_scale: float = 1.0,
    residual_zero_point: int = 0,
    activation: str = "identity",
    output_scale: float | None = None,
    output_zero_point: int = 0,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """What the int8 kernels do with an exact accumulator, step by step in float32.

    1. The accumulator is rounded to float32, and multiplied by its row's scale where there are such; `scale` is (input
       scale) · (weight scale) rounded to float32.
    2. `value = fma(accumulator, scale, bias)`: one rounding.
    3. A floating residual is added; an int8 one as `fma(residual − residual_zero_point, residual_scale, value)`.
    4. The activation, then a cast, or `quantize` where there is an `output_scale`.

    `scale`, `bias` and `residual` broadcast to the accumulator, an integer in float64 or what step 1 made of it.
    """
    value = _fused_multiply_add(accumulator.float(), scale, torch.zeros_like(scale) if bias is None else bias)
    if residual is not None and residual.dtype == torch.int8:
        value = _fused_multiply_add(residual.float() - residual_zero_point, residual_scale, value)
    elif residual is not None:
        value = value + residual.float()
    return int8_output(activate(value, activation), output_scale, output_zero_point, output_dtype)


def int8_gate(
    x: Tensor,
    gate: Tensor,
    *,
    input_scale: float,
    input_zero_point: int = 0,
    gate_scale: float,
    gate_zero_point: int = 0,
    activation: str = "identity",
    output_scale: float | None = None,
    output_zero_point: int = 0,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """`activation(x · gate)` of int8 `x: [N, C, H, W]` and `gate: [N, C, 1, 1]`, both dequantized in float32, then the
    last step of `int8_epilogue`.
    """
    value = dequantize(x, scale=input_scale, zero_point=input_zero_point)
    value = value * dequantize(gate, scale=gate_scale, zero_point=gate_zero_point)
    return int8_output(activate(value, activation), output_scale, output_zero_point, output_dtype)


def int8_add(
    x: Tensor,
    other: Tensor,
    *,
    input_scale: float,
    input_zero_point: int = 0,
    other_scale: float,
    other_zero_point: int = 0,
    activation: str = "identity",
    output_scale: float | None = None,
    output_zero_point: int = 0,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """`activation(x + other)` of int8 tensors: `fma(other − zero point, other_scale, dequantized x)`, then the last
    step of `int8_epilogue`.
    """
    first = dequantize(x, scale=input_scale, zero_point=input_zero_point)
    value = _fused_multiply_add(other.float() - other_zero_point, other_scale, first)
    return int8_output(activate(value, activation), output_scale, output_zero_point, output_dtype)
