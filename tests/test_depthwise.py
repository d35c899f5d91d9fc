"""Depthwise convolution against the float64 reference, on every backend and instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import (
    MAKERS,
    assert_close,
    assert_matches,
    channel_slice,
    channels_last,
    contiguous,
    cropped,
    expected_output,
    run_native,
)

from kernelpress import ops
from kernelpress.kernels.reference import ACTIVATIONS
from kernelpress.ops.calls.steps import native_call

many = settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def depthwise_convolutions(draw: st.DrawFn) -> dict:
    square = draw(st.sampled_from([(3, 3), (5, 5), (7, 7)]))
    kernel = draw(st.one_of(st.just(square), st.tuples(st.integers(1, 7), st.integers(1, 7))))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 3)]))
    padding = draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    return {
        "size": tuple(draw(st.integers(low, low + 14)) for low in least),
        "batch": draw(st.integers(1, 3)),
        "channels": draw(st.sampled_from([1, 3, 8, 15, 16, 17, 32, 33, 70])),
        "multiplier": draw(st.sampled_from([1, 1, 1, 2, 3])),
        "kernel": kernel,
        "stride": draw(st.sampled_from([(1, 1), (2, 2), (3, 3), (1, 2), (3, 1)])),
        "padding": padding,
        "dilation": dilation,
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "parts": draw(st.tuples(st.booleans(), st.booleans(), st.booleans())),
        "make": draw(st.sampled_from(MAKERS)),
    }


@many
@given(case=depthwise_convolutions(), seeds=st.random_module())
def test_depthwise_of_any_geometry_writes_its_channels_only(cpu_variant: str, case: dict, seeds: object) -> None:
    x = case["make"](case["batch"], case["channels"], *case["size"])
    c_out = case["channels"] * case["multiplier"]
    has_bias, has_scale, has_residual = case["parts"]
    tensors = [
        x,
        torch.randn(c_out, 1, *case["kernel"]),
        torch.randn(c_out) if has_bias else None,
        torch.rand(c_out) + 0.5 if has_scale else None,
        None,
    ]
    options = {name: case[name] for name in ("stride", "padding", "dilation", "activation")}
    if has_residual:
        tensors[4] = channel_slice(*ops.allocate("depthwise_conv2d", tensors, options).shape)
    outputs = [ops.depthwise_conv2d(*tensors, **options, backend="cpu")]
    if case["make"] in (channels_last, channel_slice):
        outputs.append(run_native("depthwise_conv2d", tensors, **options))
    assert_matches("depthwise_conv2d", tensors, options, *outputs)


@many
@given(case=depthwise_convolutions(), seeds=st.random_module())
def test_depthwise_of_contiguous_images_in_any_geometry(cpu_variant: str, case: dict, seeds: object) -> None:
    c_out = case["channels"] * case["multiplier"]
    tensors = [case["make"](case["batch"], case["channels"], *case["size"]), torch.randn(c_out, 1, *case["kernel"])]
    given = (torch.randn(c_out), torch.rand(c_out) + 0.5, None)
    tensors += [t if part else None for t, part in zip(given, case["parts"], strict=True)]
    options = {name: case[name] for name in ("stride", "padding", "dilation", "activation")}
    if case["parts"][2]:
        tensors[4] = contiguous(*ops.allocate("depthwise_conv2d", tensors, options).shape)
    outputs = [ops.depthwise_conv2d(*tensors, **options, backend="planes")]
    assert outputs[0].is_contiguous()
    if case["make"] is contiguous:
        outputs.append(run_native("depthwise_conv2d", tensors, **options, backend="planes"))
    assert_matches("depthwise_conv2d", tensors, options, *outputs)


@pytest.mark.parametrize(("size", "stride"), [((7, 7), 1), ((112, 112), 2), ((61, 90), 1)], ids=str)
def test_planes_of_several_bands(cpu_variant: str, size: tuple[int, int], stride: int) -> None:
    tensors = [contiguous(2, 5, *size), torch.randn(5, 1, 3, 3), torch.randn(5)]
    options = {"stride": (stride, stride), "padding": (1, 1), "activation": "relu"}
    out = ops.allocate("depthwise_conv2d", tensors, {**options, "backend": "planes"})
    call = native_call("depthwise_conv2d", tensors, {**options, "backend": "planes"}, out)
    assert call.name == "depthwise_planes"
    outputs = [run_native("depthwise_conv2d", tensors, **options, backend="planes")]
    assert_matches("depthwise_conv2d", tensors, options, *outputs)


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("activation", ["identity", "relu6", "hardswish"])
def test_depthwise_on_onednn(activation: str, multiplier: int) -> None:
    tensors = (channels_last(2, 9, 8, 7), torch.randn(9 * multiplier, 1, 3, 3), torch.randn(9 * multiplier))
    options = {"stride": (2, 1), "padding": (1, 1), "activation": activation}
    out = ops.depthwise_conv2d(*tensors, **options, backend="onednn")
    assert_close(out, expected_output("depthwise_conv2d", tensors, **options))


def test_nan_and_infinity_stay_in_their_channel(cpu_variant: str) -> None:
    x = channels_last(1, 20, 6, 6)
    x[0, 1, 0, 0], x[0, 2, 5, 5] = torch.nan, torch.inf
    weight = torch.rand(20, 1, 3, 3) + 0.1
    out = ops.depthwise_conv2d(x, weight, padding=1, backend="cpu")
    expected = ops.depthwise_conv2d(x, weight, padding=1, backend="reference")
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())
    assert out.isnan().any(dim=(0, 2, 3)).tolist() == [channel == 1 for channel in range(20)]


@pytest.mark.parametrize("backend", ["auto", "cpu", "onednn", "reference"])
def test_an_empty_batch_gives_an_empty_output(backend: str) -> None:
    out = ops.depthwise_conv2d(torch.empty(0, 4, 8, 8), torch.randn(8, 1, 3, 3), stride=2, backend=backend)
    assert out.shape == (0, 8, 3, 3)


X = torch.zeros(2, 4, 5, 5)
BAD = {
    "rank of x": ((X[0], torch.zeros(4, 1, 3, 3)), {}, r"x: expected \[N, C, H, W\]"),
    "dense weight": ((X, torch.zeros(4, 4, 3, 3)), {}, r"weight: expected \[C · multiplier, 1, KH, KW\] with C = 4"),
    "channels": ((X, torch.zeros(6, 1, 3, 3)), {}, r"weight: expected .* with C = 4 channels of x, got \[6, 1, 3, 3\]"),
    "bias": ((X, torch.zeros(8, 1, 3, 3), torch.zeros(4)), {}, r"bias: expected \[8\]"),
    "large kernel": ((X, torch.zeros(4, 1, 7, 3)), {}, "x: expected a height of at least 7"),
    "zero stride": ((X, torch.zeros(4, 1, 3, 3)), {"stride": (1, 0)}, "stride: expected two integers"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_a_bad_argument_is_named(case: tuple) -> None:
    tensors, options, message = case
    with pytest.raises(ValueError, match=message):
        ops.depthwise_conv2d(*tensors, **options)


def test_native_calls_refuse_memory_that_needs_a_copy() -> None:
    x, weight = cropped(1, 4, 6, 6), torch.randn(4, 1, 3, 3)
    with pytest.raises(ValueError, match="x: expected channels_last memory"):
        run_native("depthwise_conv2d", (x, weight))
