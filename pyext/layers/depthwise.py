"""Depthwise convolution with a fused activation: `DepthwiseConv2d`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernelpress import ops
from kernelpress.kernels import reference
from kernelpress.layers.common import (
    check_padding_mode,
    check_type,
    checked_activation,
    computes_plainly,
    copy_parameters,
)
from kernelpress.layers.dense import explicit_padding
from kernelpress.ops.signature import IntOrPair

__all__ = ["DepthwiseConv2d"]


class DepthwiseConv2d(nn.Conv2d):
    """Every channel by its own `channel_multiplier` filters: `activation(conv(x) + residual)`.

    Takes the arguments of `torch.nn.Conv2d` but the output channels and groups, which follow, and loads the state dict
    of one with `groups = in_channels`. `padding_mode` must be `"zeros"`.

    x: `[N, C, H, W]` → `[N, C · channel_multiplier, H_out, W_out]`; residual: of the output's shape.
    """

    def __init__(
        self,
        in_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: str | IntOrPair = 0,
        dilation: IntOrPair = 1,
        channel_multiplier: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "identity",
    ) -> None:
        check_padding_mode(padding_mode)
        if channel_multiplier < 1:
            raise ValueError(f"channel_multiplier: expected a positive integer, got {channel_multiplier}")
        geometry: Any = (kernel_size, stride, padding, dilation, in_channels, bias, padding_mode, device, dtype)
        super().__init__(in_channels, in_channels * channel_multiplier, *geometry)
        self.activation = checked_activation(activation)

    @property
    def channel_multiplier(self) -> int:
        """Filters per input channel."""
        return self.out_channels // self.in_channels

    @classmethod
    def from_dense(cls, module: nn.Conv2d, *, activation: str = "identity") -> DepthwiseConv2d:
        """The layer that computes `activation(module(x))`, with a copy of its weights on their device.

        Raises: `ValueError` where `module` does not have one group per input channel.
        """
        check_type(module, nn.Conv2d)
        if module.groups != module.in_channels:
            raise ValueError(f"module: expected groups = in_channels, got {module}")
        layer = cls(
            module.in_channels,
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            module.out_channels // module.in_channels,
            module.bias is not None,
            module.padding_mode,
            module.weight.device,
            module.weight.dtype,
            activation=activation,
        )
        return copy_parameters(module, layer)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        padding = self.padding
        if isinstance(padding, str):
            x, padding = explicit_padding(self, x)
        plain = computes_plainly(x, self.weight, self.bias, residual)
        return (reference.depthwise_conv2d if plain else ops.depthwise_conv2d)(
            x,
            self.weight,
            self.bias,
            None,
            residual,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            activation=self.activation,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"
