"""`prune_channels` with scalar weights of sums, groups, shuffled pixels and parametrised weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pruning import X, assert_same_function, conv3x3, cut_channels
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.nn.utils.parametrize import register_parametrization

from kernelpress import compress

SILENT = torch.arange(0, 16, 2)


def _silenced(module: nn.Module, channels: Tensor | slice = SILENT, dim: int = 0) -> nn.Module:
    """The module, whose outputs in `channels` are zero; they lie along `dim` of its weight."""
    with torch.no_grad():
        module.weight.movedim(dim, 0)[channels] = 0
        if module.bias is not None:
            module.bias.view(-1, module.weight.size(dim))[:, channels] = 0
    return module


class Net(nn.Module):
    """Two convolutions, half of whose channels are silent, something between, and a head."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor], *, width: int = 16, **modules: Any) -> None:
        super().__init__()
        self.a, self.c, self.head = _silenced(conv3x3(3, 16)), _silenced(conv3x3(3, 16)), nn.Conv2d(width, 4, 1)
        for name, module in modules.items():
            setattr(self, name, module)
        self.between = between
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self, x))


def _weights(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.rand(shape) + 0.1)


def _normalised(w: Tensor) -> Tensor:
    w = F.relu(w)
    return w / (w.sum() + 1e-4)


SUMS: dict[str, tuple[Callable[[Any, Tensor], Tensor], Any]] = {
    "indexed": (lambda m, x: m.w[0] * m.a(x) + m.w[1] * m.c(x), _weights(2)),
    "normalised": (lambda m, x: _normalised(m.w)[0] * m.a(x) + _normalised(m.w)[1] * m.c(x), _weights(2)),
    "softmax": (lambda m, x: m.w.softmax(0)[0] * m.a(x) + m.w.softmax(0)[1] * m.c(x), _weights(2)),
    "unpacked": (lambda m, x: sum(w * y for w, y in zip(m.w, (m.a(x), m.c(x)), strict=True)), _weights(2)),
    "sliced": (lambda m, x: m.w[0:1] * m.a(x) + m.w[1:2] * m.c(x), _weights(2)),
    "of many": (lambda m, x: m.w[3] * m.a(x) + m.w[15] * m.c(x), _weights(16)),
    "stacked first": (lambda m, x: (torch.stack([m.a(x), m.c(x)]) * m.w.view(2, 1, 1, 1, 1)).sum(0), _weights(2)),
    "stacked beside": (lambda m, x: (torch.stack([m.a(x), m.c(x)], 1) * m.w[:, None, None, None]).sum(1), _weights(2)),
    "stacked last": (lambda m, x: (torch.stack([m.a(x), m.c(x)], -1) * m.w.softmax(0)).sum(-1), _weights(2)),
    "stacked shape": (lambda m, x: (torch.stack([m.a(x), m.c(x)]) * m.w).mean(0), _weights(2, 1, 1, 1, 1)),
    "list": (lambda m, x: m.w[0] * m.a(x) + m.w[1] * m.c(x), nn.ParameterList([torch.rand(()), torch.rand(1)])),
    "list of maps": (lambda m, x: m.w[0] * m.a(x) + m.w[1] * m.c(x), nn.ParameterList([torch.rand(1, 1, 1, 1)] * 2)),
    "gate": (lambda m, x: m.w.sigmoid() * m.a(x) + (1 - m.w.sigmoid()) * m.c(x), _weights(1)),
    "lerp": (lambda m, x: torch.lerp(m.a(x), m.c(x), m.w[0]), _weights(2)),
    "of rows": (lambda m, x: m.a(x) + m.c(x) * m.w, _weights(8)),
    "of pixels": (lambda m, x: m.a(x) + m.c(x) * m.w, _weights(1, 1, 8, 8)),
}


@pytest.mark.parametrize("name", SUMS)
def test_weights_of_a_sum_are_no_channels(name: str) -> None:
    between, weights = SUMS[name]
    model = Net(between, w=weights)
    pruned = cut_channels(model, 0.4)
    assert (pruned.a.out_channels, pruned.c.out_channels, pruned.head.in_channels) == (9, 9, 9)
    assert [tuple(old.shape) for old in _all(model.w)] == [tuple(new.shape) for new in _all(pruned.w)]
    assert_same_function(pruned, model)


def _all(weights: Any) -> list[Tensor]:
    return list(weights) if isinstance(weights, nn.ParameterList) else [weights]


def test_weights_of_a_sum_in_a_buffer() -> None:
    model = Net(lambda m, x: m.w[0] * m.a(x) + m.w[1] * m.c(x))
    model.register_buffer("w", torch.rand(2, dtype=torch.float64))
    pruned = cut_channels(model, 0.4)
    assert (pruned.a.out_channels, pruned.w.numel()) == (9, 2)
    assert_same_function(pruned, model)


SCALES: dict[str, tuple[Callable[[Any, Tensor], Tensor], Any]] = {
    "[C, 1, 1]": (lambda m, x: m.w * m.a(x) + m.c(x), _weights(16, 1, 1)),
    "[1, C, 1, 1]": (lambda m, x: m.w * m.a(x) + m.c(x), _weights(1, 16, 1, 1)),
    "[C], channels last": (lambda m, x: (m.w * m.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) + m.c(x), _weights(16)),
    "[C], viewed": (lambda m, x: m.w.view(1, -1, 1, 1) * m.a(x) + m.c(x), _weights(16)),
    "[C], positive": (lambda m, x: m.w.relu()[:, None, None] * m.a(x) + m.c(x), _weights(16)),
    "[C, H, W]": (lambda m, x: m.w * m.a(x) + m.c(x), _weights(16, 8, 8)),
    "[2, C, 1, 1]": (lambda m, x: m.w[0] * m.a(x) + m.w[1] * m.c(x), _weights(2, 16, 1, 1)),
    "[2, C], stacked": (
        lambda m, x: (torch.stack([m.a(x), m.c(x)]) * m.w[:, None, :, None, None]).sum(0),
        _weights(2, 16),
    ),
}


@pytest.mark.parametrize("name", SCALES)
def test_a_scale_for_each_channel_is_cut_with_them(name: str) -> None:
    between, weights = SCALES[name]
    model = Net(between, w=weights)
    pruned = cut_channels(model, 0.4)
    assert pruned.w.numel() == model.w.numel() * 9 / 16
    assert_same_function(pruned, model)


@pytest.mark.parametrize(
    ("inner", "groups", "outer", "ratio", "shape"),
    [(8, 4, 16, 0.5, (8, 1)), (16, 4, 16, 0.7, (4, 1)), (16, 8, 16, 0.5, (8, 1)), (12, 4, 24, 0.6, (8, 1))],
)
def test_groups_of_one_channel_are_not_taken_for_depthwise(
    inner: int, groups: int, outer: int, ratio: float, shape: tuple[int, int]
) -> None:
    first, grouped = nn.Conv2d(3, inner, 1), conv3x3(inner, outer, groups=groups)
    model = nn.Sequential(first, nn.ReLU(), grouped, nn.ReLU(), nn.Conv2d(outer, 4, 1)).double().eval()
    for layer in (first, grouped):
        per_group = layer.out_channels // groups
        kept = 1 if layer is first else shape[0] // groups
        _silenced(layer, torch.arange(layer.out_channels) % per_group >= kept)
    pruned = cut_channels(model, ratio)
    layer = pruned[2]
    assert (layer.groups, layer.in_channels, tuple(layer.weight.shape[:2])) == (groups, groups, shape)
    assert_same_function(pruned, model)
    again = cut_channels(pruned, 0.3)
    assert again[2].in_channels == again[2].groups < groups
    assert again(X).shape == model(X).shape


def test_depthwise_convolution_of_the_input_keeps_equal_numbers_of_filters() -> None:
    """Its groups cannot leave: the input keeps its channels."""
    layer = _silenced(conv3x3(3, 24, groups=3), torch.arange(24) % 8 < 4)
    model = Net(lambda m, x: F.relu(m.layer(x)), width=24, layer=layer)
    pruned = cut_channels(model, 0.5)
    assert (pruned.layer.groups, pruned.layer.in_channels, pruned.layer.out_channels) == (3, 3, 12)
    assert_same_function(pruned, model)


def _transposed(outputs: int, silent: Tensor | slice, **arguments: Any) -> nn.Module:
    return _silenced(nn.ConvTranspose2d(16, outputs, 2, stride=2, **arguments), silent, dim=1)


def _up(model: Any, x: Tensor) -> Tensor:
    return F.relu(model.up(F.relu(model.a(x))))


@pytest.mark.parametrize(
    ("up", "ratio", "sizes"),
    [
        (_transposed(16, SILENT), 0.5, (8, 8, 1)),
        (_transposed(32, slice(4), groups=4), 0.5, (8, 16, 4)),
        (_silenced(nn.ConvTranspose2d(16, 16, 2, stride=2, groups=16)), 0.5, (8, 8, 8)),
        (nn.ConvTranspose2d(16, 32, 2, stride=2, groups=16, bias=False), 0.5, (8, 16, 8)),
    ],
    ids=["dense", "grouped", "depthwise", "depthwise with a multiplier"],
)
def test_transposed_convolutions(up: nn.ConvTranspose2d, ratio: float, sizes: tuple[int, int, int]) -> None:
    model = Net(_up, width=up.out_channels, up=up)
    pruned = cut_channels(model, ratio)
    assert (pruned.up.in_channels, pruned.up.out_channels, pruned.up.groups) == sizes
    assert_same_function(pruned, model)


def test_shuffled_pixels() -> None:
    whole = torch.tensor([0, 1, 2, 3, 8, 9, 10, 11])
    model = Net(lambda m, x: F.pixel_shuffle(m.d(x), 2), width=4, d=_silenced(conv3x3(3, 16), whole))
    pruned = cut_channels(model, 0.5)
    assert (pruned.d.out_channels, pruned.head.in_channels) == (8, 2)
    assert_same_function(pruned, model)
    model = Net(lambda m, x: F.pixel_unshuffle(m.a(x), 2), width=64)
    pruned = cut_channels(model, 0.5)
    assert (pruned.a.out_channels, pruned.head.in_channels) == (8, 32)
    assert_same_function(pruned, model)


def test_branches_of_one_channel_are_concatenated() -> None:
    model = Net(lambda m, x: torch.cat([m.a(x), m.c(x)], 1), width=32)
    for layer in (model.a, model.c):
        _silenced(layer, slice(1, 16))
    pruned = cut_channels(model, 0.93)
    assert (pruned.a.out_channels, pruned.c.out_channels, pruned.head.in_channels) == (1, 1, 2)
    assert_same_function(pruned, model)


def test_one_channel_under_a_map_of_attention() -> None:
    model = Net(lambda m, x: m.a(x) * m.attention(x).sigmoid(), attention=conv3x3(3, 1))
    _silenced(model.a, slice(1, 16))
    pruned = cut_channels(model, 0.93)
    assert pruned.a.out_channels == 1
    assert_same_function(pruned, model)
    reasons = {layer: s.reason for s in compress.record_of(pruned)[0].skipped for layer in s.layers}
    assert reasons["attention"] == "a single channel"


def _through(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.d(F.relu(m.a(x)))) + m.c(x)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def _parametrised(by: nn.Module) -> Callable[[nn.Module], nn.Module]:
    def parametrise(layer: nn.Module) -> nn.Module:
        register_parametrization(layer, "weight", by)
        return layer

    return parametrise


def _silent_norm(layer: nn.Module) -> nn.Module:
    """A weight norm's direction may not be zero: its magnitude is."""
    with torch.no_grad():
        layer.weight[SILENT] = 1
        layer = parametrizations.weight_norm(layer)
        layer.parametrizations.weight.original0[SILENT] = 0
    return layer


def _silent_old_norm(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        layer.weight[SILENT] = 1
    layer = weight_norm(layer)
    with torch.no_grad():
        layer.weight_g[SILENT] = 0
    return layer


def _masked(layer: nn.Module) -> nn.Module:
    """The mask, not the weight, silences the channels; another one lies over the bias."""
    torch.nn.init.normal_(layer.weight)
    mask = torch.rand_like(layer.weight) > 0.3
    mask[SILENT] = False
    prune.custom_from_mask(layer, "weight", mask)
    return prune.random_unstructured(layer, "bias", 0.5)


FOLLOWED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": _silent_norm,
    "weight norm by a hook": _silent_old_norm,
    "weight norm over inputs": lambda layer: parametrizations.weight_norm(layer, dim=1),
    "masks": _masked,
    "structured mask": lambda layer: prune.ln_structured(layer, "weight", 0.25, n=1, dim=0),
    "own, element-wise": _parametrised(Doubled()),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_parametrised_weight_is_cut_with_its_parameters(name: str) -> None:
    model = Net(_through, d=FOLLOWED[name](_silenced(conv3x3(16, 16))))
    pruned = cut_channels(model, 0.4)
    assert (pruned.d.in_channels, pruned.d.out_channels, pruned.c.out_channels) == (9, 10, 10)
    assert pruned.d.weight.shape == (10, 9, 3, 3)
    assert pruned.state_dict().keys() == model.state_dict().keys()
    assert_same_function(pruned, model)
    pruned.train()(X).square().sum().backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())
    assert {layer for layer, _ in compress.record_of(pruned)[0].layers()} == {"a", "c", "d", "head"}


def test_mask_decides_which_channels_matter() -> None:
    """All filters of the weight under the mask are alike."""
    layer = conv3x3(16, 16)
    nn.init.ones_(layer.weight)
    mask = torch.ones_like(layer.weight)
    mask[5:8] = 0
    prune.custom_from_mask(layer, "weight", mask)
    pruned = cut_channels(Net(lambda m, x: m.d(m.a(x)), d=layer), 3 / 32)
    assert pruned.d.weight_mask.shape[0] == 15
    assert int((pruned.d.weight_mask.sum((1, 2, 3)) == 0).sum()) == 2


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (parametrizations.spectral_norm(conv3x3(16, 16)), "parametrised by spectral_norm"),
        (spectral_norm(conv3x3(16, 16)), "parametrised by spectral_norm"),
        (parametrizations.orthogonal(conv3x3(16, 16)), "parametrised by orthogonal"),
        (parametrizations.weight_norm(conv3x3(16, 16), dim=None), "parametrised by weight_norm"),
        (Standardised(16, 16, 3, padding=1), "a weight that is computed"),
    ],
    ids=["spectral norm", "spectral norm by a hook", "orthogonal", "weight norm of the whole", "standardised"],
)
def test_other_parametrisations_are_named_as_the_reason(layer: nn.Module, named: str) -> None:
    model = Net(lambda m, x: m.d(m.a(x)) + m.h(m.c(x)), d=layer, h=conv3x3(16, 16))
    pruned = cut_channels(model, 0.4)
    assert_same_function(pruned, model)
    assert (pruned.a.out_channels, pruned.c.out_channels, pruned.d.weight.shape) == (16, 9, (16, 16, 3, 3))
    skipped = [s for s in compress.record_of(pruned)[0].skipped if named in s.reason]
    assert {name for s in skipped for name in s.layers} == {"a", "d"}
    alone = nn.Sequential(conv3x3(3, 16), layer, nn.Conv2d(16, 4, 1)).double().eval()
    with pytest.raises(ValueError, match=f"no channel can be pruned:.*conv2d in 1 has .*{named}"):
        cut_channels(alone, 0.4)


@pytest.mark.parametrize(
    ("between", "modules", "reason"),
    [
        (
            lambda m, x: m.m(m.a(x)[:, :8]),
            {"m": _silenced(nn.Conv2d(8, 16, 1))},
            "slice takes channels at fixed positions",
        ),
        (
            lambda m, x: m.m(m.a(x).mean((2, 3)), m.a(x).mean((2, 3)))[..., None, None],
            {"m": nn.Bilinear(16, 16, 16)},
            "bilinear in m is not understood",
        ),
        (lambda m, x: m.a(x).sort(1)[0], {}, "sort is not understood"),
        (lambda m, x: torch.einsum("nchw,c->nchw", m.a(x), m.w), {"w": _weights(16)}, "einsum is not understood"),
        (
            lambda m, x: m.m(*[m.a(x).flatten(2).transpose(1, 2)] * 3)[0].transpose(1, 2).unflatten(2, (8, 8)),
            {"m": nn.MultiheadAttention(16, 4, batch_first=True)},
            "linear in m is part of a MultiheadAttention, which insists on its width",
        ),
    ],
    ids=["slice", "bilinear", "sort", "einsum", "attention"],
)
def test_layers_that_stay_are_named_with_the_reason(
    between: Callable[[Any, Tensor], Tensor], modules: dict[str, Any], reason: str
) -> None:
    def both(m: Any, x: Tensor) -> Tensor:
        return torch.cat([between(m, x).mean((2, 3)), m.c(x).mean((2, 3))], 1)[..., None, None]

    model = Net(both, width=32, **modules)
    pruned = cut_channels(model, 0.3)
    assert (pruned.a.out_channels, pruned.c.out_channels) == (16, 11)
    assert_same_function(pruned, model)
    assert any("a" in s.layers and s.reason == reason for s in compress.record_of(pruned)[0].skipped)


class Shuffled(nn.Module):
    """ShuffleNet's unit: grouped, shuffled, depthwise and grouped again, `each` channels in every group between."""

    def __init__(self, groups: int, each: int) -> None:
        super().__init__()
        channels = groups * each
        self.groups = groups
        self.lead = nn.Conv2d(3, 4 * groups, 1)
        self.first = nn.Conv2d(4 * groups, channels, 1, groups=groups, bias=False)
        self.depthwise = conv3x3(channels, channels, groups=channels, bias=False)
        self.second = nn.Conv2d(channels, 2 * groups, 1, groups=groups)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(self.lead(x))
        y = y.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)
        return self.second(self.depthwise(y))


@pytest.mark.parametrize(("groups", "each"), [(2, 25), (3, 20), (3, 21), (4, 17), (8, 24)])
def test_shuffled_groups_lose_as_many_channels_each_also_where_groups_do_not_divide_them(
    groups: int, each: int
) -> None:
    model = Shuffled(groups, each)
    pruned = cut_channels(model, 0.3, ignore=["lead"])
    assert pruned.first.groups == pruned.second.groups == groups
    assert pruned.first.out_channels % groups == 0
    kept = (model.first.weight[:, None] == pruned.first.weight[None]).all((2, 3, 4)).any(1)
    assert int(kept.sum()) == pruned.first.out_channels < 0.8 * len(kept)
    assert kept.view(groups, each).sum(1).unique().numel() == 1
    silent = copy.deepcopy(model)
    with torch.no_grad():
        silent.first.weight[~kept] = 0
    assert_same_function(pruned, silent)
