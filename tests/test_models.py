"""The networks: torchvision's keys and shapes, published sizes, results against transformers, training, export."""

import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from kernelpress import models
from kernelpress.models.resnet import PaddedShortcut

Shapes = dict[str, tuple[int, ...]]

SMALL_INPUT_NETWORKS = {
    "mobilenet_v1": {"alpha": 0.25, "small_input": True},
    "mobilenet_v2": {"width_mult": 0.35, "small_input": True},
    "resnet18": {"small_input": True},
    "resnet20": {},
    "resnet34": {"small_input": True},
    "resnet50": {"small_input": True},
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


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet20", 269_722),
        ("mobilenet_v1", 4_231_976),
        ("mobilenet_v2", 3_504_872),
    ],
)
def test_parameter_count_is_the_published_one(name: str, parameters: int) -> None:
    assert sum(parameter.numel() for parameter in models.create(name).parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "macs"),
    [("resnet18", 1.81e9), ("resnet50", 4.09e9), ("mobilenet_v1", 0.569e9), ("mobilenet_v2", 0.301e9)],
)
def test_multiplications_at_224_are_the_published_ones(name: str, macs: float) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    network = models.create(name).eval()
    network, x = network.to("meta"), torch.empty(1, 3, 224, 224, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x)
    assert counter.get_total_flops() / 2 == pytest.approx(macs, rel=0.01)


def test_names_lists_what_create_accepts() -> None:
    assert models.names() == sorted(SMALL_INPUT_NETWORKS)


@pytest.mark.parametrize("name", SMALL_INPUT_NETWORKS)
def test_small_images_of_one_channel_give_logits_and_a_gradient_everywhere(name: str) -> None:
    network = models.create(name, num_classes=7, in_channels=1, **SMALL_INPUT_NETWORKS[name])
    logits = network(torch.randn(2, 1, 32, 32))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    without = [key for key, parameter in network.named_parameters() if parameter.grad is None]
    assert without == []
    assert network.eval()(torch.randn(0, 1, 32, 32)).shape == (0, 7)


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "resnet18", "resnet20"])
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
    half = models.mobilenet_v1(alpha=0.5)
    assert half.classifier.in_features == 512
    narrow = models.mobilenet_v2(width_mult=0.35)
    assert sum(parameter.numel() for parameter in narrow.parameters()) == 1_677_128
    assert all(size % 8 == 0 for key, (size, *_) in conv_shapes(narrow))


def conv_shapes(network: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    return ((key, shape) for key, shape in shapes_of(network).items() if len(shape) == 4)


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"^name: expected one of mobilenet_v1, .*, got 'resnet19'$"):
        models.create("resnet19")


@pytest.mark.parametrize(
    ("name", "option", "value", "error"),
    [
        ("resnet18", "num_classes", 0, ValueError),
        ("resnet20", "width", -16, ValueError),
        ("resnet50", "in_channels", "3", TypeError),
        ("mobilenet_v1", "alpha", 0.0, ValueError),
        ("mobilenet_v2", "width_mult", float("nan"), ValueError),
    ],
)
def test_bad_option_is_named(name: str, option: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"^{option}: expected a positive number, got "):
        models.create(name, **{option: value})


def test_option_of_another_network_is_refused() -> None:
    with pytest.raises(TypeError, match="alpha"):
        models.create("resnet18", alpha=0.5)


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
