"""`prune_channels` with normalisations: what leaves together, and over which channels the statistics are then taken."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pruning import X, assert_same_function, cut_channels
from torch import Tensor, nn
from torch.nn import functional

from kernelpress import compress

ALTERNATE = torch.arange(0, 16, 2)
TWO_GROUPS = torch.tensor([0, 1, 2, 3, 8, 9, 10, 11])
"""The first and the third of four groups of four."""


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of [N, C, H, W], as in ConvNeXt."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Normalised(nn.Module):
    """Convolution → norm → convolution; `silent` channels are zero before and after the norm."""

    def __init__(self, norm: nn.Module | Callable[[Tensor], Tensor], silent: Tensor) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 16, 3, padding=1), norm, nn.Conv2d(16, 4, 1)
        with torch.no_grad():
            for module in (self.a, norm):
                for name in ("weight", "bias", "running_mean", "running_var"):
                    tensor = getattr(module, name, None)
                    if tensor is not None:
                        tensor.copy_(torch.rand_like(tensor) + 0.5)
                        if name != "running_var":
                            tensor[silent] = 0
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)).relu())


EXACT: dict[str, tuple[Callable[[], nn.Module | Callable[[Tensor], Tensor]], Tensor, dict[str, object]]] = {
    "GroupNorm": (lambda: nn.GroupNorm(4, 16), TWO_GROUPS, {"num_groups": 2, "num_channels": 8}),
    "GroupNorm, not affine": (
        lambda: nn.GroupNorm(4, 16, affine=False),
        TWO_GROUPS,
        {"num_groups": 2, "num_channels": 8},
    ),
    "GroupNorm of single channels": (
        lambda: nn.GroupNorm(16, 16),
        ALTERNATE,
        {"num_groups": 8, "num_channels": 8},
    ),
    "BatchNorm, not affine": (lambda: nn.BatchNorm2d(16, affine=False), ALTERNATE, {"num_features": 8}),
    "BatchNorm of the batch": (
        lambda: nn.BatchNorm2d(16, affine=False, track_running_stats=False),
        ALTERNATE,
        {"num_features": 8},
    ),
    "InstanceNorm": (lambda: nn.InstanceNorm2d(16), ALTERNATE, {"num_features": 8}),
    "InstanceNorm, affine": (lambda: nn.InstanceNorm2d(16, affine=True), ALTERNATE, {"num_features": 8}),
    "InstanceNorm with running statistics": (
        lambda: nn.InstanceNorm2d(16, affine=True, track_running_stats=True),
        ALTERNATE,
        {"num_features": 8},
    ),
    "instance_norm": (lambda: F.instance_norm, ALTERNATE, {}),
}


@pytest.mark.parametrize("name", EXACT)
def test_silent_channels_leave_without_a_difference(name: str) -> None:
    make, silent, sizes = EXACT[name]
    model = Normalised(make(), silent)
    pruned = cut_channels(model, 0.5)
    assert (pruned.a.out_channels, pruned.b.in_channels) == (8, 8)
    assert {attribute: getattr(pruned.norm, attribute) for attribute in sizes} == sizes
    assert_same_function(pruned, model)
    again = cut_channels(pruned, 0.5)
    assert again.a.out_channels == 4
    assert again(X).shape == model(X).shape


def _kept(pruned: nn.Module, model: nn.Module) -> list[int]:
    """Positions of the filters of `model.a` that `pruned.a` has."""
    return [next(i for i, old in enumerate(model.a.weight) if torch.equal(old, new)) for new in pruned.a.weight]


def _over_kept_layer_norm(y: Tensor, norm: nn.LayerNorm, kept: list[int]) -> Tensor:
    y = y[:, kept]
    mean, var = y.mean(1, keepdim=True), y.var(1, keepdim=True, correction=0)
    scaled = (y - mean) / (var + norm.eps).sqrt()
    return scaled if norm.weight is None else scaled * norm.weight[kept, None, None] + norm.bias[kept, None, None]


def _over_kept_whole_layer_norm(y: Tensor, norm: nn.LayerNorm, kept: list[int]) -> Tensor:
    y = y[:, kept]
    mean, var = y.mean((1, 2, 3), keepdim=True), y.var((1, 2, 3), keepdim=True, correction=0)
    return (y - mean) / (var + norm.eps).sqrt() * norm.weight[kept] + norm.bias[kept]


def _over_kept_rms_norm(y: Tensor, norm: Any, kept: list[int]) -> Tensor:
    y = y[:, kept]
    return y / (y.square().mean(1, keepdim=True) + torch.finfo(y.dtype).eps).sqrt() * norm.norm.weight[kept, None, None]


def _over_kept_one_group(y: Tensor, norm: nn.GroupNorm, kept: list[int]) -> Tensor:
    return F.group_norm(y[:, kept], 1, norm.weight[kept], norm.bias[kept], norm.eps)


def _over_kept_literal_groups(y: Tensor, norm: object, kept: list[int]) -> Tensor:
    assert [channel // 4 for channel in kept] == [group for group in range(4) for _ in range(len(kept) // 4)]
    return F.group_norm(y[:, kept], 4)


class RMSNorm2d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


OVER_KEPT: dict[str, tuple[Callable[[], Any], Callable[[Tensor, Any, list[int]], Tensor], dict[str, object]]] = {
    "LayerNorm over channels": (lambda: LayerNorm2d(16), _over_kept_layer_norm, {"normalized_shape": (8,)}),
    "LayerNorm over channels, not affine": (
        lambda: LayerNorm2d(16, elementwise_affine=False),
        _over_kept_layer_norm,
        {"normalized_shape": (8,)},
    ),
    "LayerNorm over everything": (
        lambda: nn.LayerNorm([16, 8, 8]),
        _over_kept_whole_layer_norm,
        {"normalized_shape": (8, 8, 8)},
    ),
    "RMSNorm": (RMSNorm2d, _over_kept_rms_norm, {}),
    "GroupNorm of one group": (lambda: nn.GroupNorm(1, 16), _over_kept_one_group, {"num_groups": 1, "num_channels": 8}),
    "group_norm with a literal": (lambda: lambda y: F.group_norm(y, 4), _over_kept_literal_groups, {}),
}


@pytest.mark.parametrize("name", OVER_KEPT)
def test_statistics_over_channels_are_those_of_the_channels_that_stay(name: str) -> None:
    make, reference, sizes = OVER_KEPT[name]
    model = Normalised(make(), torch.tensor([], dtype=torch.int64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    pruned = cut_channels(model, 0.5)
    assert pruned.a.out_channels == 8
    assert {attribute: getattr(pruned.norm, attribute) for attribute in sizes} == sizes
    kept = _kept(pruned, model)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    expected = F.conv2d(reference(model.a(x), model.norm, kept).relu(), model.b.weight[:, kept], model.b.bias)
    torch.testing.assert_close(pruned(x), expected, rtol=1e-9, atol=1e-9)


class Two(Normalised):
    def __init__(self, operation: Callable[[Two, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__(nn.Identity(), ALTERNATE)
        self.c = copy.deepcopy(self.a)
        self.operation = operation
        for name, module in modules.items():
            setattr(self, name, module)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.operation(self, x))


def test_groups_of_several_norms_leave_together() -> None:
    model = Two(lambda m, x: m.n(m.a(x)) + m.m(m.c(x)), n=nn.GroupNorm(4, 16), m=nn.GroupNorm(8, 16))
    pruned = cut_channels(model, 0.5)
    assert (pruned.n.num_groups, pruned.m.num_groups, pruned.a.out_channels) == (2, 4, 8)
    assert _kept(pruned, model)[0] % 4 == 0


def test_groups_that_can_only_leave_together_keep_equal_numbers_of_channels() -> None:
    """After a grouped convolution every group has the same channels: none can leave whole."""
    grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
    model = Two(lambda m, x: m.n(m.grouped(m.a(x))), grouped=grouped, n=nn.GroupNorm(4, 16))
    pruned = cut_channels(model, 0.5)
    assert (pruned.n.num_groups, pruned.n.num_channels, pruned.grouped.groups) == (4, 8, 4)
    assert pruned(X).shape == model(X).shape


def test_one_group_left_of_each_branch_of_a_concatenation() -> None:
    norm = nn.GroupNorm(4, 32)
    model = Two(lambda m, x: m.n(torch.cat([m.a(x), m.c(x)], 1)), n=norm, b=nn.Conv2d(32, 4, 1))
    with torch.no_grad():
        for tensors, silent in (([model.a], slice(0, 8)), ([model.c], slice(8, 16)), ([norm], slice(0, 8))):
            for module in tensors:
                module.weight.normal_()[silent] = 0
                module.bias.normal_()[silent] = 0
        norm.weight[24:] = norm.bias[24:] = 0
    pruned = cut_channels(model, 0.5)
    assert (pruned.a.out_channels, pruned.c.out_channels, pruned.n.num_groups) == (8, 8, 2)
    assert_same_function(pruned, model)


def test_norm_that_runs_on_several_tensors_keeps_one_size() -> None:
    model = Two(lambda m, x: m.n(m.a(x)) + m.n(m.c(x)), n=nn.GroupNorm(4, 16, affine=False))
    pruned = cut_channels(model, 0.5)
    assert (pruned.n.num_groups, pruned.a.out_channels, pruned.c.out_channels) == (2, 8, 8)
    assert pruned(X).shape == model(X).shape


def test_layer_norm_with_a_literal_size_stays_with_a_reason() -> None:
    def operation(model: Two, x: Tensor) -> Tensor:
        y = functional.layer_norm(model.a(x).permute(0, 2, 3, 1), (16,)).permute(0, 3, 1, 2)
        return y.mean((2, 3), keepdim=True) + model.b2(model.c(x)).mean()

    model = Two(operation, b2=nn.Conv2d(16, 4, 1))
    pruned = cut_channels(model, 0.4)
    assert (pruned.a.out_channels, pruned.c.out_channels) == (16, 9)
    assert_same_function(pruned, model)
    reasons = {layer: skipped.reason for skipped in compress.record_of(pruned)[0].skipped for layer in skipped.layers}
    assert reasons["a"] == "layer_norm normalises over channels"


def test_pruned_norms_are_saved_and_loaded_with_their_sizes(tmp_path: Any) -> None:
    def build() -> nn.Module:
        norms = nn.Sequential(nn.GroupNorm(4, 16, affine=False), nn.InstanceNorm2d(16), LayerNorm2d(16))
        return Normalised(norms, TWO_GROUPS)

    pruned = cut_channels(build(), 0.5)
    compress.save(pruned, tmp_path / "small")
    loaded = compress.load(tmp_path / "small", build())
    torch.testing.assert_close(loaded(X), pruned(X), rtol=0, atol=0)
    assert repr(loaded) == repr(pruned)
    assert loaded.norm[2].normalized_shape == (8,)
