"""The smaller copy of a model, and whether it is what was meant."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kernelpress.compress.changes import copied
from kernelpress.compress.channels.dependency import Axis, Dependencies, contradiction
from kernelpress.compress.resize import adapt_sizes, named_tensors, replace_tensors
from kernelpress.trace import TraceError, trace

__all__ = ["cut", "failure"]


def cut(
    model: nn.Module, dependencies: Dependencies, removing: frozenset[int], scales: Mapping[Axis, Tensor]
) -> nn.Module:
    """A copy of `model` without the sets in `removing`, its weights first multiplied by `scales` along these axes."""
    pruned = copied(model)
    old = dict(named_tensors(pruned))
    new: dict[str, Tensor] = {}
    for axis, factors in scales.items():
        tensor = new.get(axis.parameter, old[axis.parameter]).detach()
        along = [-1 if dim == axis.dim else 1 for dim in range(tensor.dim())]
        new[axis.parameter] = tensor * factors.to(tensor).view(along)
    kept = {axis: _kept_positions(labels, removing) for axis, labels in dependencies.axes.items()}
    for axis, positions in kept.items():
        if len(positions) < len(dependencies.axes[axis]):
            tensor = new.get(axis.parameter, old[axis.parameter]).detach()
            new[axis.parameter] = tensor.index_select(axis.dim, positions.to(tensor.device))
    for magnitude, (direction, dim) in dependencies.weight_norms.items():
        if direction in new:
            # The weight is magnitude · direction / ‖direction‖: what stays of it has to stay the same.
            whole = torch.norm_except_dim(old[direction].detach(), 2, dim)
            positions = kept.get(Axis(direction, dim), torch.arange(whole.size(dim))).to(whole.device)
            share = torch.norm_except_dim(new[direction], 2, dim) / whole.index_select(dim, positions)
            new[magnitude] = new.get(magnitude, old[magnitude]).detach() * share.nan_to_num(1.0)
    replace_tensors(pruned, new)
    for (path, attribute, place), labels in dependencies.counts.items():
        module, count = pruned.get_submodule(path), len(_kept_positions(labels, removing))
        stated = getattr(module, attribute)
        setattr(module, attribute, count if place is None else (*stated[:place], count, *stated[place + 1 :]))
    for name, module in model.named_modules():
        adapt_sizes(pruned.get_submodule(name), original=module)
    return pruned


def failure(
    pruned: nn.Module, inputs: tuple[Any, ...], dependencies: Dependencies, removing: frozenset[int]
) -> str | None:
    """Why `pruned` is not what was intended, or None: it must run, and bring every channel to its own weights."""
    kept = {axis: labels[_kept_positions(labels, removing)] for axis, labels in dependencies.axes.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = trace(pruned, inputs, dynamic_batch=False)
    except TraceError as error:
        return str(error)
    place = contradiction(graph, pruned, kept)
    return place and f"{place} brings channels to the wrong weights"


def _kept_positions(labels: Tensor, removing: frozenset[int]) -> Tensor:
    gone = torch.isin(labels, torch.tensor(sorted(removing), dtype=labels.dtype))
    return (~gone).nonzero().flatten()
