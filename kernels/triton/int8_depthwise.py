"""int8 depthwise convolution, channels_last: the window of `depthwise` summed exactly, then the int8 epilogue.

    y[n,p,q,c] = epilogue(s[c] · Σ_rs w[r,s,c] · (x[n, p·S-P+r·D, q·S-P+s·D, c] − z))        padding stands for 0

A value has the zero point z taken off as it is loaded. At one byte a value the kernel is bound by the instructions that
unpack and multiply, one product at a time, sooner than by memory: Triton has no dot product of four bytes.
Configurations are (TILE_ROWS, TILE_COLUMNS, TILE_CHANNELS).
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
from kernelpress.kernels.triton.epilogue import finish_int8_tile
from kernelpress.kernels.triton.launch import Configuration, Device, cdiv, launch, spacing

__all__ = ["int8_depthwise_conv2d", "int8_depthwise_conv2d_configurations"]


@triton.jit
def int8_depthwise_rows_kernel(
    x,
    weight,
    scale,
    bias,
    residual,
    y,
    in_h,
    in_w,
    n_channels,
    out_h,
    out_w,
    x_spacing,
    residual_spacing,
    y_spacing,
    pad_h,
    pad_w,
    input_zero_point,
    residual_scale,
    residual_zero_point,
    inverse_scale,
    zero_point,
    MULTIPLIER: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
):
    image, first_row, columns, channels = tile_of_outputs(
        tl.program_id(0), out_h, out_w, n_channels, TILE_ROWS, TILE_COLUMNS, TILE_CHANNELS
    )
    sums = rows_of_window(
        *(x, weight, input_zero_point, image, first_row, columns, channels),
        *(in_h, in_w, n_channels, x_spacing, pad_h, pad_w),
        *(MULTIPLIER, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W),
        *(TILE_ROWS, TILE_COLUMNS, TILE_CHANNELS),
    )
    for at in tl.static_range(TILE_ROWS):
        row = first_row + at
        finish_int8_tile(
            *(sums[at].to(tl.float32), (image.to(tl.int64) * out_h + row) * out_w + columns, channels),
            *(columns < tl.where(row < out_h, out_w, 0), n_channels, scale, bias),
            *(residual, residual_spacing, residual_scale, residual_zero_point),
            *(y, y_spacing, inverse_scale, zero_point, ACTIVATION),
        )


@triton.jit
def int8_depthwise_taps_kernel(
    x,
    weight,
    scale,
    bias,
    residual,
    y,
    in_h,
    in_w,
    n_channels,
    out_h,
    out_w,
    x_spacing,
    residual_spacing,
    y_spacing,
    pad_h,
    pad_w,
    input_zero_point,
    residual_scale,
    residual_zero_point,
    inverse_scale,
    zero_point,
    dilation_h,
    dilation_w,
    MULTIPLIER: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
):
    image, row, columns, channels = tile_of_outputs(
        tl.program_id(0), out_h, out_w, n_channels, 1, TILE_COLUMNS, TILE_CHANNELS
    )
    sums = taps_of_window(
        *(x, weight, input_zero_point, image, row, columns, channels, in_h, in_w, n_channels, x_spacing),
        *(pad_h, pad_w, dilation_h, dilation_w, MULTIPLIER, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W),
        *(TILE_COLUMNS, TILE_CHANNELS),
    )
    finish_int8_tile(
        *(sums.to(tl.float32), (image.to(tl.int64) * out_h + row) * out_w + columns, channels),
        *(columns < out_w, n_channels, scale, bias),
        *(residual, residual_spacing, residual_scale, residual_zero_point),
        *(y, y_spacing, inverse_scale, zero_point, ACTIVATION),
    )


def int8_depthwise_conv2d(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    input_zero_point: int,
    activation: str,
    residual_scale: float,
    residual_zero_point: int,
    output_scale: float,
    output_zero_point: int,
    allow_tf32: bool,
    configuration: Configuration,
) -> None:
    """Runs `reference.int8_depthwise_conv2d` into `y`; `weight: [KH, KW, C · multiplier]`, `scale` has the input's in
    it."""
    kernel_h, kernel_w, _ = weight.shape
    batch, c_out, out_h, out_w = y.shape
    tile_rows, tile_columns, tile_channels = configuration.tile
    programs = batch * cdiv(out_h, tile_rows) * cdiv(out_w, tile_columns) * cdiv(c_out, tile_channels)
    arguments = (
        *(x, weight, scale, bias, residual, y, *x.shape[2:], c_out, out_h, out_w),
        *(spacing(x), spacing(residual), spacing(y), *padding, input_zero_point),
        *(residual_scale, residual_zero_point, 1.0 / output_scale, output_zero_point),
    )
    constants: dict[str, Any] = {
        "MULTIPLIER": c_out // x.shape[1],
        "KERNEL_H": kernel_h,
        "KERNEL_W": kernel_w,
        "STRIDE_H": stride[0],
        "STRIDE_W": stride[1],
        "ACTIVATION": ACTIVATIONS.index(activation),
        "TILE_COLUMNS": tile_columns,
        "TILE_CHANNELS": tile_channels,
    }
    if is_unrolled((kernel_h, kernel_w), dilation):
        constants |= {"TILE_ROWS": tile_rows}
        launch(int8_depthwise_rows_kernel, programs, configuration, *arguments, **constants)
    else:
        launch(int8_depthwise_taps_kernel, programs, configuration, *arguments, *dilation, **constants)


def int8_depthwise_conv2d_configurations(
    device: Device, y: Any, x: Any, weight: Any, *others: Any, stride: Any, dilation: Any, **options: Any
) -> tuple[Configuration, ...]:
    """What `int8_depthwise_conv2d` may run in, the best guess first."""
    return depthwise_configurations(device, y.shape, weight.shape[:2], stride, dilation)
