"""Products of int8 activations and weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelpress.kernels.reference.activation import Pair
from kernelpress.kernels.reference.int8_quantize import int8_epilogue

__all__ = ["int8_conv2d", "int8_depthwise_conv2d", "int8_matmul"]


def int8_matmul(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    row_scale: Tensor | None = None,
    row_zero_point: Tensor | None = None,
    *,
    input_scale: float = 1.0,
    input_zero_point: int = 0,
    residual_scale: float = 1.0,
    residual_zero_point: int = 0,
    activation: str = "identity",
    output_scale: float | None = None,
    output_zero_point: int = 0,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """`x: [..., C_in]` times `weight: [C_out, C_in]` transposed, both int8, summed exactly; then `int8_epilogue`.

    Activations are affine per tensor (`input_scale`, `input_zero_point`), or per row (`row_scale`, `row_zero_point`:
    `[...]`); weights are symmetric per output channel (`weight_scale: [C_out]`).
    """
    zero_point: int | Tensor = input_zero_point if row_zero_point is None else row_zero_point[..., None].double()
    accumulator = F.linear(x.double() - zero_point, weight.double())
    return int8_epilogue(
        accumulator if row_scale is None else accumulator.float() * row_scale[..., None],
        weight_scale * input_scale,
        bias,
        residual,
        residual_scale=residual_scale,
        residual_zero_point=residual_zero_point,
        activation=activation,
        output_scale=output_scale,
        output_zero_point=output_zero_point,
        output_dtype=output_dtype,
    )


def int8_conv2d(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    input_scale: float = 1.0,
    input_zero_point: int = 0,
    residual_scale: float = 1.0,
    residual_zero_point: int = 0,
    activation: str = "identity",
    output_scale: float | None = None,
    output_zero_point: int = 0,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Convolution of int8 `x: [N, C_in, H, W]` by int8 `weight: [C_out, C_in / groups, KH, KW]`, summed exactly; then
    `int8_epilogue`. Padding has the value of the zero point, which stands for 0.
    """
    shifted = x.double() - input_zero_point
    accumulator = F.conv2d(shifted, weight.double(), None, stride, padding, dilation, groups)
    return int8_epilogue(
        accumulator,
        (weight_scale * input_scale)[:, None, None],
        None if bias is None else bias[:, None, None],
        residual,
        residual_scale=residual_scale,
        residual_zero_point=residual_zero_point,
        activation=activation,
        output_scale=output_scale,
        output_zero_point=output_zero_point,
        output_dtype=output_dtype,
    )


def int8_depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    input_scale: float = 1.0,
    input_zero_point: int = 0,
    residual_scale: float = 1.0,
    residual_zero_point: int = 0,
    activation: str = "identity",
    output_scale: float | None = None,
    output_zero_point: int = 0,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Each channel of int8 `x: [N, C, H, W]` by its own filters, `weight: [C · multiplier, 1, KH, KW]`; as
    `int8_conv2d` otherwise.
    """
    return int8_conv2d(
        x,
        weight,
        weight_scale,
        bias,
        residual,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=x.shape[1],
        input_scale=input_scale,
        input_zero_point=input_zero_point,
        residual_scale=residual_scale,
        residual_zero_point=residual_zero_point,
        activation=activation,
        output_scale=output_scale,
        output_zero_point=output_zero_point,
        output_dtype=output_dtype,
    )
