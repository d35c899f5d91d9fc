"""Between floats and int8 on every instruction set of the CPU: the reference's integers exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import (
    assert_same,
    channel_slice,
    channels_last,
    contiguous,
    cropped,
    every_other,
    int8,
    int8_image,
    run_native,
    slice_of_wider,
)
from torch import Tensor

from kernelpress import ops
from kernelpress.kernels import reference
from kernelpress.kernels.reference import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("int8_cpu_variant")

SHAPES = [(1, 1, 1, 1), (2, 3, 5, 67), (2, 40, 5, 7), (1, 64, 57, 61), (3, 35, 9, 8)]
ROWS = [(7,), (5, 33), (2, 3, 16), (300, 129)]
SPECIAL = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.05, -0.05, 0.15, 1e30, -1e30, -0.0, 3e38, 1e-40])


def with_special(x: Tensor) -> Tensor:
    """Some values of a tensor replaced by those that are rounded to even, saturate, or are no numbers."""
    where = torch.randint(0, 12, x.shape)
    for i, value in enumerate(SPECIAL):
        x[where == i] = value
    return x


@pytest.mark.parametrize("make", [channels_last, contiguous, channel_slice, cropped, every_other])
@pytest.mark.parametrize("shape", SHAPES)
def test_images_are_quantized_however_they_lie(shape: tuple[int, ...], make: Callable[..., Tensor]) -> None:
    x = with_special(make(*shape))
    for scale, zero_point in ((0.1, 0), (0.03, -128), (2.0**-20, 127), (3e10, 5)):
        options = {"scale": scale, "zero_point": zero_point}
        assert_same("quantize", (x,), options, ops.quantize(x, **options, backend="cpu"))
        assert_same("quantize", (x,), options, run_native("quantize", (x,), **options))


@pytest.mark.parametrize("shape", ROWS)
def test_rows_are_quantized_and_dequantized(shape: tuple[int, ...]) -> None:
    x, values = with_special(torch.randn(shape)), int8(*shape)
    options = {"scale": 0.02, "zero_point": 11}
    assert_same("quantize", (x,), options, run_native("quantize", (x,), **options))
    assert_same("dequantize", (values,), options, run_native("dequantize", (values,), **options))
    wide, wide_values = torch.cat([x, x], -1)[..., : shape[-1]], slice_of_wider(values, 6)
    assert_same("quantize", (wide,), options, ops.quantize(wide, **options, backend="cpu"))
    assert_same("dequantize", (wide_values,), options, ops.dequantize(wide_values, **options, backend="cpu"))


@pytest.mark.parametrize("shape", SHAPES)
def test_images_are_dequantized(shape: tuple[int, ...]) -> None:
    x = int8_image(*shape)
    for options in ({"scale": 0.1, "zero_point": -77}, {"scale": 2.0**-126, "zero_point": 127}):
        for values in (x, slice_of_wider(x, 9), x.contiguous()):
            assert_same("dequantize", (values,), options, ops.dequantize(values, **options, backend="cpu"))
        assert_same("dequantize", (x,), options, run_native("dequantize", (x,), **options))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [*SHAPES[1:4], (5, 33)])
def test_sums(shape: tuple[int, ...], activation: str) -> None:
    x, other = (int8_image(*shape) if len(shape) == 4 else int8(*shape) for _ in range(2))
    options: dict[str, Any] = {
        "input_scale": 0.1,
        "input_zero_point": 3,
        "other_scale": 0.047,
        "other_zero_point": -20,
        "activation": activation,
    }
    for output in ({"output_scale": 0.13, "output_zero_point": -9}, {}):
        given = options | output
        for second in (other, slice_of_wider(other, 5)):
            assert_same("int8_add", (x, second), given, ops.int8_add(x, second, **given, backend="cpu"))
        assert_same("int8_add", (x, other), given, run_native("int8_add", (x, other), **given))


@pytest.mark.parametrize("activation", ["identity", "relu", "hardswish"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (3, 70, 7, 7), (1, 128, 29, 31)])
def test_gates(shape: tuple[int, ...], activation: str, int8_cpu_variant: str) -> None:
    x, gate = int8_image(*shape), int8_image(*shape[:2], 1, 1)
    options = {"input_scale": 0.07, "input_zero_point": 5, "gate_scale": 0.004, "gate_zero_point": -128}
    for output in ({"output_scale": 0.13, "output_zero_point": -9}, {}):
        given = options | output | {"activation": activation}
        for image, factors in ((x, gate), (slice_of_wider(x, 9), slice_of_wider(gate, 5)), (x, gate.contiguous())):
            assert_same("int8_gate", (image, factors), given, ops.int8_gate(image, factors, **given, backend="cpu"))
        assert_same("int8_gate", (x, gate), given, run_native("int8_gate", (x, gate), **given))


def test_a_gate_is_one_value_a_channel() -> None:
    with pytest.raises(
        ValueError, match=r"gate: expected \[2, 3, 1, 1\], one value per channel of x, got \[2, 4, 1, 1\]"
    ):
        ops.int8_gate(int8(2, 3, 5, 5), int8(2, 4, 1, 1), input_scale=1.0, gate_scale=1.0)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 3, 33), (70, 300)])
def test_quantize_rows_is_exact(shape: tuple[int, ...], symmetric: bool) -> None:
    x = torch.randn(shape) * torch.logspace(-3, 3, shape[-1])
    x[0] = 0.0
    x[-1, ..., 0] = torch.nan
    x[shape[0] // 2, ..., -1] = torch.inf
    sliced = torch.cat([x, x], -1)[..., : shape[-1]]
    for given in (x, sliced, -x, x.abs()):
        ours = ops.quantize_rows(given, symmetric=symmetric, backend="cpu")
        for out, expected in zip(ours, reference.quantize_rows(given, symmetric=symmetric), strict=True):
            torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.quantize(torch.randn(3).half(), scale=1.0, backend="cpu"),
        lambda: ops.dequantize(int8(3), scale=1.0, output_dtype=torch.half, backend="cpu"),
        lambda: ops.int8_add(
            int8(3), int8(3), input_scale=1.0, other_scale=1.0, output_dtype=torch.bfloat16, backend="cpu"
        ),
    ],
)
def test_halves_are_refused_with_the_reason(call: Callable[[], Tensor]) -> None:
    with pytest.raises(RuntimeError, match=r"the kernel (takes torch\.float32|gives torch\.float32 or torch\.int8)"):
        call()


def test_empty_tensors() -> None:
    assert ops.quantize(torch.empty(0, 3, 4, 4), scale=1.0, backend="cpu").shape == (0, 3, 4, 4)
    assert ops.dequantize(int8(0, 5), scale=1.0, backend="cpu").shape == (0, 5)
    assert ops.int8_gate(int8(0, 4, 3, 3), int8(0, 4, 1, 1), input_scale=1.0, gate_scale=1.0).shape == (0, 4, 3, 3)
    assert [t.shape for t in ops.quantize_rows(torch.empty(0, 5), backend="cpu")] == [(0, 5), (0,), (0,)]
