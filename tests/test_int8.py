"""The int8 family: ops against integer arithmetic and PyTorch's own quantization, layers against float modules."""

from __future__ import annotations

import io
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import absolute, int8, relative_error
from torch import Tensor, nn

from kernelpress import ops
from kernelpress.kernels import reference
from kernelpress.layers import Int8Conv2d, Int8Linear
from kernelpress.runtime.torch_private import define_quantized_ops

define_quantized_ops()
PT2E = torch.ops.quantized_decomposed
OPS = torch.ops.kernelpress


@settings(max_examples=40)
@given(
    scale=st.floats(1e-4, 1e3),
    zero_point=st.integers(-128, 127),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    shape=st.sampled_from([(7,), (2, 3, 5), (2, 3, 4, 5), (0, 3)]),
    seeds=st.random_module(),
)
def test_quantize_and_dequantize_are_those_of_pt2e(
    scale: float, zero_point: int, dtype: torch.dtype, shape: tuple[int, ...], seeds: object
) -> None:
    x = (torch.randn(shape) * 40 * scale).to(dtype)
    values = ops.quantize(x, scale=scale, zero_point=zero_point)
    assert torch.equal(values, PT2E.quantize_per_tensor(x, scale, zero_point, -128, 127, torch.int8))
    back = ops.dequantize(values, scale=scale, zero_point=zero_point)
    assert torch.equal(back, PT2E.dequantize_per_tensor(values, scale, zero_point, -128, 127, torch.int8))
    assert ops.dequantize(values, scale=scale, output_dtype=dtype).dtype == dtype


def test_quantize_rounds_half_to_even_and_saturates() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 1e9, -1e9, torch.inf, -torch.inf, torch.nan])
    expected = [0, 2, 2, 0, -2, 127, -128, 127, -128, 0]
    assert ops.quantize(x, scale=1.0).tolist() == expected
    assert ops.quantize(x[:5], scale=1.0, zero_point=-3).tolist() == [value - 3 for value in expected[:5]]
    assert ops.quantize(x[9:], scale=1.0, zero_point=-3).tolist() == [-3]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 3, 33), (0, 4)])
def test_rows_come_back_within_half_a_step(shape: tuple[int, ...], symmetric: bool) -> None:
    x = torch.randn(shape) * torch.logspace(-3, 3, shape[-1])
    values, scale, zero_point = ops.quantize_rows(x, symmetric=symmetric)
    assert (values.dtype, scale.dtype, zero_point.dtype) == (torch.int8, torch.float32, torch.int32)
    assert values.shape == x.shape
    assert scale.shape == zero_point.shape == x.shape[:-1]
    back = (values.float() - zero_point[..., None]) * scale[..., None]
    # The zero point is rounded as well: at the ends of the range that can cost another half step.
    assert bool(((back - x).abs() <= scale[..., None] * (0.5001 if symmetric else 1.0001)).all())
    if symmetric:
        assert not zero_point.any()


def test_rows_of_zeros_and_with_nan() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, torch.nan], [1.0, -1.0]])
    values, scale, zero_point = ops.quantize_rows(x)
    assert ((values[0] - zero_point[0]) * scale[0]).tolist() == [0, 0]
    assert scale[1].isnan()
    assert scale[2].isfinite()


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    has_scale = draw(st.booleans())
    return {
        "kernel": draw(st.sampled_from([(1, 1), (3, 3), (2, 5)])),
        "channels": draw(st.sampled_from([1, 3, 8])),
        "out": draw(st.sampled_from([1, 2, 5])),
        "depthwise": draw(st.booleans()),
        "parts": draw(st.tuples(st.booleans(), st.booleans())),
        "options": {
            "stride": draw(st.sampled_from([(1, 1), (2, 2), (1, 3)])),
            "padding": draw(st.tuples(st.integers(0, 2), st.integers(0, 3))),
            "dilation": draw(st.sampled_from([(1, 1), (2, 1)])),
            "input_scale": draw(st.sampled_from([1.0, 0.037])),
            "input_zero_point": draw(st.integers(-128, 127)),
            "activation": draw(st.sampled_from(["identity", "relu", "hardswish"])),
            "output_scale": draw(st.sampled_from([0.11, 7.3])) if has_scale else None,
            "output_zero_point": draw(st.integers(-128, 127)),
            "output_dtype": None if has_scale else draw(st.sampled_from([None, torch.float16, torch.bfloat16])),
        },
    }


@settings(max_examples=60)
@given(case=convolutions(), seeds=st.random_module())
def test_convolutions_sum_integers_exactly(case: dict[str, Any], seeds: object) -> None:
    channels, options = case["channels"], case["options"]
    x = int8(2, channels, 7, 9)
    depthwise = case["depthwise"]
    c_out = case["out"] * (channels if depthwise else 1)
    weight = int8(c_out, 1 if depthwise else channels, *case["kernel"])
    weight_scale = torch.rand(c_out) * 1e-3 + 1e-4
    bias = torch.randn(c_out) if case["parts"][0] else None
    op = "int8_depthwise_conv2d" if depthwise else "int8_conv2d"
    residual = None
    if case["parts"][1]:
        allocated = ops.allocate(op, (x, weight, weight_scale), options)
        residual = int8(*allocated.shape) if options["output_scale"] else torch.randn_like(allocated)
        if options["output_scale"]:
            options = options | {"residual_scale": 0.02, "residual_zero_point": 9}
    y = getattr(ops, op)(x, weight, weight_scale, bias, residual, **options)

    # Independently: an int64 convolution of the tensor padded by the zero point itself, then float64.
    (pad_h, pad_w), zero_point = options["padding"], options["input_zero_point"]
    padded = F.pad(x.long(), (pad_w, pad_w, pad_h, pad_h), value=zero_point) - zero_point
    groups = channels if depthwise else 1
    sums = F.conv2d(padded, weight.long(), None, options["stride"], 0, options["dilation"], groups)
    terms = [sums * (weight_scale.double() * options["input_scale"])[:, None, None]]
    if bias is not None:
        terms.append(bias.double()[:, None, None])
    if residual is not None:
        is_int8 = residual.dtype == torch.int8
        terms.append((residual.double() - 9) * 0.02 if is_int8 else residual.double())
    value = reference.activate(cast(Tensor, sum(terms)), options["activation"])
    if options["output_scale"]:
        steps = value / options["output_scale"] + options["output_zero_point"]
        assert bool(((y - steps.clamp(-128, 127)).abs() <= 0.501).all())
    else:
        bound = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[y.dtype]
        assert relative_error(y, value, cast(Tensor, sum(absolute(terms)))) <= bound
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("with_rows", [False, True])
def test_matmul_sums_integers_exactly(with_rows: bool) -> None:
    x, weight, weight_scale = int8(2, 3, 1000), int8(5, 1000), torch.rand(5)
    if with_rows:
        row_scale, row_zero_point = torch.rand(2, 3), torch.randint(-128, 128, (2, 3), dtype=torch.int32)
        y = ops.int8_matmul(x, weight, weight_scale, None, None, row_scale, row_zero_point)
        shifted, row = x.long() - row_zero_point[..., None], row_scale[..., None].double()
    else:
        y = ops.int8_matmul(x, weight, weight_scale, input_scale=0.03, input_zero_point=-7)
        shifted, row = x.long() + 7, torch.tensor(0.03, dtype=torch.float64)
    expected = (shifted @ weight.long().T) * row * weight_scale.double()
    torch.testing.assert_close(y.double(), expected, rtol=3e-7, atol=0)


def test_an_int8_convolution_is_its_q_dq_graph() -> None:
    """What torch's PT2E flow leaves around a convolution, in floats."""
    x, weight = torch.randn(2, 8, 9, 9), torch.randn(6, 8, 3, 3)
    bias = torch.randn(6)
    w, weight_scale, _ = reference.quantize_rows(weight.flatten(1), symmetric=True)
    w = w.view_as(weight)
    q = (0.02, 11, -128, 127, torch.int8)
    dequantized = PT2E.dequantize_per_tensor(PT2E.quantize_per_tensor(x, *q), *q)
    per_channel = PT2E.dequantize_per_channel(w, weight_scale, torch.zeros(6).long(), 0, -127, 127, torch.int8)
    float_y = F.relu(F.conv2d(dequantized, per_channel, bias, padding=1))
    expected = PT2E.quantize_per_tensor(float_y, 0.1, -100, -128, 127, torch.int8)
    y = ops.int8_conv2d(
        ops.quantize(x, scale=0.02, zero_point=11),
        *(w, weight_scale, bias),
        padding=1,
        input_scale=0.02,
        input_zero_point=11,
        activation="relu",
        output_scale=0.1,
        output_zero_point=-100,
    )
    difference = (y.int() - expected.int()).abs()
    assert int(difference.max()) <= 1
    assert float((difference > 0).float().mean()) < 1e-3, "only ties of the float graph may differ"


@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_int8_add(activation: str) -> None:
    x, other = int8(2, 3, 5, 7), int8(2, 3, 5, 7)
    scales: dict[str, Any] = {"input_scale": 0.1, "input_zero_point": 3, "other_scale": 0.04, "other_zero_point": -20}
    value = reference.activate((x.double() - 3) * 0.1 + (other.double() + 20) * 0.04, activation)
    y = ops.int8_add(x, other, **scales, activation=activation, output_scale=0.15, output_zero_point=5)
    steps = (value / 0.15 + 5).clamp(-128, 127)
    assert bool(((y - steps).abs() <= 0.5001).all())
    assert ops.int8_add(x, other, **scales, activation=activation, output_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert relative_error(ops.int8_add(x, other, **scales, activation=activation), value) < 1e-6


X, W, S = int8(2, 3, 4, 5), int8(6, 3, 3, 3), torch.rand(6)
R = int8(2, 7)
CASES: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "matmul": (OPS.int8_matmul, (R, int8(5, 7), torch.rand(5)), {}),
    "matmul to int8": (
        OPS.int8_matmul,
        (R, int8(5, 7), torch.rand(5), torch.randn(5), int8(2, 5)),
        {"output_scale": 3.0, "residual_scale": 0.5, "activation": "relu"},
    ),
    "matmul of rows": (
        OPS.int8_matmul,
        (R, int8(5, 7), torch.rand(5), None, torch.randn(2, 5).half(), torch.rand(2), torch.tensor([3, 4]).int()),
        {"output_dtype": torch.float16},
    ),
    "conv2d": (OPS.int8_conv2d, (X, W, S, torch.randn(6)), {"padding": [1, 1], "input_zero_point": 5}),
    "depthwise": (OPS.int8_depthwise_conv2d, (X, int8(6, 1, 3, 3), S), {"stride": [2, 2], "output_scale": 9.0}),
    "quantize": (OPS.quantize, (torch.randn(2, 3, 4, 5),), {"scale": 0.1, "zero_point": 3}),
    "quantize_rows": (OPS.quantize_rows, (torch.randn(2, 3, 8),), {"symmetric": True}),
    "dequantize": (OPS.dequantize, (X,), {"scale": 0.1, "output_dtype": torch.float16}),
    "add": (OPS.int8_add, (X, X.clone()), {"input_scale": 0.1, "other_scale": 2.0, "output_scale": 1.5}),
    "gate": (OPS.int8_gate, (X, X[..., :1, :1]), {"input_scale": 0.1, "gate_scale": 0.02, "output_scale": 0.05}),
    "mean": (OPS.int8_global_avg_pool2d, (X,), {"input_scale": 0.1, "keepdim": True, "output_scale": 0.03}),
    "maximum": (OPS.max_pool2d, (X,), {"kernel_size": [2, 2], "stride": [1, 1]}),
    "shuffle": (OPS.channel_shuffle, (X,), {"groups": 3}),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.mark.slow
@every_case
def test_torch_opcheck_finds_no_fault(case: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> None:
    op, tensors, options = case
    torch.library.opcheck(op.default, tensors, options)


@every_case
def test_symbolic_batch(case: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> None:
    op, tensors, options = case
    x, others = tensors[0], tensors[1:]
    takes_batch = [isinstance(t, Tensor) and op is not OPS.int8_conv2d and t.shape[:1] == x.shape[:1] for t in others]

    class Call(nn.Module):
        def forward(self, *batched: Tensor) -> Any:
            rest = iter(batched[1:])
            return op(
                batched[0], *[next(rest) if t else o for t, o in zip(takes_batch, others, strict=True)], **options
            )

    given = (x, *[t for t, takes in zip(others, takes_batch, strict=True) if takes])
    shapes = (tuple({0: torch.export.Dim("batch")} for _ in given),)
    exported = torch.export.export(Call(), given, dynamic_shapes=shapes)
    again = tuple(torch.cat([t, t, t]) for t in given)
    out, expected = exported.module()(*again), Call()(*again)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_macs_are_counted() -> None:
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        ops.int8_conv2d(X, W, S, padding=1)
        ops.int8_matmul(R, int8(5, 7), torch.rand(5))
        ops.int8_depthwise_conv2d(X, int8(6, 1, 3, 3), S)
    assert counter.get_total_flops() == 2 * (2 * 6 * 20 * 27 + 2 * 5 * 7 + 2 * 6 * 6 * 9)


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "float x": (lambda: ops.int8_conv2d(X.float(), W, S), TypeError, r"x: expected torch\.int8, got torch\.float32"),
    "float weight": (lambda: ops.int8_conv2d(X, W.float(), S), TypeError, r"weight: expected torch\.int8"),
    "half scale": (lambda: ops.int8_conv2d(X, W, S.half()), TypeError, r"weight_scale: expected torch\.float32"),
    "scale size": (lambda: ops.int8_conv2d(X, W, S[:3]), ValueError, r"weight_scale: expected \[6\]"),
    "channels": (lambda: ops.int8_conv2d(X, W[:, :2], S), ValueError, r"weight: expected .* 3 channels of x"),
    "depthwise": (lambda: ops.int8_depthwise_conv2d(X, W, S), ValueError, r"weight: expected \[C · multiplier, 1"),
    "zero point": (lambda: ops.int8_conv2d(X, W, S, input_zero_point=128), ValueError, "input_zero_point: .* got 128"),
    "zero scale": (lambda: ops.quantize(S, scale=0.0), ValueError, "scale: expected a positive scale"),
    "nan scale": (lambda: ops.dequantize(X, scale=float("nan")), ValueError, "scale: expected a positive scale"),
    "int8 without a scale": (
        lambda: ops.int8_conv2d(X, W, S, output_dtype=torch.int8),
        TypeError,
        "output_dtype: .* an int8 output needs an output_scale",
    ),
    "half with a scale": (
        lambda: ops.int8_conv2d(X, W, S, output_dtype=torch.half, output_scale=1.0),
        TypeError,
        r"output_dtype: expected torch\.int8 with output_scale",
    ),
    "residual dtype": (
        lambda: ops.int8_matmul(R, int8(5, 7), S[:5], None, torch.zeros(2, 5), output_scale=1.0),
        TypeError,
        r"residual: expected torch\.int8",
    ),
    "scaled float residual": (
        lambda: ops.int8_matmul(R, int8(5, 7), S[:5], None, torch.zeros(2, 5), residual_scale=2.0),
        ValueError,
        "residual_scale: expected 1.0",
    ),
    "rows": (
        lambda: ops.int8_matmul(R, int8(5, 7), S[:5], row_scale=torch.ones(3)),
        ValueError,
        r"row_scale: expected \[2\], one value per row of x, got \[3\]",
    ),
    "two scales": (
        lambda: ops.int8_matmul(R, int8(5, 7), S[:5], row_scale=torch.ones(2), input_scale=2.0),
        ValueError,
        "input_scale: expected 1.0 beside row_scale",
    ),
    "depth": (
        lambda: ops.int8_matmul(int8(1, 65537), int8(1, 65537), S[:1]),
        ValueError,
        "weight: expected at most 65536 values",
    ),
    "other shape": (
        lambda: ops.int8_add(X, X[:1], input_scale=1.0, other_scale=1.0),
        ValueError,
        r"other: expected the shape of x, \[2, 3, 4, 5\], got \[1, 3, 4, 5\]",
    ),
    "double": (lambda: ops.quantize(S.double(), scale=1.0), TypeError, r"x: expected torch\.float32 or"),
    "no channels": (lambda: ops.quantize_rows(torch.zeros(3, 0)), ValueError, "x: expected .* at least one channel"),
    "groups": (
        lambda: Int8Conv2d(8, 9, 3, groups=3),
        ValueError,
        "groups: expected a divisor of in_channels = 8, got 3",
    ),
    "grouped weight": (lambda: ops.int8_conv2d(X, W, S, groups=3), ValueError, r"weight: expected .* in 3 groups"),
    "uneven padding": (lambda: Int8Conv2d(8, 8, 2, padding="same"), ValueError, "padding: expected pixels"),
    "padding mode": (lambda: Int8Conv2d(8, 8, 3, padding_mode="reflect"), ValueError, "padding_mode: expected 'zeros'"),
    "layer output": (lambda: Int8Linear(8, 8, output_dtype=torch.int8), TypeError, "output_dtype: expected"),
    "module": (
        lambda: Int8Conv2d.from_float(cast(Any, nn.Linear(2, 2)), 1.0),
        TypeError,
        r"module: expected torch\.nn\.Conv2d",
    ),
    "int8 rows": (lambda: Int8Linear(7, 5, input_scale=None)(R), TypeError, "x: expected a floating dtype"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_a_bad_argument_is_named(case: tuple[Any, type[Exception], str]) -> None:
    call, error, message = case
    with pytest.raises(error, match=message):
        call()


def test_a_bias_that_requires_grad_is_no_obstacle() -> None:
    bias = torch.randn(5, requires_grad=True)
    assert not ops.int8_matmul(R, int8(5, 7), S[:5], bias, output_scale=1.0).requires_grad
    ops.int8_matmul(R, int8(5, 7), S[:5], bias).sum().backward()
    assert bias.grad is not None
    assert torch.equal(bias.grad, torch.full((5,), 2.0))


def scale_of(x: Tensor) -> float:
    return float((x.max() - x.min()) / 255)


def zero_point_of(x: Tensor) -> int:
    return round(-128 - float(x.min()) / scale_of(x))


CONVOLUTIONS = {
    "3x3": nn.Conv2d(8, 12, 3, 2, 1),
    "1x1": nn.Conv2d(8, 12, 1, bias=False),
    "depthwise": nn.Conv2d(8, 16, 5, padding="same", groups=8),
    "grouped": nn.Conv2d(8, 12, 3, padding=1, groups=4),
    "valid": nn.Conv2d(8, 4, (3, 2), padding="valid", dilation=2),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_from_float_is_near_its_module(name: str) -> None:
    module, x = CONVOLUTIONS[name].eval(), torch.randn(2, 8, 11, 13) + 0.5
    y = F.relu(module(x)).detach()
    scale, zero_point = scale_of(x), zero_point_of(x)
    layer = Int8Conv2d.from_float(module, scale, zero_point, activation="relu")
    assert relative_error(layer(x), y) < 0.02
    assert torch.equal(layer(x), layer(ops.quantize(x, scale=scale, zero_point=zero_point)))
    output = {"output_scale": scale_of(y), "output_zero_point": -128}
    out = Int8Conv2d.from_float(module, scale, zero_point, activation="relu", **output)(x)
    assert out.dtype == torch.int8
    assert relative_error(ops.dequantize(out, scale=scale_of(y), zero_point=-128), y) < 0.02
    assert not list(layer.parameters())


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_linear_layer_from_float_is_near_its_module(dynamic: bool) -> None:
    module, x = nn.Linear(33, 7), torch.randn(5, 33) - 0.3
    layer = Int8Linear.from_float(module, None if dynamic else scale_of(x), 0 if dynamic else zero_point_of(x))
    assert relative_error(layer(x), module(x)) < 0.02
    residual = torch.randn(5, 7)
    torch.testing.assert_close(layer(x, residual), layer(x) + residual)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "conv"])
def test_layers_export_and_their_state_moves(kind: str) -> None:
    layer: nn.Module
    other: nn.Module
    if kind == "conv":
        x = torch.randn(2, 8, 9, 9)
        layer = Int8Conv2d.from_float(nn.Conv2d(8, 6, 3), 0.02, 3, output_scale=0.1)
        other = Int8Conv2d(8, 6, 3, input_scale=0.02, input_zero_point=3, output_scale=0.1)
    else:
        x, scale = torch.randn(2, 8), None if kind == "dynamic" else 0.02
        layer = Int8Linear.from_float(nn.Linear(8, 6), scale)
        other = Int8Linear(8, 6, input_scale=scale)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    wide = torch.cat([x, x])
    assert torch.equal(exported.module()(wide), layer(wide))
    assert any("kernelpress" in str(node.target) for node in exported.graph.nodes)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x), layer(x))
    assert "input_scale" in repr(layer)
