"""Layers of low rank, channels_last.   y[p, n] = act(Σ_t last[n, t] · Σ_rsc core[t, r, s, c] · x[p·S-P + rs·D, c] + …)

    one program:  TILE_PIXELS outputs × TILE_CHANNELS, in steps of TILE_RANK of the channels between

      x ── window, TILE_DEPTH channels a step ──product──▶ hidden [pixels, rank] ──product──▶ y
      core ───────────────────────────────────────┘             last ────────┘

The result of the core stays in registers; a program of all output channels computes it once. Bound by tensor cores, or
by memory where channels are few. A linear layer's first factor is a core of one tap. A Tucker convolution's first
factor is a product of its own: the core reads what that makes at other pixels, which registers cannot give.

Configurations are (TILE_PIXELS, TILE_CHANNELS, TILE_RANK, TILE_DEPTH), or those of kernels in turn.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernelpress.kernels.reference import ACTIVATIONS
from kernelpress.kernels.triton.dense import pointwise_conv2d
from kernelpress.kernels.triton.epilogue import finish_tile, tile_offsets
from kernelpress.kernels.triton.launch import (
    Configuration,
    Device,
    InTurn,
    cdiv,
    launch,
    spacing,
    unit,
)
from kernelpress.kernels.triton.tiles import (
    input_pixels,
    is_scattered,
    product_configurations,
    product_precision,
    window_corners,
)

__all__ = [
    "lowrank_conv2d",
    "lowrank_conv2d_configurations",
    "lowrank_linear",
    "lowrank_linear_configurations",
]

_TILES = (
    Configuration((128, 64, 32, 64), 8, 3),
    Configuration((64, 64, 32, 64), 4, 3),
    Configuration((32, 64, 32, 64), 4, 3),
    Configuration((16, 32, 32, 64), 4, 3),
)
"""TILE_DEPTH is of 16-bit elements. Two accumulators are held: larger ones spill."""

_MOST_EXACT = 32 * 64
"""Of float32 without TF32, and of scattered values: products are done in registers, or addresses take them."""


@triton.jit
def lowrank_kernel(
    x,
    core_weight,
    last_weight,
    bias,
    residual,
    y,
    pixels,
    in_h,
    in_w,
    x_units,
    out_h,
    out_w,
    rank,
    y_units,
    x_spacing,
    residual_spacing,
    y_spacing,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
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
    TILE_RANK: tl.constexpr,
    TILE_DEPTH: tl.constexpr,
):
    c_in = x_units * X_UNIT
    c_out = y_units * Y_UNIT
    channel_tiles = tl.cdiv(c_out, TILE_CHANNELS)
    own = tl.program_id(0) // channel_tiles * TILE_PIXELS + tl.arange(0, TILE_PIXELS)
    outputs = tl.program_id(0) % channel_tiles * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    is_pixel, is_output = own < pixels, outputs < c_out
    image, row, column = window_corners(own, out_h, out_w, STRIDE_H, STRIDE_W, pad_h, pad_w)
    depth = tl.arange(0, TILE_DEPTH)
    accumulator = tl.zeros((TILE_PIXELS, TILE_CHANNELS), tl.float32)
    for first in range(0, rank, TILE_RANK):
        ranks = first + tl.arange(0, TILE_RANK)
        is_rank = ranks < rank
        hidden = tl.zeros((TILE_PIXELS, TILE_RANK), tl.float32)
        for tap in range(KERNEL_H * KERNEL_W):
            read, is_inside = input_pixels(
                image, row + tap // KERNEL_W * dilation_h, column + tap % KERNEL_W * dilation_w, in_h, in_w
            )
            is_read = (is_inside & is_pixel)[:, None]
            for start in range(0, c_in, TILE_DEPTH):
                channels = start + depth
                is_channel = (channels < c_in)[None, :]
                values = tl.load(
                    x + tile_offsets(read, channels, x_spacing * X_UNIT), mask=is_read & is_channel, other=0.0
                )
                weights = tl.load(
                    core_weight + tile_offsets(ranks * (KERNEL_H * KERNEL_W) + tap, channels, c_in),
                    mask=is_rank[:, None] & is_channel,
                    other=0.0,
                )
                hidden = tl.dot(values, tl.trans(weights), hidden, input_precision=PRECISION)
        lasts = tl.load(
            last_weight + tile_offsets(outputs, ranks, rank), mask=is_output[:, None] & is_rank[None, :], other=0.0
        )
        accumulator = tl.dot(hidden.to(x.dtype.element_ty), tl.trans(lasts), accumulator, input_precision=PRECISION)
    finish_tile(
        accumulator,
        own,
        outputs,
        is_pixel,
        c_out,
        None,
        bias,
        residual,
        residual_spacing * Y_UNIT,
        y,
        y_spacing * Y_UNIT,
        ACTIVATION,
    )


def _core_and_last(
    y: Tensor,
    x: Tensor,
    core_weight: Tensor,
    last_weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    in_size: tuple[int, ...],
    out_size: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    activation: str,
    allow_tf32: bool,
    configuration: Configuration,
) -> None:
    c_out, rank, c_in = len(last_weight), len(core_weight), core_weight.shape[-1]
    pixels = y.numel() // c_out
    tile_pixels, tile_channels, tile_rank, tile_depth = configuration.tile
    x_unit, y_unit = unit(c_in, spacing(x)), unit(c_out, spacing(residual), spacing(y))
    launch(
        lowrank_kernel,
        cdiv(pixels, tile_pixels) * cdiv(c_out, tile_channels),
        configuration,
        *(x, core_weight, last_weight, bias, residual, y),
        *(pixels, *in_size, c_in // x_unit, *out_size, rank, c_out // y_unit),
        *(spacing(x) // x_unit, spacing(residual) // y_unit, spacing(y) // y_unit, *padding, *dilation),
        X_UNIT=x_unit,
        Y_UNIT=y_unit,
        KERNEL_H=kernel[0],
        KERNEL_W=kernel[1],
        STRIDE_H=stride[0],
        STRIDE_W=stride[1],
        ACTIVATION=ACTIVATIONS.index(activation),
        PRECISION=product_precision(x.element_size(), allow_tf32),
        TILE_PIXELS=tile_pixels,
        TILE_CHANNELS=tile_channels,
        TILE_RANK=tile_rank,
        TILE_DEPTH=tile_depth,
    )


def lowrank_conv2d(
    y: Tensor,
    x: Tensor,
    first_weight: Tensor,
    core_weight: Tensor,
    last_weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    activation: str,
    allow_tf32: bool,
    configuration: InTurn,
) -> None:
    """Runs `reference.lowrank_conv2d` into `y`; `core_weight: [R_out, KH, KW, R_in]`, the others `[…, …, 1, 1]`."""
    first, rest = configuration.steps
    shape, form = (x.shape[0], len(first_weight), *x.shape[2:]), torch.channels_last
    hidden = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)
    pointwise_conv2d(
        *(hidden, x, first_weight, None, None, None, None),
        activation="identity",
        allow_tf32=allow_tf32,
        configuration=first,
    )
    _core_and_last(
        *(y, hidden, core_weight, last_weight, bias, residual, x.shape[2:], y.shape[2:], core_weight.shape[1:3]),
        *(stride, padding, dilation, activation, allow_tf32, rest),
    )


def lowrank_linear(
    y: Tensor,
    x: Tensor,
    first_weight: Tensor,
    last_weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    activation: str,
    allow_tf32: bool,
    configuration: Configuration,
) -> None:
    """Runs `reference.lowrank_linear` into `y`; weights are contiguous."""
    line = (1, y.numel() // len(last_weight))
    _core_and_last(
        *(y, x, first_weight, last_weight, bias, residual, line, line, (1, 1), (1, 1), (0, 0), (1, 1)),
        *(activation, allow_tf32, configuration),
    )


def _configurations(
    device: Device, pixels: int, c_out: int, rank: int, c_in: int, element_bytes: int, allow_tf32: bool
) -> tuple[Configuration, ...]:
    """The largest tiles that leave no multiprocessor idle first."""
    is_exact = element_bytes == 4 and product_precision(element_bytes, allow_tf32) == "ieee"
    scattered = any(is_scattered(channels, element_bytes) for channels in (c_in, rank, c_out))
    found: list[Configuration] = []
    for (tile_pixels, tile_channels, tile_rank, depth), warps, stages in _TILES:
        if (is_exact or scattered) and tile_pixels * tile_channels > _MOST_EXACT:
            continue
        depth = depth * 2 // element_bytes // (2 if scattered else 1)
        found.append(Configuration((tile_pixels, tile_channels, tile_rank, depth), warps, stages))

    def cost(configuration: Configuration) -> float:
        tile_pixels, tile_channels, *_ = configuration.tile
        channel_tiles = cdiv(c_out, tile_channels)
        waves = cdiv(cdiv(pixels, tile_pixels) * channel_tiles, device.multiprocessors)
        return waves * (tile_pixels + 32) * (c_in + tile_channels + 32)

    return tuple(sorted(found, key=cost))


def lowrank_conv2d_configurations(
    device: Device,
    y: Any,
    x: Any,
    first_weight: Any,
    core_weight: Any,
    last_weight: Any,
    bias: Any = None,
    residual: Any = None,
    *,
    allow_tf32: bool,
    **options: Any,
) -> tuple[InTurn, ...]:
    """What `lowrank_conv2d` may run in, the best guess first."""
    batch, c_in, *size = x.shape
    element_bytes, (rank_out, *_, rank_in) = x.dtype.itemsize, core_weight.shape
    precision = product_precision(element_bytes, allow_tf32)
    first, *_ = product_configurations(batch * math.prod(size), rank_in, c_in, element_bytes, precision, device)
    pixels = y.shape[0] * math.prod(y.shape[2:])
    rest = _configurations(device, pixels, y.shape[1], rank_out, rank_in, element_bytes, allow_tf32)
    return tuple(InTurn((first, configuration)) for configuration in rest)


def lowrank_linear_configurations(
    device: Device,
    y: Any,
    x: Any,
    first_weight: Any,
    last_weight: Any,
    bias: Any = None,
    residual: Any = None,
    *,
    allow_tf32: bool,
    **options: Any,
) -> tuple[Configuration, ...]:
    """What `lowrank_linear` may run in, the best guess first."""
    rank, c_in = first_weight.shape
    rows = max(1, math.prod(x.shape) // c_in)
    return _configurations(device, rows, last_weight.shape[0], rank, c_in, x.dtype.itemsize, allow_tf32)
