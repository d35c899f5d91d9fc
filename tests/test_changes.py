"""Changes that passes make in a network's structure: replayed on its architecture, or refused without a trace."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernelpress import compress
from kernelpress.compress.changes import (
    Change,
    Masked,
    NewLayer,
    Rebuilt,
    Replaced,
    Resized,
    Unmasked,
    copied,
    mask_layer,
    replace_layer,
)
from kernelpress.compress.record import PassRecord, add_record
from kernelpress.files.sealed import seal_tensors


class Block(nn.Module):
    """A convolution that is called twice under two names, a norm, and a layer on top."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.again = self.conv
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.again(self.conv(x).relu())).mean((2, 3)))


X = torch.randn(2, 8, 6, 6)


def _recorded(model: nn.Module, *changes: Change) -> nn.Module:
    add_record(model, PassRecord("some pass", {}, 1, 1, 1, 1, changes))
    return model.eval()


def _saved_and_loaded(model: nn.Module, path: Path, architecture: nn.Module) -> nn.Module:
    compress.save(model, path / "small")
    loaded = compress.load(path / "small", architecture)
    torch.testing.assert_close(loaded(X), model(X), rtol=0, atol=0)
    assert compress.record_of(loaded) == compress.record_of(model)
    loaded.train()(X).sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())
    return loaded


def _two_layers() -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(8, 2, (3, 1), padding=(1, 0), bias=False), nn.Conv2d(2, 8, (1, 3), padding=(0, 1))


def test_one_layer_replaced_by_several_returns(tmp_path: Path) -> None:
    model = Block()
    model = _recorded(model, replace_layer(model, "conv", *_two_layers()), replace_layer(model, "norm", nn.Identity()))
    loaded = _saved_and_loaded(model, tmp_path, Block().eval())
    assert repr(loaded) == repr(model)
    assert loaded.again is loaded.conv, "what stood under two names still does"
    assert [layer for layer, _ in compress.record_of(loaded)[0].layers()] == ["conv", "norm"]


def test_padding_mode_returns(tmp_path: Path) -> None:
    model = Block()
    reflecting = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
    loaded = _saved_and_loaded(_recorded(model, replace_layer(model, "conv", reflecting)), tmp_path, Block().eval())
    assert loaded.conv.padding_mode == "reflect"


def test_masked_weight_keeps_its_zeros_in_training(tmp_path: Path) -> None:
    model = Block()
    mask = (torch.rand(8, 8, 3, 3) > 0.7).float()
    changes = (
        mask_layer(model, "conv", (mask + (torch.rand_like(mask) > 0.5)).clamp(max=1)),
        mask_layer(model, "conv", mask),
    )
    loaded = _saved_and_loaded(_recorded(model, *changes), tmp_path, Block().eval())
    torch.optim.SGD(loaded.parameters(), 0.1).step()
    loaded(X)
    assert torch.equal(loaded.conv.weight != 0, mask != 0)


def test_masked_model_is_copied_while_it_trains() -> None:
    """Its weights are then no leaves, which torch does not copy."""
    model = Block()
    mask_layer(model, "conv", torch.ones(8, 8, 3, 3))
    model(X).sum().backward()
    copy_of_it = copied(model)
    torch.testing.assert_close(copy_of_it(X), model(X), rtol=0, atol=0)
    assert copy_of_it.again is copy_of_it.conv is not model.conv


def test_what_no_mask_fits_is_named() -> None:
    model = Block()
    with pytest.raises(ValueError, match=r"mask: expected the shape of weight, \[8, 8, 3, 3\], got \[8, 8, 1, 1\]"):
        mask_layer(model, "conv", torch.ones(8, 8, 1, 1))
    del model.conv.weight
    model.conv.register_buffer("weight", torch.ones(8, 8, 3, 3))
    with pytest.raises(ValueError, match=r"conv.weight: expected a parameter, which alone can be masked"):
        mask_layer(model, "conv", torch.ones(8, 8, 3, 3))
    assert not model.conv._forward_pre_hooks


def test_changes_follow_each_other_on_what_earlier_ones_made(tmp_path: Path) -> None:
    """Pruned, one layer replaced, one masked, pruned again: the second pruning cuts new layers and masks."""

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
            nn.Conv2d(16, 4, 1),
        )  # fmt: skip

    model = compress.prune_channels(build().eval(), X, ratio=0.3, round_to=1)
    width = model[0].out_channels
    replaced = replace_layer(model, "3", nn.Conv2d(width, 12, 1), nn.Conv2d(12, model[3].out_channels, 3, padding=1))
    mask = (torch.rand_like(model[0].weight) > 0.5).float()
    model = _recorded(model, replaced, mask_layer(model, "0", mask))
    model = compress.prune_channels(model, X, ratio=0.3, round_to=1)
    assert model[3][0].out_channels < 12
    loaded = _saved_and_loaded(model.eval(), tmp_path, build().eval())
    assert repr(loaded) == repr(model)
    assert [record.name for record in compress.record_of(loaded)] == ["prune_channels", "some pass", "prune_channels"]


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 1, padding="same"), nn.Conv3d(3, 4, 1), nn.Sequential()])
def test_only_layers_that_files_can_hold_replace_others(layer: nn.Module) -> None:
    model = Block()
    with pytest.raises(ValueError, match=r"by: expected some of|not made of"):
        replace_layer(model, "conv", layer)
    assert isinstance(model.conv, nn.Conv2d)


def test_wide_architecture_does_not_take_the_weights_of_a_narrow_one(tmp_path: Path) -> None:
    compress.save(nn.Sequential(nn.Conv2d(3, 4, 1)), tmp_path / "small")
    with pytest.raises(ValueError, match=r"not the architecture saved in .*they differ in 0\.weight, 0\.bias"):
        compress.load(tmp_path / "small", nn.Sequential(nn.Conv2d(3, 8, 1)))


CONV = {
    "in_channels": 3, "out_channels": 4, "kernel_size": [1, 1], "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1],
    "groups": 1, "bias": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (Resized("0", {}, {}, {"forward": 1}), "no size forward"),
        (Resized("0", {}, {}, {"weight": 1}), "no size weight"),
        (Resized("", {}, {}, {"training": 1}), "no size training"),
        (Resized("0", {}, {}, {"in_channels": -3}), "no size in_channels that could be -3"),
        (Resized("0", {}, {}, {"in_channels": [3]}), "no size in_channels"),
        (Resized("0", {"weight": (4, 3, 1, 1)}, {"weight": (4, 3, 1)}, {}), "0.weight is"),
        (Resized("0", {"weight": (9, 3, 1, 1)}, {"weight": (2, 3, 1, 1)}, {}), r"0.weight is \[4, 3, 1, 1\], not \[9"),
        (Resized("0", {"weight": (4, 3, 1, 1)}, {"weight": (2, 3, 1, 1)}, {}), "they differ in 0.weight"),
        (Resized("0", {"weight": (4, 3, 1, 1)}, {"weight": (2**40, 2**40, 1, 1)}, {}), "overflow"),
        (Resized("0", {"forward": (4,)}, {"forward": (2,)}, {}), "0 has no forward"),
        (Resized("1", {}, {}, {}), "no layer '1'"),
        (Replaced("0", (NewLayer("Conv2d", {**CONV, "groups": 7}),)), "divisible by groups"),
        (Replaced("0", (NewLayer("Conv2d", {**CONV, "bias": "yes"}),)), "not made of"),
        (Replaced("0", (NewLayer("Conv2d", {**CONV, "device": "cpu"}),)), "not made of"),
        (Replaced("0", (NewLayer("Conv2d", {**CONV, "padding_mode": "mirror"}),)), "not made of"),
        (Replaced("0", (NewLayer("ReLU", {"padding_mode": "reflect"}),)), "padding_mode"),
        (Replaced("0", (NewLayer("Module", {}),)), "no layer 'Module' may be made"),
        (Replaced("0", ()), "0 is not replaced by 0 layers"),
        (Replaced("", (NewLayer("ReLU", {}),)), "the whole model is not replaced"),
        (Replaced("0", (NewLayer("ReLU", {}),)), "they differ in 0.bias, 0.weight"),
        (Rebuilt("lenet", {}), "student: expected one of alexnet"),
        (Rebuilt("resnet8", {"depth": 2}), "resnet8 has no depth"),
        (Rebuilt("resnet8", {"width": 2**40}), "not made of"),
        (Rebuilt("resnet8", {"width": 8}), "they differ in"),
        (Masked("0", "forward"), "0 has no parameter forward"),
        (Unmasked("0"), "0 has no mask over weight to take off"),
        (Unmasked("0", "forward"), "0 has no mask over forward to take off"),
        (Masked("0"), "they differ in 0.weight, 0.weight_mask, 0.weight_orig"),
    ],
    ids=str,
)
def test_changes_that_do_not_fit_change_nothing(tmp_path: Path, change: Change, reason: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    before, shown = dict(model.state_dict()), repr(model)
    add_record(saved := copy.deepcopy(model), PassRecord("some pass", {}, 1, 1, 1, 1, (change,)))
    compress.save(saved, tmp_path / "m")
    with pytest.raises(ValueError, match=f"Sequential is not the architecture saved in .*{reason}"):
        compress.load(tmp_path / "m", model)
    assert (repr(model), model.state_dict().keys()) == (shown, before.keys())
    assert all(
        tensor is before[name] or torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()
    )
    assert not model[0]._forward_pre_hooks
    assert callable(model[0].forward)


@pytest.mark.parametrize("content", [{"kind": "moved", "layer": "0"}, {"layer": "0"}, {"kind": "masked"}, "masked"])
def test_changes_of_no_known_kind_are_refused(tmp_path: Path, content: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    record = {**asdict(PassRecord("some pass", {}, 1, 1, 1, 1)), "changes": [content]}
    (tmp_path / "m").write_bytes(seal_tensors("compressed model", 2, model.state_dict(), {"passes": [record]}))
    with pytest.raises(ValueError, match=r"its header.passes\[0\].changes\[0\]"):
        compress.load(tmp_path / "m", model)
