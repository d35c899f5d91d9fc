"""Ghost convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelpress.kernels.reference.activation import Pair
from kernelpress.kernels.reference.dense import conv2d
from kernelpress.kernels.reference.separable import depthwise_conv2d

__all__ = ["ghost_conv2d"]


def ghost_conv2d(
    x: Tensor,
    primary_weight: Tensor,
    primary_bias: Tensor | None,
    cheap_weight: Tensor,
    cheap_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    activation: str = "identity",
    cheap_activation: str = "identity",
    out_channels: int | None = None,
) -> Tensor:
    """Few channels from a convolution, the others from those by a depthwise one (GhostNet, arXiv:1911.11907, eq. 3).

    `primary_weight: [C_primary, C_in, KH, KW]`; `cheap_weight: [C_primary · multiplier, 1, DH, DW]` with odd sizes, of
    stride 1 and padded to keep the size. The result is `concat(primary, cheap) + residual`, of which the first
    `out_channels` are kept (None: all).
    """
    primary = conv2d(x, primary_weight, primary_bias, stride=stride, padding=padding, activation=activation)
    kernel_h, kernel_w = cheap_weight.shape[2:]
    cheap = depthwise_conv2d(
        primary, cheap_weight, cheap_bias, padding=(kernel_h // 2, kernel_w // 2), activation=cheap_activation
    )
    y = torch.cat([primary, cheap], 1)[:, :out_channels]
    return y if residual is None else y + residual
