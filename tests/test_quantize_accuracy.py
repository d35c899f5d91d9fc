"""What makes quantized networks more accurate: equalization, bias correction, adaptive rounding, layers left in float,
training; and quantized networks on disk and in recipes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from emitting import emit_onto
from support import with_random_norms
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kernelpress import compress
from kernelpress.compress.changes import Quantized
from kernelpress.emit.tolerance import relative_error

pytest.importorskip("torchao", reason="needs torchao: pip install 'kernelpress[quantize]'")

INT8 = ("int8_conv2d", "int8_depthwise_conv2d", "int8_matmul", "int8_add", "quantize", "dequantize")


def quantize(model, x, **options):
    return compress.quantize(model.eval(), x, data=x, progress=False, **options)


def error(quantized, model, x):
    with torch.no_grad():
        return relative_error(quantized(x), model(x))


def notes(quantized):
    return compress.record_of(quantized)[-1].notes


class TestEqualization:
    @pytest.mark.parametrize("middle", [nn.ReLU(), nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))], ids=["relu", "pool"])
    @pytest.mark.parametrize(
        "second",
        [
            lambda: nn.Conv2d(8, 6, 3, padding=1),
            lambda: nn.Conv2d(8, 16, 3, padding=1, groups=8),
            lambda: nn.Conv2d(8, 12, 3, padding=1, groups=4),
        ],
        ids=["dense", "depthwise", "groups"],
    )
    def test_channels_of_unlike_ranges_are_made_like(self, middle, second):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), middle, second()).eval()
        factors = 10 ** torch.linspace(-2, 2, 8)
        weight = model[2].weight.data
        with torch.no_grad():
            model[0].weight.mul_(factors.reshape(-1, 1, 1, 1))
            model[0].bias.mul_(factors)
            grouped = weight.unflatten(0, (model[2].groups, -1))
            grouped.div_(factors.reshape(model[2].groups, 1, -1, 1, 1))
        x = torch.randn(4, 3, 12, 12)
        plain, equalized = quantize(model, x), quantize(model, x, equalize=True)
        assert error(equalized, model, x) < 0.02 < error(plain, model, x)
        assert notes(equalized) == ("0 and 2 were equalized",)

    def test_a_network_without_like_pairs_stays_what_it_is(self):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardswish(), nn.Conv2d(8, 4, 1)).eval()
        x = torch.randn(2, 3, 9, 9)
        torch.testing.assert_close(quantize(model, x, equalize=True)(x), quantize(model, x)(x), rtol=0, atol=0)


class TestBiasCorrection:
    @pytest.mark.parametrize("bias", [True, False])
    def test_the_mean_of_every_channel_comes_back(self, bias):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(16, 8, 3, bias=bias)).eval()
        x = 1 + torch.rand(8, 16, 9, 9)
        with torch.no_grad():
            # Rounding of weights this coarse shifts every channel.
            model[0].weight[:, 0, 0, 0] = 40
            off = (quantize(model, x)(x) - model(x)).mean((0, 2, 3)).abs()
            corrected = (quantize(model, x, correct_bias=True)(x) - model(x)).mean((0, 2, 3)).abs()
        assert float(corrected.max()) < 0.1 * float(off.max())


class TestRounding:
    def test_adaptive_rounding_is_nearer_to_the_layer(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()
        x = torch.rand(4, 8, 8, 8)
        with torch.no_grad():
            model[0].weight[:, 0, 0, 0] = 30
        plain, adaptive = quantize(model, x), quantize(model, x, rounding="adaptive")
        assert any("of 2 layers are rounded adaptively" in note for note in notes(adaptive))
        first = {e.layer: e.error for e in compress.record_of(adaptive)[-1].errors}["0"]
        assert first < 0.8 * {e.layer: e.error for e in compress.record_of(plain)[-1].errors}["0"]
        steps = adaptive.get_parameter("0.weight").int() - plain.get_parameter("0.weight").int()
        assert steps.abs().max() == 1


class TestBudget:
    @pytest.fixture
    def model(self):
        """The second layer is what int8 disturbs: one weight is far larger than the others, on a channel of zeros."""
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)]
        model = nn.Sequential(*layers).eval()
        with torch.no_grad():
            model[0].weight[0], model[0].bias[0] = 0, 0
            model[2].weight[:, 0, 0, 0] = 100
        return model

    def test_the_fewest_layers_stay_float_for_it(self, model):
        x = torch.randn(8, 3, 12, 12)
        assert error(quantize(model, x), model, x) > 0.1
        quantized = quantize(model, x, budget=0.05)
        assert error(quantized, model, x) <= 0.05
        (skipped,) = compress.record_of(quantized)[-1].skipped
        assert skipped.layers == ("2",)
        assert skipped.reason.startswith("kept in float for the budget of 0.05: SQNR ")

    def test_a_metric_of_ones_own(self, model):
        x = torch.randn(8, 3, 12, 12)
        asked = []

        def metric(candidate):
            asked.append(candidate)
            return -float(relative_error(candidate(x), model(x)))

        quantized = quantize(model, x, budget=0.05, metric=metric)
        assert asked[0] is model
        assert compress.record_of(quantized)[-1].skipped[0].layers == ("2",)

    def test_what_holds_at_once_leaves_no_layer_out(self, model):
        assert compress.record_of(quantize(model, torch.randn(8, 3, 12, 12), budget=10.0))[-1].skipped == ()

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"budget": 0.0}, "budget: no layer of Sequential can be int8 for a loss of 0"),
            ({"budget": -1.0}, "budget: expected a loss of zero or more"),
            ({"metric": len}, "budget: expected the loss of the metric"),
            ({"rounding": "up"}, "rounding: expected one of 'nearest', 'adaptive'"),
        ],
    )
    def test_budgets_that_cannot_be(self, model, options, words):
        with pytest.raises(ValueError, match=words):
            quantize(model, torch.randn(2, 3, 12, 12), **options)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 1))
        self.classify = nn.Linear(8, 2)

    def forward(self, x):
        return self.classify(F.hardswish(self.features(x)).mean((2, 3)))


@pytest.fixture
def images():
    """Bright and dark ones."""
    targets = torch.arange(64) % 2
    return TensorDataset(torch.randn(64, 1, 8, 8) + targets.reshape(-1, 1, 1, 1), targets)


class TestTraining:
    def test_it_rounds_as_the_static_model_does_trains_and_becomes_int8(self, images, tmp_path):
        model, x = with_random_norms(Classifier()), images.tensors[0]
        static, qat = quantize(model, x), quantize(model, x, method="qat")
        assert error(qat, static, x) <= 0.01
        before = copy.deepcopy(qat.state_dict())
        loader = DataLoader(images, 16)
        options = {"lr": 0.05, "progress": False, "checkpoint_dir": tmp_path / "checkpoints"}
        result = compress.finetune(qat, loader, epochs=4, **options)
        assert result.history[-1].loss < result.history[0].loss
        changed = {name for name, tensor in qat.state_dict().items() if not torch.equal(tensor, before[name])}
        assert {"features.0.weight", "features.3.weight", "classify.weight", "classify.bias"} <= changed
        assert not [name for name in changed if "scale" in name or "zero_point" in name]

        converted = compress.convert_qat(qat)
        assert converted.get_parameter("classify.weight").dtype == torch.int8
        assert error(converted, qat, x) <= 0.01
        assert qat.get_parameter("classify.weight").requires_grad
        assert [record.name for record in compress.record_of(converted)] == ["quantize", "convert_qat"]

    def test_without_its_norms_no_step_of_training_is_long(self, images):
        qat = quantize(with_random_norms(Classifier()), images.tensors[0], method="qat")
        before = copy.deepcopy(qat.state_dict())
        options = {"lr": 50.0, "momentum": 0.0, "weight_decay": 0.0, "warmup": 0.0, "progress": False}
        compress.finetune(qat, DataLoader(images, 64), epochs=1, **options)
        for name, parameter in qat.named_parameters():
            if parameter.requires_grad and parameter.dim() > 1:
                moved, length = (t.flatten(1).norm(dim=1) for t in (parameter.detach() - before[name], before[name]))
                assert (moved <= 0.51 * length.clamp_min(1e-3)).all()

    def test_training_resumes(self, images, tmp_path):
        x, loader = images.tensors[0], DataLoader(images, 16)
        torch.manual_seed(0)
        model = with_random_norms(Classifier())
        whole, parts = quantize(model, x, method="qat"), quantize(model, x, method="qat")
        options = {"epochs": 2, "lr": 0.05, "progress": False}
        compress.finetune(whole, loader, **options)

        class Breaking(TensorDataset):
            reads = 0

            def __getitem__(self, index):
                Breaking.reads += 1
                if Breaking.reads == 100:  # in the second epoch
                    raise InterruptedError("the power went out")
                return super().__getitem__(index)

        with pytest.raises(InterruptedError):
            compress.finetune(parts, DataLoader(Breaking(*images.tensors), 16), **options, checkpoint_dir=tmp_path)
        compress.finetune(parts, loader, **options, checkpoint_dir=tmp_path)
        for name, tensor in whole.state_dict().items():
            torch.testing.assert_close(parts.state_dict()[name], tensor, rtol=0, atol=0)

    @pytest.mark.parametrize("is_converted", [True, False])
    def test_emission_takes_it_converted_or_not(self, is_converted, images):
        model, x = with_random_norms(Classifier()), images.tensors[0][:4]
        qat = quantize(model, x, method="qat")
        emitted = emit_onto(compress.convert_qat(qat) if is_converted else qat, x, *INT8)
        assert emitted(x[:3]).shape == (3, 2)
        names = [str(node.target) for node in emitted.body.graph.nodes]
        assert sum("int8_conv2d" in name for name in names) == 2
        assert error(emitted, qat, x) <= 0.01

    def test_what_does_not_train_in_int8_is_not_converted(self):
        model = nn.Sequential(nn.Linear(3, 2))
        for other in (model, quantize(model, torch.randn(2, 3))):
            with pytest.raises(ValueError, match="expected what quantize"):
                compress.convert_qat(other)


def quantization_in(change):
    return next(node for node in change.graph["nodes"] if ".quantize_per_tensor" in node["target"])


class TestFiles:
    @pytest.mark.parametrize("method", ["static", "qat"])
    def test_a_saved_model_comes_back_equal(self, method, tmp_path):
        x = torch.randn(4, 1, 8, 8)
        quantized = quantize(with_random_norms(Classifier()), x, method=method)
        compress.save(quantized, tmp_path / "m.safetensors")
        loaded = compress.load(tmp_path / "m.safetensors", Classifier())
        torch.testing.assert_close(loaded(x), quantized(x), rtol=0, atol=0)
        assert compress.record_of(loaded) == compress.record_of(quantized)
        trained = {name for name, p in loaded.named_parameters() if p.requires_grad}
        assert trained == {name for name, p in quantized.named_parameters() if p.requires_grad}
        assert bool(trained) == (method == "qat")

    def test_a_pruned_model_is_quantized_saved_and_loaded(self, tmp_path):
        x = torch.randn(4, 3, 12, 12)
        make = lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()  # noqa: E731
        pruned = compress.prune_channels(make(), x, ratio=0.4)
        quantized = quantize(pruned, x)
        assert [record.name for record in compress.record_of(quantized)] == ["prune_channels", "quantize"]
        compress.save(quantized, tmp_path / "m.safetensors")
        torch.testing.assert_close(compress.load(tmp_path / "m.safetensors", make())(x), quantized(x), rtol=0, atol=0)

    @pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), 1e-40])
    def test_scales_that_are_none_are_refused(self, scale, tmp_path):
        quantized = quantize(nn.Sequential(nn.Linear(3, 2)), torch.randn(2, 3))
        quantized.get_buffer("0.weight_scale")[1] = scale
        compress.save(quantized, tmp_path / "m.safetensors")
        with pytest.raises(ValueError, match=r"m\.safetensors: .* expected scales of at least"):
            compress.load(tmp_path / "m.safetensors", nn.Sequential(nn.Linear(3, 2)))

    @pytest.mark.parametrize(
        ("damage", "words"),
        [
            (lambda change: change.graph.pop("nodes"), "no graph of a quantized model"),
            (lambda change: change.graph["nodes"].pop(), "a graph ends with its one output"),
            (lambda change: change.__dict__.update(dtypes=("float32",)), "shapes of 1 tensors"),
            (lambda change: change.__dict__.update(shapes=((-1,),) * len(change.shapes)), "no tensor of a quantized"),
            (lambda change: change.__dict__.update(trained=("there",)), "has no there to train"),
            (lambda change: quantization_in(change)["args"].__setitem__(1, -0.5), "expected scales of at least"),
            (lambda change: quantization_in(change)["args"].__setitem__(2, 128), "a zero point from -128 to 127"),
        ],
        ids=["no nodes", "no output", "tensors", "sizes", "trained", "scale", "zero point"],
    )
    def test_damaged_changes_are_refused(self, damage, words):
        change = Quantized.of(quantize(nn.Sequential(nn.Linear(3, 2)), torch.randn(2, 3)))
        damage(change)
        with pytest.raises(ValueError, match=words):
            change.apply(nn.Identity())


def test_the_pass_of_recipes_calibrates_on_training_images(images, tmp_path):
    from kernelpress.press import PassContext, known_passes

    known = known_passes()["quantize"]
    model, loader = with_random_norms(Classifier()), DataLoader(images, 16)
    options = known.options(observer="mse", samples=32, budget=1.0, ignore=["classify"])
    context = PassContext(options, loader, loader, (images.tensors[0][:1],), 0, lambda step: model, "start", tmp_path)
    quantized = known.run(model, context)
    (record,) = compress.record_of(quantized)
    assert record.arguments["observer"] == "mse"
    reading = known.read(record)
    assert [layer for layer, _ in reading.rows] == ["features.0", "features.3", "classify"]
    assert "int8, SQNR" in reading.rows[0][1]
    assert any("named in ignore" in line for line in reading.remarks)
