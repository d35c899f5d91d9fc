"""What every kernel ends in: `activation(accumulator · scale + bias + residual)`, for a tile [pixels, channels]."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["activate", "affine", "finish_int8_tile", "finish_tile", "output_value", "requantize", "tile_offsets"]


@triton.jit
def between_0_and_6(value):
    """The value cut off at 0 and 6; NaN stays NaN."""
    value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(value, 6.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activate(value, ACTIVATION: tl.constexpr):
    """The activation whose position in `reference.ACTIVATIONS` is given, of float32; NaN stays NaN."""
    tl.static_assert(ACTIVATION < 8)
    if ACTIVATION == 1:
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == 2:
        value = between_0_and_6(value)
    elif ACTIVATION == 3:
        value = value * tl.sigmoid(value)
    elif ACTIVATION == 4:
        value = value * between_0_and_6(value + 3.0) * (1.0 / 6.0)
    elif ACTIVATION == 5:
        value = between_0_and_6(value + 3.0) * (1.0 / 6.0)
    elif ACTIVATION == 6:
        value = tl.sigmoid(value)
    elif ACTIVATION == 7:
        value = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    return value


@triton.jit
def affine(accumulator, scale, bias, channels, n_channels):
    """`accumulator · scale + bias`, both per channel or None."""
    known = channels < n_channels
    if scale is not None:
        accumulator = accumulator * tl.load(scale + channels, mask=known, other=0.0)[None, :]
    if bias is not None:
        accumulator = accumulator + tl.load(bias + channels, mask=known, other=0.0)[None, :]
    return accumulator


@triton.jit
def tile_offsets(pixels, channels, spacing):
    """Offsets of a tile [pixels, channels], in 64 bits."""
    return pixels.to(tl.int64)[:, None] * spacing + channels[None, :]


@triton.jit
def finish_tile(
    accumulator,
    pixels,
    channels,
    is_pixel,
    n_channels,
    scale,
    bias,
    residual,
    residual_spacing,
    y,
    y_spacing,
    ACTIVATION: tl.constexpr,
):
    """Stores the epilogue of `accumulator: [pixels, channels]`; `is_pixel` tells which pixels there are."""
    is_known = is_pixel[:, None] & (channels < n_channels)[None, :]
    value = affine(accumulator, scale, bias, channels, n_channels)
    if residual is not None:
        offsets = tile_offsets(pixels, channels, residual_spacing)
        value += tl.load(residual + offsets, mask=is_known, other=0.0).to(tl.float32)
    value = activate(value, ACTIVATION).to(y.dtype.element_ty)
    tl.store(y + tile_offsets(pixels, channels, y_spacing), value, mask=is_known)


@triton.jit
def requantize(value, inverse_scale, zero_point):
    """`clamp(round(value · inverse_scale) + zero_point)` of float32 as int8, half to even; NaN becomes the zero point.

    Added to 1.5 · 2^23, a number is rounded as an integer, which the last bits of the sum are.
    """
    steps = value * inverse_scale
    steps = tl.where(steps == steps, steps, 0.0)
    steps = tl.minimum(tl.maximum(steps, -128.0 - zero_point), 127.0 - zero_point)
    return ((steps + 12582912.0).to(tl.int32, bitcast=True) + zero_point).to(tl.int8)


@triton.jit
def output_value(value, y, inverse_scale, zero_point, ACTIVATION: tl.constexpr):
    """The activation of float32, as `y` holds it: cast, or requantized where y is int8."""
    value = activate(value, ACTIVATION)
    if y.dtype.element_ty == tl.int8:
        value = requantize(value, inverse_scale, zero_point)
    return value.to(y.dtype.element_ty)


@triton.jit
def finish_int8_tile(
    accumulator,
    pixels,
    channels,
    is_pixel,
    n_channels,
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
    """Stores `reference.int8_epilogue` of `accumulator: [pixels, channels]`, exact sums in float32, each step rounded
    where it is there: the explicit `fma` leaves the compiler no product to fuse into an addition."""
    is_channel = channels < n_channels
    is_known = is_pixel[:, None] & is_channel[None, :]
    factor = tl.load(scale + channels, mask=is_channel, other=0.0)
    term = tl.zeros_like(factor)
    if bias is not None:
        term = tl.load(bias + channels, mask=is_channel, other=0.0)
    value = tl.fma(accumulator, factor[None, :], term[None, :])
    if residual is not None:
        offsets = tile_offsets(pixels, channels, residual_spacing)
        more = tl.load(residual + offsets, mask=is_known, other=0)
        if residual.dtype.element_ty == tl.int8:
            value = tl.fma((more.to(tl.int32) - residual_zero_point).to(tl.float32), residual_scale, value)
        else:
            value += more.to(tl.float32)
    value = output_value(value, y, inverse_scale, zero_point, ACTIVATION)
    tl.store(y + tile_offsets(pixels, channels, y_spacing), value, mask=is_known)
