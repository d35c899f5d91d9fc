"""Checkpoints of torchvision and timm in our networks: the same outputs, the map that was taken, what is refused."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import with_random_norms
from torch import Tensor, nn
from zoo import PACKAGES

from kernelpress import models
from kernelpress.models.weights import LoadedWeights

THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "torchvision:alexnet": ("alexnet", {}),
    "torchvision:mobilenet_v2": ("mobilenet_v2", {}),
    "torchvision:mobilenet_v3_large": ("mobilenet_v3_large", {}),
    "torchvision:mobilenet_v3_small": ("mobilenet_v3_small", {}),
    "torchvision:resnet18": ("resnet18", {}),
    "torchvision:resnet34": ("resnet34", {}),
    "torchvision:resnet50": ("resnet50", {}),
    "torchvision:shufflenet_v2_x0_5": ("shufflenet_v2", {"width_mult": 0.5}),
    "torchvision:shufflenet_v2_x1_0": ("shufflenet_v2", {}),
    "torchvision:shufflenet_v2_x1_5": ("shufflenet_v2", {"width_mult": 1.5}),
    "torchvision:shufflenet_v2_x2_0": ("shufflenet_v2", {"width_mult": 2.0}),
    "torchvision:squeezenet1_0": ("squeezenet1_0", {}),
    "torchvision:squeezenet1_1": ("squeezenet1_1", {}),
    "timm:ghostnet_050": ("ghostnet", {"width_mult": 0.5}),
    "timm:ghostnet_100": ("ghostnet", {}),
    "timm:ghostnet_130": ("ghostnet", {"width_mult": 1.3}),
    "timm:ghostnetv2_100": ("ghostnet_v2", {}),
    "timm:ghostnetv2_130": ("ghostnet_v2", {"width_mult": 1.3}),
    "timm:ghostnetv2_160": ("ghostnet_v2", {"width_mult": 1.6}),
    "timm:mobilenetv1_100": ("mobilenet_v1", {}),
    "timm:mobilenetv2_100": ("mobilenet_v2", {}),
    "timm:mobilenetv3_large_100": ("mobilenet_v3_large", {}),
    "timm:mobilenetv3_small_100": ("mobilenet_v3_small", {}),
    "timm:resnet18": ("resnet18", {}),
}
"""A model of theirs → ours, and our options."""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the state dicts of all of theirs, images and logits."""
    if not PACKAGES.is_dir() and any(importlib.util.find_spec(name) is None for name in ("timm", "torchvision")):
        pytest.skip("needs timm and torchvision: `make zoo` installs them beside the environment")
    folder = tmp_path_factory.mktemp("zoo")
    command = [sys.executable, str(Path(__file__).with_name("zoo_weights.py")), str(folder), *THEIRS]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("theirs", THEIRS)
def test_given_their_weights_our_network_computes_what_theirs_does(zoo: Path, theirs: str) -> None:
    name, options = THEIRS[theirs]
    file = zoo / f"{theirs}.safetensors"
    network = models.create(name, weights=file, **options).eval()
    taken = models.weights_of(network)
    # timm's ResNets have torchvision's keys.
    library = "torchvision" if "resnet" in theirs else theirs.partition(":")[0]
    assert taken == LoadedWeights(str(file), library)
    known = load_file(zoo / f"{theirs}.out.safetensors")
    with torch.no_grad():
        out = network(known["x"])
    assert known["logits"].std() > 1e-3
    # Roundings make up to 1e-5; another eps of the norms, or ReLU for ReLU6, makes more than 1e-4.
    assert (out - known["logits"]).norm() / known["logits"].norm() < 5e-5


def saved(folder: Path, state: dict[str, Tensor]) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "file.safetensors")
    return folder / "file.safetensors"


@pytest.mark.parametrize("name", ["mobilenet_v1", "shufflenet_v1"])
def test_what_we_saved_loads_under_our_own_keys_also_in_half_precision_and_without_counters(
    tmp_path: Path, name: str
) -> None:
    network = with_random_norms(models.create(name, num_classes=5)).half()
    state = {key: t for key, t in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    file = saved(tmp_path, state)
    loaded = models.create(name, weights=file, num_classes=5)
    assert models.weights_of(loaded) == LoadedWeights(str(file), "kernelpress")
    assert models.weights_of(copy.deepcopy(loaded)) == models.weights_of(loaded)
    for key, tensor in loaded.state_dict().items():
        assert tensor.dtype in (torch.float32, torch.int64)
        assert key not in state or torch.equal(tensor, state[key].float())


def test_a_network_that_began_at_random_has_no_weights_of_a_file() -> None:
    assert models.weights_of(models.resnet20()) is None


def test_build_takes_the_weights_among_its_options(tmp_path: Path) -> None:
    file = saved(tmp_path, models.resnet20().state_dict())
    network = models.build("resnet20", {"weights": str(file)}, in_channels=3, classes=10)
    assert models.weights_of(network) == LoadedWeights(str(file), "kernelpress")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "squeezenet1_0",
            {},
            r"squeezenet1_0 .* as one of torchvision, it differs in .* keys, the first of them: "
            r"features.0.weight \[96, 3, 7, 7\] is missing; bn1.bias \[16\] is unknown; features.0.bias",
        ),
        (
            "resnet20",
            {"num_classes": 7},
            r"differs in 2 keys, the first of them: fc.weight is \[10, 64\], expected \[7, 64\]",
        ),
        ("resnet20", {"width": 8}, r"the first of them: conv1.weight is \[16, 3, 3, 3\], expected \[8, 3, 3, 3\]"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_with_the_first_keys_that_differ(
    tmp_path: Path, name: str, options: dict[str, Any], message: str
) -> None:
    file = saved(tmp_path, models.resnet20().state_dict())
    with pytest.raises(ValueError, match=f"^weights: .*file.safetensors is no checkpoint of .*{message}"):
        models.create(name, weights=file, **options)


def test_small_input_with_a_checkpoint_is_refused(tmp_path: Path) -> None:
    # MobileNet V2 has the same tensors either way, which the strides make another network.
    file = saved(tmp_path, models.mobilenet_v2(width_mult=0.1).state_dict())
    with pytest.raises(ValueError, match=r"^weights: .* images of 224×224, which small_input=True changes"):
        models.create("mobilenet_v2", weights=file, width_mult=0.1, small_input=True)
    assert models.weights_of(models.create("mobilenet_v2", weights=file, width_mult=0.1)) is not None


def test_an_option_that_contradicts_the_weights_is_refused(tmp_path: Path) -> None:
    state = models.mobilenet_v1(width_multiplier=0.25).state_dict()
    file = saved(tmp_path, {timms(key): tensor for key, tensor in state.items()})
    network = models.create("mobilenet_v1", weights=file, width_multiplier=0.25)
    assert models.weights_of(network) == LoadedWeights(str(file), "timm")
    assert any(isinstance(module, nn.ReLU6) for module in network.modules())
    with pytest.raises(ValueError, match=r"^relu6: expected True, with which timm's weights compute, got False"):
        models.create("mobilenet_v1", weights=file, width_multiplier=0.25, relu6=False)


def timms(key: str) -> str:
    """timm's name of an entry of our MobileNet V1."""
    _, number, *rest = key.split(".")
    if not key.startswith("features."):
        return key
    if number == "0":
        return ".".join((("conv_stem", "bn1")[int(rest[0])], *rest[1:]))
    stages = [stage for stage, depth in enumerate((1, 2, 2, 6, 2)) for _ in range(depth)]
    stage = stages[int(number) - 1]
    part = {"00": "conv_dw", "01": "bn1", "10": "conv_pw", "11": "bn2"}["".join(rest[:2])]
    return f"blocks.{stage}.{int(number) - 1 - stages.index(stage)}.{part}.{rest[2]}"


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^weights: .*absent.safetensors: no such file"):
        models.create("resnet20", weights=tmp_path / "absent.safetensors")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"\x80\x02pickled")
    with pytest.raises(ValueError, match=r"^weights: .*damaged.safetensors is no readable safetensors file"):
        models.create("resnet20", weights=damaged)
