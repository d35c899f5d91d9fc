"""quantize, dequantize, int8_add: one pass over memory through the int8 epilogue.      quantize_rows: a row is reduced
to its range, and written by it.

    elementwise     tiles of 4096 elements; what lies densely is one row, in 64-bit offsets
    quantize_rows   a program has whole rows, kept in registers while their range is found; longer ones are read twice,
                    the second time from the cache

All are bound by memory: x once, y once. Configurations are (TILE_ROWS, TILE_CHANNELS).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernelpress.kernels.reference import ACTIVATIONS
from kernelpress.kernels.triton.epilogue import output_value, requantize, tile_offsets
from kernelpress.kernels.triton.launch import Configuration, Device, cdiv, launch, power_of_2, spacing

__all__ = [
    "dequantize",
    "dequantize_configurations",
    "int8_add",
    "int8_add_configurations",
    "quantize",
    "quantize_configurations",
    "quantize_rows",
    "quantize_rows_configurations",
]

_TILE = 4096
"""Elements: 32 of each of 128 threads, whose loads are under way together."""

_LONGEST_HELD = 8192
"""Elements of a row that registers hold."""


@triton.jit
def dequantized(values, scale, zero_point):
    """int8 by scale and zero point, or floating values as they are: float32."""
    if values.dtype == tl.int8:
        values = (values.to(tl.int32) - zero_point).to(tl.float32) * scale
    return values.to(tl.float32)


@triton.jit
def elementwise_kernel(
    x,
    other,
    y,
    rows,
    n_channels,
    x_spacing,
    other_spacing,
    y_spacing,
    scale,
    zero_point,
    other_scale,
    other_zero_point,
    inverse_scale,
    output_zero_point,
    ACTIVATION: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
):
    tiles = tl.cdiv(n_channels, TILE_CHANNELS)
    first = (tl.program_id(0) % tiles).to(tl.int64) * TILE_CHANNELS
    pixels = tl.program_id(0) // tiles * TILE_ROWS + tl.arange(0, TILE_ROWS)
    channels = first + tl.arange(0, TILE_CHANNELS)
    mask = (pixels < rows)[:, None] & (channels < n_channels)[None, :]
    value = dequantized(tl.load(x + tile_offsets(pixels, channels, x_spacing), mask=mask, other=0), scale, zero_point)
    if other is not None:
        more = tl.load(other + tile_offsets(pixels, channels, other_spacing), mask=mask, other=0)
        value = tl.fma((more.to(tl.int32) - other_zero_point).to(tl.float32), other_scale, value)
    value = output_value(value, y, inverse_scale, output_zero_point, ACTIVATION)
    tl.store(y + tile_offsets(pixels, channels, y_spacing), value, mask=mask)


@triton.jit
def range_of_rows(values):
    """(least, largest, whether there is a NaN) of each row; 0 is always in the range."""
    is_nan = values != values
    known = tl.where(is_nan, 0.0, values)
    return tl.minimum(tl.min(known, 1), 0.0), tl.maximum(tl.max(known, 1), 0.0), tl.max(is_nan.to(tl.int32), 1)


@triton.jit
def quantization_of_range(low, high, has_nan, SYMMETRIC: tl.constexpr):
    """(scale, 1 / scale, zero point) of rows, rounded where `reference.quantize_rows` rounds them."""
    step = tl.maximum(high, -low) * (1 / 127) if SYMMETRIC else (high - low) * (1 / 255)
    scale = tl.where(has_nan > 0, float("nan"), tl.maximum(step, 1.1754943508222875e-38))
    inverse = tl.div_rn(1.0, scale)
    zero_point = has_nan * 0 if SYMMETRIC else requantize(-low, inverse, -128).to(tl.int32)
    return scale, inverse, zero_point


@triton.jit
def quantize_rows_kernel(
    x,
    values,
    scale,
    zero_point,
    rows,
    n_channels,
    x_spacing,
    SYMMETRIC: tl.constexpr,
    IS_HELD: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
):
    pixels = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    channels = tl.arange(0, TILE_CHANNELS)
    is_row = pixels < rows
    from_x = x + tile_offsets(pixels, channels, x_spacing)
    to_values = values + tile_offsets(pixels, channels, n_channels)
    if IS_HELD:
        mask = is_row[:, None] & (channels < n_channels)[None, :]
        held = tl.load(from_x, mask=mask, other=0.0).to(tl.float32)
        low, high, has_nan = range_of_rows(held)
        step, inverse, zero = quantization_of_range(low, high, has_nan, SYMMETRIC)
        tl.store(to_values, requantize(held, inverse[:, None], zero[:, None]), mask=mask)
    else:
        low, high = tl.zeros((TILE_ROWS,), tl.float32), tl.zeros((TILE_ROWS,), tl.float32)
        has_nan = tl.zeros((TILE_ROWS,), tl.int32)
        for start in range(0, n_channels, TILE_CHANNELS):
            mask = is_row[:, None] & (channels < n_channels - start)[None, :]
            more = range_of_rows(tl.load(from_x + start, mask=mask, other=0.0).to(tl.float32))
            low, high = tl.minimum(low, more[0]), tl.maximum(high, more[1])
            has_nan = tl.maximum(has_nan, more[2])
        step, inverse, zero = quantization_of_range(low, high, has_nan, SYMMETRIC)
        for start in range(0, n_channels, TILE_CHANNELS):
            mask = is_row[:, None] & (channels < n_channels - start)[None, :]
            again = tl.load(from_x + start, mask=mask, other=0.0).to(tl.float32)
            tl.store(to_values + start, requantize(again, inverse[:, None], zero[:, None]), mask=mask)
    tl.store(scale + pixels, step, mask=is_row)
    tl.store(zero_point + pixels, zero, mask=is_row)


def quantize(
    y: Tensor, x: Tensor, *, scale: float, zero_point: int, allow_tf32: bool, configuration: Configuration
) -> None:
    """Runs `reference.quantize` into `y`."""
    _elementwise(y, x, None, (1.0, 0, 1.0, 0, 1.0 / scale, zero_point), "identity", configuration)


def dequantize(
    y: Tensor,
    x: Tensor,
    *,
    scale: float,
    zero_point: int,
    output_dtype: torch.dtype,
    allow_tf32: bool,
    configuration: Configuration,
) -> None:
    """Runs `reference.dequantize` into `y`."""
    _elementwise(y, x, None, (scale, zero_point, 1.0, 0, 1.0, 0), "identity", configuration)


def int8_add(
    y: Tensor,
    x: Tensor,
    other: Tensor,
    *,
    input_scale: float,
    other_scale: float,
    input_zero_point: int,
    other_zero_point: int,
    activation: str,
    output_scale: float | None,
    output_zero_point: int,
    output_dtype: torch.dtype | None,
    allow_tf32: bool,
    configuration: Configuration,
) -> None:
    """Runs `reference.int8_add` into `y`."""
    inverse_scale = 1.0 if output_scale is None else 1.0 / output_scale
    scalars = (input_scale, input_zero_point, other_scale, other_zero_point, inverse_scale, output_zero_point)
    _elementwise(y, x, other, scalars, activation, configuration)


def _elementwise(
    y: Tensor,
    x: Tensor,
    other: Tensor | None,
    scalars: tuple[float, int, float, int, float, int],
    activation: str,
    configuration: Configuration,
) -> None:
    rows, channels = _rows_and_channels(y.shape)
    spacings = (spacing(x), spacing(other), spacing(y))
    tile_rows, tile_channels = configuration.tile
    if all(step in (0, channels) for step in spacings):
        tile_rows, tile_channels = 1, tile_rows * tile_channels
        rows, channels = 1, rows * channels
    launch(
        elementwise_kernel,
        cdiv(rows, tile_rows) * cdiv(channels, tile_channels),
        configuration,
        *(x, other, y, rows, channels, *spacings, *scalars),
        ACTIVATION=ACTIVATIONS.index(activation),
        TILE_ROWS=tile_rows,
        TILE_CHANNELS=tile_channels,
    )


def quantize_rows(
    values: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    x: Tensor,
    *,
    symmetric: bool,
    allow_tf32: bool,
    configuration: Configuration,
) -> None:
    """Runs `reference.quantize_rows` into its three outputs, all contiguous."""
    rows, channels = scale.numel(), values.shape[-1]
    tile_rows, tile_channels = configuration.tile
    launch(
        quantize_rows_kernel,
        cdiv(rows, tile_rows),
        configuration,
        *(x, values, scale, zero_point, rows, channels, spacing(x)),
        SYMMETRIC=symmetric,
        IS_HELD=channels <= tile_channels,
        TILE_ROWS=tile_rows,
        TILE_CHANNELS=tile_channels,
    )


def _rows_and_channels(shape: Sequence[int]) -> tuple[int, int]:
    """What an elementwise kernel sees: pixels of `[N, C, H, W]`, rows of any other shape."""
    channels = shape[1] if len(shape) == 4 else shape[-1]
    return math.prod(shape) // channels, channels


def _configuration(channels: int, elements: int) -> Configuration:
    """A tile of whole rows, or of a part of one."""
    tile_channels = min(power_of_2(channels, 16), elements)
    return Configuration((max(1, _TILE // tile_channels), tile_channels), 8 if tile_channels > _TILE else 4, 1)


def quantize_configurations(device: Device, y: Any, *others: Any, **options: Any) -> tuple[Configuration, ...]:
    """What `quantize` runs in."""
    return (_configuration(_rows_and_channels(y.shape)[1], _TILE),)


def dequantize_configurations(device: Device, y: Any, *others: Any, **options: Any) -> tuple[Configuration, ...]:
    """What `dequantize` runs in."""
    return (_configuration(_rows_and_channels(y.shape)[1], _TILE),)


def int8_add_configurations(device: Device, y: Any, *others: Any, **options: Any) -> tuple[Configuration, ...]:
    """What `int8_add` runs in."""
    return (_configuration(_rows_and_channels(y.shape)[1], _TILE),)


def quantize_rows_configurations(device: Device, y: Any, *others: Any, **options: Any) -> tuple[Configuration, ...]:
    """What `quantize_rows` runs in."""
    return (_configuration(y.shape[-1], _LONGEST_HELD),)
