"""Dynamic quantization: linear layers in int8, each row of what they read by a scale of its own, found at each call."""

import copy

import pytest
import torch
import torch.nn.functional as F
from emitting import Apply, assert_saving_and_capture_keep, matches, ops_of, prefer, torch_steps
from torch import nn

import kernelpress as kp
from kernelpress import compress
from kernelpress.emit.tolerance import INT8_TOLERANCE, relative_error
from kernelpress.press.reading import load_recipe
from kernelpress.runtime import native
from kernelpress.runtime.torch_private import define_quantized_ops

pytest.importorskip("torchao", reason="needs torchao: pip install 'kernelpress[quantize]'")

needs_native = pytest.mark.skipif(native.cpu() is None, reason=f"no native module: {native.load().absent_because}")
exact_matches = pytest.mark.usefixtures("own_cache", "every_match_is_exact")

define_quantized_ops()
quantized_ops = torch.ops.quantized_decomposed


def quantize(model, x, **options):
    return compress.quantize(model.eval(), x, method="dynamic", progress=False, **options)


def record(quantized):
    return compress.record_of(quantized)[-1]


def our_ops(emitted):
    return [name for name in ops_of(emitted) if "getitem" not in name]


def prefer_int8(candidate):
    """A cost under which int8 products win on their native kernel, if there is one."""
    backend = "cpu" if native.cpu() is not None else "reference"
    return 1.0 if candidate.name == "int8_matmul" and candidate.variant == backend else 10.0 * len(candidate.nodes)


def emit_int8(quantized, x):
    emitted = kp.emit(quantized, x, cost=prefer_int8, progress=False)
    assert not emitted.record.kept_original, emitted.record.reason
    return emitted


def mlp():
    return nn.Sequential(nn.Linear(37, 50), nn.ReLU(), nn.Linear(50, 9, bias=False))


class Cnn(nn.Module):
    """A convolution, and linear layers behind it."""

    def __init__(self):
        super().__init__()
        self.conv, self.hidden, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 20), nn.Linear(20, 5)

    def forward(self, x):
        return self.head(F.gelu(self.hidden(F.relu(self.conv(x)).mean((2, 3)))))


def bound(layer, quantized, name, x):
    """How far each result of a row may be off: half a step of each input times |w|, half a step of each weight times
    |x|, and what floats round."""
    weight = layer.weight.double()
    step = quantized.get_buffer(f"{name}.weight_scale").double()
    low, high = x.double().amin(-1).clamp(max=0), x.double().amax(-1).clamp(min=0)
    rows = ((high - low) / 255 / 2)[..., None] * (weight.abs().sum(1) + step / 2 * weight.shape[1])
    weights = x.double().abs().sum(-1)[..., None] * step / 2
    size = x.double().abs() @ weight.abs().T
    return 1.001 * (rows + weights) + 1e-6 * size


class TestMeaning:
    @pytest.mark.parametrize("sizes", [(4, 37), (37,), (2, 3, 37), (2, 1, 3, 37)], ids=str)
    def test_each_row_keeps_the_bound_of_its_own_range(self, sizes):
        layer = nn.Linear(37, 11)
        x = torch.randn(*sizes) + 0.3
        if len(sizes) > 1:
            x *= 10.0 ** torch.randint(-4, 4, (*sizes[:-1], 1))
        quantized = quantize(nn.Sequential(layer), x)
        bias = layer.bias.detach().double()
        ours = quantized(x).double() - bias
        exact = F.linear(x.double(), layer.weight.detach().double())
        slack = 1e-6 * bias.abs()  # of adding it in float32
        assert ours.shape == exact.shape
        assert bool(((ours - exact).abs() <= bound(layer, quantized, "0", x) + slack).all())

    def test_a_row_does_not_depend_on_the_others(self):
        model, x = mlp(), torch.randn(5, 37)
        quantized = quantize(model, x)
        x[2] *= 1e4
        torch.testing.assert_close(quantized(x)[3:4], quantized(x[3:4]), rtol=1e-5, atol=1e-6)

    def test_only_linear_layers_are_int8(self):
        model, x = Cnn().eval(), torch.randn(2, 3, 8, 8)
        quantized = quantize(model, x)
        int8 = {name for name, p in quantized.named_parameters() if p.dtype == torch.int8}
        assert int8 == {"hidden.weight", "head.weight"}
        torch.testing.assert_close(quantized.get_parameter("conv.weight"), model.conv.weight)
        assert relative_error(quantized(x), model(x)) <= 0.03
        told = record(quantized)
        assert [(skipped.layers, skipped.reason) for skipped in told.skipped] == [
            (("conv",), "dynamic quantization is of linear layers")
        ]
        assert {promise.layer for promise in told.promises} == {"hidden", "head"}
        assert {error.layer: error.is_int8 for error in told.errors} == {"hidden": True, "head": True, "conv": False}

    def test_layers_that_read_one_tensor_share_its_rounding(self):
        model = Apply(lambda x, a, b: a(x) * b(x), nn.Linear(12, 8), nn.Linear(12, 8))
        quantized = quantize(model, torch.randn(3, 12))
        assert sum("choose_qparams" in str(node.target) for node in quantized.graph.nodes) == 1

    def test_data_measures_errors_and_options_measure_on_it(self):
        model, x = mlp(), torch.randn(4, 37)
        data = torch.randn(64, 37)
        plain = quantize(model, x, data=data)
        better = quantize(model, x, data=data, rounding="adaptive", correct_bias=True, equalize=True)
        assert relative_error(better(data), model(data)) < 1.2 * relative_error(plain(data), model(data))
        notes = record(better).notes
        assert any("equalized" in note for note in notes)
        assert any("adaptively" in note for note in notes)

    def test_a_budget_keeps_layers_float(self):
        model, x, data = mlp(), torch.randn(4, 37), torch.randn(32, 37)
        lost = relative_error(quantize(model, x)(data), model(data))
        quantized = quantize(model, x, data=data, budget=0.9 * lost)
        assert sum(error.is_int8 for error in record(quantized).errors) == 1
        assert sum(error.is_int8 for error in record(quantize(model, x, ignore=["0"])).errors) == 1

    def test_rows_of_zeros_and_of_nan(self):
        model, x = mlp(), torch.randn(4, 37)
        quantized = quantize(model, x)
        x[1], x[2, 5] = 0, torch.nan
        y = quantized(x)
        torch.testing.assert_close(y[1], model(x)[1], rtol=0.05, atol=0.05)
        assert bool(y[2].isnan().all())
        assert bool(y[[0, 1, 3]].isfinite().all())

    def test_files_give_the_same_model(self, tmp_path):
        model, x = Cnn().eval(), torch.randn(2, 3, 8, 8)
        quantized = quantize(model, x)
        compress.save(quantized, tmp_path / "m.safetensors")
        loaded = compress.load(tmp_path / "m.safetensors", Cnn())
        assert torch.equal(loaded(x), quantized(x))
        assert torch.equal(copy.deepcopy(quantized)(x), quantized(x))


@exact_matches
class TestEmission:
    @pytest.mark.parametrize("sizes", [(4, 37), (37,), (2, 3, 37), (2, 1, 3, 37)], ids=str)
    def test_layers_run_on_rows_quantized_before_them(self, sizes, tmp_path):
        model, x = mlp(), torch.randn(*sizes)
        quantized = quantize(model, x)
        emitted = emit_int8(quantized, x)
        assert our_ops(emitted) == ["quantize_rows", "int8_matmul"] * 2
        assert relative_error(emitted(x), quantized(x)) <= INT8_TOLERANCE
        if len(sizes) > 1:
            assert_saving_and_capture_keep(emitted, tmp_path, x)
            assert emitted(x[:0]).shape == model(x[:0]).shape

    def test_every_step_of_a_plan_is_native_on_every_instruction_set(self, int8_cpu_variant):
        model, x = Cnn().eval(), torch.randn(2, 3, 8, 8)
        quantized = quantize(model, x)
        emitted = kp.emit(quantized, x, cost=prefer("cpu"), progress=False)
        plan = kp.capture(emitted, x)
        assert [step for step in plan.steps if "int8" in step or "rows" in step] == [
            *("native quantize_rows", "native int8_matmul"),
            *("native quantize_rows", "native int8_matmul"),
        ]
        assert torch_steps(emitted, x) == []
        for inputs in (x, torch.randn(2, 3, 8, 8)):
            torch.testing.assert_close(plan(inputs), emitted(inputs), rtol=1e-6, atol=1e-6)
            assert relative_error(plan(inputs), quantized(inputs)) <= INT8_TOLERANCE

    def test_the_native_layer_is_the_reference_bit_for_bit(self, int8_cpu_variant):
        model, x = nn.Sequential(nn.Linear(131, 70)), torch.randn(9, 131)
        quantized = quantize(model, x)
        emitted = emit_int8(quantized, x)
        on_reference = kp.emit(quantized, x, cost=prefer_reference, progress=False)
        assert our_ops(on_reference) == our_ops(emitted) == ["quantize_rows", "int8_matmul"]
        x = torch.randn(9, 131) * 10.0 ** torch.randint(-3, 3, (9, 1))
        assert torch.equal(emitted(x), on_reference(x))
        assert torch.equal(kp.capture(emitted, x)(x), on_reference(x))

    def test_times_decide(self):
        model, x = mlp(), torch.randn(4, 37)
        quantized = quantize(model, x)
        found = {c.variant for c in candidates(quantized, x) if c.name == "int8_matmul"}
        assert found >= {"cpu", "cuda", "triton", "reference"}
        never = kp.emit(quantized, x, cost=lambda c: 1.0 if c.is_original else 100.0, progress=False)
        assert "quantize_rows" not in our_ops(never)
        torch.testing.assert_close(never(x), quantized(x))
        measured = kp.emit(quantized, x, progress=False, cache=False)
        assert all(place.milliseconds is not None for place in measured.record.places)
        assert relative_error(measured(x), quantized(x)) <= INT8_TOLERANCE

    def test_layers_of_one_input_quantize_it_once(self, tmp_path):
        model = Apply(lambda x, a, b, c: a(x) * b(x) + c(x), *(nn.Linear(24, 16) for _ in range(3)))
        x = torch.randn(3, 24)
        quantized = quantize(model, x)
        emitted = emit_int8(quantized, x)
        assert our_ops(emitted).count("quantize_rows") == 1
        assert our_ops(emitted).count("int8_matmul") == 3
        assert relative_error(emitted(x), quantized(x)) <= INT8_TOLERANCE
        assert_saving_and_capture_keep(emitted, tmp_path, x)

    def test_sums_and_activations_belong_to_the_layer(self):
        model = Apply(lambda x, a: F.relu(a(x) + x), nn.Linear(24, 24))
        x = torch.randn(3, 24)
        quantized = quantize(model, x)
        emitted = emit_int8(quantized, x)
        assert our_ops(emitted) == ["quantize_rows", "int8_matmul"]
        assert relative_error(emitted(x), quantized(x)) <= INT8_TOLERANCE

    def test_values_that_others_read_too_stay_beside_the_layer(self):
        model = Apply(lambda x, a: (a(F.relu(x)), F.relu(x).sum()), nn.Linear(24, 24))
        x = torch.randn(3, 24)
        quantized = quantize(model, x)
        emitted = emit_int8(quantized, x)
        for ours, theirs in zip(emitted(x), quantized(x), strict=True):
            assert relative_error(ours, theirs) <= INT8_TOLERANCE

    def test_rows_without_zero_points(self):
        class Symmetric(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(20, 7)
                self.register_buffer("scale", self.linear.weight.detach().abs().amax(1) / 127)
                values = self.linear.weight.detach() / self.scale[:, None]
                self.register_buffer("values", values.round().to(torch.int8))

            def forward(self, x):
                scale, zero = quantized_ops.choose_qparams_per_token(x, torch.int8)
                limits = (-127, 127, torch.int8)
                rounded = quantized_ops.quantize_per_token(x, scale, zero, *limits)
                x = quantized_ops.dequantize_per_token(rounded, scale, zero, *limits, torch.float32)
                weight = quantized_ops.dequantize_per_channel(self.values, self.scale, None, 0, *limits)
                return F.linear(x, weight, self.linear.bias)

        model, x = Symmetric().eval(), torch.randn(3, 20)
        (match,) = [match for match in matches(model, x) if match.op == "int8_matmul"]
        assert match.row_scales.symmetric
        emitted = emit_int8(model, x)
        assert our_ops(emitted) == ["quantize_rows", "int8_matmul"]
        assert relative_error(emitted(x), model(x)) <= INT8_TOLERANCE

    @pytest.mark.parametrize("sizes", [(4, 48), (2, 3, 48)], ids=str)
    def test_graphs_of_torchaos_dynamic_quantizer(self, sizes):
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer

        quantizer = x86_inductor_quantizer.X86InductorQuantizer()
        quantizer.set_global(x86_inductor_quantizer.get_default_x86_inductor_quantization_config(is_dynamic=True))
        model, x = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 10)).eval(), torch.randn(*sizes)
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
        prepared = prepare_pt2e(exported, quantizer)
        prepared(x)
        theirs = convert_pt2e(prepared)
        if not any("choose_qparams" in str(node.target) for node in theirs.graph.nodes):
            pytest.skip("this torchao quantizes nothing under this torch")
        emitted = emit_int8(theirs, x)
        assert our_ops(emitted).count("quantize_rows") == our_ops(emitted).count("int8_matmul") == 2
        for inputs in (x, torch.randn(7, *sizes[1:])):
            assert relative_error(emitted(inputs), theirs(inputs)) <= INT8_TOLERANCE
        assert relative_error(kp.capture(emitted, x)(x), theirs(x)) <= INT8_TOLERANCE


def prefer_reference(candidate):
    is_wanted = candidate.name == "int8_matmul" and candidate.variant == "reference"
    return 1.0 if is_wanted else 10.0 * len(candidate.nodes)


def candidates(model, x):
    """All that emission weighs."""
    from kernelpress.emit.candidates import candidates_for
    from kernelpress.emit.canonical import canonicalize
    from kernelpress.emit.fold import fold
    from kernelpress.emit.fuse import find_matches
    from kernelpress.trace import trace

    graph_module = fold(canonicalize(trace(model.eval(), x)))
    order = {node: i for i, node in enumerate(graph_module.graph.nodes)}
    return [c for match in find_matches(graph_module) for c in candidates_for(match, order)]


class TestBadInput:
    def test_a_model_without_linear_layers_is_refused_with_the_reason(self):
        with pytest.raises(ValueError, match="no layer of Conv2d can be int8: dynamic quantization is of linear"):
            quantize(nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8))
        with pytest.raises(ValueError, match="no layer of ReLU can be int8: it has none"):
            quantize(nn.ReLU(), torch.randn(1, 3))

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"observer": "mse"}, "observer: .*each row's range as it comes.*got 'mse'"),
            ({"correct_bias": True}, "data: expected examples, which correct_bias measure"),
            ({"rounding": "adaptive", "budget": 0.1}, "data: .*rounding and budget measure"),
            ({"data": []}, "data: expected at least one batch"),
        ],
    )
    def test_options(self, options, words):
        with pytest.raises(ValueError, match=words):
            quantize(mlp(), torch.randn(2, 37), **options)

    def test_other_methods_are_told_and_static_needs_data(self):
        with pytest.raises(ValueError, match="method: expected one of 'static', 'dynamic', 'qat', got 'dynamically'"):
            compress.quantize(mlp(), torch.randn(2, 37), method="dynamically")
        with pytest.raises(ValueError, match=r"data: expected calibration batches.*got None"):
            compress.quantize(mlp(), torch.randn(2, 37), progress=False)

    @pytest.mark.parametrize("method", ["dynamic", "static"])
    def test_it_is_not_quantized_again(self, method):
        x = torch.randn(2, 37)
        with pytest.raises(ValueError, match="quantized already"):
            compress.quantize(quantize(mlp(), x), x, data=x, method=method, progress=False)

    def test_it_is_nothing_to_convert(self):
        with pytest.raises(ValueError, match="expected what quantize"):
            compress.convert_qat(quantize(mlp(), torch.randn(2, 37)))


def test_a_recipe_may_ask_for_it(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("model: squeezenet1_1\nsteps: [{train: {epochs: 1}}, {quantize: {method: dynamic}}]\n")
    step = load_recipe(file).run_steps()[2]
    assert (step.name, step.section.method) == ("quantize", "dynamic")
