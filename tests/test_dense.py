"""Dense ops against the float64 reference, on every backend and instruction set."""

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

many = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
makers = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


@st.composite
def convolutions(draw: st.DrawFn) -> dict:
    kernel = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    return {
        "size": tuple(draw(st.integers(low, low + 12)) for low in least),
        "batch": draw(st.integers(1, 3)),
        "c_in": draw(st.sampled_from([1, 2, 3, 5, 16, 17, 33])),
        "c_out": draw(st.sampled_from([1, 3, 8, 31, 32, 33, 70])),
        "kernel": kernel,
        "stride": draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        "padding": padding,
        "dilation": dilation,
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "parts": draw(st.tuples(st.booleans(), st.booleans(), st.booleans())),
        "make": draw(st.sampled_from(MAKERS)),
    }


@many
@given(case=convolutions(), seeds=st.random_module())
def test_conv2d_of_any_geometry_writes_its_channels_only(cpu_variant: str, case: dict, seeds: object) -> None:
    x = case["make"](case["batch"], case["c_in"], *case["size"])
    weight = torch.randn(case["c_out"], case["c_in"], *case["kernel"])
    bias, scale = torch.randn(case["c_out"]), torch.rand(case["c_out"]) + 0.5
    options = {name: case[name] for name in ("stride", "padding", "dilation", "activation")}
    has_bias, has_scale, has_residual = case["parts"]
    tensors = [x, weight, bias if has_bias else None, scale if has_scale else None, None]
    if has_residual:
        tensors[4] = channel_slice(*ops.allocate("conv2d", tensors, options).shape)
    outputs = run_native("conv2d", tensors, **options), ops.conv2d(*tensors, **options, backend="cpu")
    assert_matches("conv2d", tensors, options, *outputs)


@many
@given(
    batch=st.integers(1, 3),
    c_in=st.sampled_from([1, 3, 8, 16, 17, 64, 100]),
    c_out=st.sampled_from([1, 5, 8, 16, 31, 32, 33, 64, 97]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    activation=st.sampled_from(ACTIVATIONS),
    parts=st.tuples(*[st.booleans()] * 4),
    make=st.sampled_from(MAKERS),
    seeds=st.random_module(),
)
def test_pointwise_of_any_size(
    cpu_variant: str,
    batch: int,
    c_in: int,
    c_out: int,
    size: tuple[int, int],
    activation: str,
    parts: tuple[bool, ...],
    make: Maker,
    seeds: object,
) -> None:
    given = (torch.randn(c_out), torch.rand(c_out) + 0.5, make(batch, c_out, *size), torch.rand(batch, c_in))
    tensors = [make(batch, c_in, *size), torch.randn(c_out, c_in, 1, 1)]
    tensors += [t if part else None for t, part in zip(given, parts, strict=True)]
    outputs = [ops.pointwise_conv2d(*tensors, activation=activation, backend="cpu")]
    if make in (channels_last, channel_slice):
        outputs.append(run_native("pointwise_conv2d", tensors, activation=activation))
    assert_matches("pointwise_conv2d", tensors, {"activation": activation}, *outputs)


@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (2, 3, 20), (33,), (4, 1, 3, 9)], ids=str)
@pytest.mark.parametrize("c_out", [1, 31, 64])
def test_linear_of_any_leading_dimensions(cpu_variant: str, shape: tuple[int, ...], c_out: int) -> None:
    x, weight = torch.randn(*shape), torch.randn(c_out, shape[-1])
    residual = torch.randn(*shape[:-1], c_out)
    tensors = (x, weight, torch.randn(c_out), torch.rand(c_out) + 0.5, residual)
    outputs = ops.linear(*tensors, activation="silu", backend="cpu"), run_native("linear", tensors, activation="silu")
    assert_matches("linear", tensors, {"activation": "silu"}, *outputs)


def test_linear_on_spaced_and_on_transposed_rows(cpu_variant: str) -> None:
    weight = torch.randn(9, 12)
    for x in (torch.randn(5, 20)[:, 4:16], torch.randn(12, 5).t(), torch.randn(3, 4, 5, 12)[:, ::2]):
        assert_close(ops.linear(x, weight, backend="cpu"), expected_output("linear", (x, weight)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "with residual"])
@pytest.mark.parametrize("groups", [1, 4])
@makers
def test_onednn_fuses_what_it_supports(make: Maker, groups: int, activation: str, with_residual: bool) -> None:
    x, weight, bias, scale = make(2, 8, 9, 7), torch.randn(12, 8 // groups, 3, 3), torch.randn(12), torch.rand(12) + 0.5
    residual = make(2, 12, 5, 4) if with_residual else None
    options = {"stride": (2, 2), "padding": (1, 1), "groups": groups, "activation": activation}
    tensors = (x, weight, bias, scale, residual)
    if with_residual and activation not in ("identity", "relu"):
        with pytest.raises(RuntimeError, match="fuses a residual with identity or relu only"):
            ops.conv2d(*tensors, **options, backend="onednn")
    else:
        out = ops.conv2d(*tensors, **options, backend="onednn")
        assert_close(out, expected_output("conv2d", tensors, **options))


def test_onednn_pointwise() -> None:
    tensors = (channels_last(2, 5, 3, 4), torch.randn(7, 5, 1, 1), torch.randn(7), None, channels_last(2, 7, 3, 4))
    out = ops.pointwise_conv2d(*tensors, activation="relu", backend="onednn")
    assert_close(out, expected_output("pointwise_conv2d", tensors, activation="relu"))
    with pytest.raises(RuntimeError, match="input_scale"):
        ops.pointwise_conv2d(*tensors[:2], input_scale=torch.rand(2, 5), backend="onednn")


def test_onednn_is_left_out_where_it_computes_wrongly() -> None:
    x, weight, options = torch.randn(2, 1, 5, 5), torch.randn(1, 1, 3, 3), {"stride": (1, 3)}
    assert "computes wrongly" in str(ops.why_not("conv2d", x, weight, **options)["onednn"])
    assert_matches("conv2d", [x, weight], options, ops.conv2d(x, weight, **options))


@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize(("channels", "c_out", "size"), [(1, 1, 5), (2, 1, 5), (1, 2, 1), (2, 2, 1), (1, 1, 1)])
def test_onednn_adds_a_residual_of_one_channel_or_pixel(channels: int, c_out: int, size: int, activation: str) -> None:
    tensors = [channels_last(2, channels, size, size), torch.randn(c_out, channels, 1, 1), torch.randn(c_out), None]
    tensors.append(channels_last(2, c_out, size, size))
    out = ops.conv2d(*tensors, activation=activation, backend="onednn")
    assert_matches("conv2d", tensors, {"activation": activation}, out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_run_on_the_reference(dtype: torch.dtype) -> None:
    tensors = tuple(t.to(dtype) for t in (torch.randn(2, 6, 5, 5), torch.randn(8, 6, 3, 3), torch.randn(8)))
    out = ops.conv2d(*tensors, padding=1, activation="relu")
    assert out.dtype == dtype
    assert_close(out, expected_output("conv2d", tensors, padding=(1, 1), activation="relu"))
    with pytest.raises(RuntimeError, match="float32"):
        ops.conv2d(*tensors, backend="cpu")


def test_nan_and_infinity_propagate_as_in_pytorch(cpu_variant: str) -> None:
    x = channels_last(1, 4, 6, 6)
    x[0, 1, 0, 0], x[0, 2, 5, 5], x[0, 3, 2, 3] = torch.nan, torch.inf, -torch.inf
    weight, bias = torch.randn(5, 4, 3, 3), torch.randn(5)
    for activation in ACTIVATIONS:
        out = ops.conv2d(x, weight, bias, padding=1, activation=activation, backend="cpu")
        expected = ops.conv2d(x, weight, bias, padding=1, activation=activation, backend="reference")
        assert torch.equal(out.isnan(), expected.isnan()), activation
        assert torch.equal(out.isinf(), expected.isinf()), activation
        finite = expected.isfinite()
        assert_close(out[finite], expected[finite])


@pytest.mark.parametrize("backend", ["auto", "cpu", "onednn", "reference"])
def test_an_empty_batch_gives_an_empty_output(backend: str) -> None:
    assert ops.conv2d(torch.empty(0, 3, 8, 8), torch.randn(4, 3, 3, 3), stride=2, backend=backend).shape == (0, 4, 3, 3)
    assert ops.pointwise_conv2d(torch.empty(0, 3, 2, 2), torch.randn(4, 3, 1, 1), backend=backend).shape == (0, 4, 2, 2)


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_linear_of_no_rows(backend: str) -> None:
    assert ops.linear(torch.empty(2, 0, 3), torch.randn(4, 3), backend=backend).shape == (2, 0, 4)


X, W = torch.zeros(2, 4, 5, 5), torch.zeros(6, 4, 3, 3)
BAD_CONVOLUTIONS = {
    "rank of x": ((torch.zeros(4, 5, 5), W), {}, ValueError, r"x: expected \[N, C, H, W\], got \[4, 5, 5\]"),
    "no channels": ((torch.zeros(2, 0, 5, 5), W), {}, ValueError, "x: expected at least one channel"),
    "integers": ((X.int(), W.int()), {}, TypeError, "x: expected a floating dtype, got torch.int32"),
    "mixed dtypes": ((X, W.double()), {}, TypeError, "weight: expected the dtype of x"),
    "channels": ((X, torch.zeros(6, 5, 3, 3)), {}, ValueError, "weight: expected .* with 4 channels of x in 1 groups"),
    "rank of weight": ((X, torch.zeros(6, 4)), {}, ValueError, r"weight: expected .* got \[6, 4\]"),
    "bias": ((X, W, torch.zeros(5)), {}, ValueError, r"bias: expected \[6\].*got \[5\]"),
    "scale": ((X, W, None, torch.zeros(6, 1)), {}, ValueError, r"scale: expected \[6\].*got \[6, 1\]"),
    "residual": ((X, W, None, None, X), {}, ValueError, r"residual: expected .*\[2, 6, 3, 3\], got \[2, 4, 5, 5\]"),
    "zero stride": ((X, W), {"stride": 0}, ValueError, r"stride: expected two integers of at least 1, got \[0, 0\]"),
    "negative dilation": ((X, W), {"dilation": (1, -1)}, ValueError, "dilation: expected"),
    "negative padding": ((X, W), {"padding": -1}, ValueError, "padding: expected"),
    "fractional stride": ((X, W), {"stride": (1.5, 1)}, TypeError, "stride: expected two integers"),
    "three strides": ((X, W), {"stride": (1, 1, 1)}, ValueError, "stride: expected two integers"),
    "large kernel": ((X, W), {"dilation": 3}, ValueError, "x: expected a height of at least 7"),
    "activation": ((X, W), {"activation": "tanh"}, ValueError, "activation: expected one of identity.*'tanh'"),
    "backend": ((X, W), {"backend": "mps"}, ValueError, "backend: expected one of auto.*'mps'"),
    "groups": ((X, W), {"groups": 3}, ValueError, "groups: expected a divisor of the 4 channels"),
    "outputs in groups": (
        (X, torch.zeros(7, 2, 3, 3)),
        {"groups": 2},
        ValueError,
        "weight: expected C_out divisible by groups = 2",
    ),
}


@pytest.mark.parametrize("case", BAD_CONVOLUTIONS.values(), ids=BAD_CONVOLUTIONS)
def test_a_bad_argument_is_named(case: tuple) -> None:
    tensors, options, error, message = case
    with pytest.raises(error, match=message):
        ops.conv2d(*tensors, **options)


def test_bad_pointwise_and_linear_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"weight: expected \[C_out, C_in, 1, 1\] with C_in = 4"):
        ops.pointwise_conv2d(X, W)
    with pytest.raises(ValueError, match=r"input_scale: expected \[2, 4\], got \[2, 4, 1, 1\]"):
        ops.pointwise_conv2d(X, torch.zeros(6, 4, 1, 1), input_scale=torch.zeros(2, 4, 1, 1))
    with pytest.raises(ValueError, match=r"weight: expected \[C_out, C_in\] with C_in = 5"):
        ops.linear(X, torch.zeros(6, 4))


def test_groups_name_the_depthwise_op() -> None:
    with pytest.raises(RuntimeError, match="call depthwise_conv2d"):
        ops.conv2d(X, torch.zeros(4, 1, 3, 3), groups=4, backend="cpu")
