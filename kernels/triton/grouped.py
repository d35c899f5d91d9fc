"""Grouped convolution, channels_last.     y[n,p,q,σ(o)] = act(scale[o] · Σ_rsc w[o,r,s,c] · x[n,…,start+c] + b[o] + …)

    one program:  TILE_PIXELS × TILE_CHANNELS of one group, from the group's window of input channels

      x of a pixel  ├──── group 0 ────┼──── group 1 ────┼──── group 2 ────┤   a window starts at a multiple of 16 bytes
                    ├ window 0 ──┤ ├──── window 1 ──┤ ├──── window 2 ─────┤   and may reach into the neighbours, where
                                                                              the weights are zeros
    Narrow groups were merged, zeros between them, to fill the tensor cores. The sum goes tap by tap and TILE_DEPTH of
    the window at a time; taps find x in the first-level cache. σ, the shuffle, is an index of the store: programs of
    the same pixels are neighbours, so that the values which it scatters meet in the second-level cache.

Channel shuffle, of one tensor or of two in a row.       y[pixel, k · G + i] = concat(a, b)[pixel, i · C / G + k]

    one program:  TILE_PIXELS × TILE_GROUPS × TILE_WITHIN values         ┌ a0 a1 a2 a3 ┐
    read in runs of k, turned, and written in runs of (k, i)             └ b0 b1 b2 b3 ┘ → a0 b0 a1 b1 a2 b2 a3 b3

Memory bounds all of them, but for convolutions of wide groups. Configurations are (TILE_PIXELS, TILE_CHANNELS,
TILE_DEPTH) and (TILE_PIXELS, TILE_GROUPS, TILE_WITHIN).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kernelpress.kernels.reference import ACTIVATIONS
from kernelpress.kernels.triton.epilogue import affine, finish_tile, tile_offsets
from kernelpress.kernels.triton.launch import Configuration, Device, cdiv, launch, power_of_2, spacing, unit
from kernelpress.kernels.triton.tiles import input_pixels, is_scattered, product_precision, window_corners

__all__ = [
    "channel_shuffle",
    "channel_shuffle_configurations",
    "grouped_conv2d",
    "grouped_conv2d_configurations",
    "shuffle_concat",
    "shuffle_concat_configurations",
]

_PRODUCTS = (
    Configuration((128, 64, 32), 8, 4),
    Configuration((128, 32, 32), 8, 4),
    Configuration((128, 16, 16), 4, 4),
    Configuration((64, 64, 32), 8, 4),
    Configuration((64, 32, 32), 4, 4),
    Configuration((64, 16, 32), 4, 4),
    Configuration((32, 16, 16), 2, 4),
)
"""Deeper ones would spill: where channels are odd, a thread keeps the address of every value that it loads."""

_MOST_EXACT_ELEMENTS = 64 * 32
"""Of a float32 tile without TF32: its product is done in registers."""

_SCATTERED_DEPTH = 16
"""Of scattered float32."""

_STEP_OVERHEAD, _PROGRAM_OVERHEAD = 512, 4096
"""Of a step of the sum and of a program, in loads of one value."""

_PRODUCTS_A_LOAD = 16
"""Multiply-adds that tensor cores do while one value is loaded."""

_SHUFFLES = (
    (32, 2, 64),
    (64, 2, 32),
    (8, 2, 64),
    (32, 4, 32),
    (8, 4, 32),
    (32, 8, 16),
    (8, 32, 16),
)

_PROGRAMS_AT_ONCE = 4
"""On a multiprocessor."""


@triton.jit
def grouped_kernel(
    x,
    weight,
    bias,
    scale,
    residual,
    y,
    n_pixels,
    in_h,
    in_w,
    out_h,
    out_w,
    groups,
    group_in,
    group_out,
    c_out,
    window,
    last_start,
    kernel_h,
    kernel_w,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    shuffle,
    x_spacing,
    residual_spacing,
    y_spacing,
    WINDOW_UNIT: tl.constexpr,
    X_UNIT: tl.constexpr,
    Y_UNIT: tl.constexpr,
    IS_SHUFFLED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE_PIXELS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
    TILE_DEPTH: tl.constexpr,
):
    window, last_start = window * WINDOW_UNIT, last_start * WINDOW_UNIT
    group_out, c_out = group_out * Y_UNIT, c_out * Y_UNIT
    tiles_of_group = tl.cdiv(group_out, TILE_CHANNELS)
    tile = tl.program_id(0) % (groups * tiles_of_group)
    group = tile // tiles_of_group
    pixels = tl.program_id(0) // (groups * tiles_of_group) * TILE_PIXELS + tl.arange(0, TILE_PIXELS)
    channels = group * group_out + tile % tiles_of_group * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    end = min((group + 1) * group_out, c_out)
    is_pixel, is_channel = pixels < n_pixels, channels < end
    start = min(group * group_in // WINDOW_UNIT * WINDOW_UNIT, last_start)
    image, row, column = window_corners(pixels, out_h, out_w, stride_h, stride_w, pad_h, pad_w)

    depth = tl.arange(0, TILE_DEPTH)
    parts = tl.cdiv(window, TILE_DEPTH)
    accumulator = tl.zeros((TILE_PIXELS, TILE_CHANNELS), tl.float32)
    for step in range(kernel_h * kernel_w * parts):
        tap = step // parts
        within = step % parts * TILE_DEPTH + depth
        sources, is_inside = input_pixels(
            image, row + tap // kernel_w * dilation_h, column + tap % kernel_w * dilation_w, in_h, in_w
        )
        values = tl.load(
            x + tile_offsets(sources, start + within, x_spacing * X_UNIT),
            mask=(is_pixel & is_inside)[:, None] & (within < window)[None, :],
            other=0.0,
            cache_modifier=".ca",  # asynchronous copies of 16 bytes pass the first-level cache by otherwise
        )
        weights = tl.load(
            weight + tile_offsets(channels, tap * window + within, kernel_h * kernel_w * window),
            mask=is_channel[:, None] & (within < window)[None, :],
            other=0.0,
        )
        accumulator = tl.dot(values, tl.trans(weights), accumulator, input_precision=PRECISION)

    if IS_SHUFFLED:
        accumulator = affine(accumulator, scale, bias, channels, end)
        shuffled = channels % (c_out // shuffle) * shuffle + channels // (c_out // shuffle)
        targets = tl.where(is_channel, shuffled, c_out)
        finish_tile(
            *(accumulator, pixels, targets, is_pixel, c_out, None, None, residual, residual_spacing * Y_UNIT),
            *(y, y_spacing * Y_UNIT, ACTIVATION),
        )
    else:
        finish_tile(
            *(accumulator, pixels, channels, is_pixel, end, scale, bias, residual, residual_spacing * Y_UNIT),
            *(y, y_spacing * Y_UNIT, ACTIVATION),
        )


@triton.jit
def shuffle_kernel(
    a,
    b,
    y,
    n_pixels,
    channels_a,
    groups,
    per_group,
    a_spacing,
    b_spacing,
    y_spacing,
    UNIT: tl.constexpr,
    Y_UNIT: tl.constexpr,
    ARE_ALL_GROUPS: tl.constexpr,
    TILE_PIXELS: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    TILE_WITHIN: tl.constexpr,
):
    per_group = per_group * UNIT
    parts = tl.cdiv(per_group, TILE_WITHIN)
    tiles = parts * tl.cdiv(groups, TILE_GROUPS)
    tile = tl.program_id(0) % tiles
    pixels = tl.program_id(0) // tiles * TILE_PIXELS + tl.arange(0, TILE_PIXELS)
    group = tile // parts * TILE_GROUPS + tl.arange(0, TILE_GROUPS)
    within = tile % parts * TILE_WITHIN + tl.arange(0, TILE_WITHIN)
    is_pixel, is_group, is_within = pixels < n_pixels, group < groups, within < per_group

    sources = (group[:, None] * per_group + within[None, :])[None, :, :]
    rows = pixels.to(tl.int64)[:, None, None]
    is_known = is_pixel[:, None, None] & is_group[None, :, None] & is_within[None, None, :]
    if b is None:
        values = tl.load(a + rows * (a_spacing * UNIT) + sources, mask=is_known)
    else:
        first_b = channels_a * UNIT
        is_a = sources < first_b
        values = tl.load(a + rows * (a_spacing * UNIT) + sources, mask=is_known & is_a)
        values_b = tl.load(b + rows * (b_spacing * UNIT) + (sources - first_b), mask=is_known & (sources >= first_b))
        values = tl.where(is_a, values, values_b)
    values = tl.permute(values, (0, 2, 1))

    if ARE_ALL_GROUPS:
        channels = tile * (TILE_WITHIN * TILE_GROUPS) + tl.arange(0, TILE_WITHIN * TILE_GROUPS)
        tl.store(
            y + tile_offsets(pixels, channels, y_spacing * Y_UNIT),
            tl.reshape(values, (TILE_PIXELS, TILE_WITHIN * TILE_GROUPS)),
            mask=is_pixel[:, None] & (channels < per_group * TILE_GROUPS)[None, :],
        )
    else:
        targets = (within[:, None] * groups + group[None, :])[None, :, :]
        is_known = is_pixel[:, None, None] & is_within[None, :, None] & is_group[None, None, :]
        tl.store(y + rows * (y_spacing * Y_UNIT) + targets, values, mask=is_known)


def grouped_conv2d(
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
    groups: int,
    group_in: int,
    group_out: int,
    window: int,
    window_step: int,
    channels: int,
    shuffle: int,
    activation: str,
    allow_tf32: bool,
    configuration: Configuration,
) -> None:
    """Runs `reference.grouped_conv2d` into `y`; `weight: [C_out, KH, KW, window]`.

    `groups` to `channels` say how it was packed: they are the fields of a `Grouping`.
    """
    batch, c_out, out_h, out_w = y.shape
    n_pixels = batch * out_h * out_w
    tile_pixels, tile_channels, tile_depth = configuration.tile
    window_unit = window_step if window_step > 1 else unit(group_in, window, channels - window)
    x_unit = unit(spacing(x))
    y_unit = unit(group_out, c_out, spacing(y), spacing(residual))
    launch(
        grouped_kernel,
        cdiv(n_pixels, tile_pixels) * groups * cdiv(group_out, tile_channels),
        configuration,
        *(x, weight, bias, scale, residual, y),
        *(n_pixels, *x.shape[2:], out_h, out_w),
        *(groups, group_in, group_out // y_unit, c_out // y_unit),
        *(window // window_unit, (channels - window) // window_unit),
        *(*weight.shape[1:3], *stride, *padding, *dilation, shuffle),
        *(spacing(x) // x_unit, spacing(residual) // y_unit, spacing(y) // y_unit),
        WINDOW_UNIT=window_unit,
        X_UNIT=x_unit,
        Y_UNIT=y_unit,
        IS_SHUFFLED=shuffle != 1,
        ACTIVATION=ACTIVATIONS.index(activation),
        PRECISION=product_precision(x.element_size(), allow_tf32),
        TILE_PIXELS=tile_pixels,
        TILE_CHANNELS=tile_channels,
        TILE_DEPTH=tile_depth,
    )


def channel_shuffle(y: Tensor, x: Tensor, *, groups: int, allow_tf32: bool, configuration: Configuration) -> None:
    """Runs `reference.channel_shuffle` into `y`."""
    _shuffle(y, x, None, groups, configuration)


def shuffle_concat(
    y: Tensor, a: Tensor, b: Tensor, *, groups: int, allow_tf32: bool, configuration: Configuration
) -> None:
    """Runs `reference.shuffle_concat` into `y`."""
    _shuffle(y, a, b, groups, configuration)


def _shuffle(y: Tensor, a: Tensor, b: Tensor | None, groups: int, configuration: Configuration) -> None:
    batch, channels, height, width = y.shape
    per_group = channels // groups
    tile_pixels, tile_groups, tile_within = configuration.tile
    size = unit(per_group, a.shape[1], spacing(a), spacing(b))
    y_unit = unit(spacing(y))
    launch(
        shuffle_kernel,
        cdiv(batch * height * width, tile_pixels) * cdiv(groups, tile_groups) * cdiv(per_group, tile_within),
        configuration,
        *(a, b, y, batch * height * width, a.shape[1] // size, groups, per_group // size),
        *(spacing(a) // size, spacing(b) // size, spacing(y) // y_unit),
        UNIT=size,
        Y_UNIT=y_unit,
        ARE_ALL_GROUPS=tile_groups == groups,
        TILE_PIXELS=tile_pixels,
        TILE_GROUPS=tile_groups,
        TILE_WITHIN=tile_within,
    )


def grouped_conv2d_configurations(
    device: Device,
    y: Any,
    x: Any,
    weight: Any,
    *others: Any,
    groups: int,
    group_out: int,
    window: int,
    allow_tf32: bool,
    **options: Any,
) -> tuple[Configuration, ...]:
    """What `grouped_conv2d` may run in, the best guess first: the least time of loads and products, if the
    multiprocessors take the programs in waves."""
    batch, _, out_h, out_w = y.shape
    element_bytes = x.dtype.itemsize
    taps = weight.shape[1] * weight.shape[2]
    is_exact = product_precision(element_bytes, allow_tf32) == "ieee" and element_bytes == 4
    deepest = _SCATTERED_DEPTH if element_bytes == 4 and is_scattered(window, element_bytes) else window
    products = [it._replace(tile=(*it.tile[:2], min(it.tile[2], power_of_2(deepest, 16)))) for it in _PRODUCTS]

    def fits(configuration: Configuration) -> bool:
        pixels, channels, depth = configuration.tile
        if is_exact and pixels * channels > _MOST_EXACT_ELEMENTS:
            return False
        staged_bytes = (pixels + channels) * depth * element_bytes * configuration.stages
        return staged_bytes <= device.shared_bytes and channels <= power_of_2(group_out, 16)

    def cost(configuration: Configuration) -> float:
        pixels, channels, depth = configuration.tile
        programs = cdiv(batch * out_h * out_w, pixels) * groups * cdiv(group_out, channels)
        step = depth * (pixels + channels + pixels * channels / _PRODUCTS_A_LOAD) + _STEP_OVERHEAD
        waves = cdiv(programs, device.multiprocessors * _PROGRAMS_AT_ONCE)
        return waves * (taps * cdiv(window, depth) * step + pixels * channels + _PROGRAM_OVERHEAD)

    return tuple(sorted(filter(fits, products), key=cost))


def channel_shuffle_configurations(
    device: Device, y: Any, *operands: Any, groups: int, **options: Any
) -> tuple[Configuration, ...]:
    """What `channel_shuffle` may run in, the best guess first: the tile that lies least outside."""
    batch, channels, height, width = y.shape
    widths = sorted({tile[1] for tile in _SHUFFLES})
    width = next((width for width in widths if width >= groups), widths[-1])
    fitting = [tile for tile in _SHUFFLES if tile[1] == width]

    def cost(tile: tuple[int, ...]) -> float:
        pixels, tile_groups, within = tile
        programs = cdiv(batch * height * width, pixels) * cdiv(groups, tile_groups)
        waves = cdiv(programs * cdiv(channels // groups, within), device.multiprocessors * _PROGRAMS_AT_ONCE)
        return waves * (pixels * tile_groups * within + _PROGRAM_OVERHEAD)

    return tuple(Configuration(tile, 4, 1) for tile in sorted(fitting, key=cost))


shuffle_concat_configurations = channel_shuffle_configurations
