"""The int8 family's CPU kernels on every instruction set, against the reference: integers exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import EXACT_ACTIVATIONS, assert_same, int8, int8_image, residual_for, run_native, slice_of_wider

from kernelpress import ops
from kernelpress.kernels.reference import ACTIVATIONS
from kernelpress.runtime import native

pytestmark = pytest.mark.usefixtures("int8_cpu_variant")

EXACT = (*EXACT_ACTIVATIONS, "hardswish", "hardsigmoid")
OUTPUTS: tuple[dict[str, Any], ...] = ({"output_scale": 37.0, "output_zero_point": -11}, {})


def matmul(rows: int, c_in: int, c_out: int, number: int) -> tuple[list[Any], dict[str, Any]]:
    """Arguments whose options change with the number."""
    options: dict[str, Any] = {"activation": ACTIVATIONS[number % len(ACTIVATIONS)], **OUTPUTS[number // 2 % 2]}
    tensors: list[Any] = [int8(rows, c_in), int8(c_out, c_in), torch.rand(c_out) + 0.01, None, None, None, None]
    if number % 3 != 0:
        tensors[3] = torch.randn(c_out) * 100
        tensors[4] = residual_for("int8_matmul", tensors[:3], options)
        if "output_scale" in options:
            options |= {"residual_scale": 1.7, "residual_zero_point": 5}
    if number % 4 == 1:
        tensors[5], tensors[6] = torch.rand(rows) + 0.1, torch.randint(-128, 128, (rows,), dtype=torch.int32)
    else:
        options |= {"input_scale": 0.37, "input_zero_point": (-128, 127, 0, 19)[number % 4]}
    return tensors, options


@pytest.mark.parametrize("number", range(16))
@pytest.mark.parametrize(("rows", "c_in", "c_out"), [(1, 1, 1), (5, 7, 3), (70, 20, 65), (17, 48, 33), (29, 130, 200)])
def test_products_are_exact(rows: int, c_in: int, c_out: int, number: int) -> None:
    tensors, options = matmul(rows, c_in, c_out, number)
    assert_same("int8_matmul", tensors, options, run_native("int8_matmul", tensors, **options), EXACT)


# channels, kernel, stride, padding, dilation, groups, height and width
CONVOLUTIONS: dict[str, tuple[Any, ...]] = {
    "1x1": (20, 70, (1, 1), (1, 1), (0, 0), (1, 1), 1, (7, 9)),
    "1x1 of one channel": (1, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1, (2, 3)),
    "1x1 of a narrow map": (64, 200, (1, 1), (1, 1), (0, 0), (1, 1), 1, (2, 2)),
    "1x1 of collisions": (2048, 16, (1, 1), (1, 1), (0, 0), (1, 1), 1, (3, 9)),
    "1x1 of a large map": (64, 24, (1, 1), (1, 1), (0, 0), (1, 1), 1, (50, 50)),
    "1x1, stride 2": (16, 33, (1, 1), (2, 2), (0, 0), (1, 1), 1, (8, 11)),
    "1x1, padded": (5, 6, (1, 1), (1, 2), (1, 2), (1, 1), 1, (4, 5)),
    "1x1 of groups": (8, 12, (1, 1), (1, 1), (0, 0), (1, 1), 4, (5, 4)),
    "3x3": (64, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1, (14, 14)),
    "3x3 of narrow lines": (20, 130, (3, 3), (1, 1), (1, 1), (1, 1), 1, (11, 2)),
    "3x3, stride 2, of narrow lines": (9, 48, (3, 3), (2, 2), (1, 1), (1, 1), 1, (14, 14)),
    "3x3 stem": (3, 40, (3, 3), (2, 2), (1, 1), (1, 1), 1, (33, 31)),
    "7x7 stem": (3, 16, (7, 7), (2, 2), (3, 3), (1, 1), 1, (33, 40)),
    "3x3 of a large map": (40, 9, (3, 3), (1, 1), (1, 1), (1, 1), 1, (70, 60)),
    "dilated": (5, 17, (3, 2), (1, 2), (2, 1), (2, 3), 1, (9, 8)),
    "much padding": (3, 4, (3, 3), (1, 1), (4, 5), (1, 1), 1, (2, 1)),
    "3x3 of groups": (12, 18, (3, 3), (1, 1), (1, 1), (1, 1), 3, (6, 7)),
    "3x3 of wide groups": (160, 160, (3, 3), (2, 2), (1, 1), (2, 1), 2, (9, 6)),
}


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_are_exact(name: str, number: int) -> None:
    c_in, c_out, kernel, stride, padding, dilation, groups, size = CONVOLUTIONS[name]
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    is_int8, activation = number % 2 == 0, ("relu", "hardswish", "relu6", "identity")[number]
    options: dict[str, Any] = {**geometry, "input_scale": 0.37, "activation": activation}
    options |= {"input_zero_point": (-128, 127, 5, 0)[number], **OUTPUTS[0 if is_int8 else 1]}
    x, weight = int8_image(2, c_in, *size), int8(c_out, c_in // groups, *kernel)
    tensors: list[Any] = [x, weight, torch.rand(c_out) + 0.01, None, None]
    if number >= 1:
        tensors[0] = slice_of_wider(x, 6)
        tensors[3] = torch.randn(c_out) * 100
    if number >= 2:
        tensors[4] = residual_for("int8_conv2d", tensors[:4], options)
        if is_int8:
            options |= {"residual_scale": 1.7, "residual_zero_point": -5}
            tensors[4] = slice_of_wider(tensors[4], 3)
    assert_same("int8_conv2d", tensors, options, run_native("int8_conv2d", tensors, **options), EXACT)


def test_empty_batches() -> None:
    weight, scale = int8(5, 4, 3, 3), torch.rand(5)
    assert ops.int8_conv2d(int8_image(0, 4, 6, 6), weight, scale, backend="cpu").shape == (0, 5, 4, 4)
    y = ops.int8_matmul(int8(0, 7), int8(5, 7), torch.rand(5), output_scale=1.0, backend="cpu")
    assert (y.shape, y.dtype) == ((0, 5), torch.int8)


def test_rows_of_any_strides_are_multiplied() -> None:
    x, weight, scale = int8(40, 2, 9).transpose(0, 1)[:, ::2], int8(5, 9), torch.rand(5)
    assert_same("int8_matmul", [x, weight, scale], {}, ops.int8_matmul(x, weight, scale, backend="cpu"))


def test_an_output_of_another_type_is_refused() -> None:
    x, weight, scale = int8(4, 8), int8(5, 8), torch.rand(5)
    with pytest.raises(RuntimeError, match=r"the kernel gives torch\.int8 or torch\.float32, not torch\.float16"):
        ops.int8_matmul(x, weight, scale, output_dtype=torch.float16, backend="cpu")


@pytest.mark.parametrize("x", [-128, 127])
@pytest.mark.parametrize("weight", [-128, 127])
def test_the_largest_sums_neither_saturate_nor_overflow(x: int, weight: int) -> None:
    tensors = [torch.full((3, 65536), x).to(torch.int8), torch.full((5, 65536), weight).to(torch.int8), torch.ones(5)]
    options = {"input_zero_point": -1 - x, "backend": "cpu"}
    expected = torch.full((3, 5), float((x - options["input_zero_point"]) * weight * 65536))
    assert torch.equal(ops.int8_matmul(*tensors, **options), expected)


def test_values_that_are_no_numbers_become_the_zero_point() -> None:
    tensors = [int8(3, 8), int8(5, 8), torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, 1.0])]
    options: dict[str, Any] = {"output_scale": 0.5, "output_zero_point": 7}
    assert_same("int8_matmul", tensors, options, ops.int8_matmul(*tensors, **options, backend="cpu"))


def test_calls_prepared_for_one_instruction_set_are_not_those_of_another() -> None:
    tensors, cpu = [int8(4, 20), int8(5, 20), torch.rand(5)], native.cpu()
    before = cpu.variant()
    try:
        for variant in cpu.variants():
            cpu.select(variant)
            assert_same("int8_matmul", tensors, {}, ops.int8_matmul(*tensors, backend="cpu"))
    finally:
        cpu.select(before)
