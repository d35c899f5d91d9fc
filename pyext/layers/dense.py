"""Dense layers with a fused activation: `Conv2d`, `PointwiseConv2d`, `Linear`."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernelpress import ops
from kernelpress.kernels import reference
from kernelpress.layers.common import (
    check_padding_mode,
    check_type,
    checked_activation,
    computes_plainly,
    copy_parameters,
    is_pointwise,
)
from kernelpress.ops.signature import IntOrPair

__all__ = ["Conv2d", "Linear", "PointwiseConv2d", "explicit_padding"]


class _Windowed(Protocol):
    """What `torch.nn.Conv2d` and the layers beside it know of their window."""

    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: str | tuple[int, ...]


def explicit_padding(layer: _Windowed, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input and the symmetric padding that `padding="same"` or `"valid"` stand for.

    An even kernel needs one more row or column at the end; the input is padded with it, as PyTorch does.
    """
    if layer.padding == "valid":
        return x, (0, 0)
    total_h, total_w = (d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    if total_h % 2 or total_w % 2:
        x = F.pad(x, (0, total_w % 2, 0, total_h % 2))
    return x, (total_h // 2, total_w // 2)


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` followed by an activation, with an optional residual: `activation(conv(x) + residual)`.

    Takes the arguments of `torch.nn.Conv2d` and loads its state dict. `padding_mode` must be `"zeros"`.

    x: `[N, C_in, H, W]` → `[N, C_out, H_out, W_out]`; residual: of the output's shape.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: str | IntOrPair = 0,
        dilation: IntOrPair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "identity",
    ) -> None:
        check_padding_mode(padding_mode)
        geometry: Any = (kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype)
        super().__init__(in_channels, out_channels, *geometry)
        self.activation = checked_activation(activation)

    @classmethod
    def from_dense(cls, module: nn.Conv2d, *, activation: str = "identity") -> Conv2d:
        """The layer that computes `activation(module(x))`, with a copy of its weights on their device."""
        check_type(module, nn.Conv2d)
        layer = cls(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
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
        geometry: dict[str, Any] = {"stride": self.stride, "padding": padding, "dilation": self.dilation}
        weight, bias, groups = self.weight, self.bias, self.groups
        if computes_plainly(x, weight, bias, residual):
            return reference.conv2d(
                x, weight, bias, None, residual, groups=groups, activation=self.activation, **geometry
            )
        if groups > 1 and groups == self.in_channels:
            return ops.depthwise_conv2d(x, weight, bias, None, residual, activation=self.activation, **geometry)
        return ops.conv2d(x, weight, bias, None, residual, groups=groups, activation=self.activation, **geometry)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class PointwiseConv2d(nn.Conv2d):
    """1×1 convolution followed by an activation: `activation(conv(x · input_scale) + residual)`.

    Loads the state dict of a `torch.nn.Conv2d` with kernel size 1.

    x: `[N, C_in, H, W]` → `[N, C_out, H, W]`; residual: of the output's shape; input_scale: `[N, C_in]`, as
    squeeze-and-excitation makes it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "identity",
    ) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias, device=device, dtype=dtype)
        self.activation = checked_activation(activation)

    @classmethod
    def from_dense(cls, module: nn.Conv2d, *, activation: str = "identity") -> PointwiseConv2d:
        """The layer that computes `activation(module(x))`, with a copy of its weights on their device.

        Raises: `ValueError` where `module` is no 1×1 convolution of stride 1 without padding and groups.
        """
        check_type(module, nn.Conv2d)
        if not is_pointwise(module):
            raise ValueError(f"module: expected a 1×1 convolution of stride 1, no padding and groups = 1, got {module}")
        layer = cls(
            module.in_channels,
            module.out_channels,
            module.bias is not None,
            module.weight.device,
            module.weight.dtype,
            activation=activation,
        )
        return copy_parameters(module, layer)

    def forward(self, x: Tensor, residual: Tensor | None = None, input_scale: Tensor | None = None) -> Tensor:
        weight, bias = self.weight, self.bias
        if computes_plainly(x, weight, bias, residual, input_scale):
            compute = reference.pointwise_conv2d
        else:
            compute = ops.pointwise_conv2d
        return compute(x, weight, bias, None, residual, input_scale, activation=self.activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class Linear(nn.Linear):
    """`torch.nn.Linear` followed by an activation: `activation(linear(x) + residual)`.

    Takes the arguments of `torch.nn.Linear` and loads its state dict.

    x: `[..., C_in]` → `[..., C_out]`; residual: of the output's shape.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "identity",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = checked_activation(activation)

    @classmethod
    def from_dense(cls, module: nn.Linear, *, activation: str = "identity") -> Linear:
        """The layer that computes `activation(module(x))`, with a copy of its weights on their device."""
        check_type(module, nn.Linear)
        layer = cls(
            module.in_features,
            module.out_features,
            module.bias is not None,
            module.weight.device,
            module.weight.dtype,
            activation=activation,
        )
        return copy_parameters(module, layer)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        compute = reference.linear if computes_plainly(x, self.weight, self.bias, residual) else ops.linear
        return compute(x, self.weight, self.bias, None, residual, activation=self.activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"
