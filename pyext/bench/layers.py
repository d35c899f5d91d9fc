"""Layers of every family at the shapes of real networks: each a call of our op, and what it takes at least."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    "int8_linear",
    "int8_matmul",
    "inverted_residual",
    "layers",
    "linear",
    "separable_conv2d",
    "shuffle_concat",
    "sparse_conv2d",
    "sparse_matmul",
    "squeeze_excite",
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
    made = [partial(make, network, batch, *shape) for make, network, shapes in _LAYERS[family] for shape in shapes]
    return tuple(tiny(make) if is_tiny else make() for make in made)


_Told = dict[str, Any]

_TINY = {"batch": 2, "size": 8, "c_in": 24, "hidden": 24, "c_out": 24, "channels": 24, "rows": 64, "block": 16}
_TINY_OF_BLOCKS = {**_TINY, "c_in": 64, "c_out": 64}


def tiny(make: partial[Layer]) -> Layer:
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


def squeeze_excite(network: str, batch: int, size: int, channels: int, hidden: int) -> Layer:
    """The mean of each channel, two products with relu and hardsigmoid: the factors of the channels."""
    x, weights = (batch, channels, size, size), ((hidden, channels, 1, 1), (channels, hidden, 1, 1))
    told: _Told = {"family": "squeeze_excite", "network": network, "library": "mean + conv + conv"}
    label = f"{size}×{size} {channels}→{hidden}→{channels}"
    return Layer("squeeze_excite", x, weights, {"activation": "hardsigmoid"}, **told, label=label)


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


def int8_linear(network: str, rows: int, c_in: int, c_out: int, activation: str = "relu") -> Layer:
    """A product of a network in int8: with relu to int8, else, at the network's end, to float32."""
    options = {"activation": activation, "input_zero_point": -3, **(_INT8_OUTPUT if activation == "relu" else {})}
    label = f"{rows}×{c_in}×{c_out}" + f" {activation}" * (activation == "relu")
    told: _Told = {"family": "int8", "network": network, "label": label, "library": "cuBLAS bf16"}
    return Layer("int8_matmul", (rows, c_in), ((c_out, c_in),), options, **told)


_INT8_OUTPUT = {"output_scale": 0.02, "output_zero_point": -128}


def int8_conv2d(
    network: str, batch: int, size: int, c_in: int, c_out: int, kernel: int, depthwise: bool = False, stride: int = 1
) -> Layer:
    """An int8 convolution with relu and an int8 output."""
    x, weight = (batch, c_in, size, size), (c_out, 1 if depthwise else c_in, kernel, kernel)
    options = {**_window(kernel, stride), "activation": "relu", "input_zero_point": -3, **_INT8_OUTPUT}
    label = _label(size, (c_in, c_out), kernel, stride, "depthwise" * depthwise)
    told: _Told = {"family": "int8", "network": network, "library": "cuDNN bf16"}
    op = "int8_depthwise_conv2d" if depthwise else "int8_conv2d"
    return Layer(op, x, (weight,), options, **told, label=label)


_LAYERS: Mapping[str, Sequence[tuple[Callable[..., Layer], str, Iterable[Sequence[Any]]]]] = {
    "dense": (
        (convolution, "MobileNet V1", [(224, 3, 32, 3, 2)]),
        (convolution, "ResNet", [(224, 3, 64, 7, 2)]),
        (convolution, "ResNet-18", networks.RESNET18),
        (convolution, "MobileNet V1", [(size // s, i, o) for size, i, o, s in networks.MOBILENET_V1_PAIRS]),
        (
            convolution,
            "MobileNet V2",
            [(s, i, o, 1, 1, *end) for s, i, o, *end in networks.MOBILENET_V2_POINTWISE],
        ),
        (convolution, "ResNet-50", [(s, i, o, 1, 1, "relu", o > i) for s, i, o, k in networks.RESNET50 if k == 1]),
        *((linear, network, [(c_in, 1000)]) for network, c_in in networks.HEADS),
    ),
    "depthwise": (
        (depthwise_conv2d, "MobileNet V1", [(size, c, 3, s, "relu") for size, c, _, s in networks.MOBILENET_V1_PAIRS]),
        *((depthwise_conv2d, network, [shape]) for network, *shape in networks.DEPTHWISE),
    ),
    "separable": (
        (separable_conv2d, "MobileNet V1", networks.MOBILENET_V1_PAIRS),
        (inverted_residual, "MobileNet V2", networks.MOBILENET_V2_BLOCKS),
    ),
    "grouped": (
        *(
            (grouped_conv2d, "ShuffleNet V1", [(size, c, bottleneck, 1, 3, 3), (size, bottleneck, c, 1, 3)])
            for size, c, bottleneck in networks.SHUFFLENET_V1
        ),
        (grouped_conv2d, "ResNeXt-50", [(size, c, c, 3, 32) for size, c in networks.RESNEXT50]),
        (channel_shuffle, "ShuffleNet V1", [(size, c, 3) for size, c, _ in networks.SHUFFLENET_V1]),
        (shuffle_concat, "ShuffleNet V2", [(size, c // 2) for size, c in networks.SHUFFLENET_V2]),
    ),
    "ghost": ((ghost_conv2d, "GhostNet", networks.GHOSTNET),),
    "squeeze_excite": ((squeeze_excite, "MobileNet V3", networks.MOBILENET_V3_GATES),),
    "sparse": (
        (sparse_conv2d, "ResNet-50", [(*shape, BLOCK, SPARSITY) for shape in networks.RESNET50 if shape[1] >= 128]),
        (sparse_matmul, "AlexNet", [(*shape, BLOCK, SPARSITY) for shape in networks.ALEXNET_CLASSIFIER]),
    ),
    "int8": (
        (int8_conv2d, "MobileNet V1", [(224, 3, 32, 3, False, 2)]),
        (int8_conv2d, "ResNet-50", [(224, 3, 64, 7, False, 2), *networks.RESNET50]),
        (int8_conv2d, "MobileNet V1", [(size // s, i, o, 1) for size, i, o, s in networks.MOBILENET_V1_PAIRS]),
        (int8_conv2d, "MobileNet V1", [(size, c, c, 3, True, s) for size, c, _, s in networks.MOBILENET_V1_PAIRS]),
        *((int8_conv2d, name, [(s, c, c, k, True, stride)]) for name, s, c, k, stride, _ in networks.DEPTHWISE),
        (int8_linear, "AlexNet", networks.ALEXNET_CLASSIFIER),
        *((int8_linear, network, [(c_in, 1000, "identity")]) for network, c_in in networks.HEADS),
    ),
}
"""Family → what makes layers of a network, and their shapes behind the batch."""

ALL_FAMILIES = tuple(_LAYERS)

FAMILIES = (*ALL_FAMILIES[:6], "int8")
"""Those with peers on the CPU."""
