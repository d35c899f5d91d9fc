"""What layers a decomposition puts in the place of one: their shapes, what they cost, and the modules themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = [
    "METHODS",
    "Geometry",
    "Ranks",
    "chain",
    "joined",
    "make",
    "most_ranks",
    "resolved",
    "total_flops",
    "useful_ranks",
]

METHODS = ("svd", "spatial_svd", "tucker2", "cp", "tt")
Ranks = tuple[int, ...]
"""The channels between the layers of a chain, of one group: 1 for svd, spatial_svd and cp, 2 for tucker2, 3 for tt."""
Pair = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """A convolution; a linear layer is one of a single tap over positions of its own."""

    inputs: int
    outputs: int
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    has_bias: bool = False
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros"
    is_linear: bool = False

    @classmethod
    def of(cls, module: nn.Conv2d | nn.Linear) -> Geometry | None:
        """That of `module`; None where its padding differs between the two sides."""
        bias = module.bias is not None
        if isinstance(module, nn.Linear):
            return cls(module.in_features, module.out_features, has_bias=bias, is_linear=True)
        reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        padding = [r // 2 for r in reach] if module.padding == "same" else module.padding
        if module.padding == "same" and any(r % 2 for r in reach):
            return None
        return cls(
            inputs=module.in_channels,
            outputs=module.out_channels,
            kernel=_pair(module.kernel_size),
            stride=_pair(module.stride),
            padding=(0, 0) if module.padding == "valid" else _pair(padding),
            dilation=_pair(module.dilation),
            groups=module.groups,
            has_bias=bias,
            padding_mode=module.padding_mode,
        )

    @property
    def is_pointwise(self) -> bool:
        """Whether its kernel has one tap."""
        return self.kernel == (1, 1)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """That of a group's weight, as a convolution has it."""
        return self.outputs // self.groups, self.inputs // self.groups, *self.kernel

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        return self.groups * math.prod(self.weight_shape) + self.outputs * self.has_bias

    def output_size(self, size: Pair) -> Pair:
        """Height and width of what it makes of such an image."""
        height, width = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(size, self.padding, self.dilation, self.kernel, self.stride, strict=True)
        )
        return height, width

    def flops(self, size: Pair) -> int:
        """Of one image, a multiplication and its addition counting as two."""
        return 2 * self.groups * math.prod(self.weight_shape) * math.prod(self.output_size(size))


def resolved(method: str, layer: Geometry) -> str:
    """The method that `method` comes to on `layer`: of a kernel of one tap, and of one column or row, all that is left
    of the others is a shorter chain."""
    if layer.is_pointwise:
        return "svd"
    return "tucker2" if method == "tt" and 1 in layer.kernel else method


def most_ranks(method: str, layer: Geometry) -> Ranks:
    """The ranks at which the chain is exact."""
    outputs, inputs, rows, columns = layer.weight_shape
    taps = rows * columns
    inner, outer = min(inputs, outputs * taps), min(outputs, inputs * taps)
    middle = min(inputs * rows, outputs * columns)
    sizes = sorted((outputs, inputs, rows, columns))
    return {
        "svd": (outer,),
        "spatial_svd": (middle,),
        "tucker2": (inner, outer),
        "cp": (math.prod(sizes[:3]),),
        "tt": (inner, middle, outer),
    }[method]


def useful_ranks(ranks: Ranks, method: str, layer: Geometry) -> Ranks:
    """`ranks` without what the next layer could not tell apart."""
    rows, columns = layer.kernel
    if method == "tucker2":
        inner, outer = ranks
        outer = min(outer, inner * rows * columns)
        return min(inner, outer * rows * columns), outer
    if method == "tt":
        inner, middle, outer = ranks
        middle = min(middle, inner * rows)
        outer = min(outer, middle * columns)
        middle = min(middle, outer * columns)
        return min(inner, middle * rows), middle, outer
    return ranks


def chain(layer: Geometry, method: str, ranks: Ranks) -> tuple[Geometry, ...]:
    """The layers that take `layer`'s place, each of as many groups; the last has its bias.

    ```
    svd          k×k C→r · 1×1 r→O                     (linear: C→r · r→O)
    spatial_svd  k×1 C→r · 1×k r→O
    tucker2      1×1 C→r₁ · k×k r₁→r₂ · 1×1 r₂→O
    cp           1×1 C→r · k×1 depthwise · 1×k depthwise · 1×1 r→O
    tt           1×1 C→r₁ · k×1 r₁→r₂ · 1×k r₂→r₃ · 1×1 r₃→O
    ```
    """
    widths = [layer.groups * rank for rank in ranks]
    pointwise = Geometry(0, 0, groups=layer.groups, is_linear=layer.is_linear)
    first = replace(pointwise, inputs=layer.inputs, outputs=widths[0])
    last = replace(pointwise, inputs=widths[-1], outputs=layer.outputs, has_bias=layer.has_bias)
    rows, columns = _halves(replace(layer, has_bias=False))
    if method == "svd":
        return replace(layer, outputs=widths[0], has_bias=False), last
    if method == "spatial_svd":
        return (
            replace(rows, outputs=widths[0]),
            replace(columns, inputs=widths[0], has_bias=layer.has_bias),
        )
    if method == "tucker2":
        return first, replace(layer, inputs=widths[0], outputs=widths[1], has_bias=False), last
    if method == "tt":
        middle = replace(rows, inputs=widths[0], outputs=widths[1])
        return first, middle, replace(columns, inputs=widths[1], outputs=widths[2]), last
    depthwise = [replace(part, inputs=widths[0], outputs=widths[0], groups=widths[0]) for part in (rows, columns)]
    if 1 in layer.kernel:
        depthwise = [replace(layer, has_bias=False, inputs=widths[0], outputs=widths[0], groups=widths[0])]
    return first, *depthwise, last


def joined(chain: Sequence[Geometry]) -> Geometry:
    """The one layer whose place a chain took."""
    first, last = chain[0], chain[-1]
    rows, columns = zip(*(layer.kernel for layer in chain), strict=True)
    has_rows, has_columns = (max(chain, key=lambda layer: layer.kernel[axis]) for axis in (0, 1))
    strides, paddings = (zip(*(getattr(layer, name) for layer in chain), strict=True) for name in ("stride", "padding"))
    down, right = map(math.prod, strides)
    above, left = map(sum, paddings)
    return Geometry(
        first.inputs,
        last.outputs,
        (math.prod(rows), math.prod(columns)),
        (down, right),
        (above, left),
        (has_rows.dilation[0], has_columns.dilation[1]),
        last.groups,
        last.has_bias,
        max((layer.padding_mode for layer in chain if any(layer.padding)), key=len, default="zeros"),
        last.is_linear,
    )


def _pair(sizes: Any) -> Pair:
    return int(sizes[0]), int(sizes[1])


def _halves(layer: Geometry) -> tuple[Geometry, Geometry]:
    """A convolution over rows, and one over columns, that move over the image as `layer` does."""

    def only(axis: int) -> dict[str, Any]:
        neutral = {"kernel": 1, "stride": 1, "padding": 0, "dilation": 1}
        return {
            name: (getattr(layer, name)[0], idle) if axis == 0 else (idle, getattr(layer, name)[1])
            for name, idle in neutral.items()
        }

    return replace(layer, **only(0)), replace(layer, **only(1))


def make(geometry: Geometry, weight: Tensor, bias: nn.Parameter | None, *, trains: bool) -> nn.Module:
    """The layer of this geometry with `weight`, all groups of it, one below the other."""
    with torch.device("meta"):
        layer: nn.Module
        if geometry.is_linear:
            layer = nn.Linear(geometry.inputs, geometry.outputs, geometry.has_bias)
        else:
            layer = nn.Conv2d(
                geometry.inputs,
                geometry.outputs,
                geometry.kernel,
                geometry.stride,
                geometry.padding,
                geometry.dilation,
                geometry.groups,
                geometry.has_bias,
                geometry.padding_mode if any(geometry.padding) else "zeros",
            )
    shaped = weight.flatten(1) if geometry.is_linear else weight
    layer.weight = nn.Parameter(shaped.contiguous(), requires_grad=trains)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return layer


def total_flops(layers: Sequence[Geometry], size: Pair) -> int:
    """Of one image through `layers`, one after the other."""
    total = 0
    for layer in layers:
        total += layer.flops(size)
        size = layer.output_size(size)
    return total
