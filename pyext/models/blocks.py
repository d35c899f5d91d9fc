"""Pieces that several networks share: convolution + norm + activation, rounding, initialisation, checks."""

import math

from torch import Tensor, nn

from kernelpress.layers import Conv2d, DepthwiseConv2d, PointwiseConv2d
from kernelpress.layers.chain import NormLayer
from kernelpress.layers.common import make_divisible

__all__ = [
    "check_images",
    "check_positive",
    "conv_norm_act",
    "depthwise_norm_act",
    "initialise",
    "make_divisible",
    "pointwise_norm_act",
    "scaled",
]


def conv_norm_act(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int,
    activation: type[nn.Module],
    norm_layer: NormLayer = nn.BatchNorm2d,
) -> nn.Sequential:
    """k×k convolution, "same" padded, norm, `activation`; children `0`, `1`, `2`."""
    convolution = Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)
    return nn.Sequential(convolution, norm_layer(out_channels), activation(inplace=True))


def depthwise_norm_act(
    channels: int,
    kernel_size: int,
    stride: int,
    activation: type[nn.Module],
    norm_layer: NormLayer = nn.BatchNorm2d,
) -> nn.Sequential:
    """k×k depthwise convolution, "same" padded, norm, `activation`; children `0`, `1`, `2`."""
    convolution = DepthwiseConv2d(channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)
    return nn.Sequential(convolution, norm_layer(channels), activation(inplace=True))


def pointwise_norm_act(
    in_channels: int,
    out_channels: int,
    activation: type[nn.Module] | None,
    norm_layer: NormLayer = nn.BatchNorm2d,
) -> nn.Sequential:
    """1×1 convolution, norm and, unless None, `activation`; children `0`, `1`, `2`."""
    convolution = PointwiseConv2d(in_channels, out_channels, bias=False)
    after = [] if activation is None else [activation(inplace=True)]
    return nn.Sequential(convolution, norm_layer(out_channels), *after)


def initialise(network: nn.Module) -> None:
    """Initialises in place: trainable convolutions by He et al. (2015), eq. 14, without bias; BatchNorm to the
    identity."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            if isinstance(module.weight, nn.Parameter):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def scaled(name: str, width: float, channels: int, divisor: int = 8) -> int:
    """`channels` times the option `name`, `width`, to the nearest multiple of `divisor`.

    Raises `ValueError` where less than half a channel would be left.
    """
    if round(channels * width) < 1:
        raise ValueError(f"{name}: expected a width that leaves some of {channels} channels, got {width!r}")
    return make_divisible(channels * width, divisor)


def check_positive(**arguments: float) -> None:
    """Raises `ValueError` for the first named argument that is not above zero, `TypeError` if it is no number."""
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a positive number, got {value!r}")
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a positive number, got {value!r}")


def check_images(x: Tensor, least: int = 1) -> None:
    """Raises `ValueError` unless `x` is a batch of images of at least `least` rows and columns."""
    if isinstance(x, Tensor) and (x.dim() != 4 or min(x.shape[2:]) < least):
        raise ValueError(f"x: expected images [N, C, H, W] of at least {least}×{least} pixels, got {list(x.shape)}")
