"""Grouped convolutions and channel shuffles: `GroupedConv2d`, `ChannelShuffle`, `ShuffleUnit`, `ShuffleUnitV2`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernelpress import ops
from kernelpress.kernels import reference
from kernelpress.layers.chain import NormLayer, load_in_order
from kernelpress.layers.common import (
    check_padding_mode,
    check_type,
    checked_activation,
    computes_plainly,
    copy_parameters,
)
from kernelpress.layers.dense import explicit_padding
from kernelpress.layers.depthwise import DepthwiseConv2d
from kernelpress.layers.folding import folded, is_foldable, is_hooked
from kernelpress.layers.separable import DepthwiseSeparableConv2d, InvertedResidual
from kernelpress.ops.signature import IntOrPair

__all__ = ["ChannelShuffle", "GroupedConv2d", "ShuffleUnit", "ShuffleUnitV2"]


def _checked_divisor(name: str, divisor: int, channels: int, whose: str) -> int:
    if divisor < 1 or channels % divisor != 0:
        raise ValueError(f"{name}: expected a divisor of the {channels} {whose}, got {divisor}")
    return divisor


class GroupedConv2d(nn.Conv2d):
    """`torch.nn.Conv2d` in groups, its output channels shuffled: `activation(channel_shuffle(conv(x)) + residual)`.

    Takes the arguments of `torch.nn.Conv2d` and loads its state dict. `shuffle` is the number of groups of the shuffle,
    a divisor of `out_channels`, 1 for none; `padding_mode` must be `"zeros"`.

    x: `[N, C_in, H, W]` → `[N, C_out, H_out, W_out]`; residual: of the output's shape, in its shuffled order.
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
        shuffle: int = 1,
        activation: str = "identity",
    ) -> None:
        check_padding_mode(padding_mode)
        geometry: Any = (kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype)
        super().__init__(in_channels, out_channels, *geometry)
        self.shuffle = _checked_divisor("shuffle", shuffle, out_channels, "output channels")
        self.activation = checked_activation(activation)

    @classmethod
    def from_dense(cls, module: nn.Conv2d, *, shuffle: int = 1, activation: str = "identity") -> GroupedConv2d:
        """The layer of `activation(channel_shuffle(module(x)))`, with a copy of its weights on their device."""
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
            shuffle=shuffle,
            activation=activation,
        )
        return copy_parameters(module, layer)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        padding = self.padding
        if isinstance(padding, str):
            x, padding = explicit_padding(self, x)
        plain = computes_plainly(x, self.weight, self.bias, residual)
        return (reference.grouped_conv2d if plain else ops.grouped_conv2d)(
            x,
            self.weight,
            self.bias,
            None,
            residual,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
            shuffle=self.shuffle,
            activation=self.activation,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, shuffle={self.shuffle}, activation={self.activation}"


class ChannelShuffle(nn.ChannelShuffle):
    """`torch.nn.ChannelShuffle` at the speed of a copy, channels_last (ShuffleNet, arXiv:1707.01083, Fig. 1).

    x: `[N, C, H, W]` → the same shape, `groups` a divisor of `C`.
    """

    def __init__(self, groups: int) -> None:
        if groups < 1:
            raise ValueError(f"groups: expected a positive integer, got {groups}")
        super().__init__(groups)

    def forward(self, input: Tensor) -> Tensor:
        return (reference if computes_plainly(input) else ops).channel_shuffle(input, groups=self.groups)


class ShuffleUnit(nn.Module):
    """ShuffleNet's unit (arXiv:1707.01083, Fig. 2): grouped 1×1, shuffle, depthwise, grouped 1×1, each with a norm.

    With stride 1 it adds its input; with stride 2 it concatenates the 3×3 average of its input, so that the last
    convolution makes `out_channels - in_channels`. Either is followed by the activation. Children `compress`,
    `compress_norm`, `depthwise`, `depthwise_norm`, `expand`, `expand_norm` (norms None without `norm_layer`). A state
    dict of other names loads if it has the same tensors in this order.

    x: `[N, in_channels, H, W]` → `[N, out_channels, ceil(H / stride), ceil(W / stride)]`.

    Args:
        groups: of both 1×1 convolutions and of the shuffle.
        hidden_channels: of the depthwise convolution, a quarter of `out_channels` where None.
        compress_groups: of the first 1×1 convolution where it differs: 1 in the first unit of ShuffleNet.
        kernel_size: of the depthwise convolution, odd.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int = 3,
        stride: int = 1,
        hidden_channels: int | None = None,
        compress_groups: int | None = None,
        kernel_size: int = 3,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        norm_layer: NormLayer | None = nn.BatchNorm2d,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        _check_unit(in_channels, out_channels, stride, kernel_size)
        if stride == 2 and out_channels <= in_channels:
            raise ValueError(
                f"out_channels: expected more than in_channels = {in_channels} with stride 2, got {out_channels}"
            )
        hidden = out_channels // 4 if hidden_channels is None else hidden_channels
        first = groups if compress_groups is None else compress_groups
        made = out_channels - in_channels if stride == 2 else out_channels
        for name, count, channels, whose in (
            ("compress_groups", first, in_channels, "input channels"),
            ("compress_groups", first, hidden, "hidden channels"),
            ("groups", groups, hidden, "hidden channels"),
            ("groups", groups, made, "channels of the last convolution"),
        ):
            _checked_divisor(name, count, channels, whose)
        factory: Any = {"bias": bias, "device": device, "dtype": dtype}
        self.groups, self.stride, self.activation = groups, stride, checked_activation(activation)
        self.compress = GroupedConv2d(in_channels, hidden, 1, groups=first, **factory)
        self.compress_norm = _norm_after(self.compress, norm_layer)
        self.depthwise = DepthwiseConv2d(hidden, kernel_size, stride, kernel_size // 2, **factory)
        self.depthwise_norm = _norm_after(self.depthwise, norm_layer)
        self.expand = GroupedConv2d(hidden, made, 1, groups=groups, **factory)
        self.expand_norm = _norm_after(self.expand, norm_layer)

    def forward(self, x: Tensor) -> Tensor:
        norms = (self.compress_norm, self.depthwise_norm, self.expand_norm)
        is_one_by_one = is_hooked(self.compress, self.depthwise, self.expand)
        if is_one_by_one or computes_plainly(x, *self.parameters()) or not all(map(is_foldable, norms)):
            return self._plain(x)
        hidden = ops.grouped_conv2d(
            *(x, *folded(self.compress, self.compress_norm)),
            groups=self.compress.groups,
            shuffle=self.groups,
            activation=self.activation,
        )
        hidden = ops.depthwise_conv2d(
            *(hidden, *folded(self.depthwise, self.depthwise_norm)),
            stride=self.stride,
            padding=self.depthwise.padding,  # type: ignore[arg-type]
        )
        y = ops.grouped_conv2d(
            *(hidden, *folded(self.expand, self.expand_norm)),
            residual=x if self.stride == 1 else None,
            groups=self.groups,
            activation=self.activation,
        )
        if self.stride == 1:
            return y
        return torch.cat((reference.activate(_average(x), self.activation), y), 1)

    def _plain(self, x: Tensor) -> Tensor:
        hidden = reference.activate(_normed(self.compress_norm, self.compress(x)), self.activation)
        hidden = reference.channel_shuffle(hidden, groups=self.groups)
        hidden = _normed(self.depthwise_norm, self.depthwise(hidden))
        y = _normed(self.expand_norm, self.expand(hidden))
        y = x + y if self.stride == 1 else torch.cat((_average(x), y), 1)
        return reference.activate(y, self.activation)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        load_in_order(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"groups={self.groups}, stride={self.stride}, activation={self.activation}"


class ShuffleUnitV2(nn.Module):
    """ShuffleNet V2's unit (arXiv:1807.11164, Fig. 3): a half of the channels passes, the other goes through 1×1,
    depthwise and 1×1 convolutions; both are concatenated and shuffled in one pass.

    With stride 2 nothing is split: `branch1`, depthwise and 1×1, takes the input instead of the half that passes, and
    is None with stride 1. `branch2` holds `expand`, `depthwise` and `project`, each with its norm. The state dict of a
    torchvision block loads.

    x: `[N, in_channels, H, W]` → `[N, out_channels, ceil(H / stride), ceil(W / stride)]`, `out_channels` even.
    """

    branch1: DepthwiseSeparableConv2d | None
    branch2: InvertedResidual

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        kernel_size: int = 3,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        norm_layer: NormLayer | None = nn.BatchNorm2d,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        _check_unit(in_channels, out_channels, stride, kernel_size)
        if out_channels % 2 != 0:
            raise ValueError(f"out_channels: expected an even number, got {out_channels}")
        half = out_channels // 2
        factory: Any = {"bias": bias, "device": device, "dtype": dtype, "norm_layer": norm_layer}
        self.register_module("branch1", None)
        if stride == 2:
            self.branch1 = DepthwiseSeparableConv2d(
                in_channels, half, kernel_size, stride, kernel_size // 2, activation=activation, **factory
            )
        self.branch2 = InvertedResidual(
            *(in_channels if stride == 2 else half, half, half, kernel_size, stride),
            expand_activation=activation,
            depthwise_activation="identity",
            activation=activation,
            residual=False,
            **factory,
        )

    @classmethod
    def from_dense(cls, block: nn.Module) -> ShuffleUnitV2:
        """The layer that computes what a torchvision ShuffleNet V2 block does, with a copy of its weights.

        `block` has `branch2`, 1×1, depthwise and 1×1 convolutions, and `branch1`, depthwise and 1×1, or nothing in it
        where it splits its input; each convolution may be followed by a BatchNorm and an activation.
        Raises: `ValueError` for any other block.
        """
        passing, working = (getattr(block, name, None) for name in ("branch1", "branch2"))
        if not isinstance(working, nn.Module):
            raise ValueError(f"block: expected branch1 and branch2 in it, got {type(block).__name__}")
        layer = cls(2, 2)
        if isinstance(passing, nn.Module) and list(passing.parameters()):
            layer.branch1 = DepthwiseSeparableConv2d.from_dense(passing)
        layer.branch2 = InvertedResidual.from_dense(working, residual=False)
        layer.training = block.training
        return layer

    def forward(self, x: Tensor) -> Tensor:
        if self.branch1 is None:
            passing, x = x.chunk(2, 1)
        else:
            passing = self.branch1(x)
        y = self.branch2(x)
        return (reference if computes_plainly(y, passing) else ops).shuffle_concat(passing, y, groups=2)


def _check_unit(in_channels: int, out_channels: int, stride: int, kernel_size: int) -> None:
    if stride not in (1, 2):
        raise ValueError(f"stride: expected 1 or 2, got {stride}")
    if stride == 1 and in_channels != out_channels:
        raise ValueError(f"out_channels: expected in_channels = {in_channels} with stride 1, got {out_channels}")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size: expected a positive odd integer, got {kernel_size}")


def _norm_after(convolution: nn.Conv2d, norm_layer: NormLayer | None) -> nn.Module | None:
    return None if norm_layer is None else norm_layer(convolution.out_channels).to(convolution.weight)


def _normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 2, 1)
