"""Grouped convolution and the channel shuffle."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelpress.kernels.reference.activation import Pair, epilogue
from kernelpress.kernels.reference.dense import conv2d

__all__ = ["channel_shuffle", "grouped_conv2d", "shuffle_concat"]


def channel_shuffle(x: Tensor, *, groups: int) -> Tensor:
    """Channel `i · C / groups + k` of `x: [N, C, H, W]` becomes channel `k · groups + i` (arXiv:1707.01083, Fig. 1)."""
    shuffled = x.unflatten(1, (groups, x.shape[1] // groups)).transpose(1, 2).flatten(1, 2)
    return shuffled.clone() if groups in (1, x.shape[1]) else shuffled


def shuffle_concat(a: Tensor, b: Tensor, *, groups: int = 2) -> Tensor:
    """`channel_shuffle` of the channels of `a` and then those of `b` (ShuffleNet V2, arXiv:1807.11164, Fig. 3)."""
    return channel_shuffle(torch.cat((a, b), 1), groups=groups)


def grouped_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    shuffle: int = 1,
    activation: str = "identity",
) -> Tensor:
    """`activation(channel_shuffle(conv(x) · scale + bias) + residual)`.

    `scale` and `bias` follow the convolution's channels, those of `weight: [C_out, C_in / groups, KH, KW]`; `residual`
    and the output follow the shuffled ones. `shuffle` is the number of groups of the shuffle, 1 for none.
    """
    y = conv2d(x, weight, bias, scale, stride=stride, padding=padding, dilation=dilation, groups=groups)
    if shuffle != 1:
        y = channel_shuffle(y, groups=shuffle)
    return epilogue(y, residual=residual, activation=activation)
