"""Block-sparse and int8 layers: matrix products and the convolutions of ResNet-50."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gpu.contest import Contest, Workload
from gpu.place import Call, Place
from kernelpress.kernels import reference
from kernelpress.ops.block_csr import BlockCsr, conv_matrix

__all__ = ["int8", "sparse"]

BYTES = 2

# ResNet-50's convolutions: map size, channels in and out, window (He et al. 2016, table 1).
_RESNET50 = (
    (56, 64, 64, 1),
    (56, 64, 64, 3),
    (56, 64, 256, 1),
    (28, 512, 128, 1),
    (28, 128, 128, 3),
    (28, 128, 512, 1),
    (14, 1024, 256, 1),
    (14, 256, 256, 3),
    (14, 256, 1024, 1),
    (7, 2048, 512, 1),
    (7, 512, 512, 3),
    (7, 512, 2048, 1),
)


def sparse(place: Place, batch: int) -> list[Workload]:
    """Products of 4096³ at several sparsities, once; ResNet-50's convolutions at 90 % at every batch."""
    layers = [_sparse_convolution(place, batch, *layer) for layer in _RESNET50 if layer[1] >= 128]
    if batch == 1:
        levels = ((64, 0.9), (64, 0.5), (64, 0.6), (64, 0.8), (64, 0.95), (32, 0.9), (16, 0.9))
        layers = [_sparse_product(place, 4096, block, sparsity) for block, sparsity in levels] + layers
    return layers


def _pattern(rows: int, columns: int, sparsity: float, device: torch.device) -> Tensor:
    mask = torch.rand(rows, columns, device=device) >= sparsity
    mask[0, 0] = True
    return mask


def _sparse_product(place: Place, size: int, block: int, sparsity: float) -> Workload:
    size, block = place.features(size), min(block, 16) if place.is_dry else block

    def make() -> Contest:
        x, bias = place.random(size, size), place.random(size)
        mask = _pattern(size // block, size // block, sparsity, place.device)
        dense = place.weight(size, size) * mask.repeat_interleave(block, 0).repeat_interleave(block, 1)
        weight = BlockCsr.from_dense(dense, block, mask=mask)
        arguments = [x, weight.row_offsets, weight.columns, weight.blocks, bias]
        return Contest(
            **place.own("sparse_matmul", arguments, {}),
            peers={
                "cuBLAS, dense": lambda: F.linear(x, dense, bias),
                "torch BSR (Triton)": _bsr(x, dense, bias, block),
            },
            expected=lambda: F.linear(x.float(), dense.float(), bias.float()),
        )

    kept = round((1 - sparsity) * size * size)
    return Workload(
        *("sparse", "sparse_matmul", "matrix product", f"{size}³, {sparsity:.0%} of blocks {block}×{block}", 1, "bf16"),
        flops=2 * size * kept,
        traffic_bytes=BYTES * (2 * size * size + kept),
        make=make,
    )


def _bsr(x: Tensor, dense: Tensor, bias: Tensor, block: int) -> Call:
    """torch's Triton kernel for block-sparse rows, with its own choice of tiles."""
    weight = dense.to_sparse_bsr((block, block))
    right, column = x.t(), bias[:, None].expand(-1, x.shape[0])

    def call() -> Tensor:
        from torch.sparse._triton_ops import bsr_dense_addmm

        return bsr_dense_addmm(column, weight, right).t()

    return call


def _sparse_convolution(place: Place, batch: int, size: int, c_in: int, c_out: int, kernel: int) -> Workload:
    size, batch = place.size(size), place.batch(batch)
    c_in, c_out = place.features(c_in), place.features(c_out)
    block, sparsity = 16 if place.is_dry else 64, 0.9
    options: dict[str, Any] = {"kernel_size": [kernel] * 2, "padding": [kernel // 2] * 2, "activation": "relu"}

    def make() -> Contest:
        x, bias = place.random(batch, c_in, size, size), place.random(c_out)
        mask = _pattern(c_out // block, kernel**2 * c_in // block, sparsity, place.device)
        matrix = place.weight(c_out, kernel**2 * c_in)
        matrix = matrix * mask.repeat_interleave(block, 0).repeat_interleave(block, 1)
        weight = BlockCsr.from_dense(matrix, block, mask=mask)
        dense = matrix.view(c_out, kernel, kernel, c_in).permute(0, 3, 1, 2)
        assert torch.equal(conv_matrix(dense, block), matrix)
        arguments = [x, weight.row_offsets, weight.columns, weight.blocks, bias]

        def plain(x: Tensor, dense: Tensor, bias: Tensor) -> Tensor:
            return F.relu(F.conv2d(x, dense, bias, padding=kernel // 2), inplace=True)

        x_nchw, dense_nchw = x.contiguous(), dense.contiguous()
        return Contest(
            **place.own("sparse_conv2d", arguments, options),
            peers={
                "cuDNN channels_last, dense": lambda: plain(x, dense, bias),
                "cuDNN contiguous, dense": lambda: plain(x_nchw, dense_nchw, bias),
            },
            expected=lambda: plain(x.float(), dense.float(), bias.float()),
            eager=lambda: plain(x, dense, bias),
        )

    pixels, kept = batch * size * size, round((1 - sparsity) * c_in * c_out * kernel**2)
    label = f"{size}×{size} {c_in}→{c_out} {kernel}×{kernel}, {sparsity:.0%} of blocks {block}×{block}"
    return Workload(
        *("sparse", "sparse_conv2d", "ResNet-50", label, batch, "bf16"),
        flops=2 * pixels * kept,
        traffic_bytes=BYTES * (pixels * (c_in + c_out) + kept),
        make=make,
    )


def int8(place: Place, batch: int) -> list[Workload]:
    """Large products, once; ResNet-50's convolutions and two depthwise ones at every batch."""
    layers = [_int8_convolution(place, batch, "ResNet-50", *layer, depthwise=False) for layer in _RESNET50]
    layers += [
        _int8_convolution(place, batch, "MobileNet V2", size, c, c, 3, depthwise=True)
        for size, c in ((56, 144), (14, 576))
    ]
    if batch == 1:
        sizes = ((8192, 8192, 8192), (4096, 4096, 4096), (32, 4096, 4096))
        layers = [_int8_product(place, *size) for size in sizes] + layers
    return layers


def _vectors(place: Place, c_out: int, depth: int) -> tuple[Tensor, Tensor]:
    """Scales that bring sums of `depth` products to the size of one, and biases."""
    scale = (torch.rand(c_out, device=place.device) + 0.5) / (74 * 74 * depth**0.5)
    return scale, torch.randn(c_out, device=place.device)


def _int8_product(place: Place, rows: int, c_in: int, c_out: int) -> Workload:
    rows, c_in, c_out = map(place.features, (rows, c_in, c_out))
    options: dict[str, Any] = {"activation": "relu", "output_dtype": torch.bfloat16}

    def make() -> Contest:
        x, weight = place.bytes(rows, c_in), place.bytes(c_out, c_in)
        scale, bias = _vectors(place, c_out, c_in)
        transposed = weight.t()
        half = [t.to(torch.bfloat16) for t in (x, weight, bias)]

        def separate(product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
            return F.relu(product(x, transposed).float() * scale + bias).to(torch.bfloat16)

        return Contest(
            **place.own("int8_matmul", [x, weight, scale, bias], options),
            peers={
                "_int_mm + epilogue": lambda: separate(torch._int_mm),
                "_int_mm alone": lambda: torch._int_mm(x, transposed),
                "cuBLAS bf16": lambda: F.relu(F.linear(*half), inplace=True),
            },
            expected=lambda: reference.int8_matmul(x, weight, scale, bias, **options),
            partial=frozenset({"_int_mm alone"}),
            other_values=frozenset({"cuBLAS bf16"}),
            eager=lambda: separate(torch._int_mm),
        )

    return Workload(
        *("int8", "int8_matmul", "matrix product", f"{rows}×{c_in}×{c_out}", 1, "int8"),
        flops=2 * rows * c_in * c_out,
        traffic_bytes=rows * c_in + c_out * c_in + BYTES * rows * c_out,
        make=make,
    )


def _int8_convolution(
    place: Place, batch: int, network: str, size: int, c_in: int, c_out: int, kernel: int, *, depthwise: bool
) -> Workload:
    size, batch = place.size(size), place.batch(batch)
    c_in, c_out = place.channels(c_in), place.channels(c_out)
    op, groups = ("int8_depthwise_conv2d", c_in) if depthwise else ("int8_conv2d", 1)
    per_group = c_in // groups
    options: dict[str, Any] = {
        "padding": [kernel // 2] * 2,
        "activation": "relu",
        "input_zero_point": -3,
        "output_scale": 0.02,
        "output_zero_point": -128,
    }

    def make() -> Contest:
        x, weight = place.bytes(batch, c_in, size, size), place.bytes(c_out, per_group, kernel, kernel)
        scale, bias = _vectors(place, c_out, per_group * kernel**2)
        real = [place.random(*x.shape), place.weight(*weight.shape), place.random(c_out)]

        def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.relu(F.conv2d(x, weight, bias, padding=kernel // 2, groups=groups), inplace=True)

        contiguous = [t.contiguous() for t in real]
        names = ("cuDNN bf16 channels_last", "cuDNN bf16 contiguous")
        return Contest(
            **place.own(op, [x, weight, scale, bias], options),
            peers=dict(zip(names, (lambda: plain(*real), lambda: plain(*contiguous)), strict=True)),
            expected=lambda: getattr(reference, op)(x, weight, scale, bias, **options),
            other_values=frozenset(names),
        )

    pixels = batch * size * size
    window = f"{kernel}×{kernel}" + (" depthwise" if depthwise else "")
    return Workload(
        *("int8", op, network, f"{size}×{size} {c_in}→{c_out} {window}", batch, "int8"),
        flops=2 * pixels * c_out * per_group * kernel**2,
        traffic_bytes=pixels * (c_in + c_out) + c_out * per_group * kernel**2,
        make=make,
    )
