"""What every kernel ends in: `activation(accumulator · scale + bias + residual)`, for a tile [pixels, channels]."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["activate", "affine", "finish_tile", "tile_offsets"]


@triton.jit
def activate(value, ACTIVATION: tl.constexpr):
    """The activation whose position in `reference.ACTIVATIONS` is given, of float32; NaN stays NaN."""
    tl.static_assert(ACTIVATION < 8)
    if ACTIVATION == 1:
        value = tl.where(value < 0.0, 0.0, value)
    elif ACTIVATION == 2:
        value = tl.where(value < 0.0, 0.0, tl.where(value > 6.0, 6.0, value))
    elif ACTIVATION == 3:
        value = value * tl.sigmoid(value)
    elif ACTIVATION == 4:
        gate = value + 3.0
        value = value * tl.where(gate < 0.0, 0.0, tl.where(gate > 6.0, 6.0, gate)) * (1.0 / 6.0)
    elif ACTIVATION == 5:
        gate = value + 3.0
        value = tl.where(gate < 0.0, 0.0, tl.where(gate > 6.0, 6.0, gate)) * (1.0 / 6.0)
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
