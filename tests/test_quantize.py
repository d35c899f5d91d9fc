"""Quantization to int8 after training: right at odd channels, paddings, ranges and kinds of layers; what it tells."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from emitting import Apply, emit_onto
from support import relative_error as double_error
from support import with_random_norms
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kernelpress as kp
from kernelpress import compress, measure
from kernelpress.compress.quantization.ranges import LIMITS, OBSERVERS, Histogram, affine, weight_scale
from kernelpress.emit.tolerance import relative_error

pytest.importorskip("torchao", reason="needs torchao: pip install 'kernelpress[quantize]'")

INT8 = ("int8_conv2d", "int8_depthwise_conv2d", "int8_matmul", "int8_add", "quantize", "dequantize")


def quantize(model, *batches, **options):
    """`model` quantized on these batches, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return compress.quantize(model.eval(), batches[0], data=list(batches), progress=False, **options)


def calls(quantized, name):
    """The nodes that call the operation of this name."""
    return [node for node in quantized.graph.nodes if name in str(node.target)]


def scales(quantized):
    """The (scale, zero point) of each quantization of an activation, in order."""
    return [node.args[1:3] for node in calls(quantized, ".quantize_per_tensor")]


def record(quantized):
    return compress.record_of(quantized)[-1]


def errors(quantized):
    return {error.layer: error for error in record(quantized).errors}


def reasons(quantized):
    return {layer: skipped.reason for skipped in record(quantized).skipped for layer in skipped.layers}


def dequantized_weight(quantized, name):
    weight, scale = quantized.get_parameter(f"{name}.weight"), quantized.get_buffer(f"{name}.weight_scale")
    return weight.float() * scale.reshape(-1, *(1,) * (weight.dim() - 1))


def hidden(quantized, x, name):
    """The value of a node."""
    from kernelpress.compress.quantization.errors import results_of

    return results_of(quantized, (x,), [name])[name]


class TestChannels:
    def test_zero_and_tiny_channels_have_scales_and_keep_their_biases(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
        with torch.no_grad():
            model[1].weight[2], model[1].bias[2] = 0, 0.7
            model[0].weight[5] *= 1e-30
        batches = [torch.rand(2, 3, 16, 16) for _ in range(4)]
        quantized = quantize(model, *batches)
        for name in ("0", "3"):
            scale = quantized.get_buffer(f"{name}.weight_scale")
            assert bool(((scale > 0) & scale.isfinite()).all())
        step = scales(quantized)[1][0]
        between = calls(quantized, "dequantize_per_tensor")[1]
        for x in batches:
            map_ = hidden(quantized, x, between.name)
            assert (map_[:, 2] == map_[0, 2, 0, 0]).all()
            assert abs(float(map_[0, 2, 0, 0]) - 0.7) <= step / 2 + 1e-6
            bias = F.relu(quantized.get_parameter("0.bias")[5])
            assert float((map_[:, 5] - bias).abs().max()) <= step / 2 + 1e-6
            assert relative_error(quantized(x), model(x)) <= 0.03

    @pytest.mark.parametrize("factor", [0.0, 1e-44, 1e-38, 1e-30, 1e30])
    def test_weight_scales_are_normal_numbers(self, factor):
        scale = weight_scale(torch.randn(4, 3) * factor, 0)
        assert bool(((scale >= torch.finfo(torch.float32).tiny) & scale.isfinite()).all())

    def test_a_linear_layer_of_zeros(self):
        model = nn.Linear(6, 3)
        nn.init.zeros_(model.weight)
        x = torch.randn(4, 6)
        torch.testing.assert_close(quantize(model, x)(x), model(x))


class TestPadding:
    def test_zero_is_exact_under_an_asymmetric_zero_point(self):
        model = nn.Conv2d(4, 6, 3, padding=(2, 1), bias=False)
        x = 1 + 4 * torch.rand(2, 4, 7, 9)
        x[0, 0, 0, :2] = torch.tensor([1.0, 5.0])
        quantized = quantize(model, x)
        assert scales(quantized) == [(pytest.approx(5 / 255), -128)]
        rounded = hidden(quantized, x, calls(quantized, "dequantize_per_tensor")[0].name)
        expected = F.conv2d(
            rounded, quantized.weight.float() * quantized.weight_scale.reshape(-1, 1, 1, 1), padding=(2, 1)
        )
        torch.testing.assert_close(quantized(x), expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize(
        ("pad", "is_exact"),
        [
            (lambda x: F.pad(x, (0, 1, 2, 0)), True),
            (lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"), True),
            (lambda x: F.pad(x, (1, 2, 0, 1), mode="replicate"), True),
            (lambda x: F.pad(x, (1, 0, 2, 1), value=6.0), False),
        ],
        ids=["asymmetric", "reflect", "replicate", "six"],
    )
    def test_padding_apart_moves_values_alone(self, pad, is_exact):
        first, second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3, bias=False)
        model = Apply(lambda x, a, b: b(pad(F.relu(a(x)))), first, second)
        x = torch.randn(2, 3, 7, 8)
        quantized = quantize(model, x)
        assert set(errors(quantized)) == {"layers.0", "layers.1"}
        assert relative_error(quantized(x), model(x)) <= 0.03
        source = calls(quantized, "aten.conv2d")[1].args[0]
        (moving,) = calls(quantized, "pad")
        padded, before = hidden(quantized, x, source.name), hidden(quantized, x, moving.args[0].name)
        step = 0 if is_exact else 0.51 * scales(quantized)[-1][0]
        torch.testing.assert_close(padded, pad(before), rtol=0, atol=step)
        expected = F.conv2d(padded, dequantized_weight(quantized, "layers.1"))
        torch.testing.assert_close(quantized(x), expected, rtol=0, atol=1e-5)

    def test_a_layer_that_reflects_is_exact(self):
        model = nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", bias=False)
        x = 1 + 4 * torch.rand(2, 4, 7, 9)
        quantized = quantize(model, x)
        given = calls(quantized, "aten.conv2d")[0].args[0]
        expected = F.conv2d(
            hidden(quantized, x, given.name), quantized.weight.float() * quantized.weight_scale.reshape(-1, 1, 1, 1)
        )
        torch.testing.assert_close(quantized(x), expected, rtol=0, atol=1e-5)
        assert relative_error(quantized(x), model(x)) <= 0.03


class TestSharedLayers:
    @pytest.mark.parametrize("sign", [1, -1], ids=["BatchNorm above zero", "BatchNorm of both signs"])
    def test_one_layer_on_two_ranges_has_one_weight_and_two_scales(self, sign):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

            def forward(self, x):
                return self.norm(self.conv(x)), self.conv(50 * x)

        model = with_random_norms(Net())
        with torch.no_grad():
            model.norm.weight[3] *= sign
        batches = [torch.randn(2, 8, 9, 9) for _ in range(3)]
        quantized = quantize(model, *batches)
        assert [name for name, p in quantized.named_parameters() if p.dtype == torch.int8] == ["conv.weight"]
        (first, _), (second, _) = scales(quantized)
        assert second / first == pytest.approx(50, rel=1e-3)
        assert not calls(quantized, "batch_norm")
        for x in batches:
            for ours, theirs in zip(quantized(x), model(x), strict=True):
                assert relative_error(ours, theirs) <= 0.03
        assert len(errors(quantized)) == 2
        assert all(name.startswith("conv@") for name in errors(quantized))
        emitted = emit_onto(quantized, batches[0], *INT8)
        for ours, theirs in zip(emitted(batches[0]), quantized(batches[0]), strict=True):
            assert relative_error(ours, theirs) <= 1e-3


class SqueezeExcite(nn.Module):
    def __init__(self, channels, squeezed):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce, self.expand = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x):
        return x * F.hardsigmoid(self.expand(F.relu(self.reduce(self.pool(x)))))


class MobileBlock(nn.Module):
    """MobileNet V3's."""

    def __init__(self):
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(16, 64, 1, bias=False), nn.BatchNorm2d(64), nn.Hardswish())
        self.depthwise = nn.Sequential(nn.Conv2d(64, 64, 5, padding=2, groups=64, bias=False), nn.BatchNorm2d(64))
        self.excite = SqueezeExcite(64, 16)
        self.project = nn.Sequential(nn.Hardswish(), nn.Conv2d(64, 16, 1, bias=False), nn.BatchNorm2d(16))

    def forward(self, x):
        return x + self.project(self.excite(self.depthwise(self.expand(x))))


@pytest.fixture
def block():
    torch.manual_seed(0)
    model, batches = MobileBlock().train(), [torch.randn(4, 16, 14, 14) for _ in range(8)]
    with torch.no_grad():
        for x in batches:
            model(x)
    return model.eval(), batches


class TestMobileBlock:
    def test_it_keeps_its_accuracy_and_the_record_tells_each_layer(self, block):
        model, batches = block
        quantized = quantize(model, *batches)
        assert max(relative_error(quantized(x), model(x)) for x in batches) <= 0.05
        layers = {"expand.0", "depthwise.0", "excite.reduce", "excite.expand", "project.1"}
        found = errors(quantized)
        assert set(found) == layers
        assert all(0 < error.float_error < error.error < 0.1 and error.is_int8 for error in found.values())
        product = next(node for node in calls(quantized, "aten.mul") if len(node.args) == 2)
        zero_points = [argument.args[2] for argument in product.args]
        assert len(zero_points) == 2
        assert 0 not in zero_points

    def test_an_ignored_layer_stays_float_and_makes_less_of_an_error(self, block):
        model, batches = block
        quantized = quantize(model, *batches, ignore="depthwise.0")
        assert reasons(quantized) == {"depthwise.0": "named in ignore"}
        kept = errors(quantized)["depthwise.0"]
        assert not kept.is_int8
        assert kept.error == kept.float_error < errors(quantize(model, *batches))["depthwise.0"].error
        assert quantized.get_parameter("depthwise.0.weight").dtype == torch.float32
        assert "depthwise.0" not in {promise.layer for promise in record(quantized).promises}

    def test_emitted_it_computes_what_the_simulation_does(self, block):
        model, batches = block
        quantized = quantize(model, *batches)
        emitted = emit_onto(quantized, batches[0], *INT8)
        step = scales(quantized)[0][0]
        off = (emitted(batches[1]) - quantized(batches[1])).abs() > step
        assert float(off.double().mean()) <= 1e-3


class TestKindsOfLayers:
    @pytest.mark.parametrize(
        ("layer", "count"),
        [
            (lambda: nn.Conv2d(8, 16, 3, padding=1, groups=8), 16),
            (lambda: nn.Conv2d(8, 12, 3, stride=2, groups=4), 12),
            (lambda: nn.ConvTranspose2d(8, 5, 3, stride=2, padding=1, output_padding=1), 5),
            (lambda: nn.Conv2d(8, 5, (3, 1), dilation=(2, 1), padding="same"), 5),
        ],
        ids=["depthwise multiplier 2", "four groups", "transposed", "same"],
    )
    def test_each_output_channel_has_a_scale(self, layer, count):
        model, x = layer(), torch.randn(2, 8, 9, 8)
        quantized = quantize(model, x)
        assert quantized.weight_scale.shape == (count,)
        exact = copy.deepcopy(model).double()
        axis = int(isinstance(model, nn.ConvTranspose2d))
        shape = [1, 1, 1, 1]
        shape[axis] = -1
        with torch.no_grad():
            exact.weight.copy_(quantized.weight.double() * quantized.weight_scale.double().reshape(shape))
        rounded = hidden(quantized, x, calls(quantized, "dequantize_per_tensor")[0].name).double()
        assert double_error(quantized(x), exact(rounded)) <= 1e-6
        assert relative_error(quantized(x), model(x)) <= 0.02

    def test_a_norm_behind_a_transposed_layer_goes_into_its_scale(self):
        model = with_random_norms(nn.Sequential(nn.ConvTranspose2d(6, 4, 2, stride=2), nn.BatchNorm2d(4), nn.ReLU()))
        x = torch.randn(2, 6, 5, 4)
        quantized = quantize(model, x)
        assert relative_error(quantized(x), model(x)) <= 0.03
        assert not calls(quantized, "aten.mul")

    @pytest.mark.parametrize(
        ("layer", "sizes", "reason"),
        [
            (lambda: nn.ConvTranspose2d(6, 4, 3, groups=2), (6, 7, 7), "2 groups"),
            (lambda: nn.Conv1d(6, 4, 3), (6, 9), "1-D"),
            (lambda: nn.Conv3d(6, 4, 3), (6, 5, 5, 5), "3-D"),
        ],
        ids=["transposed in groups", "1-D", "3-D"],
    )
    def test_what_has_no_int8_stays_float_with_a_reason(self, layer, sizes, reason):
        model = nn.Sequential(layer(), nn.Flatten(), nn.LazyLinear(3))
        x = torch.randn(2, *sizes)
        model(x)
        quantized = quantize(model, x)
        assert reason in reasons(quantized)["0"]
        assert not errors(quantized)["0"].is_int8
        assert errors(quantized)["2"].is_int8
        with pytest.raises(ValueError, match=r"no layer of .* can be int8"):
            quantize(layer(), x)

    def test_sums_that_int32_does_not_hold_stay_float(self):
        model = nn.Sequential(nn.Linear(65537, 2), nn.Linear(2, 2))
        assert "65537 products" in reasons(quantize(model, torch.randn(1, 65537)))["0"]


class TestSharedScales:
    def test_what_only_moves_values_shares_their_scale(self):
        def forward(x, a, b, c):
            x = F.max_pool2d(torch.cat([F.relu(a(x)), F.relu(b(x))], 1), 2)
            x = F.channel_shuffle(x, 2)
            first, second = x.chunk(2, 1)
            return c(torch.cat([second, first], 1))

        model = Apply(forward, nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(8, 4, 1))
        x = torch.randn(2, 3, 8, 8)
        quantized = quantize(model, x)
        assert len(set(scales(quantized))) == 2
        assert relative_error(quantized(x), model(x)) <= 0.03

    def test_a_result_that_a_layer_and_the_caller_read_is_quantized_once(self):
        model = Apply(lambda x, a, b: (b(y := F.relu(a(x))), y), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
        x = torch.randn(2, 3, 8, 8)
        quantized = quantize(model, x)
        assert len(scales(quantized)) == 2
        for ours, theirs in zip(quantized(x), model(x), strict=True):
            assert relative_error(ours, theirs) <= 0.03

    def test_an_input_that_is_added_to_the_output_stays_exact(self):
        model = Apply(lambda x, a, b: x + b(F.relu(a(x))), nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1))
        nn.init.zeros_(model.layers[1].weight)
        nn.init.zeros_(model.layers[1].bias)
        x = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(quantize(model, x)(x), x, rtol=0, atol=0)


class TestRanges:
    @pytest.mark.parametrize(
        "low_high", [(1.0, 5.0), (-5.0, -1.0), (-1.0, 3.0), (0.0, 1e-44), (0.0, 3e38), (-3e38, 3e38)]
    )
    def test_a_range_holds_zero_exactly(self, low_high):
        scale, zero_point = affine(*low_high)
        assert 0 < scale < float("inf")
        assert LIMITS[0] <= zero_point <= LIMITS[1]
        ends = torch.tensor([min(low_high[0], 0), max(low_high[1], 0)], dtype=torch.float64)
        rounded = ((ends / scale).round() + zero_point).clamp(*LIMITS).sub(zero_point) * scale
        assert float((rounded - ends).abs().max()) <= scale

    def test_histograms_do_not_depend_on_the_order_of_batches(self):
        batches = [torch.randn(1000) * factor for factor in (0.3, 7.0, 1.0)]
        forward, backward = Histogram(), Histogram()
        for x in batches:
            forward.update(x)
        for x in reversed(batches):
            backward.update(x)
        assert (forward.low, forward.high, forward.reach) == (backward.low, backward.high, backward.reach)
        torch.testing.assert_close(forward.counts, backward.counts, rtol=0, atol=0)
        assert float(forward.counts.sum()) == 3000

    @pytest.mark.parametrize("observer", ["percentile", "mse", "entropy"])
    def test_outliers_do_not_set_the_range(self, observer):
        seen = Histogram()
        seen.update(torch.randn(200_000))
        seen.update(torch.tensor([30.0]))
        low, high = OBSERVERS[observer](seen)
        assert -6 < low < 0 < high < 25

    @pytest.mark.parametrize("observer", list(OBSERVERS))
    def test_every_observer_calibrates_a_network(self, observer):
        model = with_random_norms(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 4, 1)))
        x = torch.randn(8, 3, 9, 9)
        quantized = quantize(model, x, observer=observer)
        assert relative_error(quantized(x), model(x)) <= 0.05

    @pytest.mark.parametrize("observer", list(OBSERVERS))
    @pytest.mark.parametrize("value", [0.0, 0.7, -3.0])
    def test_constant_activations_are_exact_and_reported(self, observer, value):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
        nn.init.zeros_(model[0].weight)
        nn.init.constant_(model[0].bias, value)
        x = torch.randn(2, 3, 5, 5)
        quantized = quantize(model, x, observer=observer)
        between = hidden(quantized, x, calls(quantized, "dequantize_per_tensor")[1].name)
        torch.testing.assert_close(between, torch.full_like(between, value))
        wanted = "all zero" if value == 0 else f"constant {value:g}"
        assert any(wanted in note and "0 (" in note for note in record(quantized).notes)


class TestWhatIsReturned:
    def test_the_model_given_stays_as_it_was_and_shares_nothing(self):
        model = with_random_norms(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)))
        model.train()
        before, x = copy.deepcopy(model.state_dict()), torch.randn(2, 3, 9, 9)
        expected = model.eval()(x)
        model.train()
        quantized = compress.quantize(model, x, data=x, progress=False)
        assert all(module.training for module in model.modules())
        with torch.no_grad():
            for tensor in (*quantized.parameters(), *quantized.buffers()):
                tensor.zero_()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        torch.testing.assert_close(model.eval()(x), expected)

    def test_it_is_an_ordinary_module(self):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(392, 4))
        x = torch.randn(2, 3, 9, 9)
        quantized = quantize(model, x)
        assert quantized.eval() is quantized.train() is quantized
        copied = copy.deepcopy(quantized)
        torch.testing.assert_close(copied(x), quantized(x))
        torch.testing.assert_close(quantized(torch.cat([x, x]))[:2], quantized(x))
        assert measure.count_parameters(quantized) == measure.count_parameters(model)
        flops = measure.layer_flops(quantized, x)
        assert set(flops) == {"0", "3"}
        promised = measure.promised_flops(flops, record(quantized).promises, 4.0)
        assert promised == pytest.approx(sum(flops.values()) / 4)

    def test_emission_keeps_the_names_of_layers(self, tmp_path):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        x = torch.randn(2, 3, 9, 9)
        quantized = quantize(model, x)
        emitted = emit_onto(quantized, x, *INT8)
        assert [place.modules for place in emitted.record.places if "conv" in place.choice] == [("0", "1"), ("2",)]
        compress.save(quantized, tmp_path / "m.safetensors")
        # A file has the names of parameters alone.
        emitted = emit_onto(compress.load(tmp_path / "m.safetensors", model), x, *INT8)
        assert [place.modules for place in emitted.record.places if "conv" in place.choice] == [("0",), ("2",)]


class TestBadInput:
    MODEL = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    X = torch.randn(2, 3, 9, 9)

    @pytest.mark.parametrize(
        ("data", "error", "words"),
        [
            (None, ValueError, "data: expected"),
            ([], ValueError, "at least one batch"),
            (torch.empty(0, 3, 9, 9), ValueError, "at least one batch"),
            (torch.zeros(2, 4, 9, 9), ValueError, "data: batch 0 "),
            ([X, X.double()], ValueError, "data: batch 1 "),
            ([X, torch.full_like(X, torch.nan)], ValueError, "batch 1 holds NaN"),
            (torch.full_like(X, torch.inf), ValueError, "batch 0 holds NaN"),
            (7, TypeError, "data: expected a DataLoader"),
            ([{"x": X}], TypeError, "got dict as batch 0"),
        ],
        ids=["none", "no batch", "empty", "shape", "dtype", "NaN", "infinity", "number", "dict"],
    )
    def test_calibration_data(self, data, error, words):
        with pytest.raises(error, match=words):
            compress.quantize(self.MODEL, self.X, data=data, progress=False)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"method": "guess"}, "method: expected one of 'static'"),
            ({"observer": "max"}, "observer: expected one of 'minmax'"),
            ({"samples": 0}, "samples: expected a positive integer"),
            ({"ignore": "7"}, "ignore: .* no module named '7'"),
            ({"ignore": ["0", "2"]}, "can be int8: named in ignore"),
        ],
    )
    def test_options(self, options, words):
        with pytest.raises(ValueError, match=words):
            compress.quantize(self.MODEL, self.X, data=self.X, progress=False, **options)

    def test_activations_that_overflow_are_told_with_their_place(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))
        nn.init.constant_(model[1].weight, 3e38)
        with pytest.raises(ValueError, match=r"NaN or infinite at 1 "):
            quantize(model, self.X)

    def test_weights_that_are_not_finite_are_named(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 1))
        nn.init.constant_(model[0].weight, torch.nan)
        with pytest.raises(ValueError, match=r"0\.weight of Sequential holds NaN"):
            quantize(model, self.X)

    def test_a_quantized_model_is_not_quantized_again(self):
        with pytest.raises(ValueError, match="quantized already"):
            quantize(quantize(self.MODEL, self.X), self.X)

    def test_a_loader_ends_with_the_samples_and_labels_are_left_out(self):
        loader = DataLoader(TensorDataset(torch.randn(20, 3, 9, 9), torch.zeros(20)), batch_size=4)
        state = torch.get_rng_state()
        quantized = compress.quantize(self.MODEL, self.X, data=loader, samples=6, progress=False)
        assert torch.equal(torch.get_rng_state(), state)
        assert relative_error(quantized(self.X), self.MODEL(self.X)) <= 0.1


def test_emission_of_a_quantized_network_saves_and_loads(tmp_path):
    model = with_random_norms(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Hardswish(), nn.Conv2d(8, 4, 1)))
    x = torch.randn(2, 3, 9, 9)
    quantized = quantize(model, x)
    emitted = emit_onto(quantized, x, *INT8)
    emitted.save(tmp_path / "m.pt2")
    torch.testing.assert_close(kp.load(tmp_path / "m.pt2")(x), emitted(x))
