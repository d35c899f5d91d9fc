"""The int8 family's CPU kernels on every instruction set, against the reference: integers exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import EXACT_ACTIVATIONS, assert_same, int8, residual_for, run_native

from kernelpress import ops
from kernelpress.kernels.reference import ACTIVATIONS

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
