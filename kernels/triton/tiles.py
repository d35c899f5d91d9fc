"""Tile configurations of matrix products, and the order in which programs take their tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from kernelpress.kernels.triton.launch import Configuration, Device, cdiv, power_of_2

__all__ = [
    "input_pixels",
    "is_scattered",
    "product_configurations",
    "product_precision",
    "tile_of_program",
    "window_corners",
]

_PRODUCTS = (
    Configuration((128, 256, 64), 8, 3),
    Configuration((128, 128, 64), 8, 3),
    Configuration((128, 64, 64), 8, 4),
    Configuration((64, 128, 64), 8, 4),
    Configuration((64, 64, 64), 4, 4),
    Configuration((32, 64, 64), 4, 5),
    Configuration((64, 32, 64), 8, 5),
    Configuration((64, 16, 64), 4, 5),
    Configuration((16, 32, 128), 4, 4),
)
"""Rows (pixels), columns (output channels), and 16-bit elements of the sum a step, largest first."""

_MOST_ELEMENTS = 128 * 256
"""Of a tile's accumulator."""

_MOST_REGISTERS = 128 * 128
"""Where `mma` takes its operands from registers, as it does before sm_90, float32 is staged, or the end takes more."""

_MOST_SCATTERED = 64 * 128
"""Where operands are scattered."""

_MOST_EXACT = 64 * 64
"""Of float32 without TF32: its product is done in registers."""

_WAVES = 0.75
"""The least share of the multiprocessors that a tile size should occupy before a smaller one is better."""


def product_precision(element_bytes: int, allow_tf32: bool) -> str:
    """`input_precision` of `tl.dot`; it says something of float32 only."""
    return "tf32" if element_bytes == 4 and allow_tf32 else "ieee"


def is_scattered(channels: int, element_bytes: int) -> bool:
    """Whether pixels of so many channels are read in less than 8 bytes at once. A thread has a register or two for the
    address of each access then: steps must be short."""
    return channels * element_bytes % 8 != 0


def product_configurations(
    rows: int,
    columns: int,
    channels: int,
    element_bytes: int,
    precision: str,
    device: Device,
    *,
    has_more_operands: bool = False,
    has_factors: bool = False,
) -> tuple[Configuration, ...]:
    """The configurations that a product of this size may take, the best guess first: the largest tiles that neither
    waste half of themselves nor leave multiprocessors idle.

    It sums over `channels` that are neighbours in memory, maybe several times. An epilogue that `has_more_operands`
    than a bias finds no registers in the largest tile. Rows that `has_factors` for each of their values take the shared
    memory of twice as many.
    """
    scattered = element_bytes > 1 and is_scattered(channels, element_bytes)
    most = _MOST_ELEMENTS
    if element_bytes == 4 or device.capability < 90:
        most = _MOST_REGISTERS
    if has_more_operands:
        most = _MOST_REGISTERS // 2 if device.capability >= 100 else _MOST_REGISTERS
    if scattered or (has_more_operands and is_scattered(columns, element_bytes)):
        most = _MOST_SCATTERED
    if element_bytes == 4 and precision == "ieee":
        most = _MOST_EXACT
    fitting = []
    for (tile_rows, tile_columns, step), warps, stages in _PRODUCTS:
        step = step * 2 // element_bytes // (2 if scattered else 1)
        if tile_rows * tile_columns > most:
            continue
        staged = tile_rows * (2 if has_factors else 1) + tile_columns
        if staged * step * element_bytes * stages > device.shared_bytes:
            continue
        if tile_rows > power_of_2(rows, 16) or tile_columns > power_of_2(columns, 16):
            continue
        fitting.append(Configuration((tile_rows, tile_columns, step), warps, stages))
    if not fitting:
        (tile_rows, tile_columns, step), warps, stages = _PRODUCTS[-1]
        fitting = [Configuration((tile_rows, 16, step * 2 // element_bytes), warps, stages)]

    def cost(configuration: Configuration) -> float:
        tile_rows, tile_columns, _ = configuration.tile
        tiles = cdiv(rows, tile_rows) * cdiv(columns, tile_columns)
        waves = cdiv(tiles, device.multiprocessors) if tiles > device.multiprocessors * _WAVES else 1
        return waves * (tile_rows * tile_columns + 32 * (tile_rows + tile_columns))

    return tuple(sorted(fitting, key=cost))


@triton.jit
def tile_of_program(program, row_tiles, column_tiles, GROUP: tl.constexpr):
    """(row tile, column tile) of a program: bands of `GROUP` row tiles go column by column, so that what they read
    meets in the second-level cache."""
    band = program // (GROUP * column_tiles)
    rows_of_band = min(row_tiles - band * GROUP, GROUP)
    within = program % (GROUP * column_tiles)
    return band * GROUP + within % rows_of_band, within // rows_of_band


@triton.jit
def window_corners(pixels, out_h, out_w, stride_h, stride_w, pad_h, pad_w):
    """(image, row, column) where the windows of output pixels begin in the input, maybe outside; pixels are numbered
    through all images."""
    image = pixels // (out_h * out_w)
    place = pixels % (out_h * out_w)
    return image, place // out_w * stride_h - pad_h, place % out_w * stride_w - pad_w


@triton.jit
def input_pixels(image, row, column, in_h, in_w):
    """(pixel numbered through all images, in 64 bits; whether it is inside its image)."""
    is_inside = (row >= 0) & (row < in_h) & (column >= 0) & (column < in_w)
    return (image.to(tl.int64) * in_h + row) * in_w + column, is_inside
