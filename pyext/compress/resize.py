"""Changing the size of layers in place: their tensors, and the attributes that state the sizes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

__all__ = ["adapt_sizes", "named_tensors", "replace_tensors", "set_size_attributes", "size_attributes"]

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
)


def size_attributes(module: nn.Module) -> dict[str, int]:
    """The sizes that `module` states as plain integer attributes, by name."""
    values = {name: vars(module).get(name) for name in _SIZE_ATTRIBUTES}
    return {name: value for name, value in values.items() if isinstance(value, int)}


def set_size_attributes(module: nn.Module, sizes: Mapping[str, int]) -> None:
    """Sets what `size_attributes` returns."""
    for name, value in sizes.items():
        setattr(module, name, value)


def adapt_sizes(module: nn.Module, *, original: nn.Module) -> None:
    """Makes the size attributes of `module` follow its own tensors, where they differ from `original`'s."""
    shapes, before = _own_shapes(module), _own_shapes(original)
    sizes = size_attributes(original)
    if shapes == before or not sizes:
        return
    new, old = (values.get("weight") or values["running_mean"] for values in (shapes, before))
    if "out_features" in sizes:
        changed = {"in_features": new[1], "out_features": new[0]}
    elif "out_channels" in sizes:
        changed = _convolution_sizes(sizes, old, new, transposed=bool(getattr(original, "transposed", False)))
    else:
        changed = dict.fromkeys(("num_features", "num_parameters", "num_channels"), new[0])
    set_size_attributes(module, {name: value for name, value in changed.items() if name in sizes})


def _convolution_sizes(
    sizes: Mapping[str, int], old: tuple[int, ...], new: tuple[int, ...], *, transposed: bool
) -> dict[str, int]:
    groups = sizes.get("groups", 1)
    if groups > 1 and groups == sizes["in_channels"]:
        groups = new[0] * groups // old[0]
    # Transposed convolutions with groups are never resized.
    out_dim, in_dim = (1, 0) if transposed else (0, 1)
    return {"in_channels": new[in_dim] * groups, "out_channels": new[out_dim], "groups": groups}


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


def _own_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {name: tuple(tensor.shape) for name, tensor in own}
