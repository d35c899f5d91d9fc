"""Layers of every family at the shapes of real networks: each a call of our op, and what it takes at least."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from kernelpress.bench import networks
from kernelpress.bench.calls import FOLDED, Call, OpCall
from kernelpress.bench.peers import eager
from kernelpress.ops.registry import Tensors

__all__ = [
    "ALL_FAMILIES",
    "FAMILIES",
    "Layer",
    "channel_shuffle",
    "convolution",
    "depthwise_conv2d",
    "ghost_conv2d",
    "grouped_conv2d",
    "int8_conv2d",
    "int8_matmul",
    "inverted_residual",
    "layers",
    "linear",
    "separable_conv2d",
    "shuffle_concat",
    "sparse_conv2d",
    "sparse_matmul",
    "tiny",
]

SPARSITY, BLOCK = 0.9, 64


@dataclass(frozen=True, kw_only=True)
class Layer(OpCall):
    """A layer of a network. `library` is what its operations in torch run on where they run on a GPU; those of an int8
    layer are in bfloat16 and give other values."""

    family: str
    network: str
    label: str
    library: str = "cuDNN"

    @property
    def batch(self) -> int:
        """Of the images; a product for itself is one."""
        return 1 if self.op.endswith("matmul") else self.x[0]

    @property
    def title(self) -> str:
        """Shape in one line."""
        return self.label + (f" batch {self.batch}" if self.batch != 1 else "")

    def plain(self, tensors: Tensors) -> Call:
        """The layer in torch's own operations, in the memory format of these tensors."""
        return eager(self.op, tensors, self.options)


def layers(family: str, *, batch: int = 1, is_tiny: bool = False) -> tuple[Layer, ...]:
    """The layers of one of `ALL_FAMILIES`, each shape once; `is_tiny`: small enough for a dry run.

    Raises `ValueError` for an unknown family, or a batch that is not a positive integer.
    """
    if family not in ALL_FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(ALL_FAMILIES)}, got {family!r}")
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
        raise ValueError(f"batch: expected a positive integer, got {batch!r}")
    return tuple(tiny(make) if is_tiny else make() for make in _BUILDERS[family](batch))


_Maker = partial[Layer]
_Told = dict[str, Any]

_TINY = {"batch": 2, "size": 8, "c_in": 24, "hidden": 24, "c_out": 24, "channels": 24, "rows": 64, "block": 16}
_TINY_OF_BLOCKS = {**_TINY, "c_in": 64, "c_out": 64}


def tiny(make: _Maker) -> Layer:
    """The layer in sizes small enough for a dry run, its channels divisible by its groups."""
    sizes = inspect.signature(make.func).bind(*make.args, **make.keywords).arguments
    largest = _TINY_OF_BLOCKS if "block" in sizes else _TINY
    sizes |= {name: min(sizes[name], largest[name]) for name in largest.keys() & sizes.keys()}
    if sizes.get("groups", 1) > 4:
        sizes["groups"] = 3 if sizes["groups"] % 3 == 0 else 4
    return make.func(**sizes)


def _window(kernel: int, stride: int = 1) -> dict[str, list[int]]:
    return {"stride": [stride] * 2, "padding": [kernel // 2] * 2}


def _label(size: int, channels: Iterable[int], kernel: int, stride: int = 1, *more: str) -> str:
    """As `56×56 64→128 3×3/2 relu`."""
    window = f"{kernel}×{kernel}" + (f"/{stride}" if stride > 1 else "")
    told = [part for part in more if part not in ("", "identity")]
    return " ".join([f"{size}×{size}", "→".join(map(str, channels)), window, *told])


def convolution(
    network: str,
    batch: int,
    size: int,
    c_in: int,
    c_out: int,
    kernel: int = 1,
    stride: int = 1,
    activation: str = "relu",
    residual: bool = False,
) -> Layer:
    """A dense convolution; with `residual` another tensor is added before the activation."""
    op, window = ("conv2d", _window(kernel, stride)) if kernel > 1 else ("pointwise_conv2d", {})
    x, weight, options = (batch, c_in, size, size), (c_out, c_in, kernel, kernel), {"activation": activation, **window}
    absent = FOLDED - {"residual"} if residual else FOLDED
    label = _label(size, (c_in, c_out), kernel, stride, activation, "+res" * residual)
    return Layer(op, x, (weight,), options, absent, family="dense", network=network, label=label)


def linear(network: str, batch: int, c_in: int, c_out: int) -> Layer:
    """The product at a network's end."""
    told: _Told = {"family": "dense", "network": network, "label": f"{c_in}→{c_out}", "library": "cuBLAS"}
    return Layer("linear", (batch, c_in), ((c_out, c_in),), {"activation": "identity"}, **told)


def depthwise_conv2d(
    network: str, batch: int, size: int, channels: int, kernel: int, stride: int, activation: str
) -> Layer:
    """A depthwise convolution."""
    x, weight = (batch, channels, size, size), (channels, 1, kernel, kernel)
    options = {"activation": activation, **_window(kernel, stride)}
    label = _label(size, (channels,), kernel, stride, activation)
    return Layer("depthwise_conv2d", x, (weight,), options, family="depthwise", network=network, label=label)


def separable_conv2d(network: str, batch: int, size: int, c_in: int, c_out: int, stride: int) -> Layer:
    """A depthwise 3×3 convolution and a pointwise one, both with relu."""
    x, weights = (batch, c_in, size, size), ((c_in, 1, 3, 3), (c_out, c_in, 1, 1))
    options = {**_window(3, stride), "depthwise_activation": "relu", "activation": "relu"}
    label = _label(size, (c_in, c_out), 3, stride, "relu")
    return Layer("separable_conv2d", x, weights, options, family="separable", network=network, label=label)


def inverted_residual(network: str, batch: int, size: int, c_in: int, hidden: int, c_out: int, stride: int) -> Layer:
    """An expansion and a depthwise 3×3 convolution with relu6, a projection, and x added where it has that shape."""
    adds_x = stride == 1 and c_in == c_out
    options = {**_window(3, stride), "expand_activation": "relu6", "depthwise_activation": "relu6"}
    return Layer(
        *("inverted_residual", (batch, c_in, size, size)),
        ((hidden, c_in, 1, 1), (hidden, 1, 3, 3), (c_out, hidden, 1, 1)),
        {**options, "activation": "identity"},
        FOLDED - {"residual"} if adds_x else FOLDED,
        residual_is_x=adds_x,
        family="separable",
        network=network,
        label=_label(size, (c_in, hidden, c_out), 3, stride, "relu6", "+res" * adds_x),
    )


def grouped_conv2d(
    network: str, batch: int, size: int, c_in: int, c_out: int, kernel: int, groups: int, shuffle: int = 1
) -> Layer:
    """A grouped convolution with relu, its output shuffled where `shuffle` is not 1."""
    x, weight, is_shuffled = (batch, c_in, size, size), (c_out, c_in // groups, kernel, kernel), shuffle > 1
    options = {"padding": [kernel // 2] * 2, "groups": groups, "shuffle": shuffle, "activation": "relu"}
    told: _Told = {"family": "grouped", "network": network, "library": "cuDNN" + " + shuffle" * is_shuffled}
    label = _label(size, (c_in, c_out), kernel, 1, f"in {groups} groups" + ", shuffled" * is_shuffled)
    return Layer("grouped_conv2d", x, (weight,), options, **told, label=label)


def channel_shuffle(network: str, batch: int, size: int, channels: int, groups: int) -> Layer:
    """A shuffle alone."""
    x, label = (batch, channels, size, size), f"{size}×{size} {channels}"
    told: _Told = {"family": "grouped", "network": network, "library": "torch"}
    return Layer("channel_shuffle", x, (), {"groups": groups}, **told, label=label)


def shuffle_concat(network: str, batch: int, size: int, channels: int) -> Layer:
    """Two branches of `channels` each, concatenated and shuffled."""
    x, label = (batch, channels, size, size), f"{size}×{size} {channels} and {channels}"
    told: _Told = {"family": "grouped", "network": network, "library": "cat + shuffle"}
    return Layer("shuffle_concat", x, (), {"groups": 2}, **told, label=label)


def ghost_conv2d(network: str, batch: int, size: int, c_in: int, c_out: int, activation: str) -> Layer:
    """A ghost module: a pointwise convolution, a depthwise 3×3 one of its result, both concatenated."""
    primary, options = c_out // 2, {"activation": activation, "cheap_activation": activation}
    x, weights = (batch, c_in, size, size), ((primary, c_in, 1, 1), (primary, 1, 3, 3))
    told: _Told = {"family": "ghost", "network": network, "library": "conv + conv + cat"}
    return Layer("ghost_conv2d", x, weights, options, **told, label=f"{size}×{size} {c_in}→{2 * primary} {activation}")


def sparse_matmul(network: str, rows: int, c_in: int, c_out: int, block: int, sparsity: float) -> Layer:
    """`rows` vectors times a weight of which a fraction of the blocks is zero."""
    grid, label = (-(-c_out // block), -(-c_in // block), block), f"{rows}×{c_in}×{c_out}"
    label += f", {sparsity:.0%} of blocks {block}×{block}"
    told: _Told = {"family": "sparse", "network": network, "label": label, "library": "cuBLAS, dense"}
    return Layer("sparse_matmul", (rows, c_in), (grid,), density=1 - sparsity, **told)


def sparse_conv2d(
    network: str, batch: int, size: int, c_in: int, c_out: int, kernel: int, block: int, sparsity: float
) -> Layer:
    """A convolution with relu, a fraction of its weight's blocks zero; `c_in` is a multiple of `block`."""
    x, grid = (batch, c_in, size, size), (-(-c_out // block), kernel**2 * c_in // block, block)
    options = {"kernel_size": [kernel] * 2, "padding": [kernel // 2] * 2, "activation": "relu"}
    label = f"{_label(size, (c_in, c_out), kernel)}, {sparsity:.0%} of blocks {block}×{block}"
    told: _Told = {"family": "sparse", "network": network, "label": label, "library": "cuDNN, dense"}
    return Layer("sparse_conv2d", x, (grid,), options, density=1 - sparsity, **told)


def int8_matmul(network: str, rows: int, c_in: int, c_out: int) -> Layer:
    """An int8 product with relu and an output in bfloat16."""
    options = {"activation": "relu", "output_dtype": torch.bfloat16}
    told: _Told = {"family": "int8", "network": network, "label": f"{rows}×{c_in}×{c_out}", "library": "cuBLAS bf16"}
    return Layer("int8_matmul", (rows, c_in), ((c_out, c_in),), options, **told)


def int8_conv2d(
    network: str, batch: int, size: int, c_in: int, c_out: int, kernel: int, *, depthwise: bool = False
) -> Layer:
    """An int8 convolution with relu and an int8 output."""
    x, weight = (batch, c_in, size, size), (c_out, 1 if depthwise else c_in, kernel, kernel)
    options = {"padding": [kernel // 2] * 2, "activation": "relu", "input_zero_point": -3}
    options |= {"output_scale": 0.02, "output_zero_point": -128}
    label = _label(size, (c_in, c_out), kernel, 1, "depthwise" * depthwise)
    told: _Told = {"family": "int8", "network": network, "library": "cuDNN bf16"}
    op = "int8_depthwise_conv2d" if depthwise else "int8_conv2d"
    return Layer(op, x, (weight,), options, **told, label=label)


def _dense(batch: int) -> list[_Maker]:
    def of(network: str, *shapes: tuple[Any, ...]) -> list[_Maker]:
        return [partial(convolution, network, batch, *shape) for shape in shapes]

    return [
        *of("MobileNet V1", (224, 3, 32, 3, 2)),
        *of("ResNet", (224, 3, 64, 7, 2)),
        *of("ResNet-18", *networks.RESNET18),
        *of("MobileNet V1", *((size // s, c_in, c_out) for size, c_in, c_out, s in networks.MOBILENET_V1_PAIRS)),
        *of("MobileNet V2", *((s, i, o, 1, 1, *end) for s, i, o, *end in networks.MOBILENET_V2_POINTWISE)),
        *of("ResNet-50", *((s, i, o, 1, 1, "relu", added) for s, i, o, added in networks.RESNET50_POINTWISE)),
        *(partial(linear, network, batch, c_in, 1000) for network, c_in in networks.HEADS),
    ]


def _depthwise(batch: int) -> list[_Maker]:
    v1 = ((size, c, 3, stride, "relu") for size, c, _, stride in networks.MOBILENET_V1_PAIRS)
    shapes: list[tuple[Any, ...]] = [*(("MobileNet V1", *shape) for shape in v1), *networks.DEPTHWISE]
    return [partial(depthwise_conv2d, network, batch, *shape) for network, *shape in shapes]


def _separable(batch: int) -> list[_Maker]:
    pairs = [partial(separable_conv2d, "MobileNet V1", batch, *sizes) for sizes in networks.MOBILENET_V1_PAIRS]
    return [*pairs, *(partial(inverted_residual, "MobileNet V2", batch, *s) for s in networks.MOBILENET_V2_BLOCKS)]


def _grouped(batch: int) -> list[_Maker]:
    v1 = [
        layer
        for size, channels, bottleneck in networks.SHUFFLENET_V1
        for layer in (
            partial(grouped_conv2d, "ShuffleNet V1", batch, size, channels, bottleneck, 1, 3, shuffle=3),
            partial(grouped_conv2d, "ShuffleNet V1", batch, size, bottleneck, channels, 1, 3),
        )
    ]
    resnext = [partial(grouped_conv2d, "ResNeXt-50", batch, size, c, c, 3, 32) for size, c in networks.RESNEXT50]
    shuffles = [partial(channel_shuffle, "ShuffleNet V1", batch, size, c, 3) for size, c, _ in networks.SHUFFLENET_V1]
    concats = [partial(shuffle_concat, "ShuffleNet V2", batch, size, c // 2) for size, c in networks.SHUFFLENET_V2]
    return [*v1, *resnext, *shuffles, *concats]


def _ghost(batch: int) -> list[_Maker]:
    return [
        partial(ghost_conv2d, "GhostNet", batch, size, c_in, c_out, "relu" if is_active else "identity")
        for size, c_in, c_out, is_active in networks.GHOSTNET
    ]


def _sparse(batch: int) -> list[_Maker]:
    of_blocks = (BLOCK, SPARSITY)
    wide = [sizes for sizes in networks.RESNET50 if sizes[1] >= 128]
    products = [partial(sparse_matmul, "AlexNet", batch, *sizes, *of_blocks) for sizes in networks.ALEXNET_CLASSIFIER]
    return [*(partial(sparse_conv2d, "ResNet-50", batch, *sizes, *of_blocks) for sizes in wide), *products]


def _int8(batch: int) -> list[_Maker]:
    convolutions = [partial(int8_conv2d, "ResNet-50", batch, *sizes) for sizes in networks.RESNET50]
    depthwise = [
        partial(int8_conv2d, "MobileNet V2", batch, size, c, c, 3, depthwise=True)
        for size, c in networks.MOBILENET_V2_DEPTHWISE
    ]
    products = [partial(int8_matmul, "AlexNet", batch, *sizes) for sizes in networks.ALEXNET_CLASSIFIER]
    return [*convolutions, *depthwise, *products]


_BUILDERS: Mapping[str, Callable[[int], list[_Maker]]] = {
    "dense": _dense,
    "depthwise": _depthwise,
    "separable": _separable,
    "grouped": _grouped,
    "ghost": _ghost,
    "sparse": _sparse,
    "int8": _int8,
}

ALL_FAMILIES = tuple(_BUILDERS)

FAMILIES = ALL_FAMILIES[:3]
"""Those with peers on the CPU."""
