"""Depthwise, then 1×1, channels_last.   y[p, n] = act(Σ_c pw[n, c] · act_dw(Σ_rs dw[r, s, c] · x[p·S-P + rs·D, c]) + …)

    one program:  TILE_ROWS × TILE_COLUMNS outputs × TILE_CHANNELS, in steps of TILE_DEPTH of the depthwise channels

      x ── taps, by way of the caches ──▶ depthwise sums ──▶ operand ──┐
      pw ──────────────────────────────────────────────────────────────┴──▶ product ──▶ y

The depthwise result never reaches memory; a program of all output channels computes it once. Bound by memory where
C_out is large, else by the issue of the depthwise stage: a value is loaded and converted once a tap.

An inverted residual is the expansion's product, and then this kernel. On chip the expanded pixels could be read at
another place only by way of shared memory, value by value and once a tap; or be made anew for every column of the
window. Both take more instructions than memory takes time to hold them.

Configurations are (TILE_ROWS, TILE_COLUMNS, TILE_CHANNELS, TILE_DEPTH), or those of kernels in turn.
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
from kernelpress.kernels.triton.depthwise import depthwise_configurations, depthwise_conv2d, taps_of_window
from kernelpress.kernels.triton.epilogue import activate, affine, finish_tile, tile_offsets
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
from kernelpress.kernels.triton.tiles import is_scattered, product_configurations, product_precision
from kernelpress.kernels.triton.windows import patch_of_program

__all__ = [
    "inverted_residual",
    "inverted_residual_configurations",
    "separable_conv2d",
    "separable_conv2d_configurations",
]

_TILES = (
    Configuration((8, 8, 32, 64), 8, 2),
    Configuration((8, 8, 64, 64), 4, 2),
    Configuration((8, 8, 128, 64), 4, 2),
    Configuration((4, 16, 64, 64), 4, 2),
    Configuration((4, 16, 128, 64), 4, 2),
    Configuration((8, 8, 256, 64), 8, 2),
)
"""TILE_DEPTH is of 16-bit elements."""

_MOST_EXACT_CHANNELS = 64
"""Of a float32 tile without TF32: its product is done in registers."""

_SCATTERED_CHANNELS = 64
"""Of a tile where the addresses of scattered values take registers."""

_LEAST_DEPTH = 16
"""Of scattered values, and of exact float32: more would spill."""

_TENSOR_MACS = {2: 1200, 4: 300}
"""Multiply-additions of a multiprocessor's tensor cores per clock, by bytes of an element."""

_PLAIN = 128
"""Lanes of other arithmetic, of which a tap of a depthwise sum takes `_TAP_INSTRUCTIONS` and a sum `_SUM_INSTRUCTIONS`
more."""

_TAP_INSTRUCTIONS, _SUM_INSTRUCTIONS = 3, 10

_MEMORY_BYTES = 18.5
"""Of a multiprocessor's share, per clock."""

_LAUNCH, _STEP, _TAP, _PROGRAM = 4000, 400, 100, 1500
"""Clocks that nothing hides within a program: for a launch, a step of depth, a tap of its sums, its start and end."""

_PROGRAMS_AT_ONCE = 3
"""On a multiprocessor."""


@triton.jit
def separable_kernel(
    x,
    depthwise_weight,
    depthwise_bias,
    pointwise_weight,
    pointwise_bias,
    residual,
    y,
    in_h,
    in_w,
    x_units,
    out_h,
    out_w,
    c_out,
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
    DEPTHWISE_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
    TILE_DEPTH: tl.constexpr,
):
    PIXELS: tl.constexpr = TILE_ROWS * TILE_COLUMNS
    n_channels = x_units * X_UNIT
    c_out = c_out * Y_UNIT
    channel_tiles = tl.cdiv(c_out, TILE_CHANNELS)
    program = tl.program_id(0)
    image, first_row, first_column = patch_of_program(program // channel_tiles, out_h, out_w, TILE_ROWS, TILE_COLUMNS)
    rows = first_row + tl.arange(0, PIXELS) // TILE_COLUMNS
    columns = first_column + tl.arange(0, PIXELS) % TILE_COLUMNS
    outputs = program % channel_tiles * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    depth = tl.arange(0, TILE_DEPTH)
    accumulator = tl.zeros((PIXELS, TILE_CHANNELS), tl.float32)
    for start in range(0, n_channels, TILE_DEPTH):
        channels = start + depth
        sums = taps_of_window(
            *(x, depthwise_weight, None, image, rows, columns, channels, in_h, in_w, n_channels, x_spacing * X_UNIT),
            *(pad_h, pad_w, dilation_h, dilation_w, 1, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, PIXELS, TILE_DEPTH),
        )
        sums = activate(affine(sums, None, depthwise_bias, channels, n_channels), DEPTHWISE_ACTIVATION)
        weights = tl.load(
            pointwise_weight + tile_offsets(outputs, channels, n_channels),
            mask=(outputs < c_out)[:, None] & (channels < n_channels)[None, :],
            other=0.0,
        )
        values = sums.to(x.dtype.element_ty)
        accumulator = tl.dot(values, tl.trans(weights), accumulator, input_precision=PRECISION)
    finish_tile(
        accumulator,
        (image.to(tl.int64) * out_h + rows) * out_w + columns,
        outputs,
        (rows < out_h) & (columns < out_w),
        c_out,
        None,
        pointwise_bias,
        residual,
        residual_spacing * Y_UNIT,
        y,
        y_spacing * Y_UNIT,
        ACTIVATION,
    )


def _fused(
    y: Tensor,
    x: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    residual: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    depthwise_activation: str,
    activation: str,
    allow_tf32: bool,
    configuration: Configuration,
) -> None:
    kernel_h, kernel_w, channels = depthwise_weight.shape
    batch, c_out, out_h, out_w = y.shape
    tile_rows, tile_columns, tile_channels, tile_depth = configuration.tile
    x_unit, y_unit = unit(channels, spacing(x)), unit(c_out, spacing(residual), spacing(y))
    launch(
        separable_kernel,
        batch * cdiv(out_h, tile_rows) * cdiv(out_w, tile_columns) * cdiv(c_out, tile_channels),
        configuration,
        *(x, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias, residual, y),
        *(*x.shape[2:], channels // x_unit, out_h, out_w, c_out // y_unit),
        *(spacing(x) // x_unit, spacing(residual) // y_unit, spacing(y) // y_unit, *padding, *dilation),
        X_UNIT=x_unit,
        Y_UNIT=y_unit,
        KERNEL_H=kernel_h,
        KERNEL_W=kernel_w,
        STRIDE_H=stride[0],
        STRIDE_W=stride[1],
        DEPTHWISE_ACTIVATION=ACTIVATIONS.index(depthwise_activation),
        ACTIVATION=ACTIVATIONS.index(activation),
        PRECISION=product_precision(x.element_size(), allow_tf32),
        TILE_ROWS=tile_rows,
        TILE_COLUMNS=tile_columns,
        TILE_CHANNELS=tile_channels,
        TILE_DEPTH=tile_depth,
    )


def _image(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def separable_conv2d(
    y: Tensor,
    x: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    residual: Tensor | None,
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    depthwise_activation: str,
    activation: str,
    allow_tf32: bool,
    configuration: Configuration | InTurn,
) -> None:
    """Runs `reference.separable_conv2d` into `y`; weights are `[KH, KW, C]` and `[C_out, C, …]`."""
    if isinstance(configuration, Configuration):
        _fused(
            *(y, x, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias, residual),
            *(stride, padding, dilation, depthwise_activation, activation, allow_tf32, configuration),
        )
        return
    first, second = configuration.steps
    batch, _, out_h, out_w = y.shape
    hidden = _image(y, batch, x.shape[1], out_h, out_w)
    depthwise_conv2d(
        *(hidden, x, depthwise_weight, depthwise_bias, None, None),
        stride=stride,
        padding=padding,
        dilation=dilation,
        activation=depthwise_activation,
        allow_tf32=allow_tf32,
        configuration=first,
    )
    pointwise_conv2d(
        *(y, hidden, pointwise_weight, pointwise_bias, None, residual, None),
        activation=activation,
        allow_tf32=allow_tf32,
        configuration=second,
    )


def inverted_residual(
    y: Tensor,
    x: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    *operands: Any,
    expand_activation: str,
    allow_tf32: bool,
    configuration: InTurn,
    **options: Any,
) -> None:
    """Runs `reference.inverted_residual` into `y`; `expand_weight: [C_hidden, C_in, …]`, the rest as of
    `separable_conv2d`."""
    first, rest = configuration.steps
    batch, _, in_h, in_w = x.shape
    hidden = _image(y, batch, expand_weight.shape[0], in_h, in_w)
    pointwise_conv2d(
        *(hidden, x, expand_weight, expand_bias, None, None, None),
        activation=expand_activation,
        allow_tf32=allow_tf32,
        configuration=first,
    )
    separable_conv2d(y, hidden, *operands, **options, allow_tf32=allow_tf32, configuration=rest)


def _configurations(
    device: Device,
    out: tuple[int, ...],
    in_pixels: int,
    depthwise_weight: Any,
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    element_bytes: int,
    allow_tf32: bool,
    residual: Any,
) -> tuple[Configuration | InTurn, ...]:
    """What a separable convolution may run in, the cheapest by the model first."""
    batch, c_out, out_h, out_w = out
    kernel_h, kernel_w, channels = depthwise_weight.shape
    taps, pixels = kernel_h * kernel_w, batch * out_h * out_w
    precision = product_precision(element_bytes, allow_tf32)
    is_exact = element_bytes == 4 and precision == "ieee"
    macs = _PLAIN / 2 if is_exact else _TENSOR_MACS[element_bytes]

    def summing(count: int) -> float:
        return count * (taps * _TAP_INSTRUCTIONS + _SUM_INSTRUCTIONS) / _PLAIN

    def fused(configuration: Configuration) -> float:
        rows, columns, tile_channels, depth = configuration.tile
        patch, steps = rows * columns, cdiv(channels, depth)
        patches, slices = batch * cdiv(out_h, rows) * cdiv(out_w, columns), cdiv(c_out, tile_channels)
        rounds = cdiv(patches * slices, device.multiprocessors)
        moved = in_pixels / patches / slices * channels + patch * min(tile_channels, c_out)
        busy = steps * (summing(patch * depth) + patch * depth * tile_channels / macs)
        busy = max(busy, moved * element_bytes / _MEMORY_BYTES)
        waiting = steps * (_STEP + taps * _TAP) + _PROGRAM
        return _LAUNCH + max(rounds * busy, cdiv(rounds, _PROGRAMS_AT_ONCE) * waiting)

    def in_turn() -> float:
        share = element_bytes / _MEMORY_BYTES / device.multiprocessors
        first = max((in_pixels + pixels) * channels * share, summing(pixels * channels) / device.multiprocessors)
        product = cdiv(pixels, 64) * 64 * channels * c_out / macs / device.multiprocessors
        return 2 * (_LAUNCH + _PROGRAM) + first + max(pixels * (channels + c_out) * share, product)

    found: dict[Configuration, None] = {}
    scattered = is_scattered(channels, element_bytes) or is_scattered(c_out, element_bytes)
    least, most = 32, _MOST_EXACT_CHANNELS if is_exact else _TILES[-1].tile[2]
    if scattered:
        least = most = most // 2 if is_exact else _SCATTERED_CHANNELS
    for (rows, columns, tile_channels, depth), warps, stages in _TILES:
        if not least <= tile_channels <= min(most, power_of_2(c_out, least)):
            continue
        if element_bytes == 4 and device.capability >= 100 and tile_channels == 128:
            continue  # it would spill
        depth = min(depth * 2 // element_bytes, power_of_2(channels, 16))
        depth = _LEAST_DEPTH if is_exact or scattered else depth
        warps = 4 if is_exact and not scattered else warps
        if (stages * tile_channels + rows * columns) * depth * element_bytes <= device.shared_bytes:
            found[Configuration((rows, columns, tile_channels, depth), warps, stages)] = None
    hidden = (batch, channels, out_h, out_w)
    first, *_ = depthwise_configurations(device, hidden, (kernel_h, kernel_w), stride, dilation)
    sizes = (pixels, c_out, channels, element_bytes, precision, device)
    second, *_ = product_configurations(*sizes, has_more_operands=residual is not None)
    steps = InTurn((first, second))
    fitting = sorted(found, key=fused)
    return (steps, *fitting) if in_turn() < fused(fitting[0]) else (*fitting, steps)


def separable_conv2d_configurations(
    device: Device,
    y: Any,
    x: Any,
    depthwise_weight: Any,
    depthwise_bias: Any = None,
    pointwise_weight: Any = None,
    pointwise_bias: Any = None,
    residual: Any = None,
    *,
    stride: Any,
    dilation: Any,
    allow_tf32: bool,
    **options: Any,
) -> tuple[Configuration | InTurn, ...]:
    """What `separable_conv2d` may run in, the best guess first."""
    in_pixels = x.shape[0] * math.prod(x.shape[2:])
    how = (stride, dilation, x.dtype.itemsize, allow_tf32, residual)
    return _configurations(device, y.shape, in_pixels, depthwise_weight, *how)


def inverted_residual_configurations(
    device: Device,
    y: Any,
    x: Any,
    expand_weight: Any,
    expand_bias: Any,
    depthwise_weight: Any,
    depthwise_bias: Any = None,
    project_weight: Any = None,
    project_bias: Any = None,
    residual: Any = None,
    *,
    stride: Any,
    dilation: Any,
    allow_tf32: bool,
    **options: Any,
) -> tuple[InTurn, ...]:
    """What `inverted_residual` may run in, the best guess first."""
    in_pixels, element_bytes = x.shape[0] * math.prod(x.shape[2:]), x.dtype.itemsize
    precision = product_precision(element_bytes, allow_tf32)
    expand, *_ = product_configurations(in_pixels, expand_weight.shape[0], x.shape[1], element_bytes, precision, device)
    how = (stride, dilation, element_bytes, allow_tf32, residual)
    rest = _configurations(device, y.shape, in_pixels, depthwise_weight, *how)
    return tuple(InTurn((expand, configuration)) for configuration in rest)
