"""The networks: torchvision's keys and shapes, published sizes, results against transformers, training, export."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kernelpress import models
from kernelpress.measure.cost import count_parameters
from kernelpress.models import registry
from kernelpress.models.resnet import PaddedShortcut

Shapes = dict[str, tuple[int, ...]]

SMALL_INPUT_NETWORKS = {
    "alexnet": {"small_input": True},
    "ghostnet": {"width_mult": 0.5, "small_input": True},
    "ghostnet_v2": {"width_mult": 0.5, "small_input": True},
    "mobilenet_v1": {"width_multiplier": 0.25, "small_input": True},
    "mobilenet_v2": {"width_mult": 0.35, "small_input": True},
    "mobilenet_v3_large": {"width_mult": 0.35, "small_input": True},
    "mobilenet_v3_small": {"small_input": True},
    "resnet18": {"small_input": True},
    "resnet20": {},
    "resnet34": {"small_input": True},
    "resnet50": {"small_input": True},
    "resnet56": {},
    "resnet8": {},
    "shufflenet_v1": {"width_mult": 0.5, "small_input": True},
    "shufflenet_v2": {"width_mult": 0.5, "small_input": True},
    "squeezenet1_0": {"small_input": True},
    "squeezenet1_1": {"small_input": True},
}


def shapes_of(network: nn.Module) -> Shapes:
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


def norm_shapes(prefix: str, channels: int) -> Shapes:
    entries = ("weight", "bias", "running_mean", "running_var")
    return {f"{prefix}.{entry}": (channels,) for entry in entries} | {f"{prefix}.num_batches_tracked": ()}


def resnet_shapes(kind: str, depths: tuple[int, ...]) -> Shapes:
    """torchvision's state dict of a ResNet, from table 1 of the paper."""
    expansion = 4 if kind == "bottleneck" else 1
    shapes: Shapes = {"conv1.weight": (64, 3, 7, 7), **norm_shapes("bn1", 64)}
    channels = 64
    for stage, depth in enumerate(depths, start=1):
        width = 32 * 2**stage
        for index in range(depth):
            prefix = f"layer{stage}.{index}"
            kernels = (1, 3, 1) if kind == "bottleneck" else (3, 3)
            widths = (channels, width, width, width * 4) if kind == "bottleneck" else (channels, width, width)
            for i, kernel in enumerate(kernels):
                shapes[f"{prefix}.conv{i + 1}.weight"] = (widths[i + 1], widths[i], kernel, kernel)
                shapes |= norm_shapes(f"{prefix}.bn{i + 1}", widths[i + 1])
            if index == 0 and (stage > 1 or expansion > 1):
                shapes[f"{prefix}.downsample.0.weight"] = (width * expansion, channels, 1, 1)
                shapes |= norm_shapes(f"{prefix}.downsample.1", width * expansion)
            channels = width * expansion
    return shapes | {"fc.weight": (1000, channels), "fc.bias": (1000,)}


def mobilenet_v2_shapes() -> Shapes:
    """torchvision's state dict of MobileNet V2, from table 2 of the paper."""
    rows = [(1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)]
    shapes: Shapes = {"features.0.0.weight": (32, 3, 3, 3), **norm_shapes("features.0.1", 32)}
    channels, position = 32, 1
    for expansion, out_channels, repeats in rows:
        for _ in range(repeats):
            prefix, hidden, step = f"features.{position}.conv", channels * expansion, 0
            if expansion > 1:
                shapes[f"{prefix}.0.0.weight"] = (hidden, channels, 1, 1)
                shapes |= norm_shapes(f"{prefix}.0.1", hidden)
                step = 1
            shapes[f"{prefix}.{step}.0.weight"] = (hidden, 1, 3, 3)
            shapes |= norm_shapes(f"{prefix}.{step}.1", hidden)
            shapes[f"{prefix}.{step + 1}.weight"] = (out_channels, hidden, 1, 1)
            shapes |= norm_shapes(f"{prefix}.{step + 2}", out_channels)
            channels, position = out_channels, position + 1
    shapes["features.18.0.weight"] = (1280, 320, 1, 1)
    return (
        shapes
        | norm_shapes("features.18.1", 1280)
        | {"classifier.1.weight": (1000, 1280), "classifier.1.bias": (1000,)}
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", resnet_shapes("basic", (2, 2, 2, 2))),
        ("resnet34", resnet_shapes("basic", (3, 4, 6, 3))),
        ("resnet50", resnet_shapes("bottleneck", (3, 4, 6, 3))),
        ("mobilenet_v2", mobilenet_v2_shapes()),
    ],
    ids=["resnet18", "resnet34", "resnet50", "mobilenet_v2"],
)
def test_state_dict_has_torchvisions_keys_and_shapes(name: str, expected: Shapes) -> None:
    assert shapes_of(models.create(name)) == expected


FIGURES = [
    ("alexnet", {}, "61,100,840", "714 M", "torchvision"),
    ("ghostnet", {}, "5.2 M", "141 M", "Han et al. 2020, table 7"),
    ("ghostnet", {"width_mult": 0.5}, "2.6 M", "42 M", "Han et al. 2020, table 7"),
    ("ghostnet", {"width_mult": 1.3}, "7.3 M", "226 M", "Han et al. 2020, table 7"),
    ("ghostnet_v2", {}, "6.1 M", "167 M", "Tang et al. 2022, table 2"),
    ("ghostnet_v2", {"width_mult": 1.3}, "8.9 M", "269 M", "Tang et al. 2022, table 2"),
    ("ghostnet_v2", {"width_mult": 1.6}, "12.3 M", "399 M", "Tang et al. 2022, table 2"),
    ("mobilenet_v1", {}, "4.2 M", "569 M", "Howard et al. 2017, table 6"),
    ("mobilenet_v1", {"width_multiplier": 0.75}, "2.6 M", "325 M", "Howard et al. 2017, table 6"),
    ("mobilenet_v1", {"width_multiplier": 0.5}, "1.3 M", "149 M", "Howard et al. 2017, table 6"),
    ("mobilenet_v1", {"width_multiplier": 0.25}, "0.5 M", "41 M", "Howard et al. 2017, table 6"),
    ("mobilenet_v1", {"resolution_multiplier": 6 / 7}, "4.2 M", "418 M", "Howard et al. 2017, table 7"),
    ("mobilenet_v1", {"resolution_multiplier": 5 / 7}, "4.2 M", "290 M", "Howard et al. 2017, table 7"),
    ("mobilenet_v1", {"resolution_multiplier": 4 / 7}, "4.2 M", "186 M", "Howard et al. 2017, table 7"),
    ("mobilenet_v2", {}, "3,504,872", "301 M", "torchvision"),
    ("mobilenet_v3_large", {}, "5,483,032", "217 M", "torchvision"),
    ("mobilenet_v3_small", {}, "2,542,856", "57 M", "torchvision"),
    ("resnet18", {}, "11,689,512", "1814 M", "torchvision"),
    ("resnet20", {}, "0.27 M", None, "He et al. 2016, table 6"),
    ("resnet34", {}, "21,797,672", "3664 M", "torchvision"),
    ("resnet50", {}, "25,557,032", "4089 M", "torchvision"),
    ("resnet56", {}, "0.85 M", None, "He et al. 2016, table 6"),
    ("resnet8", {}, None, None, "He et al. 2016, section 4.2"),
    ("shufflenet_v1", {}, "1.9 M", "138 M", "github.com/megvii-model/ShuffleNet-Series"),
    ("shufflenet_v1", {"groups": 1}, None, "143 M", "Zhang et al. 2018, table 1"),
    ("shufflenet_v1", {"groups": 2}, None, "140 M", "Zhang et al. 2018, table 1"),
    ("shufflenet_v1", {"groups": 4}, None, "133 M", "Zhang et al. 2018, table 1"),
    ("shufflenet_v1", {"groups": 8}, "2.4 M", "138 M", "github.com/megvii-model/ShuffleNet-Series"),
    ("shufflenet_v1", {"width_mult": 0.5}, "0.7 M", "38 M", "github.com/megvii-model/ShuffleNet-Series"),
    ("shufflenet_v1", {"width_mult": 2.0}, "5.4 M", "524 M", "github.com/megvii-model/ShuffleNet-Series"),
    ("shufflenet_v2", {}, "2,278,604", "145 M", "torchvision"),
    ("shufflenet_v2", {"width_mult": 0.5}, "1,366,792", "40 M", "torchvision"),
    ("shufflenet_v2", {"width_mult": 1.5}, "3,503,624", "296 M", "torchvision"),
    ("shufflenet_v2", {"width_mult": 2.0}, "7,393,996", "583 M", "torchvision"),
    ("squeezenet1_0", {}, "1,248,424", "819 M", "torchvision"),
    ("squeezenet1_1", {}, "1,235,496", "349 M", "torchvision"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "parameters", "multiply_adds", "source"),
    [
        pytest.param(*row, id=f"{row[0]} {row[1] or ''}: {row[2]} parameters, {row[3]} multiply-adds in {row[4]}")
        for row in FIGURES
    ],
)
def test_costs_are_the_published_ones(
    name: str, options: dict[str, Any], parameters: str | None, multiply_adds: str | None, source: str
) -> None:
    with torch.device("meta"):
        network = models.create(name, **options).eval()
        x = torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x)
    published = models.published(name, **options)
    assert source.endswith(published.source)
    assert_is(count_parameters(network), published.parameters, parameters)
    assert_is(counter.get_total_flops() / 2, published.multiply_adds, multiply_adds)


def assert_is(count: float, published: float | None, stated: str | None) -> None:
    """What we state is what the source does, and the count is that: in all digits, or, where it states millions, but
    for 1.5 % and the last digit, since papers round down too, and count a layer more or less."""
    if stated is None:
        assert published is None
        return
    number, _, million = stated.replace(",", "").partition(" ")
    factor = 1e6 if million else 1
    assert published == pytest.approx(float(number) * factor, rel=1e-12)
    last_digit = factor * 10.0 ** -len(number.partition(".")[2])
    assert abs(count - published) <= (max(0.015 * published, last_digit) if million else 0)


def test_figures_of_every_network_and_variant_are_checked() -> None:
    assert {name for name, *_ in FIGURES} == set(models.names())
    checked = [(name, options) for name, options, *_ in FIGURES]
    for name in models.names():
        for variant in registry.ARCHITECTURES[name].published:
            assert (name, dict(variant.options)) in checked
            assert variant.accuracy is None or variant.accuracy_source


def test_a_variant_that_nobody_published_is_refused_with_those_that_are() -> None:
    with pytest.raises(
        ValueError, match=r"^options: figures of mobilenet_v1 are published for none; width_multiplier=0.75; "
    ):
        models.published("mobilenet_v1", width_multiplier=0.9)
    with pytest.raises(ValueError, match=r"^name: expected one of alexnet, "):
        models.published("lenet")


def test_names_lists_what_create_accepts() -> None:
    assert models.names() == sorted(SMALL_INPUT_NETWORKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL_INPUT_NETWORKS)
def test_small_images_of_one_channel_give_logits_and_a_step_down_the_gradient_a_lower_loss(name: str) -> None:
    network = models.create(name, num_classes=7, in_channels=1, **SMALL_INPUT_NETWORKS[name])
    for batch in (0, 1):
        assert network.eval()(torch.randn(batch, 1, 32, 32)).shape == (batch, 7)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # the same units before and after the step
    x, labels = torch.randn(4, 1, 32, 32), torch.arange(4)
    loss = F.cross_entropy(network.train()(x), labels)
    loss.backward()
    gradients = [parameter.grad for parameter in network.parameters()]
    assert [key for key, parameter in network.named_parameters() if parameter.grad is None] == []
    length = torch.stack([gradient.norm() for gradient in gradients]).norm()
    with torch.no_grad():
        for parameter, gradient in zip(network.parameters(), gradients, strict=True):
            parameter -= 1e-2 / length * gradient
        assert F.cross_entropy(network(x), labels) < loss


@pytest.mark.parametrize("options", [{}, {"small_input": True}], ids=["224", "small input"])
@pytest.mark.parametrize("name", SMALL_INPUT_NETWORKS)
def test_the_smallest_images_work_and_smaller_ones_are_refused(name: str, options: dict[str, Any]) -> None:
    with torch.device("meta"):
        network = models.create(
            name, num_classes=7, **(options if "small_input" in SMALL_INPUT_NETWORKS[name] else {})
        ).eval()
        least = getattr(network, "smallest_image", 1)
        assert network(torch.empty(1, 3, least, least)).shape == (1, 7)
        for shape in ((1, 3, least - 1, least), (1, 3, least, least - 1), (3, least, least)):
            with pytest.raises(ValueError, match=r"^x: expected images \[N, C, H, W\] of at least"):
                network(torch.empty(shape))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small", "resnet20", "squeezenet1_1"])
def test_network_exports_with_dynamic_batch(name: str) -> None:
    network = models.create(name, num_classes=7, in_channels=1, **SMALL_INPUT_NETWORKS[name]).eval()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(network, (torch.randn(2, 1, 32, 32),), dynamic_shapes=({0: batch},))
    x = torch.randn(3, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), network(x))


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet20"])
def test_weights_survive_the_way_through_a_state_dict(name: str) -> None:
    options = {"num_classes": 7, "in_channels": 1, **SMALL_INPUT_NETWORKS[name]}
    first, second = models.create(name, **options).eval(), models.create(name, **options).eval()
    x = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert not torch.allclose(first(x), second(x))
        second(x)
        second.load_state_dict(first.state_dict())
        torch.testing.assert_close(second(x), first(x), rtol=0, atol=0)


def test_padded_shortcut_takes_every_second_pixel_and_adds_zero_channels() -> None:
    x = torch.randn(2, 3, 7, 8)
    out = PaddedShortcut(3, 8, stride=2)(x)
    expected = torch.zeros(2, 8, 4, 4)
    expected[:, 2:5] = x[:, :, ::2, ::2]
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_padded_shortcut_has_nothing_to_train_but_is_saved() -> None:
    shortcut = PaddedShortcut(3, 8, stride=2)
    assert list(shortcut.parameters()) == []
    assert shapes_of(shortcut) == {"weight": (8, 3, 1, 1)}


def test_width_multipliers_scale_channels_in_multiples_of_eight() -> None:
    half = models.mobilenet_v1(width_multiplier=0.5)
    assert half.classifier.in_features == 512
    narrow = models.mobilenet_v2(width_mult=0.35)
    assert sum(parameter.numel() for parameter in narrow.parameters()) == 1_677_128
    assert all(size % 8 == 0 for key, (size, *_) in conv_shapes(narrow))


def conv_shapes(network: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    return ((key, shape) for key, shape in shapes_of(network).items() if len(shape) == 4)


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"^name: expected one of alexnet, .*, got 'resnet19'$"):
        models.create("resnet19")


@pytest.mark.parametrize(
    ("name", "option", "value", "error"),
    [
        ("resnet18", "num_classes", 0, ValueError),
        ("resnet20", "width", -16, ValueError),
        ("resnet50", "in_channels", "3", TypeError),
        ("mobilenet_v1", "width_multiplier", 0.0, ValueError),
        ("mobilenet_v1", "resolution_multiplier", -1.0, ValueError),
        ("mobilenet_v2", "width_mult", float("nan"), ValueError),
        ("mobilenet_v3_large", "width_mult", float("inf"), ValueError),
        ("mobilenet_v3_small", "norm_eps", 0, ValueError),
        ("squeezenet1_0", "num_classes", None, TypeError),
        ("alexnet", "in_channels", 0, ValueError),
    ],
)
def test_bad_option_is_named(name: str, option: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"^{option}: expected a positive number, got "):
        models.create(name, **{option: value})


def test_option_of_another_network_is_refused() -> None:
    with pytest.raises(TypeError, match="width_mult"):
        models.create("resnet18", width_mult=0.5)


@pytest.mark.parametrize(
    ("name", "option", "channels"),
    [
        ("ghostnet", "width_mult", 16),
        ("mobilenet_v1", "width_multiplier", 32),
        ("mobilenet_v2", "width_mult", 32),
        ("mobilenet_v3_large", "width_mult", 16),
        ("mobilenet_v3_small", "width_mult", 16),
        ("shufflenet_v1", "width_mult", 24),
        ("shufflenet_v2", "width_mult", 116),
    ],
)
def test_a_width_without_channels_is_refused(name: str, option: str, channels: int) -> None:
    with pytest.raises(ValueError, match=f"^{option}: expected a width that leaves some of {channels} channels, got "):
        models.create(name, **{option: 0.004})


@pytest.mark.parametrize("groups", [0, 5, True, "3", None])
def test_groups_that_the_paper_has_no_widths_for_are_refused(groups: object) -> None:
    with pytest.raises(ValueError, match=r"^groups: expected one of 1, 2, 3, 4, 8, got "):
        models.shufflenet_v1(groups=groups)


@pytest.mark.slow
@pytest.mark.parametrize("width_mult", [0.25, 0.3, 0.7, 1.9])
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 8])
def test_groups_divide_the_channels_of_shufflenet_v1_at_any_width(groups: int, width_mult: float) -> None:
    with torch.device("meta"):
        network = models.shufflenet_v1(groups=groups, width_mult=width_mult)
        assert network(torch.empty(2, 3, 64, 64)).shape == (2, 1000)


@pytest.mark.parametrize("width_mult", [0.25, 0.9, 3])
def test_shufflenet_v2_has_any_width(width_mult: float) -> None:
    with torch.device("meta"):
        assert models.shufflenet_v2(width_mult=width_mult)(torch.empty(2, 3, 64, 64)).shape == (2, 1000)


def test_the_resolution_multiplier_resizes_images() -> None:
    half = models.mobilenet_v1(width_multiplier=0.25, resolution_multiplier=0.5).eval()
    whole = models.mobilenet_v1(width_multiplier=0.25).eval()
    whole.load_state_dict(half.state_dict())
    x = torch.randn(2, 3, 64, 97)
    with torch.no_grad():
        torch.testing.assert_close(half(x), whole(F.interpolate(x, (32, 48), mode="bilinear")))


def test_relu6_bounds_what_mobilenet_v1_computes() -> None:
    network = models.mobilenet_v1(width_multiplier=0.25, relu6=True).eval()
    with torch.no_grad():
        assert float(network.features(100 * torch.randn(2, 3, 32, 32)).max()) <= 6


def randomise_statistics(network: nn.Module) -> None:
    """Gives every BatchNorm other than its initial values, so that a mix-up of two of them shows."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)


def renamed_resnet_entry(key: str) -> str:
    """torchvision's name of an entry in transformers' ResNet."""
    key = key.replace("classifier.1.", "fc.").replace("resnet.embedder.embedder.convolution.", "conv1.")
    key = key.replace("resnet.embedder.embedder.normalization.", "bn1.")
    for stage in range(4):
        key = key.replace(f"resnet.encoder.stages.{stage}.layers.", f"layer{stage + 1}.")
    key = key.replace(".shortcut.convolution.", ".downsample.0.").replace(".shortcut.normalization.", ".downsample.1.")
    for index in range(3):
        key = key.replace(f".layer.{index}.convolution.", f".conv{index + 1}.")
        key = key.replace(f".layer.{index}.normalization.", f".bn{index + 1}.")
    return key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layer_type", "depths"), [("resnet18", "basic", [2, 2, 2, 2]), ("resnet50", "bottleneck", [3, 4, 6, 3])]
)
def test_resnet_computes_what_transformers_computes(name: str, layer_type: str, depths: list[int]) -> None:
    transformers = pytest.importorskip("transformers", reason="cross-check needs: pip install transformers")
    widths = [64, 128, 256, 512] if layer_type == "basic" else [256, 512, 1024, 2048]
    config = transformers.ResNetConfig(layer_type=layer_type, depths=depths, hidden_sizes=widths, num_labels=11)
    theirs = transformers.ResNetForImageClassification(config).eval()
    randomise_statistics(theirs)
    ours = models.create(name, num_classes=11).eval()
    ours.load_state_dict({renamed_resnet_entry(key): value for key, value in theirs.state_dict().items()})
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert_near(ours(x), theirs(x).logits)


def test_mobilenet_v2_computes_what_transformers_computes() -> None:
    transformers = pytest.importorskip("transformers", reason="cross-check needs: pip install transformers")
    config = transformers.MobileNetV2Config(tf_padding=False, layer_norm_eps=1e-5, num_labels=11)
    theirs = transformers.MobileNetV2ForImageClassification(config).eval()
    randomise_statistics(theirs)
    ours = models.mobilenet_v2(num_classes=11).eval()
    # Both list their layers in the order of computation.
    values = list(theirs.state_dict().values())
    keys = list(ours.state_dict())
    ours.load_state_dict(dict(zip(keys, values, strict=True)))
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert_near(ours(x), theirs(x).logits)


def assert_near(out: Tensor, expected: Tensor) -> None:
    assert expected.std() > 1e-3
    assert (out - expected).norm() / expected.norm() < 1e-5


class TestSources:
    """Models of other libraries by name."""

    def test_image_classifiers_of_transformers_return_their_logits(self):
        pytest.importorskip("transformers", reason="pip install transformers runs this test")
        options = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
        model = models.build("transformers:ResNetForImageClassification", options, in_channels=1, classes=4)
        assert model(torch.randn(2, 1, 32, 32)).shape == (2, 4)

    def test_channels_and_classes_of_the_data_yield_to_options(self):
        model = models.build("resnet20", {"num_classes": 3}, in_channels=1, classes=10).eval()
        assert model(torch.randn(1, 1, 8, 8)).shape == (1, 3)

    @pytest.mark.parametrize("library", ["timm", "torchvision", "transformers"])
    def test_library_that_is_missing_is_named(self, monkeypatch, library):
        for name in (library, f"{library}.models"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=f"model: {library}: takes {library}, which cannot be imported here"):
            models.build(f"{library}:resnet18")

    def test_what_transformers_lacks_is_refused(self):
        pytest.importorskip("transformers", reason="pip install transformers runs this test")
        with pytest.raises(ValueError, match="transformers has no class 'pipeline' for image classification"):
            models.build("transformers:pipeline")
