"""Sums over windows: of patches, TILE_ROWS × TILE_COLUMNS pixels of one image; of inputs in memory or on chip."""

from __future__ import annotations

import triton
import triton.language as tl

from kernelpress.kernels.triton.epilogue import tile_offsets
from kernelpress.kernels.triton.tiles import input_pixels

__all__ = ["depthwise_of_tile", "patch_of_program", "window_product"]


@triton.jit
def patch_of_program(program, out_h, out_w, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr):
    """(image, first row, first column) of a program's patch."""
    column_tiles, row_tiles = tl.cdiv(out_w, TILE_COLUMNS), tl.cdiv(out_h, TILE_ROWS)
    place = program // column_tiles
    return place // row_tiles, place % row_tiles * TILE_ROWS, program % column_tiles * TILE_COLUMNS


@triton.jit
def window_product(
    x,
    weight,
    image,
    rows,
    columns,
    is_pixel,
    channels,
    in_h,
    in_w,
    c_in,
    n_channels,
    x_spacing,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE_PIXELS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
    TILE_DEPTH: tl.constexpr,
):
    """Sums over windows that begin at (rows, columns): [pixels, channels]; `weight: [n_channels, KH, KW, c_in]`."""
    depth = tl.arange(0, TILE_DEPTH)
    is_channel = channels < n_channels
    sums = tl.zeros((TILE_PIXELS, TILE_CHANNELS), tl.float32)
    for tap in range(KERNEL_H * KERNEL_W):
        pixels, is_inside = input_pixels(image, rows + tap // KERNEL_W, columns + tap % KERNEL_W, in_h, in_w)
        x_tile = x + tile_offsets(pixels, depth, x_spacing)
        weight_tile = weight + tile_offsets(channels * (KERNEL_H * KERNEL_W) + tap, depth, c_in)
        for start in range(0, c_in, TILE_DEPTH):
            in_depth = (depth < c_in - start)[None, :]
            values = tl.load(x_tile + start, mask=(is_inside & is_pixel)[:, None] & in_depth, other=0.0)
            weights = tl.load(weight_tile + start, mask=is_channel[:, None] & in_depth, other=0.0)
            sums = tl.dot(values, tl.trans(weights), sums, input_precision=PRECISION)
    return sums


@triton.jit
def depthwise_of_tile(
    values,
    weight,
    channels,
    n_channels,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
):
    """Depthwise sums, stride 1, where a window is centred, of float32 `values: [LANES, channels]` on chip.

    A lane is a pixel of a patch with its border, WIDTH to a row: a tap reads all lanes a constant distance away. In the
    border the sums are of anything. `weight: [KH, KW, n_channels]`.
    """
    lanes = tl.arange(0, LANES)
    sums = tl.zeros((LANES, TILE_CHANNELS), tl.float32)
    for tap in range(KERNEL_H * KERNEL_W):
        distance = (tap // KERNEL_W - KERNEL_H // 2) * WIDTH + tap % KERNEL_W - KERNEL_W // 2
        sources = tl.minimum(tl.maximum(lanes + distance, 0), LANES - 1)
        factor = tl.load(weight + tap * n_channels + channels, mask=channels < n_channels, other=0.0)
        shifted = tl.gather(values, tl.broadcast_to(sources[:, None], (LANES, TILE_CHANNELS)), 0)
        sums += shifted * factor.to(tl.float32)[None, :]
    return sums
