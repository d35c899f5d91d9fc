"""The int8 depthwise convolution on every instruction set of the CPU: the reference's integers exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import EXACT_ACTIVATIONS, assert_same, int8, int8_image, residual_for, run_native, slice_of_wider

from kernelpress import ops
from kernelpress.kernels.reference import ACTIVATIONS
from kernelpress.runtime import native

OP = "int8_depthwise_conv2d"
EXACT = (*EXACT_ACTIVATIONS, "hardswish", "hardsigmoid")


def tensors_of(
    batch: int, channels: int, multiplier: int, height: int, width: int, kernel: tuple[int, int]
) -> list[Any]:
    weight = int8(channels * multiplier, 1, *kernel)
    return [int8_image(batch, channels, height, width), weight, torch.rand(len(weight)) * 1e-2 + 1e-3]


@pytest.mark.slow
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("channels", [1, 24, 64, 70, 144])
def test_the_usual_windows(channels: int, kernel: int, stride: int, int8_cpu_variant: str) -> None:
    tensors = tensors_of(2, channels, 1, 13, 11, (kernel, kernel))
    options: dict[str, Any] = {
        "stride": (stride, stride),
        "padding": (kernel // 2, kernel // 2),
        "input_scale": 0.7,
        "input_zero_point": -100,
        "output_scale": 0.9,
        "output_zero_point": 17,
    }
    for activation in ("identity", "relu", "relu6"):
        given = options | {"activation": activation}
        bias = torch.randn(channels) * 20
        assert_same(OP, [*tensors, bias, None], given, run_native(OP, [*tensors, bias, None], **given))
    assert_same(OP, tensors, options, ops.int8_depthwise_conv2d(*tensors, **options, backend="cpu"))


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Any], dict[str, Any]]:
    channels, multiplier = draw(st.sampled_from([1, 5, 16, 33, 64, 130])), draw(st.sampled_from([1, 1, 2, 3]))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (3, 3), (5, 5), (7, 7), (2, 3), (9, 4), (1, 6)]))
    padding = draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 3), (2, 2)]))
    least = [(k - 1) * d + 1 - 2 * p for k, d, p in zip(kernel, dilation, padding, strict=True)]
    size = [draw(st.integers(max(1, low), max(1, low) + 12)) for low in least]
    tensors = tensors_of(draw(st.integers(1, 3)), channels, multiplier, *size, kernel)
    has_scale = draw(st.booleans())
    options: dict[str, Any] = {
        "stride": draw(st.sampled_from([(1, 1), (2, 2), (1, 3), (3, 1)])),
        "padding": padding,
        "dilation": dilation,
        "input_scale": 0.37,
        "input_zero_point": draw(st.sampled_from([-128, -3, 0, 127])),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        **(
            {"output_scale": draw(st.sampled_from([0.4, 9.0])), "output_zero_point": draw(st.integers(-128, 127))}
            if has_scale
            else {}
        ),
    }
    bias = torch.randn(channels * multiplier) * 30 if draw(st.booleans()) else None
    tensors.append(bias)
    if draw(st.booleans()):
        residual = residual_for(OP, tensors, options)
        tensors.append(slice_of_wider(residual, 4) if has_scale else residual)
        options |= {"residual_scale": 1.7, "residual_zero_point": 5} if has_scale else {}
    if draw(st.booleans()):
        tensors[0] = slice_of_wider(tensors[0], 11)
    return tensors, options


@pytest.mark.parametrize("variant", native.cpu().variants() if native.cpu() else [])
@settings(max_examples=60)
@given(problem=problems(), seeds=st.random_module())
def test_any_window(variant: str, problem: tuple[list[Any], dict[str, Any]], seeds: object) -> None:
    tensors, options = problem
    module, before = native.cpu(), native.cpu().variant()
    module.select(variant)
    try:
        assert_same(OP, tensors, options, run_native(OP, tensors, **options), EXACT)
    finally:
        module.select(before)


@pytest.mark.parametrize("value", [-128, 127])
@pytest.mark.parametrize("weight", [-128, 127])
def test_the_largest_sums_do_not_saturate(value: int, weight: int, int8_cpu_variant: str) -> None:
    x, w = torch.full((1, 70, 9, 9), value).to(torch.int8), torch.full((70, 1, 7, 7), weight).to(torch.int8)
    y = ops.int8_depthwise_conv2d(x, w, torch.ones(70), input_zero_point=-1 - value, backend="cpu")
    assert torch.equal(y, torch.full((1, 70, 3, 3), float((2 * value + 1) * weight * 49)))


def test_numbers_that_overflow_saturate_and_those_that_are_none_become_the_zero_point(int8_cpu_variant: str) -> None:
    x, weight, scale = tensors_of(1, 80, 1, 6, 5, (3, 3))
    scale[:6] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 1e7])
    bias = torch.randn(80)
    bias[70], bias[71] = torch.nan, 3e38
    options: dict[str, Any] = {"padding": (1, 1), "output_scale": 0.5, "output_zero_point": 7, "activation": "relu"}
    tensors = [x, weight, scale, bias, None]
    assert_same(OP, tensors, options, ops.int8_depthwise_conv2d(*tensors, **options, backend="cpu"))


def test_an_empty_batch_and_large_padding(int8_cpu_variant: str) -> None:
    weight, scale = int8(6, 1, 3, 3), torch.rand(6)
    assert ops.int8_depthwise_conv2d(int8(0, 6, 5, 5), weight, scale, backend="cpu").shape == (0, 6, 3, 3)
    tensors, options = [int8_image(1, 6, 2, 2), weight, scale], {"padding": (5, 6), "input_zero_point": 9}
    assert_same(OP, tensors, options, ops.int8_depthwise_conv2d(*tensors, **options, backend="cpu"))  # type: ignore[arg-type]
