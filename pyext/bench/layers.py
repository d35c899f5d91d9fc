"""Layers of every family as calls of our ops: what each computes, and the least work and traffic it costs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernelpress.bench import networks
from kernelpress.bench.peers import eager
from kernelpress.bench.shapes import FAMILIES, FLOAT_BYTES, Call, Case, cases, check_batch
from kernelpress.ops.registry import Tensors
from kernelpress.ops.sparse_blocks import BlockCsr, conv_weight

__all__ = [
    "ALL_FAMILIES",
    "BLOCK",
    "SPARSITY",
    "Layer",
    "channel_shuffle",
    "ghost_conv2d",
    "grouped_conv2d",
    "int8_conv2d",
    "int8_matmul",
    "layer_of_case",
    "layers",
    "shuffle_concat",
    "sparse_conv2d",
    "sparse_matmul",
    "tiny",
]

SPARSITY, BLOCK = 0.9, 64


@dataclass(frozen=True)
class Layer:
    """A layer at one shape. `make(device, dtype)` gives fresh tensors for its op, and the options; `elements` of the
    layer's dtype are the least to move, each read or written once. `dtype` is None where any floating one will do.

    `plain` makes of such tensors a call of torch's own operations, which on a GPU run on `library`; that of an int8
    layer is in bfloat16 and gives other values. `case`: what a dense, depthwise or separable layer is made of.
    """

    family: str
    op: str
    network: str
    label: str
    batch: int
    flops: int
    elements: int
    make: Callable[[torch.device, torch.dtype], tuple[Tensors, dict[str, Any]]]
    plain: Callable[[Tensors], Call]
    library: str
    dtype: torch.dtype | None = None
    case: Case | None = None

    def traffic_bytes(self, dtype: torch.dtype) -> int:
        """Least bytes to move in a floating dtype, or in the layer's own."""
        return self.elements * (self.dtype or dtype).itemsize

    @property
    def title(self) -> str:
        """Shape in one line."""
        return self.label + (f" batch {self.batch}" if self.batch != 1 else "")


def layers(family: str, *, batch: int = 1, is_tiny: bool = False) -> tuple[Layer, ...]:
    """The layers of one of `ALL_FAMILIES`, each shape once; `is_tiny`: small enough for a dry run.

    Raises `ValueError` for an unknown family, or a batch that is not a positive integer.
    """
    if family not in ALL_FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(ALL_FAMILIES)}, got {family!r}")
    if family in FAMILIES:
        return tuple(layer_of_case(case.tiny() if is_tiny else case) for case in cases(family, batch=batch))
    check_batch(batch)
    return tuple(tiny(make) if is_tiny else make() for make in _BUILDERS[family](batch))


_Maker = partial[Layer]

_TINY = {"batch": 2, "size": 8, "c_in": 24, "c_out": 24, "channels": 24, "rows": 64, "block": 16}
_TINY_OF_BLOCKS = {**_TINY, "c_in": 64, "c_out": 64}


def tiny(make: _Maker) -> Layer:
    """The layer in sizes small enough for a dry run, its channels divisible by its groups."""
    sizes = inspect.signature(make.func).bind(*make.args, **make.keywords).arguments
    largest = _TINY_OF_BLOCKS if "block" in sizes else _TINY
    sizes |= {name: min(sizes[name], largest[name]) for name in largest.keys() & sizes.keys()}
    if sizes.get("groups", 1) > 4:
        sizes["groups"] = 3 if sizes["groups"] % 3 == 0 else 4
    return make.func(**sizes)


def layer_of_case(case: Case) -> Layer:
    """A case of the families dense, depthwise and separable."""
    return Layer(
        *(case.family, case.op, case.network, replace(case, batch=1).label, case.batch, case.flops),
        elements=case.traffic_bytes // FLOAT_BYTES,
        make=lambda device, dtype: (case.make(device, dtype), case.options),
        plain=lambda tensors: eager(case, tensors),
        library="cuBLAS" if case.op == "linear" else "cuDNN",
        case=case,
    )


def _on(function: Callable[..., Tensor]) -> Callable[[Tensors], Call]:
    return lambda tensors: lambda: function(*tensors)


def _image(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    if dtype == torch.int8:
        x = torch.randint(-128, 128, shape, device=device, dtype=dtype)
    else:
        x = torch.randn(shape, device=device, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def _weight(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """Scaled so that sums of products are of the size of their terms; int8 of the whole range."""
    weight = _image(device, dtype, *shape)
    return weight if dtype == torch.int8 else weight * torch.Size(shape[1:]).numel() ** -0.5


def _shuffled(x: Tensor, groups: int) -> Tensor:
    """The shuffle as networks write it; a copy."""
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def grouped_conv2d(
    network: str, batch: int, size: int, c_in: int, c_out: int, kernel: int, groups: int, shuffle: int = 1
) -> Layer:
    """A grouped convolution with relu, its output shuffled where `shuffle` is not 1."""
    weight_shape, pixels = (c_out, c_in // groups, kernel, kernel), batch * size * size
    options = {"padding": [kernel // 2] * 2, "groups": groups, "shuffle": shuffle, "activation": "relu"}

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Tensors, dict[str, Any]]:
        x, weight = _image(device, dtype, batch, c_in, size, size), _weight(device, dtype, *weight_shape)
        return [x, weight, _image(device, dtype, c_out)], options

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.relu(F.conv2d(x, weight, bias, 1, kernel // 2, 1, groups), inplace=True)
        return _shuffled(y, shuffle) if shuffle > 1 else y

    shuffled = ", shuffled" if shuffle > 1 else ""
    label = f"{size}×{size} {c_in}→{c_out} {kernel}×{kernel} in {groups} groups{shuffled}"
    weights = torch.Size(weight_shape).numel()
    flops, elements = 2 * pixels * weights, pixels * (c_in + c_out) + weights + c_out
    return Layer(
        *("grouped", "grouped_conv2d", network, label, batch, flops, elements, make, _on(plain)),
        library="cuDNN + shuffle" if shuffle > 1 else "cuDNN",
    )


def channel_shuffle(network: str, batch: int, size: int, channels: int, groups: int) -> Layer:
    """A shuffle alone."""

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Tensors, dict[str, Any]]:
        return [_image(device, dtype, batch, channels, size, size)], {"groups": groups}

    label, elements, plain = (
        f"{size}×{size} {channels}",
        2 * batch * size * size * channels,
        partial(_shuffled, groups=groups),
    )
    return Layer("grouped", "channel_shuffle", network, label, batch, 0, elements, make, _on(plain), "torch")


def shuffle_concat(network: str, batch: int, size: int, channels: int) -> Layer:
    """Two branches of `channels` each, concatenated and shuffled."""

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Tensors, dict[str, Any]]:
        return [_image(device, dtype, batch, channels, size, size) for _ in range(2)], {"groups": 2}

    def plain(a: Tensor, b: Tensor) -> Tensor:
        return _shuffled(torch.cat([a, b], 1), 2)

    label, elements = f"{size}×{size} {channels} and {channels}", 4 * batch * size * size * channels
    return Layer("grouped", "shuffle_concat", network, label, batch, 0, elements, make, _on(plain), "cat + shuffle")


def ghost_conv2d(network: str, batch: int, size: int, c_in: int, c_out: int, activation: str) -> Layer:
    """A ghost module: a pointwise convolution, a depthwise 3×3 one of its result, both concatenated."""
    primary, pixels = c_out // 2, batch * size * size
    options = {"activation": activation, "cheap_activation": activation}

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Tensors, dict[str, Any]]:
        weights = [_weight(device, dtype, primary, c_in, 1, 1), _weight(device, dtype, primary, 1, 3, 3)]
        biases = [_image(device, dtype, primary) for _ in weights]
        pairs = [t for pair in zip(weights, biases, strict=True) for t in pair]
        return [_image(device, dtype, batch, c_in, size, size), *pairs], options

    def plain(x: Tensor, weight: Tensor, bias: Tensor, cheap: Tensor, cheap_bias: Tensor) -> Tensor:
        act = partial(F.relu, inplace=True) if activation == "relu" else torch.nn.Identity()
        p = act(F.conv2d(x, weight, bias))
        return torch.cat([p, act(F.conv2d(p, cheap, cheap_bias, padding=1, groups=primary))], 1)

    label = f"{size}×{size} {c_in}→{2 * primary} {activation}"
    flops, elements = 2 * pixels * primary * (c_in + 9), pixels * (c_in + 2 * primary) + primary * (c_in + 11)
    library = "conv + conv + cat"
    return Layer("ghost", "ghost_conv2d", network, label, batch, flops, elements, make, _on(plain), library)


def _block_csr(
    device: torch.device, dtype: torch.dtype, rows: int, columns: int, block: int, sparsity: float
) -> BlockCsr:
    """A weight with blocks at random places, one at least."""
    mask = torch.rand(-(-rows // block), -(-columns // block), device=device) >= sparsity
    mask[0, 0] = True
    return BlockCsr.from_dense(_weight(device, dtype, rows, columns), block, mask=mask)


def _dense(tensors: Tensors, shape: tuple[int, int]) -> Tensor:
    """The weight of a sparse layer."""
    _, offsets, columns, blocks, _ = tensors
    return BlockCsr(offsets, columns, blocks, shape).to_dense()  # type: ignore[arg-type]


def sparse_matmul(network: str, rows: int, c_in: int, c_out: int, block: int, sparsity: float) -> Layer:
    """`rows` vectors times a weight of which a fraction of the blocks is zero."""

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Tensors, dict[str, Any]]:
        weight = _block_csr(device, dtype, c_out, c_in, block, sparsity)
        x, bias = _image(device, dtype, rows, c_in), _image(device, dtype, c_out)
        return [x, weight.row_offsets, weight.columns, weight.blocks, bias], {}

    def plain(tensors: Tensors) -> Call:
        dense = _dense(tensors, (c_out, c_in))
        return lambda: F.linear(tensors[0], dense, tensors[-1])  # type: ignore[arg-type]

    kept = round((1 - sparsity) * c_in * c_out)
    label = f"{rows}×{c_in}×{c_out}, {sparsity:.0%} of blocks {block}×{block}"
    flops, elements = 2 * rows * kept, rows * (c_in + c_out) + kept + c_out
    return Layer("sparse", "sparse_matmul", network, label, 1, flops, elements, make, plain, "cuBLAS, dense")


def sparse_conv2d(
    network: str, batch: int, size: int, c_in: int, c_out: int, kernel: int, block: int, sparsity: float
) -> Layer:
    """A convolution with relu, a fraction of its weight's blocks zero; `c_in` is a multiple of `block`."""
    pixels, depth = batch * size * size, kernel**2 * c_in

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Tensors, dict[str, Any]]:
        weight = _block_csr(device, dtype, c_out, depth, block, sparsity)
        x, bias = _image(device, dtype, batch, c_in, size, size), _image(device, dtype, c_out)
        options = {"kernel_size": [kernel] * 2, "padding": [kernel // 2] * 2, "activation": "relu"}
        return [x, weight.row_offsets, weight.columns, weight.blocks, bias], options

    def plain(tensors: Tensors) -> Call:
        x, bias = tensors[0], tensors[-1]
        assert x is not None
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        dense = conv_weight(_dense(tensors, (c_out, depth)), c_in, (kernel, kernel)).contiguous(memory_format=layout)
        return lambda: F.relu(F.conv2d(x, dense, bias, padding=kernel // 2), inplace=True)

    kept = round((1 - sparsity) * depth * c_out)
    label = f"{size}×{size} {c_in}→{c_out} {kernel}×{kernel}, {sparsity:.0%} of blocks {block}×{block}"
    flops, elements = 2 * pixels * kept, pixels * (c_in + c_out) + kept + c_out
    return Layer("sparse", "sparse_conv2d", network, label, batch, flops, elements, make, plain, "cuDNN, dense")


def _rescaling(device: torch.device, c_out: int, depth: int) -> list[Tensor]:
    """Scales that bring sums of `depth` products to the size of one, and biases."""
    scale = (torch.rand(c_out, device=device) + 0.5) / (74 * 74 * depth**0.5)
    return [scale, torch.randn(c_out, device=device)]


def _in_bfloat16(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensors], Call]:
    """Of an int8 layer's x, weight and bias."""

    def plain(tensors: Tensors) -> Call:
        x, weight, _, bias = tensors
        real = [t.to(torch.bfloat16) for t in (x, weight, bias) if t is not None]
        return lambda: F.relu(function(*real), inplace=True)

    return plain


def int8_matmul(network: str, rows: int, c_in: int, c_out: int) -> Layer:
    """An int8 product with relu and an output in bfloat16."""
    options = {"activation": "relu", "output_dtype": torch.bfloat16}

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Tensors, dict[str, Any]]:
        operands = [_image(device, torch.int8, rows, c_in), _weight(device, torch.int8, c_out, c_in)]
        return [*operands, *_rescaling(device, c_out, c_in)], options

    label, flops = f"{rows}×{c_in}×{c_out}", 2 * rows * c_in * c_out
    elements, plain = rows * c_in + c_out * (c_in + 8) + 2 * rows * c_out, _in_bfloat16(F.linear)
    return Layer("int8", "int8_matmul", network, label, 1, flops, elements, make, plain, "cuBLAS bf16", torch.int8)


def int8_conv2d(
    network: str, batch: int, size: int, c_in: int, c_out: int, kernel: int, *, depthwise: bool = False
) -> Layer:
    """An int8 convolution with relu and an int8 output."""
    op, groups = ("int8_depthwise_conv2d", c_in) if depthwise else ("int8_conv2d", 1)
    per_output, pixels = c_in // groups * kernel**2, batch * size * size
    options = {
        "padding": [kernel // 2] * 2,
        "activation": "relu",
        "input_zero_point": -3,
        "output_scale": 0.02,
        "output_zero_point": -128,
    }

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Tensors, dict[str, Any]]:
        x = _image(device, torch.int8, batch, c_in, size, size)
        weight = _weight(device, torch.int8, c_out, c_in // groups, kernel, kernel)
        return [x, weight, *_rescaling(device, c_out, per_output)], options

    label = f"{size}×{size} {c_in}→{c_out} {kernel}×{kernel}" + (" depthwise" if depthwise else "")
    flops, elements = 2 * pixels * c_out * per_output, pixels * (c_in + c_out) + c_out * (per_output + 8)
    plain = _in_bfloat16(partial(F.conv2d, padding=kernel // 2, groups=groups))
    return Layer("int8", op, network, label, batch, flops, elements, make, plain, "cuDNN bf16", torch.int8)


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
    "grouped": _grouped,
    "ghost": _ghost,
    "sparse": _sparse,
    "int8": _int8,
}

ALL_FAMILIES = (*FAMILIES, *_BUILDERS)
