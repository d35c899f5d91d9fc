"""Chains of int8 layers compute, bit for bit, what the layers do one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import int8, int8_image, native_plan, slice_of_wider
from torch import Tensor

from kernelpress.runtime import native

pytestmark = pytest.mark.skipif(native.cpu() is None, reason="no native kernels: build them with `make build`")

MOST_LAYERS = 12

Call = tuple[str, tuple[Tensor, ...], dict[str, Any]]

LAYERS = st.tuples(
    st.sampled_from(["depthwise", "pointwise"]),
    st.sampled_from([1, 3, 4, 5, 7, 9]),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 8, 17, 64, 70]),
    st.sampled_from(["identity", "relu", "relu6"]),
)


def call_of(kind: str, c_in: int, kernel: int, stride: int, c_out: int, activation: str) -> Call:
    """The op, its parameters and options, of a layer on `c_in` channels that gives int8 over about its whole range."""
    if kind == "depthwise":
        op, c_out, shape = "int8_depthwise_conv2d", c_in, (1, kernel, kernel)
    else:
        kernel, stride = (1, 1) if kind == "pointwise" else (kernel, stride)
        op, shape = "int8_conv2d", (c_in, kernel, kernel)
    depth = shape[0] * kernel * kernel
    options: dict[str, Any] = {
        "stride": (stride, stride),
        "padding": (kernel // 2, kernel // 2),
        "input_scale": 0.7,
        "input_zero_point": -9,
        "activation": activation,
        "output_scale": 0.9,
        "output_zero_point": -9,
    }
    scale = (torch.rand(c_out) + 0.5) / (70 * depth**0.5)
    return op, (int8(c_out, *shape), scale, torch.randn(c_out) * 9), options


def with_float_output(call: Call) -> Call:
    op, parameters, options = call
    return op, parameters, {key: value for key, value in options.items() if not key.startswith("output_")}


def assert_joined_is_equal(plan: Any, x: Tensor, out: Tensor, steps: int) -> None:
    plan.run(0, len(plan), [x.data_ptr(), out.data_ptr()])
    expected, other = out.clone(), torch.zeros_like(out)
    assert plan.join(0, steps)
    assert len(plan) == 1
    plan.run(0, 1, [x.data_ptr(), other.data_ptr()])
    assert torch.equal(other, expected)


@given(
    layers=st.lists(LAYERS, min_size=2, max_size=6),
    stem=st.booleans(),
    size=st.tuples(st.integers(5, 40), st.integers(5, 40)),
    batch=st.sampled_from([1, 3]),
    residual=st.booleans(),
    gives_int8=st.booleans(),
    seeds=st.random_module(),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_chain_computes_every_bit_that_its_layers_do(
    int8_cpu_variant: str,
    layers: list[tuple[str, int, int, int, str]],
    stem: bool,
    size: tuple[int, int],
    batch: int,
    residual: bool,
    gives_int8: bool,
    seeds: object,
) -> None:
    c = 3 if stem else 24
    x = int8_image(batch, c, *size)
    calls = [call_of("conv", c, 3, 2, c := 33, "relu6")] if stem else []
    for kind, kernel, stride, c_out, activation in layers:
        calls.append(call_of(kind, c, kernel, stride, c_out, activation))
        c = c if kind == "depthwise" else c_out
    if not gives_int8:
        calls[-1] = with_float_output(calls[-1])
    plan, out, held = native_plan(x, calls, residual)
    assert_joined_is_equal(plan, x, out, len(calls))
    del held


def test_a_large_map_is_streamed_in_many_steps(int8_cpu_variant: str) -> None:
    x = int8_image(2, 3, 200, 180)
    calls = [
        call_of("conv", 3, 3, 2, 64, "relu6"),
        call_of("depthwise", 64, 3, 1, 64, "relu6"),
        call_of("pointwise", 64, 1, 1, 96, "relu6"),
        call_of("depthwise", 96, 5, 2, 96, "relu6"),
        call_of("pointwise", 96, 1, 1, 72, "identity"),
    ]
    plan, out, held = native_plan(x, calls, residual=True)
    assert_joined_is_equal(plan, x, out, len(calls))
    del held


def test_a_chain_reads_channels_of_a_wider_map(int8_cpu_variant: str) -> None:
    x = slice_of_wider(int8_image(2, 24, 11, 9), 11)
    calls = [call_of("depthwise", 24, 3, 1, 24, "relu"), call_of("pointwise", 24, 1, 1, 40, "relu")]
    plan, out, held = native_plan(x, calls, residual=False)
    assert_joined_is_equal(plan, x, out, len(calls))
    del held


def joins(*calls: Call) -> bool:
    plan, _, held = native_plan(int8_image(1, 8, 9, 9), calls, residual=False)
    joined = plan.join(0, len(calls))
    del held
    return bool(joined)


def test_layers_that_no_chain_can_hold_are_not_joined() -> None:
    depthwise, pointwise = call_of("depthwise", 8, 3, 1, 8, "relu"), call_of("pointwise", 8, 1, 1, 8, "relu")
    window = call_of("conv", 8, 3, 1, 8, "relu")
    assert joins(window, depthwise, pointwise)
    assert not joins(depthwise, window)
    op, (weight, scale, bias), options = window
    assert not joins((op, (weight[:, :4].contiguous(), scale, bias), {**options, "groups": 2}), depthwise)
    assert joins(*[depthwise] * MOST_LAYERS)
    assert not joins(*[depthwise] * (MOST_LAYERS + 1))
