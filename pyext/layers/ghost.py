"""Ghost modules computed by one op: `GhostModule` and `GhostBottleneck` (GhostNet, arXiv:1911.11907)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kernelpress import ops
from kernelpress.layers.chain import (
    NormLayer,
    Stage,
    activation_module,
    copy_stages,
    has_bias,
    norm_layer_of,
    read_stages,
)
from kernelpress.layers.common import checked_activation, computes_plainly, make_divisible
from kernelpress.layers.dense import Conv2d, PointwiseConv2d
from kernelpress.layers.depthwise import DepthwiseConv2d
from kernelpress.layers.folding import folded, is_foldable, is_hooked

__all__ = ["GhostBottleneck", "GhostModule", "SqueezeExcite"]


class GhostModule(nn.Module):
    """Few channels from a convolution, the others from those by a depthwise one, each with norm and activation.

    Takes the arguments and loads the state dict of the GhostNet authors' module, which timm's shares: children
    `primary_conv` and `cheap_operation`, of convolution, norm and activation each. `activation` stands for `relu`,
    `cheap_activation` for the second one alone; `norm_layer` None leaves the norms out.

    x: `[N, C_in, H, W]` → `[N, C_out, H_out, W_out]`; residual: of the output's shape, added to all of it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        ratio: int = 2,
        dw_size: int = 3,
        stride: int = 1,
        relu: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        cheap_activation: str | None = None,
        norm_layer: NormLayer | None = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        if ratio < 2:
            raise ValueError(f"ratio: expected an integer of at least 2, got {ratio}")
        for name, size in (("kernel_size", kernel_size), ("dw_size", dw_size)):
            if size % 2 == 0:
                raise ValueError(f"{name}: expected an odd size, got {size}")
        first = ("relu" if relu else "identity") if activation is None else activation
        self.activation = checked_activation(first)
        self.cheap_activation = self.activation if cheap_activation is None else checked_activation(cheap_activation)
        primary = math.ceil(out_channels / ratio)
        self._surplus = ratio * primary - out_channels
        form: Any = {"bias": bias, "device": device, "dtype": dtype}
        self.primary_conv = _conv_norm_act(
            Conv2d(in_channels, primary, kernel_size, stride, kernel_size // 2, **form), norm_layer, self.activation
        )
        self.cheap_operation = _conv_norm_act(
            DepthwiseConv2d(primary, dw_size, 1, dw_size // 2, channel_multiplier=ratio - 1, **form),
            norm_layer,
            self.cheap_activation,
        )

    @property
    def out_channels(self) -> int:
        """What both convolutions make, but for the last few where `ratio` does not divide what was asked for."""
        (primary, _), (cheap, _) = _parts(self.primary_conv), _parts(self.cheap_operation)
        return int(primary.out_channels + cheap.out_channels - self._surplus)

    @classmethod
    def from_dense(cls, module: nn.Module, out_channels: int | None = None) -> GhostModule:
        """The layer that computes what a ghost module of plain PyTorch does, with a copy of its weights.

        Args:
            module: its children `primary_conv` and `cheap_operation` are a convolution each, with an optional BatchNorm
                and activation; what it returns is their concatenation.
            out_channels: how many channels of it are kept; where None, what the module's `oup` or `out_chs` says, else
                all.

        Raises: `ValueError` for any other module.
        """
        stages = [_only_stage(module, name) for name in ("primary_conv", "cheap_operation")]
        primary, cheap = (stage.convolution for stage in stages)
        total = primary.out_channels + cheap.out_channels
        if out_channels is None:
            out_channels = getattr(module, "oup", getattr(module, "out_chs", total))
        layer = cls(
            primary.in_channels,
            out_channels,
            primary.kernel_size[0],
            total // primary.out_channels,
            cheap.kernel_size[0],
            int(primary.stride[0]),
            bias=has_bias(stages),
            device=primary.weight.device,
            dtype=primary.weight.dtype,
            activation=stages[0].activation,
            cheap_activation=stages[1].activation,
            norm_layer=norm_layer_of(stages),
        )
        parts = _parts(layer.primary_conv), _parts(layer.cheap_operation)
        for (ours, _), theirs in zip(parts, (primary, cheap), strict=True):
            if _geometry(ours) != _geometry(theirs):
                raise ValueError(f"module: expected a convolution like {ours}, got {theirs}")
        layer.train(module.training)
        copy_stages(stages, parts)
        return layer

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        parts = _parts(self.primary_conv), _parts(self.cheap_operation)
        if not _is_one_op(parts, x, residual):
            primary = self.primary_conv(x)
            y = torch.cat([primary, self.cheap_operation(primary)], 1)
            y = y[:, : self.out_channels] if self._surplus else y
            return y if residual is None else y + residual
        primary_part, cheap_part = parts
        convolution = primary_part[0]
        return ops.ghost_conv2d(
            *(x, *folded(*primary_part), *folded(*cheap_part), residual),
            stride=convolution.stride,
            padding=convolution.padding,
            activation=self.activation,
            cheap_activation=self.cheap_activation,
            out_channels=self.out_channels,
        )

    def extra_repr(self) -> str:
        return f"out_channels={self.out_channels}"


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation (arXiv:1709.01507): `x · hardsigmoid(expand(relu(reduce(mean of x))))`.

    Children `conv_reduce` and `conv_expand`, as the GhostNet authors' module and timm's have them.

    x: `[N, C, H, W]`, as is the result.
    """

    def __init__(
        self,
        channels: int,
        reduced_channels: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv_reduce = PointwiseConv2d(channels, reduced_channels, True, device, dtype, activation="relu")
        self.conv_expand = PointwiseConv2d(reduced_channels, channels, True, device, dtype, activation="hardsigmoid")

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3)) if computes_plainly(x) else ops.global_avg_pool2d(x)
        gate: Tensor = self.conv_expand(self.conv_reduce(mean[:, :, None, None]))
        return x * gate


class GhostBottleneck(nn.Module):
    """Two ghost modules, with a strided depthwise convolution and squeeze-and-excitation between, and a shortcut.

    Takes the arguments and loads the state dict of the GhostNet authors' block, which timm's shares: children `ghost1`,
    `conv_dw` and `bn_dw` (where the stride is not 1), `se` (where `se_ratio` is not 0), `ghost2`, `shortcut`
    (depthwise, norm, 1×1, norm; none where the block keeps size and channels).

    x: `[N, C_in, H, W]` → `[N, C_out, H_out, W_out]`.
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        dw_kernel_size: int = 3,
        stride: int = 1,
        se_ratio: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dw_kernel_size % 2 == 0:
            raise ValueError(f"dw_kernel_size: expected an odd size, got {dw_kernel_size}")
        if not 0 <= se_ratio <= 1:
            raise ValueError(f"se_ratio: expected a number from 0 to 1, got {se_ratio}")
        form: Any = {"device": device, "dtype": dtype}

        def depthwise(channels: int) -> DepthwiseConv2d:
            return DepthwiseConv2d(channels, dw_kernel_size, stride, dw_kernel_size // 2, bias=False, **form)

        self.ghost1 = GhostModule(in_channels, mid_channels, **form)
        self.conv_dw = depthwise(mid_channels) if stride > 1 else None
        self.bn_dw = nn.BatchNorm2d(mid_channels, **form) if stride > 1 else None
        self.se = SqueezeExcite(mid_channels, make_divisible(mid_channels * se_ratio, 4), **form) if se_ratio else None
        self.ghost2 = GhostModule(mid_channels, out_channels, relu=False, **form)
        self.shortcut = nn.Sequential()
        if stride > 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                depthwise(in_channels),
                nn.BatchNorm2d(in_channels, **form),
                PointwiseConv2d(in_channels, out_channels, False, **form),
                nn.BatchNorm2d(out_channels, **form),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.ghost1(x)
        if self.conv_dw is not None:
            y = self._downsampled(y)
        if self.se is not None:
            y = self.se(y)
        result: Tensor = self.ghost2(y, self._shortcut(x))
        return result

    def _downsampled(self, y: Tensor) -> Tensor:
        convolution: Any = self.conv_dw
        norm: Any = self.bn_dw
        if not _is_one_op([(convolution, norm)], y):
            result: Tensor = norm(convolution(y))
            return result
        weight, bias = folded(convolution, norm)
        return ops.depthwise_conv2d(y, weight, bias, stride=convolution.stride, padding=convolution.padding)

    def _shortcut(self, x: Tensor) -> Tensor:
        modules: list[Any] = list(self.shortcut)
        parts = list(zip(modules[::2], modules[1::2], strict=True))
        if not parts or not _is_one_op(parts, x):
            result: Tensor = self.shortcut(x)
            return result
        depthwise = modules[0]
        return ops.separable_conv2d(
            *(x, *folded(*parts[0]), *folded(*parts[1])),
            stride=depthwise.stride,
            padding=depthwise.padding,
        )


def _conv_norm_act(convolution: nn.Conv2d, norm_layer: NormLayer | None, activation: str) -> nn.Sequential:
    norm = nn.Identity() if norm_layer is None else norm_layer(convolution.out_channels).to(convolution.weight)
    return nn.Sequential(convolution, norm, activation_module(activation))


def _only_stage(module: nn.Module, name: str) -> Stage:
    """The one stage that a child of that name is made of. Raises `ValueError`."""
    child = getattr(module, name, None)
    stages = read_stages(child) if isinstance(child, nn.Module) else []
    if len(stages) != 1:
        raise ValueError(f"module: expected one convolution in {name}, got {module}")
    return stages[0]


def _geometry(convolution: nn.Conv2d) -> tuple[Any, ...]:
    padding_mode, window = convolution.padding_mode, (convolution.stride, convolution.padding, convolution.dilation)
    return convolution.weight.shape, window, padding_mode


def _parts(stage: nn.Module) -> tuple[Any, nn.Module | None]:
    """Convolution and norm of `_conv_norm_act`'s modules."""
    convolution, norm, _ = stage.children()
    return convolution, None if isinstance(norm, nn.Identity) else norm


def _is_one_op(parts: Sequence[tuple[nn.Module, nn.Module | None]], *activations: Tensor | None) -> bool:
    """Whether an op with the norms folded in can compute these convolutions on the activations, the input first."""
    if not all(is_foldable(norm) for _, norm in parts) or is_hooked(*(convolution for convolution, _ in parts)):
        return False
    modules = [module for part in parts for module in part if module is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for module in modules for t in module.parameters()):
        return False
    x, *others = activations
    assert x is not None
    return not computes_plainly(x, *others)
