"""int8 products and convolutions, channels_last.      y[m,n] = epilogue((Σ_k x[m,k] · w[n,k] − z · Σ_k w[n,k]) · s[n])

    one program:  TILE_ROWS pixels × TILE_COLUMNS output channels, exact in int32        bound by tensor cores
          k →          n →
      ┌─────────┐   ┌───────┐    matrix: steps of TILE_DEPTH channels; the zero point z, for all of x or of each row,
    m │ x       │ · │ wᵀ    │    comes off the sums behind the loop, by sums of weights known before
    ↓ └─────────┘   └───────┘    convolution: a step reads one tap of the window, or a part of it. Outside of the
                                 image it reads `padding`, zero points, so that the same correction fits everywhere

Few channels leave a tap's step almost empty: the taps of a row of the window, neighbours in memory, are then one run.
Configurations are (TILE_ROWS, TILE_COLUMNS, TILE_DEPTH).
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kernelpress.kernels.reference import ACTIVATIONS
from kernelpress.kernels.triton.epilogue import finish_int8_tile, tile_offsets
from kernelpress.kernels.triton.launch import Configuration, Device, cdiv, launch, spacing, unit
from kernelpress.kernels.triton.tiles import input_pixels, product_configurations, tile_of_program, window_corners

__all__ = ["int8_conv2d", "int8_conv2d_configurations", "int8_matmul", "int8_matmul_configurations"]

_FEW_CHANNELS = 32
"""Fewer are read together with those of the taps beside them; also the least sum that an instruction takes."""

_LARGEST_OF_BYTES = 64 * 32
"""Elements of a tile that is read by single bytes."""

_STEP_OVERHEAD = 16
"""Of a step, in values of its sum."""


@triton.jit
def halves(tile):
    """The left and the right half of the columns of `[rows, columns]`."""
    COLUMNS: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, COLUMNS)), (0, 2, 1)))


@triton.jit
def finish_sums(
    sums,
    pixels,
    channels,
    is_pixel,
    n_channels,
    corrections,
    row_scale,
    row_zero_point,
    weight_sums,
    scale,
    bias,
    residual,
    residual_spacing,
    residual_scale,
    residual_zero_point,
    y,
    y_spacing,
    inverse_scale,
    zero_point,
    ACTIVATION: tl.constexpr,
    PART: tl.constexpr,
):
    """Takes zero points off the sums of products, and stores their epilogue: `PART` columns at a time, since registers
    that hold a large tile have little room beside it."""
    COLUMNS: tl.constexpr = sums.shape[1]
    if COLUMNS > PART:
        parts, parts_channels = halves(sums), halves(channels[None, :])
        for part in tl.static_range(2):
            finish_sums(
                *(parts[part], pixels, tl.reshape(parts_channels[part], (COLUMNS // 2,)), is_pixel, n_channels),
                *(corrections, row_scale, row_zero_point, weight_sums, scale, bias),
                *(residual, residual_spacing, residual_scale, residual_zero_point),
                *(y, y_spacing, inverse_scale, zero_point, ACTIVATION, PART),
            )
    else:
        is_channel = channels < n_channels
        if corrections is not None:
            sums += tl.load(corrections + channels, mask=is_channel, other=0)[None, :]
        if row_zero_point is not None:
            zero_points = tl.load(row_zero_point + pixels, mask=is_pixel, other=0)
            sums -= zero_points[:, None] * tl.load(weight_sums + channels, mask=is_channel, other=0)[None, :]
        accumulator = sums.to(tl.float32)
        if row_scale is not None:
            accumulator *= tl.load(row_scale + pixels, mask=is_pixel, other=0.0)[:, None]
        finish_int8_tile(
            *(accumulator, pixels, channels, is_pixel, n_channels, scale, bias),
            *(residual, residual_spacing, residual_scale, residual_zero_point),
            *(y, y_spacing, inverse_scale, zero_point, ACTIVATION),
        )


@triton.jit
def int8_product_kernel(
    x,
    weight,
    corrections,
    scale,
    bias,
    residual,
    row_scale,
    row_zero_point,
    weight_sums,
    y,
    rows,
    c_in,
    c_out,
    x_spacing,
    weight_spacing,
    residual_spacing,
    y_spacing,
    residual_scale,
    residual_zero_point,
    inverse_scale,
    zero_point,
    X_UNIT: tl.constexpr,
    Y_UNIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PART: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE_DEPTH: tl.constexpr,
):
    c_in, x_spacing = c_in * X_UNIT, x_spacing * X_UNIT
    c_out, residual_spacing, y_spacing = c_out * Y_UNIT, residual_spacing * Y_UNIT, y_spacing * Y_UNIT
    row_tile, column_tile = tile_of_program(
        tl.program_id(0), tl.cdiv(rows, TILE_ROWS), tl.cdiv(c_out, TILE_COLUMNS), GROUP=8
    )
    pixels = row_tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    channels = column_tile * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    depth = tl.arange(0, TILE_DEPTH)
    is_pixel, is_channel = pixels < rows, channels < c_out
    x_tile = x + tile_offsets(pixels, depth, x_spacing)
    weight_tile = weight + tile_offsets(channels, depth, weight_spacing)
    sums = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.int32)
    for start in range(0, c_in, TILE_DEPTH):
        in_depth = (depth < c_in - start)[None, :]
        values = tl.load(x_tile + start, mask=is_pixel[:, None] & in_depth, other=0)
        weights = tl.load(weight_tile + start, mask=is_channel[:, None] & in_depth, other=0)
        sums = tl.dot(values, tl.trans(weights), sums, out_dtype=tl.int32)
    finish_sums(
        *(sums, pixels, channels, is_pixel, c_out),
        *(corrections, row_scale, row_zero_point, weight_sums, scale, bias),
        *(residual, residual_spacing, residual_scale, residual_zero_point),
        *(y, y_spacing, inverse_scale, zero_point, ACTIVATION, PART),
    )


@triton.jit
def int8_convolution_kernel(
    x,
    weight,
    padding,
    corrections,
    scale,
    bias,
    residual,
    y,
    rows,
    in_h,
    in_w,
    c_in,
    out_h,
    out_w,
    c_out,
    kernel_h,
    kernel_w,
    taps,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    x_spacing,
    weight_spacing,
    residual_spacing,
    y_spacing,
    residual_scale,
    residual_zero_point,
    inverse_scale,
    zero_point,
    MERGES_TAPS: tl.constexpr,
    X_UNIT: tl.constexpr,
    Y_UNIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PART: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE_DEPTH: tl.constexpr,
):
    """Steps of `taps` at a time, one or all of a row of the window: a run of neighbours in memory."""
    c_in, x_spacing = c_in * X_UNIT, x_spacing * X_UNIT
    c_out, residual_spacing, y_spacing = c_out * Y_UNIT, residual_spacing * Y_UNIT, y_spacing * Y_UNIT
    run = c_in * taps
    row_tile, column_tile = tile_of_program(
        tl.program_id(0), tl.cdiv(rows, TILE_ROWS), tl.cdiv(c_out, TILE_COLUMNS), GROUP=8
    )
    pixels = row_tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    channels = column_tile * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    depth = tl.arange(0, TILE_DEPTH)
    is_pixel, is_channel = pixels < rows, channels < c_out
    image, first_row, first_column = window_corners(pixels, out_h, out_w, stride_h, stride_w, pad_h, pad_w)
    weight_tile = weight + tile_offsets(channels, depth, weight_spacing)
    runs_of_row, steps_of_run = kernel_w // taps, tl.cdiv(run, TILE_DEPTH)
    sums = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.int32)
    for step in range(kernel_h * runs_of_row * steps_of_run):
        at, start = step // steps_of_run, step % steps_of_run * TILE_DEPTH
        row, column = first_row + at // runs_of_row * dilation_h, first_column + at % runs_of_row * dilation_w
        sources, is_inside = input_pixels(image, row, column, in_h, in_w)
        inside = x + tile_offsets(sources, start + depth, x_spacing)
        in_run = (depth < run - start)[None, :]
        if MERGES_TAPS:
            tap_column = column[:, None] + ((start + depth) // c_in)[None, :]
            is_inside = (is_pixel & (row >= 0) & (row < in_h))[:, None] & (tap_column >= 0) & (tap_column < in_w)
            values = tl.load(inside, mask=is_inside & in_run, other=0)
            values = tl.where(is_inside, values, tl.load(padding))
        else:
            outside = padding + (start + depth)[None, :]
            values = tl.load(tl.where((is_inside & is_pixel)[:, None], inside, outside), mask=in_run, other=0)
        weights = tl.load(weight_tile + at * run + start, mask=is_channel[:, None] & in_run, other=0)
        sums = tl.dot(values, tl.trans(weights), sums, out_dtype=tl.int32)
    finish_sums(
        *(sums, pixels, channels, is_pixel, c_out, corrections, None, None, None, scale, bias),
        *(residual, residual_spacing, residual_scale, residual_zero_point),
        *(y, y_spacing, inverse_scale, zero_point, ACTIVATION, PART),
    )


def int8_matmul(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    corrections: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    row_scale: Tensor | None,
    row_zero_point: Tensor | None,
    weight_sums: Tensor | None,
    *,
    activation: str,
    residual_scale: float,
    residual_zero_point: int,
    output_scale: float,
    output_zero_point: int,
    allow_tf32: bool,
    configuration: Configuration,
) -> None:
    """Runs `reference.int8_matmul` into `y`, by the operands of the CUDA kernel: rows of `weight: [C_out, …]` end in
    zeros, `scale` has the input's in it."""
    _product(
        *(y, x, weight, corrections, scale, bias, residual, row_scale, row_zero_point, weight_sums),
        *(x.shape[-1], y.shape[-1], activation, configuration),
        (residual_scale, residual_zero_point, 1.0 / output_scale, output_zero_point),
    )


def int8_conv2d(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    padding_values: Tensor,
    corrections: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    kernel: tuple[int, int],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    activation: str,
    residual_scale: float,
    residual_zero_point: int,
    output_scale: float,
    output_zero_point: int,
    allow_tf32: bool,
    configuration: Configuration,
) -> None:
    """Runs `reference.int8_conv2d` into `y`, by the operands of the CUDA kernel; `padding_values: [KW · C_in]`, or more
    of them, are all the zero point."""
    _, c_in, in_h, in_w = x.shape
    batch, c_out, out_h, out_w = y.shape
    scalars = (residual_scale, residual_zero_point, 1.0 / output_scale, output_zero_point)
    if kernel == (1, 1) and tuple(stride) == (1, 1) and tuple(padding) == (0, 0):
        _product(
            *(y, x, weight, corrections, scale, bias, residual, None, None, None),
            *(c_in, c_out, activation, configuration, scalars),
        )
        return
    merges_taps = _merges_taps(kernel, c_in, dilation) and spacing(x) == c_in
    taps = kernel[1] if merges_taps else 1
    rows = batch * out_h * out_w
    x_unit, y_unit = unit(c_in, spacing(x)), unit(c_out, spacing(residual), spacing(y))
    tile_rows, tile_columns, tile_depth = configuration.tile
    launch(
        int8_convolution_kernel,
        cdiv(rows, tile_rows) * cdiv(c_out, tile_columns),
        configuration,
        *(x, weight, padding_values, corrections, scale, bias, residual, y),
        *(rows, in_h, in_w, c_in // x_unit, out_h, out_w, c_out // y_unit, *kernel, taps, *stride, *padding, *dilation),
        *(spacing(x) // x_unit, weight.shape[1], spacing(residual) // y_unit, spacing(y) // y_unit, *scalars),
        MERGES_TAPS=merges_taps,
        X_UNIT=x_unit,
        Y_UNIT=y_unit,
        ACTIVATION=ACTIVATIONS.index(activation),
        PART=_part(configuration),
        TILE_ROWS=tile_rows,
        TILE_COLUMNS=tile_columns,
        TILE_DEPTH=tile_depth,
    )


def _product(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    corrections: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    row_scale: Tensor | None,
    row_zero_point: Tensor | None,
    weight_sums: Tensor | None,
    c_in: int,
    c_out: int,
    activation: str,
    configuration: Configuration,
    scalars: tuple[float, int, float, int],
) -> None:
    rows = x.numel() // c_in
    x_unit, y_unit = unit(c_in, spacing(x)), unit(c_out, spacing(residual), spacing(y))
    tile_rows, tile_columns, tile_depth = configuration.tile
    launch(
        int8_product_kernel,
        cdiv(rows, tile_rows) * cdiv(c_out, tile_columns),
        configuration,
        *(x, weight, corrections, scale, bias, residual, row_scale, row_zero_point, weight_sums, y),
        *(rows, c_in // x_unit, c_out // y_unit),
        *(spacing(x) // x_unit, weight.shape[1], spacing(residual) // y_unit, spacing(y) // y_unit, *scalars),
        X_UNIT=x_unit,
        Y_UNIT=y_unit,
        ACTIVATION=ACTIVATIONS.index(activation),
        PART=_part(configuration),
        TILE_ROWS=tile_rows,
        TILE_COLUMNS=tile_columns,
        TILE_DEPTH=tile_depth,
    )


def _part(configuration: Configuration) -> int:
    """Columns that a program finishes together: 16 values a thread."""
    return max(16, 16 * 32 * configuration.warps // configuration.tile[0])


def _merges_taps(kernel: tuple[int, int], c_in: int, dilation: tuple[int, ...]) -> bool:
    return kernel[1] > 1 and c_in < _FEW_CHANNELS and c_in % 16 != 0 and dilation[1] == 1


def _configurations(rows: int, c_out: int, c_in: int, reads_bytes: bool, device: Device) -> tuple[Configuration, ...]:
    """Those of a product, in steps that do not reach far beyond the runs that they read; small ones where each byte has
    an address of its own, and a register for it."""

    def step(longest: int) -> int:
        steps = [size for size in (128, 64, 32) if size <= longest]
        return min(steps, key=lambda size: cdiv(c_in, size) * (size + _STEP_OVERHEAD))

    found = product_configurations(rows, c_out, c_in, 1, "ieee", device)
    return tuple(
        Configuration(
            (tile_rows, tile_columns, _FEW_CHANNELS if reads_bytes else step(longest)),
            8 if tile_rows >= 128 else 4,
            stages,
        )
        for (tile_rows, tile_columns, longest), _, stages in found
        if not (reads_bytes and tile_rows * tile_columns > _LARGEST_OF_BYTES)
    )


def int8_matmul_configurations(
    device: Device, y: Any, x: Any, *others: Any, **options: Any
) -> tuple[Configuration, ...]:
    """What `int8_matmul` may run in, the best guess first."""
    c_in, c_out = x.shape[-1], y.shape[-1]
    return _configurations(max(1, math.prod(x.shape) // c_in), c_out, c_in, c_in % 4 != 0, device)


def int8_conv2d_configurations(
    device: Device, y: Any, x: Any, *others: Any, kernel: tuple[int, int], dilation: Any, **options: Any
) -> tuple[Configuration, ...]:
    """What `int8_conv2d` may run in, the best guess first."""
    batch, c_out, out_h, out_w = y.shape
    c_in = x.shape[1]
    reads_bytes = c_in % 4 != 0 or _merges_taps(kernel, c_in, dilation)
    return _configurations(batch * out_h * out_w, c_out, c_in, reads_bytes, device)
