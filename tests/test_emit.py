"""Emission: what is folded, what is fused, what is chosen, and that the result computes what the model does."""

import copy
import errno
import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from emitting import FUSED_BACKENDS, Apply, assert_as_exact_as, emit_fused, ops_of
from support import with_random_norms
from torch import nn

import kernelpress as kp
from kernelpress.emit import evaluate, pipeline
from kernelpress.emit.cache import TimingCache
from kernelpress.emit.canonical import canonicalize
from kernelpress.emit.examples import Example
from kernelpress.emit.fold import fold
from kernelpress.emit.fuse import find_matches
from kernelpress.emit.record import EmissionRecord
from kernelpress.emit.tolerance import relative_error
from kernelpress.ops.layout import PIXELS
from kernelpress.trace import TraceError, trace

pytestmark = pytest.mark.usefixtures("own_cache")


def separable(channels, out, stride=1):
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, out, 1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(inplace=True),
    )


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        pytest.param(lambda y: y.relu(), "relu", id="y.relu()"),
        pytest.param(lambda y: y.clamp(min=0), "relu", id="y.clamp(min=0)"),
        pytest.param(lambda y: F.relu6(y), "relu6", id="F.relu6(y)"),
        pytest.param(lambda y: y.clamp(0, 6), "relu6", id="y.clamp(0, 6)"),
        pytest.param(lambda y: F.hardtanh(y, 0.0, 6.0), "relu6", id="F.hardtanh(y, 0.0, 6.0)"),
        pytest.param(lambda y: F.silu(y), "silu", id="F.silu(y)"),
        pytest.param(lambda y: y * y.sigmoid(), "silu", id="y * y.sigmoid()"),
        pytest.param(lambda y: F.hardswish(y), "hardswish", id="F.hardswish(y)"),
        pytest.param(lambda y: y * F.hardtanh(y + 3, 0, 6) / 6, "hardswish", id="y * F.hardtanh(y + 3, 0, 6) / 6"),
        pytest.param(lambda y: y * (F.relu6(y + 3) / 6), "hardswish", id="y * (F.relu6(y + 3) / 6)"),
        pytest.param(lambda y: F.relu6(y + 3) * (1 / 6) * y, "hardswish", id="F.relu6(y + 3) * (1 / 6) * y"),
        pytest.param(lambda y: F.hardsigmoid(y), "hardsigmoid", id="F.hardsigmoid(y)"),
        pytest.param(lambda y: F.relu6(y + 3) / 6, "hardsigmoid", id="F.relu6(y + 3) / 6"),
        pytest.param(lambda y: y.sigmoid(), "sigmoid", id="y.sigmoid()"),
        pytest.param(lambda y: F.gelu(y), "gelu", id="F.gelu(y)"),
    ],
)
def test_activations_however_spelled_end_in_the_epilogue(spelled, name):
    model = Apply(lambda x, conv: spelled(conv(x)), nn.Conv2d(3, 8, 3)).eval()
    emitted = emit_fused(model, torch.randn(2, 3, 9, 9))
    assert ops_of(emitted) == ["conv2d"]
    (call,) = (node for node in emitted.body.graph.nodes if node.op == "call_function")
    assert call.kwargs["activation"] == name
    assert_as_exact_as(emitted, model, torch.randn(3, 3, 9, 9))


@pytest.mark.parametrize(
    "spelled",
    [
        pytest.param(lambda y: F.hardtanh(y, -1.0, 1.0), id="F.hardtanh(y, -1.0, 1.0)"),
        pytest.param(lambda y: y.clamp(0, 5), id="y.clamp(0, 5)"),
        pytest.param(lambda y: F.gelu(y, approximate="tanh"), id="F.gelu(y, approximate='tanh')"),
        pytest.param(lambda y: F.relu6(y + 2) / 6, id="F.relu6(y + 2) / 6"),
        pytest.param(lambda y: y * F.hardtanh(y + 3, 0, 6) / 5, id="y * F.hardtanh(y + 3, 0, 6) / 5"),
        pytest.param(lambda y: F.leaky_relu(y), id="F.leaky_relu(y)"),
    ],
)
def test_functions_like_activations_of_ours_are_left_as_they_are(spelled):
    model = Apply(lambda x, conv: spelled(conv(x)), nn.Conv2d(3, 8, 3)).eval()
    emitted = emit_fused(model, torch.randn(2, 3, 9, 9))
    assert len(ops_of(emitted)) > 1
    assert_as_exact_as(emitted, model, torch.randn(3, 3, 9, 9))


@pytest.mark.parametrize("order", ["conv first", "conv second"])
def test_a_residual_of_the_same_shape_is_added_in_the_epilogue(order):
    def forward(x, conv):
        return (conv(x) + x if order == "conv first" else x + conv(x)).relu()

    model = Apply(forward, nn.Conv2d(8, 8, 3, padding=1)).eval()
    emitted = emit_fused(model, torch.randn(2, 8, 9, 9))
    assert ops_of(emitted) == ["conv2d"]
    assert_as_exact_as(emitted, model, torch.randn(2, 8, 9, 9))


@pytest.mark.parametrize(
    "forward",
    [
        lambda x, conv: conv(x) + x.mean((2, 3), keepdim=True),
        lambda x, conv: conv(x) + x[:, :1],
        lambda x, conv: torch.add(conv(x), x, alpha=2),
    ],
    ids=["per-channel residual", "one-channel residual", "scaled residual"],
)
def test_sums_that_the_epilogue_cannot_express_stay_sums(forward):
    model = Apply(forward, nn.Conv2d(8, 8, 3, padding=1)).eval()
    emitted = emit_fused(model, torch.randn(2, 8, 9, 9))
    assert "aten.add.Tensor" in ops_of(emitted)
    matches = find_matches(fold(canonicalize(trace(model, torch.randn(2, 8, 9, 9)))))
    assert all(match.arguments["residual"] is None for match in matches)
    assert_as_exact_as(emitted, model, torch.randn(2, 8, 9, 9))


def test_an_output_read_twice_is_not_swallowed():
    def forward(x, depthwise, pointwise):
        y = depthwise(x)
        return pointwise(y.relu()) + y.sum((2, 3), keepdim=True)

    model = Apply(forward, nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)).eval()
    emitted = emit_fused(model, torch.randn(2, 8, 9, 9))
    assert "separable_conv2d" not in ops_of(emitted)
    assert "depthwise_conv2d" in ops_of(emitted)
    assert_as_exact_as(emitted, model, torch.randn(2, 8, 9, 9))


def test_a_residual_block_of_two_projections_fuses_the_sum_into_one():
    def forward(x, a, b):
        return (a(x) + b(x)).relu()

    model = Apply(forward, nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(4, 8, 1)).eval()
    emitted = emit_fused(model, torch.randn(2, 4, 9, 9))
    assert sorted(ops_of(emitted)) == ["conv2d", "pointwise_conv2d"]
    assert_as_exact_as(emitted, model, torch.randn(2, 4, 9, 9))


def test_a_convolution_of_one_channel_is_dense_not_depthwise():
    emitted = emit_fused(nn.Conv2d(1, 8, 3).eval(), torch.randn(2, 1, 9, 9))
    assert ops_of(emitted) == ["conv2d"]


def test_squeeze_and_excitation_scales_the_input_of_the_projection():
    def forward(x, reduce, expand, project):
        gate = expand(reduce(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()
        return project(x * gate)

    model = Apply(forward, nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1), nn.Conv2d(16, 8, 1)).eval()
    x = torch.randn(2, 16, 7, 7)
    emitted = emit_fused(model, x)
    assert "aten.mul.Tensor" not in ops_of(emitted)
    scaled = [n for n in emitted.body.graph.nodes if n.op == "call_function" and len(n.args) > 5]
    assert len(scaled) == 1
    assert_as_exact_as(emitted, model, x)


@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_pooled_and_flattened_images_are_one_operation(backend):
    model = nn.Sequential(
        nn.MaxPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4), nn.ReLU()
    ).eval()
    emitted = emit_fused(model, torch.randn(2, 6, 9, 9), backend)
    assert ops_of(emitted) == ["max_pool2d", "global_avg_pool2d", "linear"]
    assert_as_exact_as(emitted, model, torch.randn(5, 6, 9, 9))


@pytest.mark.parametrize(("size", "op"), [(9, "max_pool2d"), (8, "aten.max_pool2d")], ids=["whole", "cut off"])
def test_windows_that_ceil_mode_adds_are_pooled_as_they_came(size, op):
    model = nn.Sequential(nn.MaxPool2d(3, 2, ceil_mode=True), nn.Conv2d(6, 4, 1)).eval()
    emitted = emit_fused(model, torch.randn(2, 6, size, size), FUSED_BACKENDS[-1])
    assert ops_of(emitted) == [op, "pointwise_conv2d"]
    assert_as_exact_as(emitted, model, torch.randn(5, 6, size, size))


def test_a_pooled_image_reshaped_by_its_own_sizes_is_one_operation():
    model = Apply(lambda x, pool: pool(x).view(x.size(0), x.size(1)), nn.AdaptiveAvgPool2d(1)).eval()
    emitted = emit_fused(model, torch.randn(2, 6, 9, 9), FUSED_BACKENDS[-1])
    assert "global_avg_pool2d" in ops_of(emitted)
    assert_as_exact_as(emitted, model, torch.randn(5, 6, 9, 9))


@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_chains_become_separable_convolutions_and_inverted_residuals(backend):
    expand = nn.Sequential(nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6())
    narrow = nn.Sequential(*separable(24, 8)[:-1])
    model = with_random_norms(Apply(lambda x, a, b, c: c(x + b(a(x))), expand, narrow, separable(8, 16, stride=2)))
    emitted = emit_fused(model, torch.randn(2, 8, 9, 9), backend)
    assert ops_of(emitted) == ["inverted_residual", "separable_conv2d"]
    assert_as_exact_as(emitted, model, torch.randn(3, 8, 9, 9))


def test_affine_steps_after_a_convolution_are_folded_into_it():
    scale = nn.Parameter(torch.rand(8, 1, 1) + 0.5)

    def forward(x, conv, norm):
        return (norm(conv(x)) * scale - 0.5) / 2 + 1

    model = Apply(forward, nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    model.scale = scale
    model = with_random_norms(model)
    emitted = emit_fused(model, torch.randn(2, 3, 9, 9))
    assert ops_of(emitted) == ["conv2d"]

    class Double(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = copy.deepcopy(model.layers[0]).double(), copy.deepcopy(model.layers[1]).double()

        def forward(self, x):
            return (self.norm(self.conv(x)) * scale.double() - 0.5) / 2 + 1

    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(emitted(x).double(), Double().eval()(x.double()), rtol=1e-5, atol=1e-5)


def test_norms_and_activations_behind_a_concatenation_go_into_the_layers_before_it():
    def forward(x, a, b, norm):
        left, right = x.chunk(2, dim=1)
        return F.silu(norm(torch.cat([a(left), b(right)], 1)))

    layers = nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.Conv2d(4, 5, 5, padding=2, bias=False)
    for norm in (with_random_norms(nn.BatchNorm2d(11)), nn.BatchNorm2d(11, affine=False)):
        model = Apply(forward, *layers, norm).eval()
        x = torch.randn(2, 8, 7, 7)
        emitted = emit_fused(model, x)
        assert not {"aten.batch_norm", "aten.silu"} & set(ops_of(emitted))
        assert_as_exact_as(emitted, model, x)


@pytest.mark.parametrize(
    "forward",
    [
        lambda x, a, b, norm: norm(torch.cat([a(x), x], 1)),
        lambda x, a, b, norm: (y := torch.cat([a(x), b(x)], 1)) + norm(y),
        lambda x, a, b, norm: norm(torch.cat([(y := a(x)), b(x)], 1)) + y.mean((1, 2, 3), True),
        lambda x, a, b, norm: norm(torch.cat([a(x), b(x)], 2).reshape(2, 16, 7, 7)),
    ],
    ids=["a part that is no layer", "the whole is read", "a part is read", "rows"],
)
def test_norms_behind_other_concatenations_stay(forward):
    model = Apply(forward, nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), with_random_norms(nn.BatchNorm2d(16))).eval()
    x = torch.randn(2, 8, 7, 7)
    emitted = emit_fused(model, x)
    assert "aten.batch_norm" in ops_of(emitted)
    assert_as_exact_as(emitted, model, x)


def test_a_sum_behind_a_concatenation_goes_into_the_layers_before_it():
    def forward(x, a, b, norm):
        y = norm(torch.cat([a(x[:, :5]), b(x[:, 3:])], 1))
        return (x + y).relu()

    model = Apply(
        forward, nn.Conv2d(5, 6, 1), nn.Conv2d(5, 2, 3, padding=1), with_random_norms(nn.BatchNorm2d(8))
    ).eval()
    x = torch.randn(2, 8, 7, 7)
    emitted = emit_fused(model, x)
    assert set(ops_of(emitted)) <= {"pointwise_conv2d", "conv2d", "aten.slice.Tensor", "aten.cat"}
    assert_as_exact_as(emitted, model, x)


@pytest.mark.parametrize(
    "split",
    [lambda y: y.split([5, 3], 1), lambda y: y.chunk(2, 1), lambda y: y.split(4, -3)],
    ids=["sizes", "chunks", "equal"],
)
def test_a_gate_before_a_split_scales_the_input_of_every_part(split):
    def forward(x, reduce, expand, a, b):
        gate = expand(reduce(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        left, right = split(gate * x)
        return torch.cat([a(left), b(right)], 1)

    sizes = [part.shape[1] for part in split(torch.empty(1, 8, 1, 1))]
    layers = [nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), *(nn.Conv2d(size, 6, 1) for size in sizes)]
    model = Apply(forward, *layers).eval()
    x = torch.randn(2, 8, 7, 7)
    emitted = emit_fused(model, x)
    assert "aten.mul.Tensor" not in ops_of(emitted)
    assert_as_exact_as(emitted, model, x)


def test_one_layer_twice_in_a_concatenation_is_normalised_for_each_place():
    model = Apply(
        lambda x, a, norm: norm(torch.cat([(y := a(x)), y], 1)).relu(),
        nn.Conv2d(8, 8, 1),
        with_random_norms(nn.BatchNorm2d(16)),
    ).eval()
    x = torch.randn(2, 8, 7, 7)
    assert_as_exact_as(emit_fused(model, x), model, x)


def test_a_batch_norm_over_the_wrong_dimension_of_a_linear_layer_is_not_folded():
    model = with_random_norms(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(4)))
    x = torch.randn(3, 4, 6)
    assert_as_exact_as(emit_fused(model, x), model, x)


def test_shared_weights_are_folded_for_each_use_apart():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = with_random_norms(nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), conv, nn.BatchNorm2d(4)))
    before = copy.deepcopy(model.state_dict())
    emitted = emit_fused(model, torch.randn(2, 4, 9, 9))
    assert ops_of(emitted) == ["conv2d", "conv2d"]
    assert_as_exact_as(emitted, model, torch.randn(2, 4, 9, 9))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_keep_their_names():
    model = with_random_norms(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)))
    assert {name for name, _ in emit_fused(model, torch.randn(1, 3, 8, 8)).named_parameters()} == {
        "body.0.weight",
        "body.0.bias",
    }


def test_a_model_keeps_its_input_and_output_structure():
    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, inputs, other):
            return {"sum": self.conv(inputs["x"]) + self.conv(other), "pair": (inputs["x"], [other])}

    model = Pairs().eval()
    x, y = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    emitted = emit_fused(model, ({"x": x}, y))
    result = emitted({"x": x}, y)
    assert set(result) == {"sum", "pair"}
    torch.testing.assert_close(result["sum"], model({"x": x}, y)["sum"], rtol=1e-4, atol=1e-5)
    assert torch.equal(result["pair"][1][0], y)


def test_measured_emission_chooses_the_fastest_of_every_place():
    model = with_random_norms(
        nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), *separable(16, 32))
    )
    x = torch.randn(1, 3, 32, 32)
    emitted = kp.emit(model, x, progress=False)
    assert_as_exact_as(emitted, model, x)
    record = emitted.record
    covered = [name for place in record.places for name in place.operations]
    assert len(covered) == len(set(covered))
    for place in record.places:
        valid = [c.milliseconds for c in place.candidates if c.milliseconds is not None and "+" not in c.name]
        assert place.milliseconds == min(valid)
        assert any(candidate.name.startswith("aten[") for candidate in place.candidates)
        assert any(candidate.name == place.choice for candidate in place.candidates)
    assert sum(place.flops for place in record.places) == 2 * 16 * 16 * (16 * 27 + 16 * 9 + 16 * 32)
    assert record.original_milliseconds > 0
    assert record.kept_original or record.emitted_milliseconds <= record.original_milliseconds
    summary = emitted.summary()
    assert all(place.choice in summary and place.name in summary for place in record.places)
    assert EmissionRecord.from_json(json.loads(json.dumps(record.to_json()))) == record


def test_layers_timed_once_are_not_timed_again(monkeypatch):
    model, x = nn.Conv2d(3, 8, 3).eval(), torch.randn(1, 3, 16, 16)
    first = kp.emit(model, x, progress=False)
    monkeypatch.setattr(evaluate, "race", lambda *_, **__: pytest.fail("timed again"))
    again = kp.emit(model, x, progress=False)
    assert again.record.places[0].milliseconds == first.record.places[0].milliseconds
    with pytest.raises(pytest.fail.Exception):
        kp.emit(model, x, progress=False, cache=False)
    with pytest.raises(pytest.fail.Exception):
        kp.emit(model, torch.randn(1, 3, 17, 16), progress=False)


def test_a_cache_that_cannot_be_read_or_written_costs_only_time(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("KERNELPRESS_CACHE", str(blocked / "inside"))
    assert kp.emit(nn.Conv2d(3, 8, 3).eval(), torch.randn(1, 3, 8, 8), progress=False).record.places


def test_candidates_outside_the_tolerance_are_refused_with_their_error():
    def half_wrong(candidate):
        return 1.0 if candidate.variant == "reference" else 2.0

    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.GELU()).eval()
    emitted = kp.emit(model, torch.randn(1, 64, 12, 12), cost=half_wrong, tolerance=1e-30, progress=False)
    refused = [c for place in emitted.record.places for c in place.candidates if c.refusal]
    assert any(c.error is not None and "above the tolerance" in c.refusal for c in refused)
    for place in emitted.record.places:
        chosen = next(c for c in place.candidates if c.name == place.choice)
        assert chosen.error <= 1e-30


def test_the_original_is_kept_where_the_emitted_model_is_slower(monkeypatch):
    real = pipeline.race

    def emitted_is_slow(calls, rivals, **options):
        return {**real(calls, rivals, **options), "emitted": 1e6}

    monkeypatch.setattr(pipeline, "race", emitted_is_slow)
    model = with_random_norms(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    x = torch.randn(2, 3, 9, 9)
    emitted = kp.emit(model, x, progress=False)
    assert emitted.record.kept_original
    assert "kept the original" in emitted.summary()
    assert "aten.batch_norm" in ops_of(emitted)
    assert_as_exact_as(emitted, model, x)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)], ids=str
)
def test_models_of_other_dtypes_emit_to_what_can_run_them(dtype, bound):
    model = with_random_norms(nn.Sequential(*separable(8, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten())).to(dtype)
    x = torch.randn(2, 8, 9, 9, dtype=dtype)
    emitted = kp.emit(model, x, progress=False)
    assert "[cpu]" not in "".join(place.choice for place in emitted.record.places)
    assert relative_error(emitted(x), model(x)) <= bound


def test_emission_leaves_the_model_and_its_training_mode_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    before = copy.deepcopy(model.state_dict())
    emitted = emit_fused(model, torch.randn(2, 3, 8, 8))
    assert model.training
    assert not emitted.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="inference"):
        emitted.train()


def test_gradients_reach_the_inputs_of_an_emitted_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    model(x).square().sum().backward()
    expected, x.grad = x.grad, None
    emit_fused(model, x.detach())(x).square().sum().backward()
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tracked", [False, True], ids=["its own statistics", "running statistics"])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_instance_norm_of_one_image_keeps_its_gradients_and_its_digits(tracked, mean):
    """PyTorch's own gradient is wrong where what comes back lies in channels_last, as convolutions there give it."""
    norm = nn.InstanceNorm2d(8, affine=True, track_running_stats=tracked)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), norm, nn.Conv2d(8, 4, 3)).eval()
    nn.init.constant_(model[0].bias, mean)
    x = torch.randn(1, 3, 12, 12)
    emitted = kp.emit(model, x, cost=lambda candidate: 1.0 - 0.5 * candidate.is_original, progress=False)
    weight = torch.randn_like(model(x))

    def answer_and_slope(run, x):
        x = x.requires_grad_()
        y = run(x)
        return y, *torch.autograd.grad((y * weight).sum(), x)

    wanted = answer_and_slope(copy.deepcopy(model).double(), x.double())
    for got, exact in zip(answer_and_slope(emitted, x.clone()), wanted, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=2e-5)


def test_gradients_stop_where_the_model_detaches():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            y = self.conv(x)
            return y * y.sigmoid().detach()

    model = Gated().eval()
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    (got,) = torch.autograd.grad(emit_fused(model, x.detach())(x).sum(), x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_nan_and_infinity_pass_through_as_in_the_original():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    emitted = emit_fused(model, torch.randn(1, 3, 8, 8))
    x = torch.randn(1, 3, 8, 8)
    x[0, 0, 2, 2] = math.nan
    x[0, 1, 6, 6] = math.inf
    assert torch.equal(torch.isfinite(emitted(x)), torch.isfinite(model(x)))


def test_a_model_that_cannot_be_exported_says_so():
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(TraceError):
        kp.emit(Branch(), torch.randn(1, 3))


@pytest.mark.parametrize("tolerance", [0, -1.0, math.inf])
def test_a_tolerance_that_is_no_positive_number_is_refused(tolerance):
    with pytest.raises(ValueError, match="tolerance"):
        kp.emit(nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8), tolerance=tolerance)


@pytest.fixture(params=FUSED_BACKENDS)
def saved(request, tmp_path):
    model = with_random_norms(
        nn.Sequential(nn.Conv2d(3, 8, 3, 2), *separable(8, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    )
    emitted = emit_fused(model, torch.randn(1, 3, 16, 16), request.param)
    path = tmp_path / "model.pt2"
    emitted.save(path)
    return emitted, path


def test_a_saved_model_loads_as_it_was(saved):
    emitted, path = saved
    loaded = kp.load(path)
    assert ops_of(loaded) == ops_of(emitted)
    assert loaded.record == emitted.record
    assert loaded.dynamic_batch
    for batch in (1, 4):
        x = torch.randn(batch, 3, 16, 16)
        assert torch.equal(loaded(x), emitted(x))
    loaded.save(path)
    assert torch.equal(kp.load(path)(x), emitted(x))


def test_a_channels_last_weight_survives_saving(tmp_path):
    model, x = nn.Conv2d(6, 10, (3, 5)).eval(), torch.randn(2, 6, 9, 9)
    emitted = kp.emit(model, x, cost=lambda c: 1.0 if c.label == "aten[channels_last]" else 2.0, progress=False)
    assert emitted.body.weight.is_contiguous(memory_format=torch.channels_last)
    emitted.save(tmp_path / "m.pt2")
    loaded = kp.load(tmp_path / "m.pt2")
    assert torch.equal(loaded.body.weight, model.weight)
    torch.testing.assert_close(loaded(x), model(x))


def test_a_full_disk_leaves_the_old_file(saved, monkeypatch):
    emitted, path = saved
    before = path.read_bytes()

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"model\.pt2 could not be written: No space left.*unchanged"):
        emitted.save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent).count(path.name) == 1
    assert not [name for name in os.listdir(path.parent) if name.startswith(".model.pt2")]


def test_saving_into_a_missing_folder_names_the_path(saved, tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        saved[0].save(tmp_path / "nowhere" / "m.pt2")


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "text"])
def test_damaged_files_are_refused_by_name(saved, damage):
    _, path = saved
    content = path.read_bytes()
    damaged = {"cut": content[: len(content) // 2], "noise": os.urandom(5000), "empty": b"", "text": b"hello"}
    path.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=r"model\.pt2"):
        kp.load(path)


def test_a_missing_file_and_an_archive_of_another_kind_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        kp.load(tmp_path / "absent.pt2")
    program = torch.export.export(nn.Linear(2, 2), (torch.randn(2, 2),))
    torch.export.save(program, tmp_path / "plain.pt2")
    with pytest.raises(ValueError, match="no emitted model"):
        kp.load(tmp_path / "plain.pt2")


def test_who_writes_into_a_result_changes_nothing_else():
    class Results(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.register_buffer("anchors", torch.randn(5))

        def forward(self, x):
            y = self.conv(x).relu()
            copies = x.flatten(1).clone(), x.transpose(2, 3).contiguous(), x.to(torch.float32, copy=True)
            return y, y.clone(), self.anchors * 2, self.anchors.view(-1).clone(), *copies

    model = Results().eval()
    emitted = emit_fused(model, torch.randn(2, 3, 4, 4))
    x = torch.randn(2, 3, 4, 4)
    for run in (emitted, kp.capture(emitted, x, cache=False)):
        expected, given = model(x), x.clone()
        for i in range(len(expected)):
            results = run(x)
            results[i].fill_(7.0)
            for j, (result, wanted) in enumerate(zip(results, expected, strict=True)):
                torch.testing.assert_close(result, torch.full_like(wanted, 7.0) if i == j else wanted)
            assert torch.equal(x, given)


def test_gradients_run_through_what_was_written_in_place():
    class Written(nn.Module):
        def forward(self, x):
            y = x + 1
            y[..., 1:] = y[..., :-1].clone()
            y[..., 0] = 0.5
            return y * 2

    x = torch.randn(2, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(Written()(x).sum(), x)
    emitted = kp.emit(Written().eval(), x.detach(), cost=lambda _: 1.0, progress=False)
    (got,) = torch.autograd.grad(emitted(x).sum(), x)
    assert torch.equal(got, expected)


def test_what_the_model_makes_contiguous_is_made_so_however_it_comes():
    class Ordered(nn.Module):
        def forward(self, x):
            return x.contiguous(), x.contiguous(memory_format=torch.channels_last)

    x = torch.randn(2, 3, 4, 5)
    emitted = kp.emit(Ordered().eval(), x, cost=lambda _: 1.0, progress=False)
    for form in (x, x.transpose(2, 3).contiguous().transpose(2, 3), x[:1].expand(2, 3, 4, 5)):
        for result, expected in zip(emitted(form), Ordered()(form), strict=True):
            assert torch.equal(result, expected)
            assert (result.data_ptr() == form.data_ptr()) == (expected.data_ptr() == form.data_ptr())


def test_random_values_of_large_tensors_differ_from_image_to_image():
    shape = (3, 64, 112, 112)
    values = Example(shape, PIXELS.stride(shape), torch.float32).random()
    assert values.stride() == PIXELS.stride(shape)
    assert abs(float(values.mean())) < 0.01
    assert float(values.std()) == pytest.approx(1.0, abs=0.01)
    assert int((values[0] == values[1]).sum()) < 10


def test_random_values_reach_every_element_of_a_strided_form():
    values = Example((5, 7), (20, 2), torch.float32).random()
    assert values.stride() == (20, 2)
    assert len(values.unique()) == 35


def test_what_competes_with_something_new_is_timed_again():
    def trial(key):
        return evaluate._Trial(SimpleNamespace(is_original=False, gives=None), key, 0.0, None)

    cache = TimingCache(torch.device("cpu"), enabled=False)
    for known in ("old", "older", "part", "apart"):
        cache.put(known, 1.0)
    rivals = [{("old",), ("part", "new")}, {("older",), ("part",)}, {("apart",)}]
    running = [trial(key) for key in ("old", "older", "part", "new", "apart")]
    assert list(evaluate._to_time(running, rivals, cache)) == ["old", "part", "new"]
    cache.put("new", 1.0)
    assert not evaluate._to_time(running, rivals, cache)
