"""The int8 family's Triton kernels on Triton's interpreter, against the reference: integers exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreting import run_triton
from support import int8, int8_image, slice_of_wider
from torch import Tensor

from kernelpress import ops
from kernelpress.kernels import reference
from kernelpress.kernels.reference import ACTIVATIONS
from kernelpress.kernels.triton import int8_quantize as quantize_kernels
from kernelpress.kernels.triton.launch import Configuration

pytestmark = [
    pytest.mark.usefixtures("interpreted_triton"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OUTPUTS: tuple[dict[str, Any], ...] = (
    {"output_scale": 9.0, "output_zero_point": -11},
    {"output_dtype": torch.float16},
    {"output_dtype": torch.bfloat16},
    {},
)
EXACT = ("identity", "relu", "relu6")


def check(op: str, tensors: list[Any], options: dict[str, Any], *tile: int) -> None:
    """Every bit: the reference says where each number is rounded. Curved activations may differ in the last place."""
    out, expected = run_triton(op, tensors, options, *tile), getattr(reference, op)(*tensors, **options)
    assert out.dtype == expected.dtype
    if options.get("activation", "identity") in EXACT:
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    elif out.dtype == torch.int8:
        assert int((out.int() - expected.int()).abs().max()) <= 1
    else:
        rtol = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[out.dtype]
        torch.testing.assert_close(out, expected, rtol=rtol, atol=1e-4)


def with_residual(op: str, tensors: list[Any], options: dict[str, Any]) -> None:
    """Puts one of the output's dtype at its place."""
    plain = ops.allocate(op, tensors, options)
    tensors[4] = plain.copy_(int8(*plain.shape) if plain.dtype == torch.int8 else torch.randn(plain.shape) * 50)
    if plain.dtype == torch.int8:
        options |= {"residual_scale": 1.7, "residual_zero_point": 5}


def matmul(rows: int, c_in: int, c_out: int, number: int) -> tuple[list[Any], dict[str, Any]]:
    """Arguments whose options change with the number; all of them from 1 on."""
    options: dict[str, Any] = {"activation": EXACT[number % 3], **OUTPUTS[number % 4]}
    tensors: list[Any] = [int8(rows, c_in), int8(c_out, c_in), torch.rand(c_out) / 20, None, None, None, None]
    if number:
        tensors[3] = torch.randn(c_out) * 100
        with_residual("int8_matmul", tensors, options)
    if number % 2:
        tensors[5], tensors[6] = torch.rand(rows) + 0.1, torch.randint(-128, 128, (rows,), dtype=torch.int32)
    elif number:
        options |= {"input_scale": 0.37, "input_zero_point": -19 * (number % 5)}
    return tensors, options


@pytest.mark.parametrize("number", range(7))
@pytest.mark.parametrize(("rows", "c_in", "c_out"), [(37, 70, 21), (1, 1, 1)], ids=["ragged", "one value"])
def test_products(rows: int, c_in: int, c_out: int, number: int) -> None:
    check("int8_matmul", *matmul(rows, c_in, c_out, number), 32, 16, 32)


def test_a_tile_of_many_columns_is_finished_in_parts() -> None:
    check("int8_matmul", *matmul(20, 40, 300, 4), 16, 256, 32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("output", [{"output_scale": 0.03, "output_zero_point": 7}, {}], ids=["int8", "float32"])
def test_every_activation(activation: str, output: dict[str, Any]) -> None:
    tensors = [int8(16, 32), int8(16, 32), torch.rand(16) * 1e-4, torch.randn(16)]
    check("int8_matmul", tensors, {"activation": activation, **output})


@pytest.mark.parametrize("zero_point", [1, 127, -128])
def test_a_zero_point_for_all_beside_scales_of_rows(zero_point: int) -> None:
    tensors = [int8(3, 5, 24), int8(9, 24), torch.rand(9), None, None, torch.rand(3, 5)]
    check("int8_matmul", tensors, {"input_zero_point": zero_point})


def test_the_largest_sums_do_not_overflow() -> None:
    weight = torch.full((3, 65536), -128, dtype=torch.int8)
    weight[1] = 127
    x = torch.full((2, 65536), -128, dtype=torch.int8)
    check("int8_matmul", [x, weight, torch.ones(3)], {"input_zero_point": 127}, 16, 16, 8192)


def test_a_row_scale_of_nan_stays_in_its_row() -> None:
    tensors = [int8(3, 16), int8(8, 16), torch.rand(8), None, None, torch.tensor([1.0, torch.nan, 2.0])]
    check("int8_matmul", tensors, {})
    check("int8_matmul", tensors, {"output_scale": 9.0, "output_zero_point": 4})


def test_bias_and_residual_are_added_as_the_reference_rounds() -> None:
    """Every step at its own rounding: scales of many digits, sums far above the residual."""
    tensors = [int8(64, 32), int8(16, 32), torch.rand(16) / 3, torch.randn(16) / 7, torch.randn(64, 16) / 11]
    check("int8_matmul", tensors, {"input_scale": 0.123})
    tensors[3] = None
    check("int8_matmul", tensors, {"input_scale": 0.123})
    tensors[4] = int8(64, 16)
    check("int8_matmul", tensors, {"output_scale": 1.7, "residual_scale": 1 / 3, "residual_zero_point": 1})


# input channels, output channels, kernel, size, options, tile
CONVOLUTIONS: dict[str, tuple[int, int, tuple[int, int], tuple[int, int], dict[str, Any], tuple[int, ...]]] = {
    "3x3": (40, 20, (3, 3), (5, 4), {"padding": (1, 1)}, (32, 32, 32)),
    "stride 2": (32, 24, (3, 3), (7, 6), {"padding": (1, 1), "stride": (2, 2)}, (16, 32, 64)),
    "1x1": (48, 24, (1, 1), (3, 5), {}, (16, 16, 64)),
    "1x1 of stride 2": (33, 17, (1, 1), (7, 5), {"stride": (2, 2)}, (16, 32, 32)),
    "dilated rectangle": (
        16,
        8,
        (2, 3),
        (7, 9),
        {"padding": (2, 0), "dilation": (2, 3), "stride": (1, 2)},
        (32, 16, 32),
    ),
    "stem": (3, 16, (3, 3), (8, 7), {"padding": (1, 1), "stride": (2, 2)}, (16, 16, 32)),
    "few channels, in two steps a row": (7, 17, (2, 7), (3, 8), {"padding": (1, 3)}, (32, 32, 32)),
    "padded by more than the window": (5, 9, (2, 2), (2, 3), {"padding": (3, 2)}, (32, 16, 32)),
}


def convolution(name: str, number: int) -> tuple[list[Any], dict[str, Any], tuple[int, ...]]:
    c_in, c_out, kernel, size, geometry, tile = CONVOLUTIONS[name]
    options: dict[str, Any] = {"activation": EXACT[number % 3], **geometry, **OUTPUTS[number % 4]}
    options |= {"input_scale": 0.1, "input_zero_point": (-128, 127, 0, 1)[number % 4]}
    tensors: list[Any] = [int8_image(2, c_in, *size), int8(c_out, c_in, *kernel), torch.rand(c_out) / 3, None, None]
    if number % 2:
        tensors[3] = torch.randn(c_out) * 100
    if number % 3:
        with_residual("int8_conv2d", tensors, options)
    return tensors, options, tile


def numbers(cases: dict[str, Any], name: str) -> list[int]:
    """All four outputs and zero points of the first case, two of any other one."""
    at = list(cases).index(name)
    return [0, 1, 2, 3] if at == 0 else [at % 4, (at + 1) % 4]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str) -> None:
    for number in numbers(CONVOLUTIONS, name):
        tensors, options, tile = convolution(name, number)
        check("int8_conv2d", tensors, options, *tile)


@pytest.mark.parametrize("name", ["3x3", "1x1", "stem"])
def test_channel_slices_in_the_tiles_of_the_heuristic(name: str) -> None:
    tensors, options, _ = convolution(name, 1)
    tensors[0], tensors[4] = slice_of_wider(tensors[0], 5), slice_of_wider(tensors[4], 3)
    check("int8_conv2d", tensors, options)


# channels, kernel, size, options, tile, multiplier
DEPTHWISE: dict[str, tuple[int, tuple[int, int], tuple[int, int], dict[str, Any], tuple[int, ...], int]] = {
    "3x3": (9, (3, 3), (3, 5), {"padding": (1, 1)}, (2, 4, 8), 1),
    "5x5 of stride 2": (8, (5, 5), (5, 6), {"padding": (2, 2), "stride": (2, 2)}, (2, 4, 8), 1),
    "2x5 of two strides": (9, (2, 5), (4, 12), {"padding": (0, 2), "stride": (1, 3)}, (4, 4, 16), 1),
    "multiplier 3": (5, (3, 3), (3, 5), {"padding": (1, 1)}, (4, 8, 16), 3),
    "dilated": (8, (3, 3), (3, 8), {"padding": (2, 2), "dilation": (2, 3)}, (1, 8, 8), 1),
    "9x1": (8, (9, 1), (4, 3), {"padding": (4, 0)}, (1, 4, 8), 1),
}


@pytest.mark.parametrize("name", DEPTHWISE)
def test_depthwise(name: str) -> None:
    channels, kernel, size, geometry, tile, multiplier = DEPTHWISE[name]
    c_out = channels * multiplier
    for number in numbers(DEPTHWISE, name):
        options: dict[str, Any] = {"activation": EXACT[number % 3], **geometry, **OUTPUTS[number]}
        options |= {"input_scale": 0.1, "input_zero_point": (-128, 127, 0, 1)[number]}
        tensors = [int8_image(1, channels, *size), int8(c_out, 1, *kernel), torch.rand(c_out), torch.randn(c_out), None]
        with_residual("int8_depthwise_conv2d", tensors, options)
        check("int8_depthwise_conv2d", tensors, options, *tile)


def test_depthwise_of_slices_in_the_tiles_of_the_heuristic() -> None:
    tensors: list[Any] = [slice_of_wider(int8_image(2, 6, 5, 4), 3), int8(6, 1, 3, 3), torch.rand(6)]
    check("int8_depthwise_conv2d", tensors, {"padding": (1, 1), "input_zero_point": -9, "output_scale": 50.0})


SHAPES = [(1,), (3, 7), (2, 5, 24), (2, 3, 5, 7), (2, 3000)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_and_dequantize(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(shape) * 20).to(dtype)
    values = reference.quantize(x, scale=0.3)
    for extra in (0, 3):
        check("quantize", [slice_of_wider(x, extra)], {"scale": 0.3, "zero_point": -7})
        options = {"scale": 0.3, "zero_point": 1, "output_dtype": dtype}
        check("dequantize", [slice_of_wider(values, extra)], options)


def test_quantize_rounds_half_to_even_and_saturates() -> None:
    x = [0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, -128.5, 1e9, -1e9, torch.inf, -torch.inf, torch.nan, 3e38, -3e38]
    for zero_point in (0, -3, 127, -128):
        check("quantize", [torch.tensor(x)], {"scale": 1.0, "zero_point": zero_point})
    check("quantize", [torch.tensor(x)], {"scale": 1e-30})


def test_many_programs_take_their_tiles() -> None:
    check("quantize", [torch.randn(5, 70)], {"scale": 0.01}, 2, 32)
    check("quantize", [slice_of_wider(torch.randn(5, 70), 3)], {"scale": 0.01}, 2, 32)


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 5, 7)], ids=str)
def test_add(shape: tuple[int, ...], number: int) -> None:
    tensors = [int8(*shape), slice_of_wider(int8(*shape), number)]
    options: dict[str, Any] = {"input_scale": 0.1, "input_zero_point": 3, "other_scale": 0.7, "other_zero_point": -9}
    options |= {"activation": (*EXACT, "silu")[number], **OUTPUTS[number]}
    if "output_scale" in options:
        options["output_scale"] = 0.5
    check("int8_add", tensors, options)


def check_rows(x: Tensor, symmetric: bool) -> None:
    outputs = ops.quantize_rows(x, symmetric=symmetric, backend="triton")
    for out, expected in zip(outputs, reference.quantize_rows(x, symmetric=symmetric), strict=True):
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (70, 7), (3, 5, 96), (2, 1030), (40,)], ids=str)
def test_quantize_rows(shape: tuple[int, ...], symmetric: bool) -> None:
    x = (torch.randn(shape) * 3 + 1).to(DTYPES[shape[-1] % 3])
    check_rows(x, symmetric)
    check_rows(slice_of_wider(x, 6), symmetric)


@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_longer_than_a_tile(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = (Configuration((2, 16), 4, 1),)
    monkeypatch.setattr(quantize_kernels, "quantize_rows_configurations", lambda *_, **options: tiles)
    x = torch.randn(3, 50) * torch.logspace(-3, 3, 50)
    x[1, 40] = torch.nan
    check_rows(x, symmetric)


@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_of_zeros_nan_and_infinity(symmetric: bool) -> None:
    rows = [
        [0.0, 0.0],
        [-3.0, -2.0],
        [5.0, 2.0],
        [torch.nan, -2.0],
        [torch.inf, -2.0],
        [-torch.inf, 2.0],
        [3e38, -3e38],
    ]
    check_rows(torch.tensor(rows), symmetric)


def test_empty_batches() -> None:
    assert run_triton("int8_matmul", [int8(0, 5), int8(3, 5), torch.rand(3)], {}).shape == (0, 3)
    assert run_triton("quantize", [torch.zeros(0, 4)], {"scale": 1.0}).shape == (0, 4)
    assert [t.shape[0] for t in ops.quantize_rows(torch.zeros(0, 4), backend="triton")] == [0, 0, 0]
