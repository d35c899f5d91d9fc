"""Emission of quantized models of other people's making onto int8 layers."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from emitting import (
    Apply,
    assert_saving_and_capture_keep,
    emit_fused,
    emit_onto,
    ops_of,
    prefer_ops,
    torch_steps,
)
from support import with_random_norms
from torch import nn

import kernelpress as kp
from kernelpress.emit import pipeline
from kernelpress.emit.ties import compare, moved_by_rounding
from kernelpress.emit.tolerance import INT8_TOLERANCE, relative_error
from kernelpress.runtime import native
from kernelpress.runtime.torch_private import define_quantized_ops

pytestmark = pytest.mark.usefixtures("own_cache", "every_match_is_exact")

define_quantized_ops()
quantized = torch.ops.quantized_decomposed


INT8 = (
    *("int8_conv2d", "int8_depthwise_conv2d", "int8_matmul", "int8_add", "quantize", "dequantize", "int8_gate"),
    *("int8_global_avg_pool2d", "max_pool2d", "channel_shuffle", "shuffle_concat"),
)


class Quantized(nn.Module):
    """A tensor rounded to int8, or uint8, and back."""

    def __init__(self, scale, zero_point=0, dtype=torch.int8, limits=None):
        super().__init__()
        low, high = limits or ((-128, 127) if dtype == torch.int8 else (0, 255))
        self.arguments = (scale, zero_point, low, high, dtype)

    def forward(self, x):
        return quantized.dequantize_per_tensor(quantized.quantize_per_tensor(x, *self.arguments), *self.arguments)


class QuantizedWeight(nn.Module):
    """A convolution or linear layer whose weight is int8 per output channel."""

    def __init__(self, layer, values=None):
        super().__init__()
        weight = layer.weight.detach()
        scale = weight.flatten(1).abs().amax(1) / 127
        zero_point = torch.zeros(len(scale), dtype=torch.int64)
        self.layer, self.arguments = layer, (0, -128, 127, torch.int8)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("values", quantized.quantize_per_channel(weight, scale, zero_point, *self.arguments))
        layer.weight = None

    def forward(self, x):
        weight = quantized.dequantize_per_channel(self.values, self.scale, self.zero_point, *self.arguments)
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.layer.bias)
        return self.layer._conv_forward(x, weight, self.layer.bias)


needs_native = pytest.mark.skipif(native.cpu() is None, reason=f"no native module: {native.load().absent_because}")


def prefer_native_products(candidate):
    """A cost under which int8 layers win, those with a native kernel on it."""
    backend = "cpu" if candidate.name in ("int8_conv2d", "int8_matmul") else "reference"
    return 1.0 if candidate.name in INT8 and candidate.variant == backend else 10.0 * len(candidate.nodes)


def native_products(emitted, x):
    """The int8 products that a plan of the model runs natively."""
    steps = (step.removeprefix("native ") for step in kp.capture(emitted, x).steps)
    return [step for step in steps if step in ("int8_conv2d", "int8_matmul")]


def emit_int8(model, x):
    return emit_onto(model.eval(), x, *INT8)


def assert_as_rounded(emitted, model, x):
    """Float outputs agree as closely as a few values, rounded to the other of two neighbours, allow."""
    with torch.no_grad():
        assert relative_error(emitted(x), model(x)) <= INT8_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_pass_roundings_of_floats_that_stay_floats(dtype):
    layers = (nn.Conv2d(6, 8, 3), Apply(lambda x: torch.fake_quantize_per_tensor_affine(x, 0.02, 3, -128, 127)))
    model = nn.Sequential(*layers, nn.Conv2d(8, 4, 1)).eval().to(dtype)
    x = torch.randn(2, 6, 9, 8, dtype=dtype, requires_grad=True)
    emitted = kp.emit(model, x, cost=prefer_ops(), progress=False)
    of_emitted, of_model = (torch.autograd.grad(run(x).sum(), x)[0] for run in (emitted, model))
    torch.testing.assert_close(of_emitted, of_model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize(
    ("layer", "op", "sizes"),
    [
        (lambda: nn.Conv2d(6, 8, 3, 2, 1), "int8_conv2d", (6, 9, 8)),
        (lambda: nn.Conv2d(6, 8, 1, bias=False), "int8_conv2d", (6, 9, 8)),
        (lambda: nn.Conv2d(6, 12, 3, padding=2, dilation=2, groups=6), "int8_depthwise_conv2d", (6, 9, 8)),
        (lambda: nn.Conv2d(6, 10, 3, padding=1, groups=2), "int8_conv2d", (6, 9, 8)),
        (lambda: nn.Linear(20, 8), "int8_matmul", (20,)),
        (lambda: nn.Linear(20, 8), "int8_matmul", (3, 20)),
    ],
    ids=["3x3", "1x1", "depthwise", "grouped", "linear", "linear of rows"],
)
def test_layers_between_quantizations_compute_in_int8(layer, op, sizes, dtype, tmp_path):
    zero_point = 3 if dtype == torch.int8 else 131
    model = nn.Sequential(Quantized(0.03, zero_point, dtype), QuantizedWeight(layer()), nn.ReLU()).eval()
    x = torch.randn(2, *sizes)
    emitted = emit_int8(model, x)
    assert ops_of(emitted) == ["quantize", op]
    for inputs in (x, torch.randn(5, *sizes)):
        torch.testing.assert_close(emitted(inputs), model(inputs), rtol=1e-5, atol=1e-5)
    assert_saving_and_capture_keep(emitted, tmp_path, x)


@needs_native
def test_products_are_native_steps_of_a_plan(tmp_path):
    model = nn.Sequential(
        *(Quantized(0.03, 120, torch.uint8), QuantizedWeight(nn.Conv2d(3, 8, 3, 2, 1)), nn.ReLU(), Quantized(0.01)),
        *(QuantizedWeight(nn.Conv2d(8, 12, 1)), nn.Hardswish(), Quantized(0.01, 9)),
        *(QuantizedWeight(nn.Conv2d(12, 12, 3, groups=3)), Quantized(0.02)),
        *(nn.AvgPool2d(2), nn.Flatten(), Quantized(0.01, 3), QuantizedWeight(nn.Linear(12, 5))),
    ).eval()
    x = torch.randn(2, 3, 9, 8)

    emitted = kp.emit(model, x, cost=prefer_native_products, progress=False)
    assert native_products(emitted, x) == ["int8_conv2d", "int8_conv2d", "int8_conv2d", "int8_matmul"]
    assert_as_rounded(emitted, model, torch.randn(3, 3, 9, 8))
    assert_saving_and_capture_keep(emitted, tmp_path, x)


def test_int8_stays_int8_between_layers(tmp_path):
    model = nn.Sequential(
        *(Quantized(0.03, 120, torch.uint8), QuantizedWeight(nn.Conv2d(6, 8, 3, padding=1)), nn.ReLU()),
        *(Quantized(0.01, 0, torch.uint8), QuantizedWeight(nn.Conv2d(8, 8, 3, padding=1, groups=8)), nn.ReLU6()),
        *(Quantized(0.005, 0, torch.uint8), QuantizedWeight(nn.Conv2d(8, 12, 1)), Quantized(0.01, 99, torch.uint8)),
    ).eval()
    x = torch.randn(2, 6, 9, 8)
    emitted = emit_int8(model, x)
    assert ops_of(emitted) == ["quantize", "int8_conv2d", "int8_depthwise_conv2d", "int8_conv2d", "dequantize"]
    assert_as_rounded(emitted, model, torch.randn(3, 6, 9, 8))
    assert_saving_and_capture_keep(emitted, tmp_path, x)


def test_an_int8_residual_is_added_in_the_layer_and_two_branches_in_a_sum(tmp_path):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.other = (QuantizedWeight(nn.Conv2d(8, 8, 3, padding=1)) for _ in range(2))
            self.first, self.second, self.third = Quantized(0.03), Quantized(0.04, -5), Quantized(0.05, 7)

        def forward(self, x):
            x = self.first(x)
            x = self.second(F.relu(self.inner(x) + x))
            return self.third(self.third(self.other(x)) + x)

    model = Block().eval()
    x = torch.randn(2, 8, 6, 5)
    emitted = emit_int8(model, x)
    assert ops_of(emitted) == ["quantize", "int8_conv2d", "int8_conv2d", "int8_add", "dequantize"]
    assert_as_rounded(emitted, model, torch.randn(3, 8, 6, 5))
    assert_saving_and_capture_keep(emitted, tmp_path, x)


def test_a_float_residual_comes_with_a_float_output():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.quantized, self.conv = Quantized(0.03), QuantizedWeight(nn.Conv2d(8, 8, 3, padding=1))

        def forward(self, x):
            return self.quantized(F.relu(self.conv(self.quantized(x)) + x))

    model = Block().eval()
    x = torch.randn(2, 8, 6, 5)
    emitted = emit_int8(model, x)
    assert ops_of(emitted) == ["quantize", "int8_conv2d", "quantize", "dequantize"]
    assert_as_rounded(emitted, model, x)


def test_a_batch_norm_behind_a_quantized_weight_goes_into_its_scale():
    model = nn.Sequential(Quantized(0.03), QuantizedWeight(nn.Conv2d(6, 8, 3, bias=False)), nn.BatchNorm2d(8))
    with torch.no_grad():
        with_random_norms(model)[2].weight[0] = -0.7
    x = torch.randn(2, 6, 9, 8)
    emitted = emit_int8(model, x)
    assert ops_of(emitted) == ["quantize", "int8_conv2d"]
    torch.testing.assert_close(emitted(x), model(x), rtol=1e-5, atol=1e-5)


def test_scales_in_tensors_are_read():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = QuantizedWeight(nn.Conv2d(6, 8, 3))
            self.register_buffer("scale", torch.tensor(0.03))
            self.register_buffer("zero_point", torch.tensor(4))

        def forward(self, x):
            limits = (self.scale, self.zero_point, -128, 127, torch.int8)
            x = quantized.quantize_per_tensor.tensor(x, *limits)
            return self.conv(quantized.dequantize_per_tensor.tensor(x, *limits))

    model = Scaled().eval()
    x = torch.randn(2, 6, 9, 8)
    emitted = emit_int8(model, x)
    assert ops_of(emitted) == ["quantize", "int8_conv2d"]
    torch.testing.assert_close(emitted(x), model(x), rtol=1e-5, atol=1e-5)


def test_values_that_are_only_moved_between_equal_quantizations_stay_int8():
    quantizer = Quantized(0.01, 0, torch.uint8)
    model = nn.Sequential(
        *(Quantized(0.03), QuantizedWeight(nn.Conv2d(6, 8, 3)), nn.ReLU(), quantizer, nn.Flatten(), quantizer),
        QuantizedWeight(nn.Linear(8 * 4 * 3, 5)),
    ).eval()
    x = torch.randn(2, 6, 6, 5)
    emitted = emit_int8(model, x)
    assert ops_of(emitted) == ["quantize", "int8_conv2d", "aten.flatten.using_ints", "int8_matmul"]
    assert_as_rounded(emitted, model, torch.randn(3, 6, 6, 5))


def int8_conv(c_in, c_out, kernel=1, **options):
    return QuantizedWeight(nn.Conv2d(c_in, c_out, kernel, **options))


def test_pools_of_int8(tmp_path):
    first, second = Quantized(0.03, 120, torch.uint8), Quantized(0.01, 7, torch.uint8)
    model = nn.Sequential(
        *(first, int8_conv(6, 8, 3, padding=1), nn.ReLU(), second, nn.MaxPool2d(3, 2, 1), second, int8_conv(8, 10)),
        *(second, nn.AdaptiveAvgPool2d(1), first, nn.Flatten(), first, QuantizedWeight(nn.Linear(10, 5))),
    ).eval()
    x = torch.randn(2, 6, 9, 8)
    emitted = emit_int8(model, x)
    assert ops_of(emitted) == [
        *("quantize", "int8_conv2d", "max_pool2d", "int8_conv2d", "int8_global_avg_pool2d"),
        *("aten.flatten.using_ints", "int8_matmul"),
    ]
    assert_as_rounded(emitted, model, torch.randn(3, 6, 9, 8))
    assert_saving_and_capture_keep(emitted, tmp_path, x)


class Gated(nn.Module):
    """Squeeze-and-excitation with a quantization wherever a quantizer leaves one."""

    def __init__(self):
        super().__init__()
        self.image, self.gate, self.product = Quantized(0.03, 11, torch.uint8), Quantized(0.004, -128), Quantized(0.02)
        self.conv = int8_conv(6, 6)

    def forward(self, x):
        y = self.image(x)
        factors = self.gate(nn.functional.hardsigmoid(self.conv(self.image(y.mean((2, 3), keepdim=True)))))
        return self.product(y * factors)


def test_gates_of_int8(tmp_path):
    model, x = Gated().eval(), torch.randn(2, 6, 9, 8)
    emitted = emit_int8(model, x)
    assert ops_of(emitted) == ["quantize", "int8_global_avg_pool2d", "int8_conv2d", "int8_gate", "dequantize"]
    assert_as_rounded(emitted, model, torch.randn(3, 6, 9, 8))
    assert_saving_and_capture_keep(emitted, tmp_path, x)


@needs_native
def test_gates_are_steps_of_a_plan():
    model, x = Gated().eval(), torch.randn(2, 6, 9, 8)
    emitted = kp.emit(model, x, cost=lambda candidate: 1.0 if candidate.variant == "cpu" else 99.0, progress=False)
    assert "int8_gate" in ops_of(emitted)
    assert torch_steps(emitted, x) == []


def test_the_mean_of_int8_that_is_not_quantized_again():
    model = Apply(lambda x, quantizer: quantizer(x).mean((2, 3)), Quantized(0.03, -9))
    x = torch.randn(2, 6, 9, 8)
    emitted = emit_int8(model.eval(), x)
    assert ops_of(emitted) == ["quantize", "int8_global_avg_pool2d"]
    torch.testing.assert_close(emitted(x), model(x), rtol=1e-5, atol=1e-5)


class ShuffleUnit(nn.Module):
    """ShuffleNet V2's, with a quantization wherever a quantizer leaves one, all of one scale."""

    def __init__(self):
        super().__init__()
        self.quantizer, self.last = Quantized(0.03, 11, torch.uint8), Quantized(0.03, 11, torch.uint8)
        self.expand, self.depthwise = int8_conv(6, 6), int8_conv(6, 6, 3, padding=1, groups=6)

    def forward(self, x):
        kept, x = self.quantizer(x).chunk(2, 1)
        x = self.quantizer(F.relu(self.expand(self.quantizer(x))))
        x = self.quantizer(F.relu(self.depthwise(x)))
        n, _, h, w = x.shape
        whole = torch.cat([kept, x], 1)
        return self.last(whole.view(n, 2, 6, h, w).transpose(1, 2).contiguous().view(n, 12, h, w))


def test_splits_concatenations_and_shuffles_move_int8(tmp_path):
    model = nn.Sequential(ShuffleUnit(), ShuffleUnit(), int8_conv(12, 5)).eval()
    x = torch.randn(2, 12, 9, 8)
    emitted = emit_int8(model, x)
    layers = [op for op in ops_of(emitted) if not op.startswith(("aten.chunk", "<built-in"))]
    unit = ["int8_conv2d", "int8_depthwise_conv2d", "shuffle_concat"]
    assert layers == ["quantize", *unit, *unit, "int8_conv2d"]
    assert_as_rounded(emitted, model, torch.randn(3, 12, 9, 8))
    assert_saving_and_capture_keep(emitted, tmp_path, x)
    assert torch_steps(emit_fused(model, x, "cpu"), x) == []


def test_what_is_quantized_behind_a_concatenation_is_quantized_by_its_parts():
    def forward(x, first, a, b, second, last):
        x = first(x)
        return last(second(torch.cat([F.relu(a(x)), F.relu(b(x))], 1)))

    model = Apply(
        forward, Quantized(0.03), int8_conv(6, 8), int8_conv(6, 5), Quantized(0.02, -7), int8_conv(13, 4)
    ).eval()
    x = torch.randn(2, 6, 9, 8)
    emitted = emit_int8(model, x)
    assert ops_of(emitted) == ["quantize", "int8_conv2d", "int8_conv2d", "aten.cat", "int8_conv2d"]
    assert_as_rounded(emitted, model, x)


def test_a_concatenation_of_two_scales_is_requantized_where_they_differ():
    def forward(x, first, second, last):
        return last(second(torch.cat([second(x), first(x)], 1)))

    model = Apply(forward, Quantized(0.03), Quantized(0.02, -7), int8_conv(12, 4)).eval()
    x = torch.randn(2, 6, 9, 8)
    emitted = emit_int8(model, x)
    assert sorted(ops_of(emitted)) == ["aten.cat", "dequantize", "int8_conv2d", "quantize", "quantize", "quantize"]
    assert_as_rounded(emitted, model, x)


@pytest.mark.parametrize(
    "between",
    [
        nn.Sequential(Quantized(0.01), nn.Flatten(), Quantized(0.02)),
        nn.Sequential(Quantized(0.01), nn.AvgPool2d(2), nn.Flatten(), Quantized(0.01)),
        nn.Sequential(Quantized(0.01), nn.MaxPool2d(2), nn.Flatten(), Quantized(0.02)),
    ],
    ids=["another scale", "a mean", "another scale behind a pool"],
)
def test_between_other_quantizations_values_are_floats(between):
    model = nn.Sequential(QuantizedWeight(nn.Conv2d(6, 8, 3)), between)
    emitted = emit_int8(model, torch.randn(2, 6, 6, 6))
    assert ops_of(emitted).count("quantize") == 2
    assert_as_rounded(emitted, model, torch.randn(3, 6, 6, 6))


def test_a_dequantized_tensor_that_is_also_returned_feeds_an_int8_layer():
    def forward(x, quantizer, conv):
        x = quantizer(x)
        return conv(x), x

    model = Apply(forward, Quantized(0.03), QuantizedWeight(nn.Conv2d(6, 8, 3))).eval()
    x = torch.randn(2, 6, 9, 8)
    emitted = emit_int8(model, x)
    assert sorted(ops_of(emitted)) == ["dequantize", "int8_conv2d", "quantize"]
    for ours, theirs in zip(emitted(x), model(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_int8_values_that_are_returned_are_int8():
    class Returned(nn.Module):
        def __init__(self):
            super().__init__()
            self.quantized, self.conv = Quantized(0.03, 2), QuantizedWeight(nn.Conv2d(6, 8, 3))

        def forward(self, x):
            return quantized.quantize_per_tensor(self.conv(self.quantized(x)), 0.02, -3, -128, 127, torch.int8)

    model = Returned().eval()
    x = torch.randn(2, 6, 9, 8)
    emitted = emit_int8(model, x)
    assert ops_of(emitted) == ["quantize", "int8_conv2d"]
    assert emitted(x).dtype == torch.int8
    assert_as_rounded(emitted, model, x)


@pytest.mark.parametrize(
    "quantizer",
    [Quantized(0.03, 0, torch.uint8, (0, 127)), Quantized(0.03, 0, limits=(-127, 127)), nn.Identity()],
    ids=["uint8 of 7 bits", "symmetric limits", "float input"],
)
def test_other_ranges_and_float_inputs_stay_as_they_are(quantizer):
    model = nn.Sequential(quantizer, QuantizedWeight(nn.Conv2d(6, 8, 3))).eval()
    x = 5 * torch.randn(2, 6, 9, 8)
    emitted = kp.emit(model, x, cost=prefer_ops(*INT8), progress=False)
    assert "quantize" not in ops_of(emitted)
    torch.testing.assert_close(emitted(x), model(x), rtol=1e-5, atol=1e-5)


def test_asymmetric_weights_in_int8_stay_in_float():
    shifted = QuantizedWeight(nn.Conv2d(6, 8, 3))
    shifted.zero_point += 9
    model = nn.Sequential(Quantized(0.03), shifted).eval()
    x = torch.randn(2, 6, 9, 8)
    emitted = emit_int8(model, x)
    assert not [name for name in ops_of(emitted) if name.startswith("int8")]
    torch.testing.assert_close(emitted(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_dequantization_read_by_several_layers_left_in_float_is_computed_once():
    def forward(x, quantizer, a, b):
        x = quantizer(x)
        return a(x), b(x)

    model = Apply(forward, Quantized(0.03), nn.Conv2d(6, 8, 3), nn.Conv2d(6, 8, 1)).eval()
    emitted = emit_int8(model, torch.randn(2, 6, 9, 8))
    assert ops_of(emitted).count("dequantize") == 1


def test_steps_of_int8_are_told_apart_from_errors():
    expected = torch.randint(-100, 100, (1000,), dtype=torch.int8)
    one_off, two_off, all_off = expected.clone(), expected.clone(), expected + 1
    one_off[3] += 1
    two_off[3] += 2
    assert 0 < relative_error(one_off, expected) <= INT8_TOLERANCE
    assert relative_error(two_off, expected) == float("inf")
    assert relative_error(all_off, expected) > INT8_TOLERANCE


def amplifying(depth, x):
    """A quantized network that carries a single step on from layer to layer: each gives a deviation of one."""
    layers = [Quantized(0.03)]
    for _ in range(depth):
        conv = nn.Conv2d(8, 8, 3, padding=1)
        with torch.no_grad():
            y = conv(nn.Sequential(*layers)(x))
            conv.weight /= y.std()
        layers += [QuantizedWeight(conv), nn.Hardtanh(), Quantized(0.05)]
    return nn.Sequential(*layers).eval()


@pytest.mark.slow
def test_a_network_that_amplifies_steps_is_judged_by_what_rounding_does_to_it(monkeypatch):
    x = torch.randn(2, 8, 40, 40)
    found = []
    monkeypatch.setattr(pipeline, "compare", lambda *given: found.append(compare(*given)) or found[-1])
    monkeypatch.setattr(
        pipeline, "moved_by_rounding", lambda *given: found.append(moved_by_rounding(*given)) or found[-1]
    )

    emitted = kp.emit(amplifying(40, x), x, progress=False, cost=prefer_native_products)
    assert not emitted.record.kept_original, emitted.record.reason
    assert found[0].error > 10 * INT8_TOLERANCE
    assert found[1] > 10 * INT8_TOLERANCE

    graph = kp.emit(amplifying(2, x), x, progress=False, cost=prefer_ops()).body
    assert moved_by_rounding(graph, [x], 0.1) < INT8_TOLERANCE


def test_a_wrong_layer_of_a_quantized_network_is_refused(monkeypatch):
    faster_of = pipeline._faster_of

    def broken(traced, body, *others, **named):
        for node in [node for node in body.graph.nodes if "int8_conv2d" in str(node.target)]:
            with body.graph.inserting_after(node):
                negated = body.graph.call_function(torch.neg, (node,))
            node.replace_all_uses_with(negated, delete_user_cb=lambda user, own=negated: user is not own)
        body.recompile()
        return faster_of(traced, body, *others, **named)

    monkeypatch.setattr(pipeline, "_faster_of", broken)
    x = torch.randn(2, 8, 12, 12)
    emitted = kp.emit(amplifying(2, x), x, progress=False, cost=prefer_native_products)
    assert emitted.record.kept_original
    assert "error" in emitted.record.reason


@pytest.mark.slow
def test_a_model_with_quantizations_left_in_it_loads_where_nobody_has_registered_them(tmp_path):
    model = nn.Sequential(Quantized(0.03), QuantizedWeight(nn.Conv2d(6, 8, 3))).eval()
    x = torch.ones(2, 6, 9, 8)
    kp.emit(model, x, cost=prefer_ops(), progress=False).save(tmp_path / "m.pt2")
    script = (
        "import sys, torch, kernelpress as kp\n"
        "assert not hasattr(torch.ops.quantized_decomposed, 'quantize_per_tensor')\n"
        "print(float(kp.load(sys.argv[1])(torch.ones(2, 6, 9, 8)).sum()))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "m.pt2")], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) == pytest.approx(model(x).sum().item(), rel=1e-4)


def test_a_model_quantized_by_torchao_runs_in_int8(tmp_path):
    pytest.importorskip("torchao", reason="needs torchao: pip install torchao")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
            self.depthwise, self.project = nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Conv2d(8, 8, 1)
            self.classify = nn.Linear(8, 4)

        def forward(self, x):
            x = self.stem(x)
            y = F.relu(self.project(F.relu(self.depthwise(x))) + x)
            return self.classify(y.mean((2, 3)))

    x = torch.randn(4, 3, 12, 12)
    dynamic = ({0: torch.export.Dim.AUTO},)
    # Before torch 2.12 a quantizer knows the modules of strictly exported graphs alone.
    exported = torch.export.export(with_random_norms(Net()), (x,), dynamic_shapes=dynamic, strict=True).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported, quantizer)
    prepared(x)
    model = convert_pt2e(prepared)
    emitted = kp.emit(model, x, cost=prefer_ops(*INT8), progress=False)
    assert not emitted.record.kept_original, emitted.record.reason
    names = ops_of(emitted)
    layers = [name for name in names if name.startswith("int8")]
    assert layers == ["int8_conv2d", "int8_depthwise_conv2d", "int8_conv2d", "int8_matmul"]
    assert not [name for name in names if name.startswith(("aten.conv", "aten.linear", "quantized_decomposed"))]
    assert relative_error(emitted(x[:3]), model(x[:3])) <= 10 * INT8_TOLERANCE
    assert_saving_and_capture_keep(emitted, tmp_path, x)
    if native.cpu() is not None:
        on_cpu = kp.emit(model, x, cost=prefer_native_products, progress=False)
        assert ops_of(on_cpu) == names
        assert native_products(on_cpu, x) == ["int8_conv2d", "int8_conv2d", "int8_matmul"]
        torch.testing.assert_close(on_cpu(x), emitted(x), rtol=0, atol=0)
