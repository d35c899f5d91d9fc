"""Fused separable blocks and pooling against the float64 reference, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import (
    MAKERS,
    Maker,
    assert_close,
    assert_matches,
    channel_slice,
    channels_last,
    expected_output,
    run_native,
)

from kernelpress import ops
from kernelpress.kernels.reference import ACTIVATIONS

many = settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
in_place = (channels_last, channel_slice)


@st.composite
def blocks(draw: st.DrawFn) -> dict:
    kernel = draw(st.one_of(st.sampled_from([(3, 3), (5, 5)]), st.tuples(st.integers(1, 5), st.integers(1, 7))))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (2, 3)]))
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    return {
        "size": tuple(draw(st.integers(low, low + 16)) for low in least),
        "batch": draw(st.integers(1, 3)),
        "c_in": draw(st.sampled_from([1, 5, 8, 17, 32])),
        "hidden": draw(st.sampled_from([1, 6, 16, 33, 96])),
        "c_out": draw(st.sampled_from([1, 7, 16, 31, 33, 64])),
        "kernel": kernel,
        "options": {
            "stride": draw(st.sampled_from([(1, 1), (2, 2), (3, 3), (2, 1)])),
            "padding": padding,
            "dilation": dilation,
            "depthwise_activation": draw(st.sampled_from(ACTIVATIONS)),
            "activation": draw(st.sampled_from(ACTIVATIONS)),
        },
        "biases": draw(st.tuples(*[st.booleans()] * 3)),
        "has_residual": draw(st.booleans()),
        "make": draw(st.sampled_from(MAKERS)),
    }


def check(op: str, tensors: list, options: dict, case: dict) -> None:
    if case["has_residual"]:
        tensors.append(channel_slice(*ops.allocate(op, tensors, options).shape))
    outputs = [getattr(ops, op)(*tensors, **options, backend="cpu")]
    if case["make"] in in_place:
        outputs.append(run_native(op, tensors, **options))
    assert_matches(op, tensors, options, *outputs)


def biases_of(case: dict, *sizes: int) -> list:
    return [torch.randn(size) if present else None for size, present in zip(sizes, case["biases"], strict=False)]


@many
@given(case=blocks(), seeds=st.random_module())
def test_separable_of_any_geometry_writes_its_channels_only(cpu_variant: str, case: dict, seeds: object) -> None:
    channels, c_out = case["hidden"], case["c_out"]
    depthwise_bias, pointwise_bias = biases_of(case, channels, c_out)
    tensors = [
        *(case["make"](case["batch"], channels, *case["size"]), torch.randn(channels, 1, *case["kernel"])),
        *(depthwise_bias, torch.randn(c_out, channels, 1, 1), pointwise_bias),
    ]
    check("separable_conv2d", tensors, case["options"], case)


@many
@given(case=blocks(), expand_activation=st.sampled_from(ACTIVATIONS), seeds=st.random_module())
def test_inverted_residual_of_any_geometry_writes_its_channels_only(
    cpu_variant: str, case: dict, expand_activation: str, seeds: object
) -> None:
    c_in, hidden, c_out = case["c_in"], case["hidden"], case["c_out"]
    expand_bias, depthwise_bias, project_bias = biases_of(case, hidden, hidden, c_out)
    tensors = [
        *(case["make"](case["batch"], c_in, *case["size"]), torch.randn(hidden, c_in, 1, 1), expand_bias),
        *(torch.randn(hidden, 1, *case["kernel"]), depthwise_bias, torch.randn(c_out, hidden, 1, 1), project_bias),
    ]
    check("inverted_residual", tensors, case["options"] | {"expand_activation": expand_activation}, case)


@many
@given(
    case=blocks(),
    stem_activation=st.sampled_from(ACTIVATIONS),
    stem_kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stem_stride=st.sampled_from([(1, 1), (2, 2), (1, 3)]),
    seeds=st.random_module(),
)
def test_separable_stem_of_any_geometry_writes_its_channels_only(
    cpu_variant: str,
    case: dict,
    stem_activation: str,
    stem_kernel: tuple[int, int],
    stem_stride: tuple[int, int],
    seeds: object,
) -> None:
    c_in, hidden, c_out = case["c_in"] % 5 + 1, case["hidden"], case["c_out"]
    options = {name: value for name, value in case["options"].items() if name != "dilation"}
    options |= {"stem_stride": stem_stride, "stem_padding": (1, 0), "stem_activation": stem_activation}
    needed = [max(1, k - 2 * p) for k, p in zip(case["kernel"], options["padding"], strict=True)]
    spatial = zip(needed, stem_stride, stem_kernel, case["size"], strict=True)
    size = tuple((least - 1) * stride + kernel + extra % 9 for least, stride, kernel, extra in spatial)
    stem_bias, depthwise_bias, pointwise_bias = biases_of(case, hidden, hidden, c_out)
    tensors = [
        *(case["make"](case["batch"], c_in, *size), torch.randn(hidden, c_in, *stem_kernel), stem_bias),
        *(torch.randn(hidden, 1, *case["kernel"]), depthwise_bias, torch.randn(c_out, hidden, 1, 1), pointwise_bias),
    ]
    check("separable_stem", tensors, options, case | {"has_residual": False})


def test_an_inverted_residual_may_add_its_own_input_and_later_another(cpu_variant: str) -> None:
    x, other = channels_last(1, 8, 7, 7), channels_last(1, 8, 7, 7)
    weights = (torch.randn(24, 8, 1, 1), None, torch.randn(24, 1, 3, 3), None, torch.randn(8, 24, 1, 1), None)
    for residual in (x, other, x):
        tensors = (x, *weights, residual)
        out = ops.inverted_residual(*tensors, padding=1, backend="cpu")
        assert_close(out, expected_output("inverted_residual", tensors, padding=(1, 1)))


@pytest.mark.parametrize("size", [(112, 112), (56, 57)], ids=str)
def test_maps_larger_than_the_cache_run_by_row_tiles(cpu_variant: str, size: tuple[int, int]) -> None:
    tensors = (channels_last(1, 32, *size), torch.randn(32, 1, 3, 3), torch.randn(32), torch.randn(64, 32, 1, 1), None)
    for stride in (1, 2):
        options = {"stride": (stride, stride), "padding": (1, 1), "depthwise_activation": "relu6"}
        out = ops.separable_conv2d(*tensors, **options, backend="cpu")
        assert_close(out, expected_output("separable_conv2d", tensors, **options))


def test_nan_and_infinity_propagate_as_in_pytorch(cpu_variant: str) -> None:
    x = channels_last(1, 8, 9, 9)
    x[0, 1, 0, 0], x[0, 2, 8, 8] = torch.nan, torch.inf
    weights = (torch.rand(8, 1, 3, 3) + 0.1, None, torch.randn(5, 8, 1, 1))
    out = ops.separable_conv2d(x, *weights, padding=1, depthwise_activation="relu", backend="cpu")
    expected = ops.separable_conv2d(x, *weights, padding=1, depthwise_activation="relu", backend="reference")
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_an_empty_batch_gives_an_empty_output(backend: str) -> None:
    depthwise, expand, project = torch.randn(6, 1, 3, 3), torch.randn(6, 4, 1, 1), torch.randn(5, 6, 1, 1)
    x = torch.empty(0, 4, 8, 8)
    out = ops.inverted_residual(x, expand, None, depthwise, None, project, stride=2, backend=backend)
    assert out.shape == (0, 5, 3, 3)
    x = torch.empty(0, 6, 8, 8)
    assert ops.separable_conv2d(x, depthwise, None, project, backend=backend).shape == (0, 5, 6, 6)
    assert ops.global_avg_pool2d(x, backend=backend).shape == (0, 6)
    assert ops.max_pool2d(x, kernel_size=2, backend=backend).shape == (0, 6, 4, 4)


@many
@given(
    shape=st.tuples(st.integers(1, 3), st.sampled_from([1, 7, 16, 33, 100]), st.integers(1, 12), st.integers(1, 12)),
    make=st.sampled_from(MAKERS),
    seeds=st.random_module(),
)
def test_global_average_of_any_shape(cpu_variant: str, shape: tuple[int, ...], make: Maker, seeds: object) -> None:
    x = make(*shape)
    outputs = [ops.global_avg_pool2d(x, backend="cpu")]
    if make in in_place:
        outputs.append(run_native("global_avg_pool2d", (x,)))
    assert_matches("global_avg_pool2d", (x,), {}, *outputs)


@many
@given(
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padded=st.booleans(),
    extra=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    channels=st.sampled_from([1, 7, 16, 33]),
    make=st.sampled_from(MAKERS),
    seeds=st.random_module(),
)
def test_max_pool_of_any_geometry_is_exact(
    cpu_variant: str,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padded: bool,
    extra: tuple[int, int],
    channels: int,
    make: Maker,
    seeds: object,
) -> None:
    x = make(2, channels, kernel[0] + extra[0], kernel[1] + extra[1])
    x -= 3.0
    options = {
        "kernel_size": kernel,
        "stride": stride,
        "padding": (kernel[0] // 2, kernel[1] // 2) if padded else (0, 0),
    }
    expected = torch.nn.functional.max_pool2d(x, **options)
    assert torch.equal(ops.max_pool2d(x, **options, backend="cpu"), expected)
    if make in in_place:
        assert torch.equal(
            run_native("max_pool2d", (x.contiguous(memory_format=torch.channels_last),), **options), expected
        )


def test_max_pool_lets_nan_win(cpu_variant: str) -> None:
    x = channels_last(1, 20, 6, 6)
    x[0, 3, 2, 2], x[0, 4] = torch.nan, -torch.inf
    out = ops.max_pool2d(x, kernel_size=3, stride=2, padding=1, backend="cpu")
    assert torch.equal(out.nan_to_num(77), torch.nn.functional.max_pool2d(x, 3, 2, 1).nan_to_num(77))


X = torch.zeros(2, 4, 5, 5)
DW, PW, EX = torch.zeros(4, 1, 3, 3), torch.zeros(6, 4, 1, 1), torch.zeros(4, 4, 1, 1)
BAD = {
    "multiplier": (lambda: ops.separable_conv2d(X, torch.zeros(8, 1, 3, 3), None, PW), "depthwise_weight: expected"),
    "depthwise bias": (lambda: ops.separable_conv2d(X, DW, torch.zeros(5), PW), r"depthwise_bias: expected \[4\]"),
    "pointwise": (lambda: ops.separable_conv2d(X, DW, None, torch.zeros(6, 5, 1, 1)), "pointwise_weight: expected"),
    "activation": (
        lambda: ops.separable_conv2d(X, DW, None, PW, depthwise_activation="elu"),
        "depthwise_activation: expected one of",
    ),
    "expand": (
        lambda: ops.inverted_residual(X, torch.zeros(4, 3, 1, 1), None, DW, None, PW),
        "expand_weight: expected",
    ),
    "hidden": (
        lambda: ops.inverted_residual(X, PW, None, DW, None, EX),
        "depthwise_weight: expected .* C = 6 channels",
    ),
    "project": (
        lambda: ops.inverted_residual(X, EX, None, DW, None, torch.zeros(6, 5, 1, 1)),
        "project_weight: expected",
    ),
    "residual": (
        lambda: ops.inverted_residual(X, EX, None, DW, None, PW, None, X),
        r"residual: expected .*\[2, 6, 3, 3\], got \[2, 4, 5, 5\]",
    ),
    "pool padding": (lambda: ops.max_pool2d(X, kernel_size=3, padding=2), "padding: expected at most half"),
    "pool kernel": (lambda: ops.max_pool2d(X, kernel_size=0), "kernel_size: expected two integers of at least 1"),
    "no positions": (lambda: ops.global_avg_pool2d(torch.zeros(1, 3, 0, 4)), "x: expected at least one position"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_a_bad_argument_is_named(case: tuple) -> None:
    call, message = case
    with pytest.raises(ValueError, match=message):
        call()
