"""Our blocks as PyTorch computes them, one layer after the other: what a network without kernelpress does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernelpress.kernels import reference
from kernelpress.layers import (
    Conv2d,
    DepthwiseConv2d,
    DepthwiseSeparableConv2d,
    GhostBottleneck,
    GhostModule,
    GroupedConv2d,
    InvertedResidual,
    Linear,
    LowRankConv2d,
    LowRankLinear,
    PointwiseConv2d,
    ShuffleUnit,
    ShuffleUnitV2,
    SqueezeExcite,
)
from kernelpress.models.ghostnet import AttentiveGhostBottleneck, AttentiveGhostModule

__all__ = ["to_plain"]

_LAYERS = (Conv2d, PointwiseConv2d, DepthwiseConv2d, GroupedConv2d, Linear)


def to_plain(network: nn.Module) -> nn.Module:
    """`network` with our blocks and layers, in place, as those of PyTorch that they are kinds of. Raises `ValueError`
    for a fused activation."""
    for layer in _with_plain_blocks(network).modules():
        if isinstance(layer, _LAYERS):
            if layer.activation != "identity":
                fused = f"got {layer.activation} fused into a layer"
                raise ValueError(f"network: expected activations that are modules, {fused}")
            layer.__class__ = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d  # type: ignore[assignment]
    return network


def _with_plain_blocks(network: nn.Module) -> nn.Module:
    """`network` whose blocks, in place, call none of our ops themselves; the layers in them are as they were."""
    for module in network.modules():
        module.__class__ = _PLAIN.get(type(module), type(module))
        if isinstance(module, SqueezeExcite):
            for layer in (module.conv_reduce, module.conv_expand):
                layer.activation = "identity"
    return network


class _SqueezeExcite(SqueezeExcite):
    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.conv_reduce(x.mean((2, 3), keepdim=True)))
        return x * F.hardsigmoid(self.conv_expand(hidden))


class _GhostModule(GhostModule):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        primary = self.primary_conv(x)
        y = torch.cat((primary, self.cheap_operation(primary)), 1)[:, : self.out_channels]
        return y if residual is None else y + residual


class _GhostBottleneck(GhostBottleneck):
    def _downsampled(self, y: Tensor) -> Tensor:
        convolution: Any = self.conv_dw
        norm: Any = self.bn_dw
        result: Tensor = norm(convolution(y))
        return result

    def _shortcut(self, x: Tensor) -> Tensor:
        result: Tensor = self.shortcut(x)
        return result


class _AttentiveGhostModule(AttentiveGhostModule, _GhostModule):
    """The ghost module that its `forward` asks for is the plain one."""


class _AttentiveGhostBottleneck(AttentiveGhostBottleneck, _GhostBottleneck):
    """Its convolutions beside the ghost modules are the plain ones."""


class _DepthwiseSeparableConv2d(DepthwiseSeparableConv2d):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self._one_by_one(x, residual)


class _InvertedResidual(InvertedResidual):
    def forward(self, x: Tensor) -> Tensor:
        return self._one_by_one(x, x if self.residual else None)


class _LowRankConv2d(LowRankConv2d):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self._one_by_one(x, residual)


class _LowRankLinear(LowRankLinear):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self._one_by_one(x, residual)


class _ShuffleUnit(ShuffleUnit):
    def forward(self, x: Tensor) -> Tensor:
        return self._plain(x)


class _ShuffleUnitV2(ShuffleUnitV2):
    def forward(self, x: Tensor) -> Tensor:
        if self.branch1 is None:
            passing, x = x.chunk(2, 1)
        else:
            passing = self.branch1(x)
        return reference.shuffle_concat(passing, self.branch2(x), groups=2)


_PLAIN: Mapping[type[nn.Module], type[nn.Module]] = {
    SqueezeExcite: _SqueezeExcite,
    GhostModule: _GhostModule,
    GhostBottleneck: _GhostBottleneck,
    AttentiveGhostModule: _AttentiveGhostModule,
    AttentiveGhostBottleneck: _AttentiveGhostBottleneck,
    DepthwiseSeparableConv2d: _DepthwiseSeparableConv2d,
    InvertedResidual: _InvertedResidual,
    LowRankConv2d: _LowRankConv2d,
    LowRankLinear: _LowRankLinear,
    ShuffleUnit: _ShuffleUnit,
    ShuffleUnitV2: _ShuffleUnitV2,
}
