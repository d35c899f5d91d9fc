"""Changing the size of layers in place: their tensors, and the attributes that state the sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = [
    "adapt_sizes",
    "compute_weights",
    "named_tensors",
    "replace_tensors",
    "set_size_attributes",
    "size_attributes",
]

_SIZE_ATTRIBUTES = (
    "in_channels",
    "out_channels",
    "channels",
    "channel_multiplier",
    "groups",
    "in_features",
    "out_features",
    "num_features",
    "num_parameters",
    "num_channels",
    "num_groups",
    "width",
    "normalized_shape",
)


def size_attributes(module: nn.Module) -> dict[str, Any]:
    """The sizes that `module` states as plain integers or tuples of them, by attribute."""
    values = {name: vars(module).get(name) for name in _SIZE_ATTRIBUTES}
    return {name: value for name, value in values.items() if isinstance(value, int | tuple)}


def set_size_attributes(module: nn.Module, sizes: Mapping[str, Any]) -> None:
    """Sets what `size_attributes` returns; a tuple may be a list, as JSON has it."""
    for name, value in sizes.items():
        setattr(module, name, tuple(value) if isinstance(value, list) else value)


def adapt_sizes(module: nn.Module, *, original: nn.Module) -> None:
    """Makes the sizes that `module` states, groups aside, those of its tensors where they differ from `original`'s.

    A weight that a hook of `torch.nn.utils` computes before each call is computed anew.
    """
    compute_weights(module)
    new, old = _stated_shape(module), _stated_shape(original)
    sizes = size_attributes(module)
    if new == old or not sizes:
        return
    if "out_features" in sizes:
        changed = {"in_features": new[1], "out_features": new[0]}
    elif "out_channels" in sizes:
        groups = sizes.get("groups", 1)
        outputs, inputs = (
            (new[1] * groups, new[0]) if getattr(module, "transposed", False) else (new[0], new[1] * groups)
        )
        changed = {"in_channels": inputs, "out_channels": outputs}
    else:
        changed = dict.fromkeys(("num_features", "num_parameters"), new[0])
    set_size_attributes(module, {name: value for name, value in changed.items() if name in sizes})


def compute_weights(module: nn.Module) -> None:
    """Computes what hooks of `torch.nn.utils` compute before each call: a weight of a norm, or under a mask."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm | SpectralNorm | BasePruningMethod):
            with torch.no_grad():
                hook(module, ())


def _stated_shape(module: nn.Module) -> tuple[int, ...]:
    """Shape of the weight, or of the running mean, of which a module states the sizes; `()` without either."""
    for name in ("weight", "running_mean"):
        if isinstance(tensor := getattr(module, name, None), Tensor):
            return tuple(tensor.shape)
    return ()


def replace_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts `tensors` in the place of the parameters and buffers of these names, and of every other name they have.

    A parameter stays a trainable or frozen parameter; its gradient is dropped.
    """
    names: dict[int, list[str]] = {}
    for name, tensor in named_tensors(model):
        names.setdefault(id(tensor), []).append(name)
    by_name = dict(named_tensors(model))
    for name, tensor in tensors.items():
        old = by_name[name]
        new = nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor
        for alias in names[id(old)]:
            path, _, attribute = alias.rpartition(".")
            setattr(model.get_submodule(path), attribute, new)


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every parameter and buffer under every name it has."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
