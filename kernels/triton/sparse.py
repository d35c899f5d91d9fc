"""Products with block-CSR weights, channels_last.     y[m, n] = act(scale[n] · Σ_blocks Σ_k x[m, k] · block[n, k] + …)

    row of blocks   ▓ · · ▓ · ▓ · ·    one program: TILE_PIXELS pixels × one row of blocks; its sum goes over that row's
                    · · · · · · · ·    blocks, which lie in memory one after the other, in steps of TILE_DEPTH of their
                    ▓ ▓ ▓ ▓ ▓ ▓ ▓ ▓    columns: a part of a block, or several blocks

    x is gathered as the block columns say, which are loaded a step ahead of it, while the copies of the next steps are
    under way. A convolution's block column is a position of the window and some channels there. A step reads
    TILE_PIXELS + r values for TILE_PIXELS · r products: the second-level cache bounds it.

Configurations are (TILE_PIXELS, TILE_DEPTH).
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kernelpress.kernels.reference import ACTIVATIONS
from kernelpress.kernels.triton.epilogue import finish_int8_tile, finish_tile
from kernelpress.kernels.triton.launch import Configuration, Device, cdiv, launch, power_of_2, spacing, unit
from kernelpress.kernels.triton.tiles import (
    input_pixels,
    is_scattered,
    product_precision,
    tile_of_program,
    window_corners,
)

__all__ = ["sparse_conv2d", "sparse_conv2d_configurations", "sparse_matmul", "sparse_matmul_configurations"]

_TILES = (
    Configuration((256, 64), 8, 3),
    Configuration((128, 64), 4, 4),
    Configuration((128, 64), 4, 3),
    Configuration((64, 64), 4, 4),
    Configuration((32, 64), 4, 4),
    Configuration((16, 64), 4, 4),
)
"""Pixels, and elements of the sum a step where they have 8 or 16 bits."""

_MOST_EXACT_PIXELS, _EXACT_DEPTH = 64, 16
"""Of a float32 tile without TF32: its product is done in registers."""

_SPILLED_ON_SM_100 = (64, 32)
"""Pixels and rows of a block of the one float32 tile that ptxas spills there, at 72 registers."""

_SCATTERED_DEPTH = {1: 32, 2: 16, 4: 16}
"""Where values are read in less than 8 bytes, by bytes of an element: a thread keeps the address of each access."""

_PROGRAM_OVERHEAD = 100_000
"""Of starting a program and storing its tile, in bytes that a multiprocessor reads meanwhile: about 2 µs."""


@triton.jit
def sparse_kernel(
    x,
    row_offsets,
    columns,
    blocks,
    bias,
    scale,
    residual,
    y,
    n_pixels,
    n_rows,
    c_in,
    c_out,
    in_h,
    in_w,
    out_h,
    out_w,
    x_spacing,
    residual_spacing,
    y_spacing,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    kernel_w,
    X_UNIT: tl.constexpr,
    Y_UNIT: tl.constexpr,
    IS_WINDOW: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE_PIXELS: tl.constexpr,
    TILE_DEPTH: tl.constexpr,
):
    c_in, x_spacing = c_in * X_UNIT, x_spacing * X_UNIT
    c_out, residual_spacing, y_spacing = c_out * Y_UNIT, residual_spacing * Y_UNIT, y_spacing * Y_UNIT
    pixel_tile, row = tile_of_program(tl.program_id(0), tl.cdiv(n_pixels, TILE_PIXELS), n_rows, GROUP=8)
    pixels = pixel_tile * TILE_PIXELS + tl.arange(0, TILE_PIXELS)
    is_pixel = pixels < n_pixels
    first = tl.load(row_offsets + row)
    row_depth = (tl.load(row_offsets + row + 1) - first) * BLOCK_COLUMNS
    row_columns = columns + first
    row_blocks = blocks + first.to(tl.int64) * (BLOCK_ROWS * BLOCK_COLUMNS)
    block_rows = tl.arange(0, BLOCK_ROWS)
    depth = tl.arange(0, TILE_DEPTH)
    at = tl.arange(0, TILE_DEPTH if TILE_DEPTH > BLOCK_COLUMNS else 1)  # a step within one block has one column
    if IS_WINDOW:
        image, top, left = window_corners(pixels, out_h, out_w, stride_h, stride_w, pad_h, pad_w)
    IS_INT8: tl.constexpr = x.dtype.element_ty == tl.int8
    SUM: tl.constexpr = tl.int32 if IS_INT8 else tl.float32
    accumulator = tl.zeros((TILE_PIXELS, BLOCK_ROWS), SUM)
    column = tl.load(row_columns + at // BLOCK_COLUMNS, mask=at < row_depth, other=0)
    for start in tl.range(0, row_depth, TILE_DEPTH):
        within = (start + depth) % BLOCK_COLUMNS
        is_listed = depth < row_depth - start
        if IS_WINDOW:
            blocks_of_position = tl.cdiv(c_in, BLOCK_COLUMNS)
            position = column // blocks_of_position
            channels = column % blocks_of_position * BLOCK_COLUMNS + within
            inputs, is_inside = input_pixels(
                image[:, None],
                top[:, None] + (position // kernel_w * dilation_h)[None, :],
                left[:, None] + (position % kernel_w * dilation_w)[None, :],
                in_h,
                in_w,
            )
            mask = is_inside & is_pixel[:, None] & (is_listed & (channels < c_in))[None, :]
        else:
            channels = column * BLOCK_COLUMNS + within
            inputs = pixels.to(tl.int64)[:, None]
            mask = is_pixel[:, None] & (is_listed & (channels < c_in))[None, :]
        values = tl.load(x + (inputs * x_spacing + channels[None, :]), mask=mask, other=0)
        place = (start + depth) // BLOCK_COLUMNS * (BLOCK_ROWS * BLOCK_COLUMNS) + within
        weights = tl.load(
            row_blocks + (block_rows[:, None] * BLOCK_COLUMNS + place[None, :]), mask=is_listed[None, :], other=0
        )
        following = start + TILE_DEPTH + at
        column = tl.load(row_columns + following // BLOCK_COLUMNS, mask=following < row_depth, other=0)
        accumulator = tl.dot(values, tl.trans(weights), accumulator, input_precision=PRECISION, out_dtype=SUM)
    channels = row * BLOCK_ROWS + block_rows
    if IS_INT8:
        finish_int8_tile(
            *(accumulator.to(tl.float32), pixels, channels, is_pixel, c_out, scale, bias),
            *(residual, residual_spacing, 1.0, 0, y, y_spacing, 1.0, 0, ACTIVATION),
        )
    else:
        finish_tile(
            *(accumulator, pixels, channels, is_pixel, c_out, scale, bias),
            *(residual, residual_spacing, y, y_spacing, ACTIVATION),
        )


def sparse_matmul(
    y: Tensor,
    x: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    blocks: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    *,
    activation: str,
    allow_tf32: bool,
    configuration: Configuration,
    **options: Any,
) -> None:
    """Runs `reference.sparse_matmul` into `y`; the weight's parts contiguous."""
    c_in, c_out = x.shape[-1], y.shape[-1]
    _product(
        *(y, x, row_offsets, columns, blocks, bias, scale, residual, x.numel() // c_in, c_in, c_out),
        *((1, 1), (1, 1), (1, 1), (1, 1), (0, 0), (1, 1), activation, allow_tf32, configuration),
    )


def sparse_conv2d(
    y: Tensor,
    x: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    blocks: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    *,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    activation: str,
    allow_tf32: bool,
    configuration: Configuration,
    **options: Any,
) -> None:
    """Runs `reference.sparse_conv2d` into `y`; the weight's parts contiguous."""
    batch, c_out, out_h, out_w = y.shape
    _product(
        *(y, x, row_offsets, columns, blocks, bias, scale, residual, batch * out_h * out_w, x.shape[1], c_out),
        *(tuple(x.shape[2:]), (out_h, out_w), kernel_size, stride, padding, dilation),
        *(activation, allow_tf32, configuration),
    )


def _product(
    y: Tensor,
    x: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    blocks: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    pixels: int,
    c_in: int,
    c_out: int,
    image: tuple[int, ...],
    out: tuple[int, ...],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    activation: str,
    allow_tf32: bool,
    configuration: Configuration,
) -> None:
    rows = row_offsets.shape[0] - 1
    tile_pixels, tile_depth = configuration.tile
    x_unit, y_unit = unit(c_in, spacing(x)), unit(c_out, spacing(residual), spacing(y))
    launch(
        sparse_kernel,
        cdiv(pixels, tile_pixels) * rows,
        configuration,
        *(x, row_offsets, columns, blocks, bias, scale, residual, y),
        *(pixels, rows, c_in // x_unit, c_out // y_unit, *image, *out),
        *(spacing(x) // x_unit, spacing(residual) // y_unit, spacing(y) // y_unit),
        *(*stride, *padding, *dilation, kernel_size[1]),
        X_UNIT=x_unit,
        Y_UNIT=y_unit,
        IS_WINDOW=(tuple(kernel_size), tuple(stride), tuple(padding)) != ((1, 1), (1, 1), (0, 0)),
        BLOCK_ROWS=blocks.shape[1],
        BLOCK_COLUMNS=blocks.shape[2],
        ACTIVATION=ACTIVATIONS.index(activation),
        PRECISION=product_precision(x.element_size(), allow_tf32),
        TILE_PIXELS=tile_pixels,
        TILE_DEPTH=tile_depth,
    )


def _configurations(
    device: Device, pixels: int, channels: int, rows: int, blocks: Any, element_bytes: int, allow_tf32: bool
) -> tuple[Configuration, ...]:
    """The best guess first: that of least time on the busiest multiprocessor, counted in bytes of the second-level
    cache, where programs that run together share what starting one costs."""
    count, block_rows, block_columns = blocks.shape
    is_exact = product_precision(element_bytes, allow_tf32) == "ieee" and element_bytes == 4
    scattered = is_scattered(channels, element_bytes)
    fitting = []
    for (tile_pixels, depth), warps, stages in _TILES:
        depth = _EXACT_DEPTH if is_exact else min(depth, 128 // element_bytes)
        if scattered:
            depth = min(depth, _SCATTERED_DEPTH[element_bytes])
        if (is_exact or scattered) and tile_pixels > _MOST_EXACT_PIXELS:
            continue
        if device.capability >= 100 and element_bytes == 4 and (tile_pixels, block_rows) == _SPILLED_ON_SM_100:
            continue
        if _shared_bytes(tile_pixels, block_rows, depth, element_bytes, stages) > device.shared_bytes:
            continue
        if tile_pixels <= power_of_2(pixels, 16):
            fitting.append(Configuration((tile_pixels, depth), warps, stages))

    def cost(configuration: Configuration) -> float:
        (tile_pixels, depth), _, stages = configuration
        programs = cdiv(cdiv(pixels, tile_pixels) * rows, device.multiprocessors)
        together = device.shared_bytes // _shared_bytes(tile_pixels, block_rows, depth, element_bytes, stages)
        bytes_of_step = _shared_bytes(tile_pixels, block_rows, depth, element_bytes, 1)
        steps = count * block_columns / (rows * depth)
        return programs * (bytes_of_step * steps + _PROGRAM_OVERHEAD / min(together, programs))

    return tuple(sorted(fitting, key=cost))


def _shared_bytes(pixels: int, block_rows: int, depth: int, element_bytes: int, stages: int) -> int:
    return (pixels + block_rows) * depth * element_bytes * stages


def sparse_matmul_configurations(
    device: Device,
    y: Any,
    x: Any,
    row_offsets: Any,
    columns: Any,
    blocks: Any,
    *others: Any,
    allow_tf32: bool,
    **options: Any,
) -> tuple[Configuration, ...]:
    """What `sparse_matmul` may run in, the best guess first."""
    pixels = math.prod(y.shape) // y.shape[-1]
    return _configurations(device, pixels, x.shape[-1], row_offsets.shape[0] - 1, blocks, x.dtype.itemsize, allow_tf32)


def sparse_conv2d_configurations(
    device: Device,
    y: Any,
    x: Any,
    row_offsets: Any,
    columns: Any,
    blocks: Any,
    *others: Any,
    allow_tf32: bool,
    **options: Any,
) -> tuple[Configuration, ...]:
    """What `sparse_conv2d` may run in, the best guess first."""
    pixels = math.prod(y.shape) // y.shape[1]
    return _configurations(device, pixels, x.shape[1], row_offsets.shape[0] - 1, blocks, x.dtype.itemsize, allow_tf32)
