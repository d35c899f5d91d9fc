"""Helpers of the tests of pruning: silent channels in float64, so that what is cut away changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kernelpress import compress

__all__ = ["X", "assert_same_function", "conv3x3", "cut_channels", "without_lost_inputs"]

X = torch.randn(2, 3, 8, 8, dtype=torch.float64)


def conv3x3(inputs: int, outputs: int, **arguments: Any) -> nn.Conv2d:
    """A convolution that keeps the size of the map."""
    return nn.Conv2d(inputs, outputs, 3, padding=1, **arguments)


def cut_channels(model: nn.Module, ratio: float, **arguments: Any) -> nn.Module:
    """`model` without this part of its channels, in no groups."""
    return compress.prune_channels(model, X, ratio=ratio, target="channels", round_to=1, **arguments)


def assert_same_function(pruned: nn.Module, model: nn.Module) -> None:
    """Both compute the same of a fresh input."""
    x: Tensor = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(pruned(x), model(x), rtol=1e-10, atol=1e-10)


def _plain(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy whose weights, as they are in a call, are computed by nothing."""
    model(x)
    plain = copy.deepcopy(model)
    for name, layer in list(plain.named_modules()):
        if parametrize.is_parametrized(layer) or hasattr(layer, "weight_mask"):
            make = nn.ConvTranspose2d if isinstance(layer, nn.ConvTranspose2d) else nn.Conv2d
            twin = make(layer.in_channels, layer.out_channels, 3, padding=1, groups=layer.groups).double()
            twin.weight, twin.bias = nn.Parameter(layer.weight.clone()), layer.bias
            plain.set_submodule(name, twin)
    return plain


def without_lost_inputs(model: nn.Module, pruned: nn.Module, x: Tensor) -> nn.Module:
    """`model` with zeros where a layer of `pruned` no longer reads; columns are known again by their values."""
    cut, small = _plain(model, x), _plain(pruned, x)
    for name, layer in cut.named_modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            dim = 0 if isinstance(layer, nn.ConvTranspose2d) else 1
            columns, part = layer.weight.movedim(dim, 0), small.get_submodule(name).weight
            if part.size(dim) < len(columns):
                values = part[part != 0]
                stays = torch.tensor(
                    [bool(torch.isclose(values, column[..., None], rtol=1e-9, atol=0).any()) for column in columns]
                )
                assert stays.sum() == part.size(dim), name
                columns[~stays] = 0
    return cut
