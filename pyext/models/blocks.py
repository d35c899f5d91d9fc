"""Pieces that several networks share: convolution + BatchNorm + activation, rounding, initialisation, checks."""

from torch import nn

from kernelpress.layers import Conv2d, DepthwiseConv2d, PointwiseConv2d
from kernelpress.layers.common import make_divisible

__all__ = [
    "check_positive",
    "conv_norm_act",
    "depthwise_norm_act",
    "initialise",
    "make_divisible",
    "pointwise_norm_act",
]


def conv_norm_act(
    in_channels: int, out_channels: int, kernel_size: int, stride: int, activation: type[nn.Module]
) -> nn.Sequential:
    """k×k convolution, "same" padded, BatchNorm, `activation`; children `0`, `1`, `2`."""
    convolution = Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), activation(inplace=True))


def depthwise_norm_act(channels: int, kernel_size: int, stride: int, activation: type[nn.Module]) -> nn.Sequential:
    """k×k depthwise convolution, "same" padded, BatchNorm, `activation`; children `0`, `1`, `2`."""
    convolution = DepthwiseConv2d(channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), activation(inplace=True))


def pointwise_norm_act(in_channels: int, out_channels: int, activation: type[nn.Module]) -> nn.Sequential:
    """1×1 convolution, BatchNorm, `activation`; children `0`, `1`, `2`."""
    convolution = PointwiseConv2d(in_channels, out_channels, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), activation(inplace=True))


def initialise(network: nn.Module) -> None:
    """Initialises in place: trainable convolutions by He et al. (2015), eq. 14; BatchNorm to the identity."""
    for module in network.modules():
        if isinstance(module, (Conv2d, DepthwiseConv2d, PointwiseConv2d)):
            if isinstance(module.weight, nn.Parameter):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def check_positive(**arguments: float) -> None:
    """Raises `ValueError` for the first named argument that is not above zero, `TypeError` if it is no number."""
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a positive number, got {value!r}")
        if not value > 0:
            raise ValueError(f"{name}: expected a positive number, got {value!r}")
