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
from kernelpress.kernels.triton.launch import Configuration, Device, cdiv, launch, spacing
from kernelpress.kernels.triton.tiles import input_pixels, product_configurations, tile_of_program, window_corners

__all__ = ["int8_conv2d", "int8_conv2d_configurations", "int8_matmul", "int8_matmul_configurations"]

_FEW_CHANNELS = 32
"""Fewer are read together with those of the taps beside them; also the least sum that an instruction takes."""

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
):
    """Takes zero points off the sums of products, and stores their epilogue: 32 columns at a time, since registers that
    hold a large tile have little room beside it."""
    COLUMNS: tl.constexpr = sums.shape[1]
    if COLUMNS > 32:
        parts, parts_channels = halves(sums), halves(channels[None, :])
        for part in tl.static_range(2):
            finish_sums(
                *(parts[part], pixels, tl.reshape(parts_channels[part], (COLUMNS // 2,)), is_pixel, n_channels),
                *(corrections, row_scale, row_zero_point, weight_sums, scale, bias),
                *(residual, residual_spacing, residual_scale, residual_zero_point),
                *(y, y_spacing, inverse_scale, zero_point, ACTIVATION),
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
    ACTIVATION: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE_DEPTH: tl.constexpr,
):
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
        sums = tl.dot(values, tl.trans(weights), sums)
    finish_sums(
        *(sums, pixels, channels, is_pixel, c_out),
        *(corrections, row_scale, row_zero_point, weight_sums, scale, bias),
        *(residual, residual_spacing, residual_scale, residual_zero_point),
        *(y, y_spacing, inverse_scale, zero_point, ACTIVATION),
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
    run,
    kernel_h,
    runs_of_row,
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
    ACTIVATION: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE_DEPTH: tl.constexpr,
):
    """`run`: the neighbours in memory that a step's values are part of, one tap or all of a row of the window."""
    row_tile, column_tile = tile_of_program(
        tl.program_id(0), tl.cdiv(rows, TILE_ROWS), tl.cdiv(c_out, TILE_COLUMNS), GROUP=8
    )
    pixels = row_tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    channels = column_tile * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    depth = tl.arange(0, TILE_DEPTH)
    is_pixel, is_channel = pixels < rows, channels < c_out
    image, first_row, first_column = window_corners(pixels, out_h, out_w, stride_h, stride_w, pad_h, pad_w)
    weight_tile = weight + tile_offsets(channels, depth, weight_spacing)
    steps_of_run = tl.cdiv(run, TILE_DEPTH)
    sums = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.int32)
    for step in range(kernel_h * runs_of_row * steps_of_run):
        at, start = step // steps_of_run, step % steps_of_run * TILE_DEPTH
        row, column = first_row + at // runs_of_row * dilation_h, first_column + at % runs_of_row * dilation_w
        sources, is_inside = input_pixels(image, row, column, in_h, in_w)
        if MERGES_TAPS:
            tap_column = column[:, None] + ((start + depth) // c_in)[None, :]
            is_inside = ((row >= 0) & (row < in_h))[:, None] & (tap_column >= 0) & (tap_column < in_w)
        else:
            is_inside = is_inside[:, None]
        inside = x + tile_offsets(sources, start + depth, x_spacing)
        outside = padding + (start + depth)[None, :]
        in_run = (depth < run - start)[None, :]
        values = tl.load(tl.where(is_inside & is_pixel[:, None], inside, outside), mask=in_run, other=0)
        weights = tl.load(weight_tile + at * run + start, mask=is_channel[:, None] & in_run, other=0)
        sums = tl.dot(values, tl.trans(weights), sums)
    finish_sums(
        *(sums, pixels, channels, is_pixel, c_out, corrections, None, None, None, scale, bias),
        *(residual, residual_spacing, residual_scale, residual_zero_point),
        *(y, y_spacing, inverse_scale, zero_point, ACTIVATION),
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
    merges_taps = _merges_taps(c_in, dilation) and spacing(x) == c_in
    taps = kernel[1] if merges_taps else 1
    rows = batch * out_h * out_w
    tile_rows, tile_columns, tile_depth = configuration.tile
    launch(
        int8_convolution_kernel,
        cdiv(rows, tile_rows) * cdiv(c_out, tile_columns),
        configuration,
        *(x, weight, padding_values, corrections, scale, bias, residual, y),
        *(rows, in_h, in_w, c_in, out_h, out_w, c_out, taps * c_in, kernel[0], kernel[1] // taps),
        *(*stride, *padding, *dilation, spacing(x), weight.shape[1], spacing(residual), spacing(y), *scalars),
        MERGES_TAPS=merges_taps,
        ACTIVATION=ACTIVATIONS.index(activation),
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
    tile_rows, tile_columns, tile_depth = configuration.tile
    launch(
        int8_product_kernel,
        cdiv(rows, tile_rows) * cdiv(c_out, tile_columns),
        configuration,
        *(x, weight, corrections, scale, bias, residual, row_scale, row_zero_point, weight_sums, y),
        *(rows, c_in, c_out, spacing(x), weight.shape[1], spacing(residual), spacing(y), *scalars),
        ACTIVATION=ACTIVATIONS.index(activation),
        TILE_ROWS=tile_rows,
        TILE_COLUMNS=tile_columns,
        TILE_DEPTH=tile_depth,
    )


def _merges_taps(c_in: int, dilation: tuple[int, ...]) -> bool:
    return c_in < _FEW_CHANNELS and dilation[1] == 1


def _configurations(rows: int, c_out: int, run: int, device: Device) -> tuple[Configuration, ...]:
    """Those of a product, in steps that do not reach far beyond the runs that they read."""
    found = product_configurations(rows, c_out, run, 1, "ieee", device)

    def step(longest: int) -> int:
        steps = [size for size in (128, 64, 32) if size <= longest]
        return min(steps, key=lambda size: cdiv(run, size) * (size + _STEP_OVERHEAD))

    return tuple(
        Configuration((*configuration.tile[:2], step(configuration.tile[2])), *configuration[1:])
        for configuration in found
    )


def int8_matmul_configurations(
    device: Device, y: Any, x: Any, *others: Any, **options: Any
) -> tuple[Configuration, ...]:
    """What `int8_matmul` may run in, the best guess first."""
    c_in, c_out = x.shape[-1], y.shape[-1]
    return _configurations(max(1, math.prod(x.shape) // c_in), c_out, c_in, device)


def int8_conv2d_configurations(
    device: Device, y: Any, x: Any, *others: Any, kernel: tuple[int, int], dilation: Any, **options: Any
) -> tuple[Configuration, ...]:
    """What `int8_conv2d` may run in, the best guess first."""
    batch, c_out, out_h, out_w = y.shape
    run = x.shape[1] * (kernel[1] if _merges_taps(x.shape[1], dilation) else 1)
    return _configurations(batch * out_h * out_w, c_out, run, device)
