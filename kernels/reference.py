"""What every op of kernelpress means, in plain PyTorch: any float dtype, differentiable, exportable.

Every op ends in the same epilogue, `activation(accumulator * scale + bias + residual)`. Nothing is checked here;
`kernelpress.ops` owns the checks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "ACTIVATIONS",
    "activate",
    "channel_shuffle",
    "conv2d",
    "depthwise_conv2d",
    "epilogue",
    "ghost_conv2d",
    "global_avg_pool2d",
    "grouped_conv2d",
    "inverted_residual",
    "linear",
    "max_pool2d",
    "pointwise_conv2d",
    "separable_conv2d",
    "separable_stem",
    "shuffle_concat",
]

Pair = tuple[int, ...]

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
}

ACTIVATIONS: tuple[str, ...] = tuple(_FUNCTIONS)
"""Activation names; the position of a name is the integer the native kernels take."""


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply the activation of that name. Raises `ValueError` for an unknown one."""
    try:
        function = _FUNCTIONS[activation]
    except KeyError:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}") from None
    return function(x)


def epilogue(
    accumulator: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "identity",
) -> Tensor:
    """`activation(accumulator * scale + bias + residual)` with `scale` and `bias` per channel of `[N, C, H, W]`."""
    if scale is not None:
        accumulator = accumulator * scale[:, None, None]
    if bias is not None:
        accumulator = accumulator + bias[:, None, None]
    if residual is not None:
        accumulator = accumulator + residual
    return activate(accumulator, activation)


def conv2d(
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
    activation: str = "identity",
) -> Tensor:
    """Convolution of `x: [N, C_in, H, W]` by `weight: [C_out, C_in / groups, KH, KW]` with the epilogue."""
    if scale is None:
        return epilogue(F.conv2d(x, weight, bias, stride, padding, dilation, groups), None, None, residual, activation)
    accumulator = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    return epilogue(accumulator, bias, scale, residual, activation)


def pointwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    input_scale: Tensor | None = None,
    *,
    activation: str = "identity",
) -> Tensor:
    """1×1 convolution of `x · input_scale` (`[N, C_in]`, squeeze-and-excitation) with the epilogue."""
    if input_scale is not None:
        x = x * input_scale[:, :, None, None]
    return conv2d(x, weight, bias, scale, residual, activation=activation)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str = "identity",
) -> Tensor:
    """`x: [..., C_in]` times `weight: [C_out, C_in]` transposed, with the epilogue over the last dimension."""
    if scale is None:
        y = F.linear(x, weight, bias)
    else:
        y = F.linear(x, weight) * scale
        if bias is not None:
            y = y + bias
    if residual is not None:
        y = y + residual
    return activate(y, activation)


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    activation: str = "identity",
) -> Tensor:
    """Each channel of `x: [N, C, H, W]` by its own filters, `weight: [C · multiplier, 1, KH, KW]`, and the epilogue."""
    return conv2d(
        x,
        weight,
        bias,
        scale,
        residual,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=x.shape[1],
        activation=activation,
    )


def separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    depthwise_activation: str = "identity",
    activation: str = "identity",
) -> Tensor:
    """Depthwise convolution, its activation, then a 1×1 convolution with the epilogue (MobileNet, arXiv:1704.04861)."""
    hidden = depthwise_conv2d(
        x,
        depthwise_weight,
        depthwise_bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        activation=depthwise_activation,
    )
    return pointwise_conv2d(hidden, pointwise_weight, pointwise_bias, None, residual, activation=activation)


def inverted_residual(
    x: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    expand_activation: str = "identity",
    depthwise_activation: str = "identity",
    activation: str = "identity",
) -> Tensor:
    """Expand 1×1, depthwise, project 1×1 with the epilogue (MobileNet V2, arXiv:1801.04381)."""
    hidden = pointwise_conv2d(x, expand_weight, expand_bias, activation=expand_activation)
    return separable_conv2d(
        hidden,
        depthwise_weight,
        depthwise_bias,
        project_weight,
        project_bias,
        residual,
        stride=stride,
        padding=padding,
        dilation=dilation,
        depthwise_activation=depthwise_activation,
        activation=activation,
    )


def separable_stem(
    x: Tensor,
    stem_weight: Tensor,
    stem_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None = None,
    *,
    stem_stride: Pair = (1, 1),
    stem_padding: Pair = (0, 0),
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    stem_activation: str = "identity",
    depthwise_activation: str = "identity",
    activation: str = "identity",
) -> Tensor:
    """Dense convolution, depthwise convolution, 1×1 convolution (MobileNet, arXiv:1704.04861, Table 1, first rows)."""
    hidden = conv2d(x, stem_weight, stem_bias, stride=stem_stride, padding=stem_padding, activation=stem_activation)
    return separable_conv2d(
        hidden,
        depthwise_weight,
        depthwise_bias,
        pointwise_weight,
        pointwise_bias,
        stride=stride,
        padding=padding,
        depthwise_activation=depthwise_activation,
        activation=activation,
    )


def global_avg_pool2d(x: Tensor) -> Tensor:
    """Mean over the positions of every channel: `[N, C, H, W]` → `[N, C]`."""
    return x.mean((2, 3))


def max_pool2d(x: Tensor, *, kernel_size: Pair, stride: Pair, padding: Pair = (0, 0)) -> Tensor:
    """Largest value under every window; padding counts as −∞, NaN wins."""
    return F.max_pool2d(x, kernel_size, stride, padding)


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


def channel_shuffle(x: Tensor, *, groups: int) -> Tensor:
    """Channel `i · C / groups + k` of `x: [N, C, H, W]` becomes channel `k · groups + i` (arXiv:1707.01083, Fig. 1)."""
    return x.unflatten(1, (groups, x.shape[1] // groups)).transpose(1, 2).flatten(1, 2)


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
