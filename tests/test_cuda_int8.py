"""The int8 CUDA kernels on the host emulator, against the reference: integers exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from emulating import run_configured
from simt.fixtures import ORDERS, Simt
from support import assert_same, int8, int8_image, residual_for, slice_of_wider
from torch import Tensor

import kernelpress
from kernelpress import ops
from kernelpress.kernels import reference
from kernelpress.ops.backends import cuda

pytestmark = pytest.mark.usefixtures("emulated_cuda")

WINDOW_TILES = ("128x128", "128x64", "64x64,", "128x32", "16x64", "64x64 of any alignment")
TILES = (*WINDOW_TILES, "256x128")
OUTPUTS: tuple[dict[str, Any], ...] = (
    {"output_scale": 37.0, "output_zero_point": -11},
    {"output_dtype": torch.float16},
    {"output_dtype": torch.bfloat16},
    {},
)


def matmul(rows: int, c_in: int, c_out: int, number: int) -> tuple[list[Any], dict[str, Any]]:
    """Arguments whose options change with the number."""
    options: dict[str, Any] = {
        "activation": ("identity", "relu", "hardswish", "relu6")[number % 4],
        **OUTPUTS[number % 4],
    }
    tensors: list[Any] = [
        int8(rows, c_in),
        int8(c_out, c_in),
        torch.rand(c_out) + 0.01,
        None,
        None,
        None,
        None,
    ]
    if number % 3 != 0:
        tensors[3] = torch.randn(c_out) * 100
        tensors[4] = residual_for("int8_matmul", tensors[:3], options)
        if "output_scale" in options:
            options |= {"residual_scale": 1.7, "residual_zero_point": 5}
    if number % 2:
        tensors[5], tensors[6] = torch.rand(rows) + 0.1, torch.randint(-128, 128, (rows,), dtype=torch.int32)
    else:
        options |= {"input_scale": 0.37, "input_zero_point": -19 * (number % 5)}
    return tensors, options


@pytest.mark.parametrize(("rows", "c_in", "c_out"), [(150, 144, 136), (33, 400, 40)])
@pytest.mark.parametrize("tile", TILES)
def test_every_tile_multiplies_exactly(tile: str, rows: int, c_in: int, c_out: int) -> None:
    tensors, options = matmul(rows, c_in, c_out, TILES.index(tile) + rows)
    assert_same("int8_matmul", tensors, options, run_configured("int8_matmul", tensors, options, tile))


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize(("rows", "c_in", "c_out"), [(1, 1, 1), (5, 7, 3), (70, 20, 65), (17, 48, 33)])
def test_ragged_products(rows: int, c_in: int, c_out: int, number: int) -> None:
    tensors, options = matmul(rows, c_in, c_out, number)
    with kernelpress.use_backend("cuda"):
        assert_same("int8_matmul", tensors, options, ops.int8_matmul(*tensors, **options))


@pytest.mark.parametrize("number", range(4))
def test_few_tiles_split_k(number: int) -> None:
    tensors, options = matmul(3, 2064, 20, number)
    with kernelpress.use_backend("cuda"):
        assert_same("int8_matmul", tensors, options, ops.int8_matmul(*tensors, **options))


@pytest.fixture
def two_multiprocessors(simt: Simt) -> Iterator[None]:
    """The emulator's other device, on which a block takes several tiles."""
    launches = 0

    def launch(name: str, tensors: Sequence[Tensor], fields: Sequence[int | float], index: int) -> None:
        nonlocal launches
        order = ORDERS[launches % len(ORDERS)]
        simt.run(name, tensors, fields, seed=launches, order=order, outputs=tensors[:1], device=1)
        launches += 1

    def describe(index: int) -> cuda.CudaDevice:
        return cuda.CudaDevice(**simt.module.device(1))

    with cuda.TARGET.changed(
        device_type="cpu",
        reason=lambda index: None,
        describe=describe,
        launch=launch,
        configurations=simt.module.configurations,
    ):
        yield


@pytest.mark.usefixtures("two_multiprocessors")
@pytest.mark.parametrize("tile", TILES)
def test_blocks_take_tile_after_tile(tile: str) -> None:
    number = TILES.index(tile)
    rows, c_out = {"256x128": (600, 200), "128x128": (300, 270)}.get(tile, (290, 140))
    tensors, options = matmul(rows, 160, c_out, number)
    assert_same("int8_matmul", tensors, options, run_configured("int8_matmul", tensors, options, tile))
    tensors, options = matmul(rows, 16, c_out, number + 1)
    assert_same("int8_matmul", tensors, options, run_configured("int8_matmul", tensors, options, tile))


@pytest.mark.usefixtures("two_multiprocessors")
@pytest.mark.parametrize("tile", ["128x128", "128x32", "64x64 of any alignment"])
def test_blocks_take_windows_after_windows(tile: str) -> None:
    tensors: list[Any] = [int8_image(2, 16, 17, 19), int8(70, 16, 3, 3), torch.rand(70), None, None]
    options: dict[str, Any] = {"padding": (1, 1), "input_zero_point": -77, "output_scale": 2e2}
    assert_same("int8_conv2d", tensors, options, run_configured("int8_conv2d", tensors, options, tile))


def test_the_largest_sums_do_not_overflow() -> None:
    x, weight = torch.full((2, 65536), -128, dtype=torch.int8), torch.full((3, 65536), -128, dtype=torch.int8)
    weight[1] = 127
    for zero_point in (0, 127):
        options: dict[str, Any] = {"input_zero_point": zero_point}
        with kernelpress.use_backend("cuda"):
            out = ops.int8_matmul(x, weight, torch.ones(3), **options)
        assert_same("int8_matmul", [x, weight, torch.ones(3)], options, out)


# input channels, output channels, kernel, size, options
CONVOLUTIONS: dict[str, tuple[int, int, tuple[int, int], tuple[int, int], dict[str, Any]]] = {
    "ResNet's 3x3": (32, 40, (3, 3), (9, 11), {"padding": (1, 1)}),
    "stride 2": (16, 72, (3, 3), (13, 10), {"padding": (1, 1), "stride": (2, 2)}),
    "1x1": (48, 24, (1, 1), (7, 9), {}),
    "1x1 of stride 2": (16, 24, (1, 1), (7, 9), {"stride": (2, 2)}),
    "dilated rectangle": (16, 8, (2, 3), (10, 9), {"padding": (2, 0), "dilation": (2, 3), "stride": (1, 2)}),
    "stem": (3, 16, (3, 3), (12, 13), {"padding": (1, 1), "stride": (2, 2)}),
    "4-byte channels": (20, 9, (3, 3), (6, 5), {"padding": (1, 1)}),
    "odd channels": (7, 33, (3, 3), (5, 6), {"padding": (2, 2)}),
}


def convolution(name: str, number: int) -> tuple[list[Any], dict[str, Any]]:
    c_in, c_out, kernel, size, geometry = CONVOLUTIONS[name]
    options: dict[str, Any] = {
        "activation": ("relu", "identity", "relu6")[number % 3],
        **geometry,
        **OUTPUTS[number % 4],
    }
    options |= {"input_scale": 0.1, "input_zero_point": (-128, 127, 0, 3)[number % 4]}
    tensors: list[Any] = [
        int8_image(2, c_in, *size),
        int8(c_out, c_in, *kernel),
        torch.rand(c_out) + 0.01,
        None,
        None,
    ]
    if number % 2:
        tensors[3] = torch.randn(c_out) * 100
    if number % 3:
        tensors[4] = residual_for("int8_conv2d", tensors[:3], options)
        if "output_scale" in options:
            options |= {"residual_scale": 0.8, "residual_zero_point": -3}
    return tensors, options


@pytest.mark.parametrize("tile", WINDOW_TILES)
@pytest.mark.parametrize("name", ["ResNet's 3x3", "stride 2"])
def test_every_tile_convolves_exactly(name: str, tile: str) -> None:
    tensors, options = convolution(name, TILES.index(tile) + len(name))
    assert_same("int8_conv2d", tensors, options, run_configured("int8_conv2d", tensors, options, tile))


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str, number: int) -> None:
    tensors, options = convolution(name, number)
    with kernelpress.use_backend("cuda"):
        assert_same("int8_conv2d", tensors, options, ops.int8_conv2d(*tensors, **options))


def test_deep_convolutions_split_k() -> None:
    tensors: list[Any] = [int8_image(1, 256, 4, 4), int8(24, 256, 3, 3), torch.rand(24), torch.randn(24)]
    options: dict[str, Any] = {"padding": (1, 1), "input_zero_point": 90, "output_scale": 5e3}
    with kernelpress.use_backend("cuda"):
        assert_same("int8_conv2d", tensors, options, ops.int8_conv2d(*tensors, **options))


@pytest.mark.parametrize("extra", [32, 5])
def test_slices_of_wider_tensors(extra: int) -> None:
    tensors, options = convolution("ResNet's 3x3", 4)
    for at in (0, 4):
        t = tensors[at]
        assert t is not None
        tensors[at] = slice_of_wider(t, extra)
    with kernelpress.use_backend("cuda"):
        assert_same("int8_conv2d", tensors, options, ops.int8_conv2d(*tensors, **options))
    rows, options = matmul(20, 32, 16, 1)
    assert rows[0] is not None
    rows[0] = slice_of_wider(rows[0], extra)
    with kernelpress.use_backend("cuda"):
        assert_same("int8_matmul", rows, options, ops.int8_matmul(*rows, **options))


def test_a_row_scale_of_nan_stays_in_its_row() -> None:
    scale = torch.tensor([1.0, torch.nan, 2.0])
    tensors: list[Any] = [int8(3, 16), int8(8, 16), torch.rand(8), None, None, scale]
    outputs: tuple[dict[str, Any], ...] = ({}, {"output_scale": 9.0, "output_zero_point": 4})
    for output in outputs:
        with kernelpress.use_backend("cuda"):
            out = ops.int8_matmul(*tensors, **output)
        assert_same("int8_matmul", tensors, output, out)


SHAPES = [(1,), (3, 7), (2, 5, 24), (2, 3, 5, 7), (2, 16, 9, 11), (5, 1000)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_and_dequantize(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(shape) * 20).to(dtype)
    x.view(-1)[0] = torch.nan
    options: dict[str, Any] = {"scale": 0.3, "zero_point": -7}
    for t in (x, slice_of_wider(x, 16), slice_of_wider(x, 3)):
        with kernelpress.use_backend("cuda"):
            values = ops.quantize(t, **options)
            back = ops.dequantize(values, **options, output_dtype=dtype)
            again = ops.dequantize(slice_of_wider(values, 5), **options, output_dtype=dtype)
        assert torch.equal(values, reference.quantize(x, **options))
        assert torch.equal(back, reference.dequantize(values, **options, output_dtype=dtype))
        assert torch.equal(again, back)


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("shape", SHAPES)
def test_add(shape: tuple[int, ...], number: int) -> None:
    tensors: list[Any] = [int8(*shape), slice_of_wider(int8(*shape), (3, 16)[number % 2])]
    options: dict[str, Any] = {"input_scale": 0.1, "input_zero_point": 3, "other_scale": 0.7, "other_zero_point": -9}
    options |= {"activation": ("relu", "identity", "relu6", "silu")[number], **OUTPUTS[number]}
    if "output_scale" in options:
        options["output_scale"] = 0.5
    with kernelpress.use_backend("cuda"):
        assert_same("int8_add", tensors, options, ops.int8_add(*tensors, **options))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (9, 7), (3, 5, 96), (2, 1024), (3, 1030), (2, 20000)])
def test_quantize_rows(shape: tuple[int, ...], symmetric: bool) -> None:
    dtype = (torch.float32, torch.float16, torch.bfloat16)[shape[-1] % 3]
    x = (torch.randn(shape) * 3 + 1).to(dtype)
    x[0, -1] = 0
    for t in (x, slice_of_wider(x, 6)):
        with kernelpress.use_backend("cuda"):
            outputs = ops.quantize_rows(t, symmetric=symmetric)
        for out, expected in zip(outputs, reference.quantize_rows(x, symmetric=symmetric), strict=True):
            torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_rows_of_zeros_nan_and_infinity() -> None:
    x = torch.tensor([[0.0, 0.0, 0.0], [1.0, torch.nan, -2.0], [1.0, torch.inf, -2.0], [1.0, -torch.inf, 2.0]])
    for symmetric in (False, True):
        with kernelpress.use_backend("cuda"):
            outputs = ops.quantize_rows(x, symmetric=symmetric)
        for out, expected in zip(outputs, reference.quantize_rows(x, symmetric=symmetric), strict=True):
            torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def test_rows_quantized_and_multiplied_are_near_the_floats() -> None:
    x, weight = torch.randn(40, 64), torch.randn(24, 64)
    values, weight_scale, _ = reference.quantize_rows(weight, symmetric=True)
    with kernelpress.use_backend("cuda"):
        quantized = ops.quantize_rows(x)
        out = ops.int8_matmul(quantized[0], values, weight_scale, None, None, *quantized[1:])
    expected = x @ weight.T
    assert float((out - expected).norm() / expected.norm()) < 0.02


def test_empty_batches() -> None:
    with kernelpress.use_backend("cuda"):
        assert ops.int8_matmul(int8(0, 5), int8(3, 5), torch.rand(3)).shape == (0, 3)
        assert ops.int8_conv2d(int8(0, 3, 4, 4), int8(3, 3, 2, 2), torch.rand(3)).shape == (0, 3, 3, 3)
        assert ops.quantize(torch.zeros(0, 4), scale=1.0).shape == (0, 4)
        assert [t.shape[0] for t in ops.quantize_rows(torch.zeros(0, 4))] == [0, 0, 0]
