"""Dense products, channels_last.      y[m, n] = act(scale[n] · Σ_k x[m, k] · input_scale[image of m, k] · w[n, k] + …)

    one program:  TILE_ROWS pixels × TILE_COLUMNS output channels        bound by tensor cores, or by memory
          k →          n →                                               where C_in and C_out are small
      ┌─────────┐   ┌───────┐    both operands come in steps of
    m │ x       │ · │ wᵀ    │    TILE_DEPTH input channels, the next
    ↓ └─────────┘   └───────┘    steps' loads under way meanwhile

Configurations are (TILE_ROWS, TILE_COLUMNS, TILE_DEPTH).
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kernelpress.kernels.reference import ACTIVATIONS
from kernelpress.kernels.triton.epilogue import finish_tile, tile_offsets
from kernelpress.kernels.triton.launch import Configuration, Device, cdiv, launch, spacing, unit
from kernelpress.kernels.triton.tiles import product_configurations, product_precision, tile_of_program

__all__ = ["linear", "linear_configurations", "pointwise_conv2d", "pointwise_conv2d_configurations"]


@triton.jit
def product_kernel(
    x,
    weight,
    bias,
    scale,
    residual,
    input_scale,
    y,
    rows,
    c_in,
    c_out,
    positions,
    x_spacing,
    residual_spacing,
    y_spacing,
    X_UNIT: tl.constexpr,
    Y_UNIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE_DEPTH: tl.constexpr,
):
    c_in, x_spacing = c_in * X_UNIT, x_spacing * X_UNIT
    c_out, residual_spacing, y_spacing = c_out * Y_UNIT, residual_spacing * Y_UNIT, y_spacing * Y_UNIT
    row_tile, column_tile = tile_of_program(
        tl.program_id(0), tl.cdiv(rows, TILE_ROWS), tl.cdiv(c_out, TILE_COLUMNS), GROUP=8
    )
    pixels = row_tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    channels = column_tile * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    depth = tl.arange(0, TILE_DEPTH)
    is_pixel, is_channel = pixels < rows, channels < c_out
    x_tile = x + tile_offsets(pixels, depth, x_spacing)
    weight_tile = weight + tile_offsets(channels, depth, c_in)
    if input_scale is not None:
        scale_tile = input_scale + tile_offsets(pixels // positions, depth, c_in)
    accumulator = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    for start in range(0, c_in, TILE_DEPTH):
        in_depth = (depth < c_in - start)[None, :]
        values = tl.load(x_tile + start, mask=is_pixel[:, None] & in_depth, other=0.0)
        weights = tl.load(weight_tile + start, mask=is_channel[:, None] & in_depth, other=0.0)
        if input_scale is not None:
            factors = tl.load(scale_tile + start, mask=is_pixel[:, None] & in_depth, other=0.0)
            values = (values.to(tl.float32) * factors.to(tl.float32)).to(x.dtype.element_ty)
        accumulator = tl.dot(values, tl.trans(weights), accumulator, input_precision=PRECISION)
    finish_tile(
        accumulator,
        pixels,
        channels,
        is_pixel,
        c_out,
        scale,
        bias,
        residual,
        residual_spacing,
        y,
        y_spacing,
        ACTIVATION,
    )


def pointwise_conv2d(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    input_scale: Tensor | None,
    *,
    activation: str,
    allow_tf32: bool,
    configuration: Configuration,
) -> None:
    """Runs `reference.pointwise_conv2d` into `y`; `weight: [C_out, C_in, …]` contiguous."""
    _, c_in, height, width = x.shape
    _product(
        *(y, x, weight, bias, scale, residual, input_scale),
        *(x.shape[0] * height * width, c_in, y.shape[1], height * width),
        *(activation, allow_tf32, configuration),
    )


def linear(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    *,
    activation: str,
    allow_tf32: bool,
    configuration: Configuration,
) -> None:
    """Runs `reference.linear` into `y`; `weight: [C_out, C_in]` contiguous."""
    c_in, c_out = x.shape[-1], y.shape[-1]
    rows = x.numel() // c_in
    _product(
        *(y, x, weight, bias, scale, residual, None),
        *(rows, c_in, c_out, rows, activation, allow_tf32, configuration),
    )


def _product(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    input_scale: Tensor | None,
    rows: int,
    c_in: int,
    c_out: int,
    positions: int,
    activation: str,
    allow_tf32: bool,
    configuration: Configuration,
) -> None:
    tile_rows, tile_columns, tile_depth = configuration.tile
    x_unit, y_unit = unit(c_in, spacing(x)), unit(c_out, spacing(residual), spacing(y))
    launch(
        product_kernel,
        cdiv(rows, tile_rows) * cdiv(c_out, tile_columns),
        configuration,
        *(x, weight, bias, scale, residual, input_scale, y),
        *(rows, c_in // x_unit, c_out // y_unit, positions),
        *(spacing(x) // x_unit, spacing(residual) // y_unit, spacing(y) // y_unit),
        X_UNIT=x_unit,
        Y_UNIT=y_unit,
        ACTIVATION=ACTIVATIONS.index(activation),
        PRECISION=product_precision(x.element_size(), allow_tf32),
        TILE_ROWS=tile_rows,
        TILE_COLUMNS=tile_columns,
        TILE_DEPTH=tile_depth,
    )


def pointwise_conv2d_configurations(
    device: Device,
    y: Any,
    x: Any,
    weight: Any,
    bias: Any,
    scale: Any,
    residual: Any,
    input_scale: Any,
    *,
    allow_tf32: bool,
    **options: Any,
) -> tuple[Configuration, ...]:
    """What `pointwise_conv2d` may run in, the best guess first."""
    batch, _, height, width = x.shape
    return _configurations(
        device, batch * height * width, weight, x.dtype.itemsize, allow_tf32, scale, residual, input_scale
    )


def linear_configurations(
    device: Device,
    y: Any,
    x: Any,
    weight: Any,
    bias: Any,
    scale: Any,
    residual: Any,
    *,
    allow_tf32: bool,
    **options: Any,
) -> tuple[Configuration, ...]:
    """What `linear` may run in, the best guess first."""
    rows = max(1, math.prod(x.shape) // weight.shape[1])
    return _configurations(device, rows, weight, x.dtype.itemsize, allow_tf32, scale, residual, None)


def _configurations(
    device: Device,
    rows: int,
    weight: Any,
    element_bytes: int,
    allow_tf32: bool,
    scale: Any,
    residual: Any,
    input_scale: Any,
) -> tuple[Configuration, ...]:
    return product_configurations(
        *(rows, *weight.shape[:2], element_bytes, product_precision(element_bytes, allow_tf32), device),
        has_more_operands=scale is not None or residual is not None,
        has_factors=input_scale is not None,
    )
