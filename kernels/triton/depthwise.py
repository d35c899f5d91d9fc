"""Depthwise convolution, channels_last.  y[n,p,q,c] = act(scale[c] · Σ_rs w[r,s,c] · x[n, p·S-P+r·D, q·S-P+s·D, c] + …)

    one program:  TILE_ROWS × TILE_COLUMNS outputs × TILE_CHANNELS       bound by memory: reads x once, writes y once
    ┌───────────┐
    │ ↓ ↓ ↓ ↓ ↓ │   for each column of the window walks down the input's rows; a value is loaded once and added to all
    │ ↓ ↓ ↓ ↓ ↓ │   rows of outputs that it reaches, so that KW · (TILE_ROWS + KH - 1) / TILE_ROWS loads make an output,
    └───────────┘   most of them from the first-level cache

Other windows than the usual ones go tap by tap. Configurations are (TILE_ROWS, TILE_COLUMNS, TILE_CHANNELS).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kernelpress.kernels.reference import ACTIVATIONS
from kernelpress.kernels.triton.epilogue import finish_tile
from kernelpress.kernels.triton.launch import Configuration, Device, cdiv, launch, power_of_2, spacing, unit
from kernelpress.kernels.triton.tiles import input_pixels

__all__ = [
    "depthwise_configurations",
    "depthwise_conv2d",
    "depthwise_conv2d_configurations",
    "is_unrolled",
    "rows_of_window",
    "taps_of_window",
    "tile_of_outputs",
]

_UNROLLED = 7
"""The largest window, in either direction, whose rows are unrolled."""

_TILES = (
    (8, 16, 64),
    (4, 16, 64),
    (8, 8, 64),
    (4, 8, 64),
    (2, 8, 64),
    (8, 16, 32),
    (1, 8, 32),
    (4, 8, 16),
)
"""The last is for whatever no other fits."""

_PROGRAMS_AT_ONCE = 4
"""On a multiprocessor."""

_PROGRAM_OVERHEAD = 8192
"""Of starting a program, in loads of one value."""


@triton.jit
def tile_of_outputs(
    program,
    out_h,
    out_w,
    n_channels,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
):
    """(image, first row, columns, channels) of a program; channels of a pixel are neighbours."""
    channel_tiles = tl.cdiv(n_channels, TILE_CHANNELS)
    column_tiles = tl.cdiv(out_w, TILE_COLUMNS)
    row_tiles = tl.cdiv(out_h, TILE_ROWS)
    channels = program % channel_tiles * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    place = program // channel_tiles
    columns = place % column_tiles * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    place = place // column_tiles
    return place // row_tiles, place % row_tiles * TILE_ROWS, columns, channels


@triton.jit
def input_tile(x, image, row, columns, channels, is_channel, in_h, in_w, x_spacing, zero_point):
    """x at one row and several columns, some of them outside: [columns, channels]; minus the zero point, if any."""
    rows = row + tl.zeros_like(columns)  # a condition on a scalar is no mask to the interpreter
    pixels, is_inside = input_pixels(image, rows, columns, in_h, in_w)
    mask = is_inside[:, None] & is_channel[None, :]
    offsets = pixels[:, None] * x_spacing + channels[None, :]
    if zero_point is None:
        values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        values = tl.where(mask, tl.load(x + offsets, mask=mask, other=0).to(tl.int32) - zero_point, 0)
    return values


@triton.jit
def tap_weight(weight, row, column, channels, n_channels, zero_point, KERNEL_W: tl.constexpr):
    """Weights of one tap: [channels]."""
    values = tl.load(weight + (row * KERNEL_W + column) * n_channels + channels, mask=channels < n_channels, other=0)
    return values.to(tl.float32 if zero_point is None else tl.int32)


@triton.jit
def rows_of_window(
    x,
    weight,
    zero_point,
    image,
    first_row,
    columns,
    channels,
    in_h,
    in_w,
    n_channels,
    x_spacing,
    pad_h,
    pad_w,
    MULTIPLIER: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
):
    """Sums for `TILE_ROWS` rows of outputs, a tuple of [columns, channels]; the window's rows unrolled, no dilation."""
    is_channel = channels < n_channels
    inputs = channels // MULTIPLIER
    KIND: tl.constexpr = tl.float32 if zero_point is None else tl.int32
    sums = ()
    for _ in tl.static_range(TILE_ROWS):
        sums += (tl.zeros((TILE_COLUMNS, TILE_CHANNELS), KIND),)
    for s in range(KERNEL_W):
        factors = ()
        for r in tl.static_range(KERNEL_H):
            factors += (tap_weight(weight, r, s, channels, n_channels, zero_point, KERNEL_W),)
        for reach in tl.static_range((TILE_ROWS - 1) * STRIDE_H + KERNEL_H):
            values = input_tile(
                *(x, image, first_row * STRIDE_H - pad_h + reach, columns * STRIDE_W - pad_w + s, inputs, is_channel),
                *(in_h, in_w, x_spacing, zero_point),
            )
            grown = ()
            for at in tl.static_range(TILE_ROWS):
                if reach >= at * STRIDE_H and reach < at * STRIDE_H + KERNEL_H:
                    grown += (sums[at] + values * factors[reach - at * STRIDE_H][None, :],)
                else:
                    grown += (sums[at],)
            sums = grown
    return sums


@triton.jit
def taps_of_window(
    x,
    weight,
    zero_point,
    image,
    row,
    columns,
    channels,
    in_h,
    in_w,
    n_channels,
    x_spacing,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    MULTIPLIER: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
):
    """Sums for one row of outputs, [columns, channels], of any window."""
    is_channel = channels < n_channels
    sums = tl.zeros((TILE_COLUMNS, TILE_CHANNELS), tl.float32 if zero_point is None else tl.int32)
    for r in range(KERNEL_H):
        for s in range(KERNEL_W):
            values = input_tile(
                *(x, image, row * STRIDE_H - pad_h + r * dilation_h, columns * STRIDE_W - pad_w + s * dilation_w),
                *(channels // MULTIPLIER, is_channel, in_h, in_w, x_spacing, zero_point),
            )
            factor = tap_weight(weight, r, s, channels, n_channels, zero_point, KERNEL_W)
            sums += values * factor[None, :]
    return sums


@triton.jit
def depthwise_rows_kernel(
    x,
    weight,
    bias,
    scale,
    residual,
    y,
    in_h,
    in_w,
    n_channels,
    out_h,
    out_w,
    x_spacing,
    residual_spacing,
    y_spacing,
    pad_h,
    pad_w,
    X_UNIT: tl.constexpr,
    Y_UNIT: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
):
    x_spacing, n_channels = x_spacing * X_UNIT, n_channels * Y_UNIT
    residual_spacing, y_spacing = residual_spacing * Y_UNIT, y_spacing * Y_UNIT
    image, first_row, columns, channels = tile_of_outputs(
        tl.program_id(0), out_h, out_w, n_channels, TILE_ROWS, TILE_COLUMNS, TILE_CHANNELS
    )
    sums = rows_of_window(
        *(x, weight, None, image, first_row, columns, channels, in_h, in_w, n_channels, x_spacing, pad_h, pad_w),
        *(MULTIPLIER, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W),
        *(TILE_ROWS, TILE_COLUMNS, TILE_CHANNELS),
    )
    for at in tl.static_range(TILE_ROWS):
        row = first_row + at
        finish_tile(
            sums[at],
            (image.to(tl.int64) * out_h + row) * out_w + columns,
            channels,
            columns < tl.where(row < out_h, out_w, 0),
            n_channels,
            scale,
            bias,
            residual,
            residual_spacing,
            y,
            y_spacing,
            ACTIVATION,
        )


@triton.jit
def depthwise_taps_kernel(
    x,
    weight,
    bias,
    scale,
    residual,
    y,
    in_h,
    in_w,
    n_channels,
    out_h,
    out_w,
    x_spacing,
    residual_spacing,
    y_spacing,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    X_UNIT: tl.constexpr,
    Y_UNIT: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
):
    x_spacing, n_channels = x_spacing * X_UNIT, n_channels * Y_UNIT
    residual_spacing, y_spacing = residual_spacing * Y_UNIT, y_spacing * Y_UNIT
    image, row, columns, channels = tile_of_outputs(
        tl.program_id(0), out_h, out_w, n_channels, 1, TILE_COLUMNS, TILE_CHANNELS
    )
    sums = taps_of_window(
        *(x, weight, None, image, row, columns, channels, in_h, in_w, n_channels, x_spacing),
        *(pad_h, pad_w, dilation_h, dilation_w, MULTIPLIER, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W),
        *(TILE_COLUMNS, TILE_CHANNELS),
    )
    finish_tile(
        sums,
        (image.to(tl.int64) * out_h + row) * out_w + columns,
        channels,
        columns < out_w,
        n_channels,
        scale,
        bias,
        residual,
        residual_spacing,
        y,
        y_spacing,
        ACTIVATION,
    )


def is_unrolled(kernel: tuple[int, int], dilation: tuple[int, ...]) -> bool:
    """Whether a window's taps are unrolled."""
    return max(kernel) <= _UNROLLED and tuple(dilation) == (1, 1)


def depthwise_conv2d(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    activation: str,
    allow_tf32: bool,
    configuration: Configuration,
) -> None:
    """Runs `reference.depthwise_conv2d` into `y`; `weight: [KH, KW, C · multiplier]`."""
    kernel_h, kernel_w, _ = weight.shape
    batch, c_out, out_h, out_w = y.shape
    tile_rows, tile_columns, tile_channels = configuration.tile
    programs = batch * cdiv(out_h, tile_rows) * cdiv(out_w, tile_columns) * cdiv(c_out, tile_channels)
    x_unit, y_unit = unit(spacing(x)), unit(c_out, spacing(residual), spacing(y))
    arguments = (
        *(x, weight, bias, scale, residual, y, *x.shape[2:], c_out // y_unit, out_h, out_w),
        *(spacing(x) // x_unit, spacing(residual) // y_unit, spacing(y) // y_unit, *padding),
    )
    constants: dict[str, Any] = {
        "X_UNIT": x_unit,
        "Y_UNIT": y_unit,
        "MULTIPLIER": c_out // x.shape[1],
        "KERNEL_H": kernel_h,
        "KERNEL_W": kernel_w,
        "STRIDE_H": stride[0],
        "STRIDE_W": stride[1],
        "ACTIVATION": ACTIVATIONS.index(activation),
        "TILE_COLUMNS": tile_columns,
        "TILE_CHANNELS": tile_channels,
    }
    if is_unrolled((kernel_h, kernel_w), dilation):
        constants |= {"TILE_ROWS": tile_rows}
        launch(depthwise_rows_kernel, programs, configuration, *arguments, **constants)
    else:
        launch(depthwise_taps_kernel, programs, configuration, *arguments, *dilation, **constants)


def depthwise_configurations(
    device: Device,
    out: tuple[int, ...],
    kernel: tuple[int, int],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[Configuration, ...]:
    """What a depthwise convolution with an output `[N, C, H, W]` may run in, the best guess first: the tile of fewest
    loads an output that neither lies half outside nor leaves multiprocessors idle."""
    batch, c_out, out_h, out_w = out
    unrolled = is_unrolled(kernel, dilation)

    def fits(tile: tuple[int, ...]) -> bool:
        rows, columns, channels = tile
        return (
            (rows <= power_of_2(out_h) or not unrolled)
            and columns <= power_of_2(out_w, 8)
            and channels <= power_of_2(c_out, 16)
        )

    def configured(tile: tuple[int, ...]) -> Configuration:
        rows, columns, channels = tile
        return Configuration((rows if unrolled else 1, columns, channels), max(1, min(8, columns * channels // 128)), 1)

    def cost(configuration: Configuration) -> float:
        rows, columns, channels = configuration.tile
        programs = batch * cdiv(out_h, rows) * cdiv(out_w, columns) * cdiv(c_out, channels)
        waves = cdiv(programs, device.multiprocessors * _PROGRAMS_AT_ONCE)
        loads = ((rows - 1) * stride[0] + kernel[0]) * kernel[1] if unrolled else rows * kernel[0] * kernel[1]
        return waves * (columns * channels * (loads + 4 * rows) + _PROGRAM_OVERHEAD)

    fitting = [tile for tile in _TILES if fits(tile)] or _TILES[-1:]
    return tuple(sorted(dict.fromkeys(map(configured, fitting)), key=cost))


def depthwise_conv2d_configurations(
    device: Device, y: Any, x: Any, weight: Any, *others: Any, stride: Any, dilation: Any, **options: Any
) -> tuple[Configuration, ...]:
    """What `depthwise_conv2d` may run in, the best guess first."""
    return depthwise_configurations(device, y.shape, weight.shape[:2], stride, dilation)
