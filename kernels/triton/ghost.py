"""Ghost convolution, channels_last.   p = act(conv(x, W) + b)  y = concat(p, cheap_act(depthwise(p, w) + c)) + residual

    y, one pixel:  │ p: primary channels │ cheap: kept channels │   both written where they belong, nothing concatenated

    one kernel:  TILE_ROWS × TILE_COLUMNS pixels × TILE_CHANNELS primary channels, and the pixels around them
      ┌──────────────┐
      │   ┌──────┐   │   p of all of them by products in steps of TILE_DEPTH, zero outside the image; the cheap half
      │   │ both │   │   from there, lanes reading other lanes by way of shared memory
      │   └──────┘   │
      └──────────────┘   bound by that reading in large images, where two kernels win; else by its own latency

    two kernels:  a product over windows writes p, a depthwise convolution reads it for the cheap half; p lies in y, or
    beside it where a residual is added                                           bound by memory: x, p twice, cheap

Configurations of the one kernel are (TILE_ROWS, TILE_COLUMNS, TILE_CHANNELS, TILE_DEPTH). It takes a multiplier of 1.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kernelpress.kernels.reference import ACTIVATIONS
from kernelpress.kernels.triton.depthwise import (
    depthwise_configurations,
    is_unrolled,
    rows_of_window,
    taps_of_window,
    tile_of_outputs,
)
from kernelpress.kernels.triton.epilogue import activate, affine, tile_offsets
from kernelpress.kernels.triton.launch import (
    Configuration,
    Device,
    InTurn,
    cdiv,
    launch,
    power_of_2,
    spacing,
    unit,
)
from kernelpress.kernels.triton.tiles import (
    input_pixels,
    is_scattered,
    product_configurations,
    product_precision,
    tile_of_program,
    window_corners,
)
from kernelpress.kernels.triton.windows import depthwise_of_tile, patch_of_program, window_product

__all__ = ["ghost_conv2d", "ghost_conv2d_configurations"]

_PATCHES = (
    Configuration((14, 14, 16, 64), 8, 3),
    Configuration((6, 14, 32, 64), 4, 3),
    Configuration((6, 6, 32, 64), 4, 3),
)
"""With a window of 3×3, patches fill 256, 128 and 64 lanes. TILE_DEPTH is of 16-bit elements."""

_MOST_PRIMARY, _MOST_PRIMARY_OF_SM_90 = 64 * 64, 64 * 128
"""Elements of a tile of the product: more spill, with two outputs to write."""

_MOST_SCATTERED_ROWS = 4
"""Of the tile of a cheap operation whose values are scattered."""

_LEAST_DEPTH = 16
"""For scattered values, whose addresses take registers, and for exact float32."""

_MOST_LANES = 256

_STEP, _TAP, _PROGRAM, _LAUNCH = 300, 150, 1500, 5000
"""Clocks that nothing hides within a program: for a step of its products, a tap, its start and end; for a launch."""

_GATHERED = 12
"""Values that a multiprocessor's lanes read of one another in a clock."""

_MEMORY_BYTES = 18.5
"""Of a multiprocessor's share, per clock."""

_PROGRAMS_AT_ONCE = 4
"""On a multiprocessor."""


@triton.jit
def store_half(value, pixels, is_pixel, channels, n_channels, first, residual, residual_spacing, y, y_spacing):
    """Stores finished channels, which begin at `first` in y, with the residual added."""
    is_known = is_pixel[:, None] & (channels < n_channels)[None, :]
    if residual is not None:
        offsets = tile_offsets(pixels, channels + first, residual_spacing)
        value += tl.load(residual + offsets, mask=is_known, other=0.0).to(tl.float32)
    tl.store(y + tile_offsets(pixels, channels + first, y_spacing), value.to(y.dtype.element_ty), mask=is_known)


@triton.jit
def ghost_kernel(
    x,
    primary_weight,
    primary_bias,
    cheap_weight,
    cheap_bias,
    residual,
    y,
    in_h,
    in_w,
    c_in,
    out_h,
    out_w,
    primary,
    kept,
    x_spacing,
    residual_spacing,
    y_spacing,
    pad_h,
    pad_w,
    X_UNIT: tl.constexpr,
    Y_UNIT: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    CHEAP_H: tl.constexpr,
    CHEAP_W: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHEAP_ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
    TILE_DEPTH: tl.constexpr,
    LANES: tl.constexpr,
):
    WIDTH: tl.constexpr = TILE_COLUMNS + CHEAP_W - 1
    primary = primary * Y_UNIT
    channel_tiles = tl.cdiv(primary, TILE_CHANNELS)
    program = tl.program_id(0)
    image, first_row, first_column = patch_of_program(program // channel_tiles, out_h, out_w, TILE_ROWS, TILE_COLUMNS)
    channels = program % channel_tiles * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    lanes = tl.arange(0, LANES)
    down, along = lanes // WIDTH - CHEAP_H // 2, lanes % WIDTH - CHEAP_W // 2
    rows, columns = first_row + down, first_column + along
    pixels, is_pixel = input_pixels(image, rows, columns, out_h, out_w)
    is_own = is_pixel & (down >= 0) & (down < TILE_ROWS) & (along >= 0) & (along < TILE_COLUMNS)

    value = window_product(
        *(x, primary_weight, image, rows * STRIDE_H - pad_h, columns * STRIDE_W - pad_w, is_pixel, channels),
        *(in_h, in_w, c_in * X_UNIT, primary, x_spacing * X_UNIT, KERNEL_H, KERNEL_W, PRECISION),
        *(LANES, TILE_CHANNELS, TILE_DEPTH),
    )
    value = activate(affine(value, None, primary_bias, channels, primary), ACTIVATION)
    value = tl.where(is_pixel[:, None], value, 0.0)
    target = (residual, residual_spacing * Y_UNIT, y, y_spacing * Y_UNIT)
    store_half(value, pixels, is_own, channels, primary, 0, *target)

    kept = kept * Y_UNIT
    sums = depthwise_of_tile(*(value, cheap_weight, channels, kept, CHEAP_H, CHEAP_W, WIDTH, LANES, TILE_CHANNELS))
    sums = activate(affine(sums, None, cheap_bias, channels, kept), CHEAP_ACTIVATION)
    store_half(sums, pixels, is_own, channels, kept, primary, *target)


@triton.jit
def primary_kernel(
    x,
    weight,
    bias,
    residual,
    p,
    y,
    n_pixels,
    in_h,
    in_w,
    c_in,
    out_h,
    out_w,
    primary,
    x_spacing,
    residual_spacing,
    p_spacing,
    y_spacing,
    pad_h,
    pad_w,
    X_UNIT: tl.constexpr,
    Y_UNIT: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE_PIXELS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
    TILE_DEPTH: tl.constexpr,
):
    primary = primary * Y_UNIT
    pixel_tile, channel_tile = tile_of_program(
        tl.program_id(0), tl.cdiv(n_pixels, TILE_PIXELS), tl.cdiv(primary, TILE_CHANNELS), GROUP=8
    )
    pixels = pixel_tile * TILE_PIXELS + tl.arange(0, TILE_PIXELS)
    channels = channel_tile * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    is_pixel = pixels < n_pixels
    image, rows, columns = window_corners(pixels, out_h, out_w, STRIDE_H, STRIDE_W, pad_h, pad_w)
    value = window_product(
        *(x, weight, image, rows, columns, is_pixel, channels, in_h, in_w, c_in * X_UNIT, primary),
        *(x_spacing * X_UNIT, KERNEL_H, KERNEL_W, PRECISION, TILE_PIXELS, TILE_CHANNELS, TILE_DEPTH),
    )
    value = activate(affine(value, None, bias, channels, primary), ACTIVATION)
    store_half(value, pixels, is_pixel, channels, primary, 0, None, 0, p, p_spacing * Y_UNIT)
    if residual is not None:
        target = (residual, residual_spacing * Y_UNIT, y, y_spacing * Y_UNIT)
        store_half(value, pixels, is_pixel, channels, primary, 0, *target)


@triton.jit
def cheap_kernel(
    p,
    weight,
    bias,
    residual,
    y,
    out_h,
    out_w,
    primary,
    kept,
    p_spacing,
    residual_spacing,
    y_spacing,
    P_UNIT: tl.constexpr,
    Y_UNIT: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    IS_UNROLLED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
):
    kept = kept * Y_UNIT
    image, first_row, columns, channels = tile_of_outputs(
        tl.program_id(0), out_h, out_w, kept, TILE_ROWS, TILE_COLUMNS, TILE_CHANNELS
    )
    if IS_UNROLLED:
        sums = rows_of_window(
            *(p, weight, None, image, first_row, columns, channels, out_h, out_w, kept, p_spacing * P_UNIT),
            *(KERNEL_H // 2, KERNEL_W // 2, MULTIPLIER, KERNEL_H, KERNEL_W, 1, 1),
            *(TILE_ROWS, TILE_COLUMNS, TILE_CHANNELS),
        )
    else:
        sums = (
            taps_of_window(
                *(p, weight, None, image, first_row, columns, channels, out_h, out_w, kept, p_spacing * P_UNIT),
                *(KERNEL_H // 2, KERNEL_W // 2, 1, 1, MULTIPLIER, KERNEL_H, KERNEL_W, 1, 1),
                *(TILE_COLUMNS, TILE_CHANNELS),
            ),
        )
    for at in tl.static_range(TILE_ROWS):
        row = first_row + at
        pixels = (image.to(tl.int64) * out_h + row) * out_w + columns
        is_pixel = columns < tl.where(row < out_h, out_w, 0)
        value = activate(affine(sums[at], None, bias, channels, kept), ACTIVATION)
        target = (residual, residual_spacing * Y_UNIT, y, y_spacing * Y_UNIT)
        store_half(value, pixels, is_pixel, channels, kept, primary, *target)


def ghost_conv2d(
    y: Tensor,
    x: Tensor,
    primary_weight: Tensor,
    primary_bias: Tensor | None,
    cheap_weight: Tensor,
    cheap_bias: Tensor | None,
    residual: Tensor | None,
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    activation: str,
    cheap_activation: str,
    multiplier: int,
    allow_tf32: bool,
    configuration: Configuration | InTurn,
) -> None:
    """Runs `reference.ghost_conv2d` into `y`; `primary_weight: [C_primary, KH, KW, C_in]`, `cheap_weight: [DH, DW,
    kept channels]`, and `multiplier` filters a primary channel, of which the last may be cut off."""
    primary, kernel_h, kernel_w, c_in = primary_weight.shape
    cheap_h, cheap_w, kept = cheap_weight.shape
    batch, _, out_h, out_w = y.shape
    x_unit = unit(c_in, spacing(x))
    precision = product_precision(x.element_size(), allow_tf32)
    window: dict[str, Any] = {
        "KERNEL_H": kernel_h,
        "KERNEL_W": kernel_w,
        "STRIDE_H": stride[0],
        "STRIDE_W": stride[1],
        "ACTIVATION": ACTIVATIONS.index(activation),
        "PRECISION": precision,
    }
    if isinstance(configuration, Configuration):
        tile_rows, tile_columns, tile_channels, tile_depth = configuration.tile
        y_unit = unit(primary, kept, spacing(residual), spacing(y))
        patches = batch * cdiv(out_h, tile_rows) * cdiv(out_w, tile_columns)
        launch(
            ghost_kernel,
            patches * cdiv(primary, tile_channels),
            configuration,
            *(x, primary_weight, primary_bias, cheap_weight, cheap_bias, residual, y),
            *(*x.shape[2:], c_in // x_unit, out_h, out_w, primary // y_unit, kept // y_unit),
            *(spacing(x) // x_unit, spacing(residual) // y_unit, spacing(y) // y_unit, *padding),
            X_UNIT=x_unit,
            Y_UNIT=y_unit,
            **window,
            CHEAP_H=cheap_h,
            CHEAP_W=cheap_w,
            CHEAP_ACTIVATION=ACTIVATIONS.index(cheap_activation),
            TILE_ROWS=tile_rows,
            TILE_COLUMNS=tile_columns,
            TILE_CHANNELS=tile_channels,
            TILE_DEPTH=tile_depth,
            LANES=_lanes(tile_rows, tile_columns, cheap_h, cheap_w),
        )
        return
    first, second = configuration.steps
    p = y if residual is None else y.new_empty(batch, out_h, out_w, primary).permute(0, 3, 1, 2)
    p_spacing = spacing(y) if residual is None else primary
    tile_pixels, tile_channels, tile_depth = first.tile
    y_unit = unit(primary, spacing(residual), spacing(y))
    launch(
        primary_kernel,
        cdiv(batch * out_h * out_w, tile_pixels) * cdiv(primary, tile_channels),
        first,
        *(x, primary_weight, primary_bias, residual, p, y),
        *(batch * out_h * out_w, *x.shape[2:], c_in // x_unit, out_h, out_w, primary // y_unit),
        *(spacing(x) // x_unit, spacing(residual) // y_unit, p_spacing // y_unit, spacing(y) // y_unit, *padding),
        X_UNIT=x_unit,
        Y_UNIT=y_unit,
        **window,
        TILE_PIXELS=tile_pixels,
        TILE_CHANNELS=tile_channels,
        TILE_DEPTH=tile_depth,
    )
    if kept == 0:
        return
    tile_rows, tile_columns, tile_channels = second.tile
    y_unit, p_unit = unit(kept, primary, spacing(residual), spacing(y)), unit(p_spacing)
    launch(
        cheap_kernel,
        batch * cdiv(out_h, tile_rows) * cdiv(out_w, tile_columns) * cdiv(kept, tile_channels),
        second,
        *(p, cheap_weight, cheap_bias, residual, y, out_h, out_w, primary, kept // y_unit),
        *(p_spacing // p_unit, spacing(residual) // y_unit, spacing(y) // y_unit),
        P_UNIT=p_unit,
        Y_UNIT=y_unit,
        MULTIPLIER=multiplier,
        KERNEL_H=cheap_h,
        KERNEL_W=cheap_w,
        IS_UNROLLED=is_unrolled((cheap_h, cheap_w), (1, 1)),
        ACTIVATION=ACTIVATIONS.index(cheap_activation),
        TILE_ROWS=tile_rows,
        TILE_COLUMNS=tile_columns,
        TILE_CHANNELS=tile_channels,
    )


def _lanes(rows: int, columns: int, cheap_h: int, cheap_w: int) -> int:
    return power_of_2((rows + cheap_h - 1) * (columns + cheap_w - 1), 16)


def ghost_conv2d_configurations(
    device: Device,
    y: Any,
    x: Any,
    primary_weight: Any,
    primary_bias: Any,
    cheap_weight: Any,
    cheap_bias: Any = None,
    residual: Any = None,
    *,
    multiplier: int,
    allow_tf32: bool,
    **options: Any,
) -> tuple[Configuration | InTurn, ...]:
    """What `ghost_conv2d` may run in, the cheapest by the model first."""
    primary, kernel_h, kernel_w, c_in = primary_weight.shape
    cheap_h, cheap_w, kept = cheap_weight.shape
    batch, _, out_h, out_w = y.shape
    pixels, size = batch * out_h * out_w, x.dtype.itemsize
    precision = product_precision(size, allow_tf32)
    sizes = (pixels, primary, c_in, size, precision, device)
    products = product_configurations(*sizes, has_more_operands=residual is not None)
    most = _MOST_PRIMARY_OF_SM_90 if 90 <= device.capability < 100 else _MOST_PRIMARY
    products = tuple(it for it in products if it.tile[0] * it.tile[1] <= most) or products[-1:]
    cheap = depthwise_configurations(device, (batch, max(1, kept), out_h, out_w), (cheap_h, cheap_w), (1, 1), (1, 1))
    if not is_unrolled((cheap_h, cheap_w), (1, 1)):
        cheap = (min(cheap, key=lambda it: it.tile[2]),)
    elif is_scattered(primary, size) or is_scattered(kept, size):
        cheap = tuple(it for it in cheap if it.tile[0] <= _MOST_SCATTERED_ROWS)
    in_turn = InTurn((products[0], cheap[0]))
    if multiplier != 1 or kept == 0:
        return (in_turn,)

    found: dict[Configuration, None] = {}
    for (rows, columns, channels, depth), warps, stages in _PATCHES:
        rows, columns = min(rows + 3 - cheap_h, out_h), min(columns + 3 - cheap_w, out_w)
        is_short = is_scattered(c_in, size) or (size == 4 and precision == "ieee")
        depth = _LEAST_DEPTH if is_short else min(depth * 2 // size, power_of_2(c_in, 16))
        if min(rows, columns) < 1:
            continue
        lanes = _lanes(rows, columns, cheap_h, cheap_w)
        if lanes <= _MOST_LANES and stages * (lanes + channels) * depth * size <= device.shared_bytes:
            found[Configuration((rows, columns, channels, depth), warps, stages)] = None

    def cost(configuration: Configuration) -> float:
        rows, columns, channels, depth = configuration.tile
        lanes, taps = _lanes(rows, columns, cheap_h, cheap_w), cheap_h * cheap_w
        patches = batch * cdiv(out_h, rows) * cdiv(out_w, columns)
        rounds = cdiv(patches * cdiv(primary, channels), device.multiprocessors)
        steps = kernel_h * kernel_w * cdiv(c_in, depth)
        busy = lanes * (channels * taps / _GATHERED + steps * depth * size / _MEMORY_BYTES)
        waiting = steps * _STEP + taps * _TAP + _PROGRAM
        return _LAUNCH + max(rounds * busy, cdiv(rounds, _PROGRAMS_AT_ONCE) * waiting)

    moved = x.shape[0] * x.shape[2] * x.shape[3] * c_in + pixels * (2 * primary + kept)
    steps = kernel_h * kernel_w * cdiv(c_in, products[0].tile[2])
    two_kernels = moved * size / _MEMORY_BYTES / device.multiprocessors + 2 * (_LAUNCH + _PROGRAM) + steps * _STEP
    fitting = sorted(found, key=cost)
    return (*fitting, in_turn) if fitting and cost(fitting[0]) < two_kernels else (in_turn, *fitting)
