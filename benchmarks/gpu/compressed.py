"""Block-sparse and int8 layers: matrix products and the convolutions of ResNet-50."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from gpu.contest import Contest, Workload
from gpu.place import Call, Place
from kernelpress.bench import networks
from kernelpress.bench.layers import BLOCK, SPARSITY, int8_conv2d, int8_matmul, sparse_conv2d, sparse_matmul
from kernelpress.kernels import reference
from kernelpress.ops.sparse_blocks import BlockCsr, conv_weight
from kernelpress.runtime.torch_private import int_mm

__all__ = ["int8", "sparse"]


def sparse(place: Place, batch: int) -> list[Workload]:
    """Products of 4096³ at several sparsities, once; ResNet-50's convolutions at 90 % at every batch."""
    layers = [_sparse_convolution(place, batch, *sizes) for sizes in networks.RESNET50 if sizes[1] >= 128]
    if batch == 1:
        levels = ((64, 0.9), (64, 0.5), (64, 0.6), (64, 0.8), (64, 0.95), (32, 0.9), (16, 0.9))
        layers = [_sparse_product(place, 4096, block, sparsity) for block, sparsity in levels] + layers
    return layers


def _sparse_product(place: Place, size: int, block: int, sparsity: float) -> Workload:
    size, block = place.features(size), min(block, 16) if place.is_dry else block
    layer = sparse_matmul("matrix product", size, size, size, block, sparsity)

    def make() -> Contest:
        tensors, options = place.make(layer)
        x, offsets, columns, blocks, bias = tensors
        dense = BlockCsr(offsets, columns, blocks, (size, size)).to_dense()
        return Contest(
            **place.own(layer.op, tensors, options),
            peers={
                "cuBLAS, dense": lambda: F.linear(x, dense, bias),
                "torch BSR (Triton)": _bsr(x, dense, bias, block),
            },
            expected=lambda: F.linear(x.float(), dense.float(), bias.float()),
        )

    return Workload.of(layer, make)


def _bsr(x: Tensor, dense: Tensor, bias: Tensor, block: int) -> Call:
    """torch's Triton kernel for block-sparse rows, with its own choice of tiles."""
    weight = dense.to_sparse_bsr((block, block))
    right, column = x.t(), bias[:, None].expand(-1, x.shape[0])

    def call() -> Tensor:
        from kernelpress.runtime.torch_private import bsr_dense_addmm

        return bsr_dense_addmm(column, weight, right).t()

    return call


def _sparse_convolution(place: Place, batch: int, size: int, c_in: int, c_out: int, kernel: int) -> Workload:
    c_in, c_out, block = place.features(c_in), place.features(c_out), 16 if place.is_dry else BLOCK
    layer = sparse_conv2d("ResNet-50", place.batch(batch), place.size(size), c_in, c_out, kernel, block, SPARSITY)

    def make() -> Contest:
        tensors, options = place.make(layer)
        x, offsets, columns, blocks, bias = tensors
        matrix = BlockCsr(offsets, columns, blocks, (c_out, kernel**2 * c_in)).to_dense()
        dense = conv_weight(matrix, c_in, (kernel, kernel)).contiguous(memory_format=torch.channels_last)

        def plain(x: Tensor, dense: Tensor, bias: Tensor) -> Tensor:
            return F.relu(F.conv2d(x, dense, bias, padding=kernel // 2), inplace=True)

        x_nchw, dense_nchw = x.contiguous(), dense.contiguous()
        return Contest(
            **place.own(layer.op, tensors, options),
            peers={
                "cuDNN channels_last, dense": lambda: plain(x, dense, bias),
                "cuDNN contiguous, dense": lambda: plain(x_nchw, dense_nchw, bias),
            },
            expected=lambda: plain(x.float(), dense.float(), bias.float()),
            eager=lambda: plain(x, dense, bias),
        )

    return Workload.of(layer, make)


def int8(place: Place, batch: int) -> list[Workload]:
    """Large products, once; ResNet-50's convolutions and two depthwise ones at every batch."""
    layers = [_int8_convolution(place, batch, "ResNet-50", *sizes, depthwise=False) for sizes in networks.RESNET50]
    layers += [
        _int8_convolution(place, batch, "MobileNet V2", size, c, c, 3, depthwise=True)
        for size, c in networks.MOBILENET_V2_DEPTHWISE
    ]
    if batch == 1:
        sizes = ((8192, 8192, 8192), (4096, 4096, 4096), (32, 4096, 4096))
        layers = [_int8_product(place, *size) for size in sizes] + layers
    return layers


def _int8_product(place: Place, rows: int, c_in: int, c_out: int) -> Workload:
    layer = int8_matmul("matrix product", *map(place.features, (rows, c_in, c_out)))

    def make() -> Contest:
        (x, weight, scale, bias), options = place.make(layer)
        transposed = weight.t()
        half = [t.to(torch.bfloat16) for t in (x, weight, bias)]

        def separate(product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
            return F.relu(product(x, transposed).float() * scale + bias).to(torch.bfloat16)

        return Contest(
            **place.own(layer.op, [x, weight, scale, bias], options),
            peers={
                "_int_mm + epilogue": lambda: separate(int_mm),
                "_int_mm alone": lambda: int_mm(x, transposed),
                "cuBLAS bf16": lambda: F.relu(F.linear(*half), inplace=True),
            },
            expected=lambda: reference.int8_matmul(x, weight, scale, bias, **options),
            partial=frozenset({"_int_mm alone"}),
            other_values=frozenset({"cuBLAS bf16"}),
            eager=lambda: separate(int_mm),
        )

    return Workload.of(layer, make)


def _int8_convolution(
    place: Place, batch: int, network: str, size: int, c_in: int, c_out: int, kernel: int, *, depthwise: bool
) -> Workload:
    c_in, c_out = place.channels(c_in), place.channels(c_out)
    sizes = (place.batch(batch), place.size(size), c_in, c_out, kernel)
    layer, groups = int8_conv2d(network, *sizes, depthwise=depthwise), c_in if depthwise else 1

    def make() -> Contest:
        tensors, options = place.make(layer)
        x, weight, *_ = tensors
        real = [place.random(*x.shape), place.weight(*weight.shape), place.random(c_out)]

        def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.relu(F.conv2d(x, weight, bias, padding=kernel // 2, groups=groups), inplace=True)

        contiguous = [t.contiguous() for t in real]
        names = ("cuDNN bf16 channels_last", "cuDNN bf16 contiguous")
        return Contest(
            **place.own(layer.op, tensors, options),
            peers=dict(zip(names, (lambda: plain(*real), lambda: plain(*contiguous)), strict=True)),
            expected=lambda: getattr(reference, layer.op)(*tensors, **options),
            other_values=frozenset(names),
        )

    return Workload.of(layer, make)
