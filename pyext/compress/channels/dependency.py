"""Which channels of which layers can only be removed together, found on the exported graph."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from kernelpress.compress.channels.rules import RULES
from kernelpress.compress.channels.sets import ChannelSets
from kernelpress.compress.channels.walk import Axis, ChannelWalk, Count, LayerCall
from kernelpress.compress.record import SkippedLayers

__all__ = ["Axis", "Count", "Dependencies", "LayerCall", "Occurrence", "Pool", "contradiction", "find_dependencies"]


class Occurrence(NamedTuple):
    """How often a set of channels stands on an axis."""

    axis: Axis
    positions: int


@dataclass(frozen=True)
class Pool:
    """Sets of channels that live on the same axes, so that any one of them may go instead of any other.

    `roots`: their labels. `occurrences`: the axes, with the positions that one set takes there (more than one after
    flattening, in grouped convolutions, with a channel multiplier). `producers`: the weights' output axes among them.
    """

    roots: tuple[int, ...]
    occurrences: tuple[Occurrence, ...]
    producers: tuple[Occurrence, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """Qualified names of the layers whose filters make these channels."""
        return tuple(dict.fromkeys(axis.layer for axis, _ in self.producers))


@dataclass(frozen=True)
class Dependencies:
    """The labels along every axis of every parameter that depends on channels, and what follows from them.

    `axes[axis][i]` is the set of position i; `FIXED` where it must stay. `calls`: every convolution and linear layer
    in the graph with its FLOPs. `counts`: attribute → the sets of what it counts. `weights`: parameter of a producer →
    the weight made of it, itself where it is no mask's or norm's. `weight_norms`: magnitude → its direction, and the
    dimension along which it lies.
    """

    axes: Mapping[Axis, Tensor]
    pools: tuple[Pool, ...]
    skipped: tuple[SkippedLayers, ...]
    calls: tuple[LayerCall, ...]
    counts: Mapping[Count, Tensor]
    weights: Mapping[str, Tensor]
    weight_norms: Mapping[str, tuple[str, int]]


def find_dependencies(
    graph: GraphModule, model: nn.Module, *, ignore: Iterable[str] = (), couple_splits: bool = True
) -> Dependencies:
    """Walks `graph`, the static export of `model` by `trace`, and groups its channels.

    `ignore`: qualified names of layers whose output channels stay. With `couple_splits`, a reshape or chunk that
    divides an axis of channels (channel shuffle, heads) is understood as equal blocks that are pruned alike, and a size
    in the graph as one that `forward` takes from its tensors; without, such channels stay.

    Source of the grouping: Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023, section 3; here each
    channel is labelled and the labels are carried through the operations themselves, so that concatenation,
    flattening and shuffling need no rules of their own.
    """
    sets = ChannelSets()
    walk = ChannelWalk(graph, model, sets, RULES, couple_splits=couple_splits)
    walk.run()
    ignored = set(ignore)
    for axis in walk.producers:
        if (layer := axis.layer) in ignored:
            sets.freeze(walk.axes[axis], f"{layer} is ignored on request")

    roots = {axis: sets.find(labels) for axis, labels in walk.axes.items()}
    opaque = [SkippedLayers((layer,), channels, reason) for layer, (channels, reason) in walk.opaque.items()]
    with torch.no_grad():
        weights = {name: _value(graph, node).detach() for name, node in walk.weights.items()}
    return Dependencies(
        axes={axis: sets.unfrozen(labels) for axis, labels in roots.items()},
        pools=_pools(roots, walk.producers, sets),
        skipped=(*_skipped(roots, walk.producers, sets), *opaque),
        calls=tuple(
            replace(call, entering=sets.unfrozen(call.entering), leaving=sets.unfrozen(call.leaving))
            for call in walk.calls
        ),
        counts={count: sets.unfrozen(labels) for count, labels in walk.counts.items()},
        weights=weights,
        weight_norms=walk.weight_norms,
    )


def contradiction(graph: GraphModule, model: nn.Module, kept: Mapping[Axis, Tensor]) -> str | None:
    """Checks a pruned model: `kept` says which original channel each position of each axis should carry.

    Returns None if the graph of the pruned model brings exactly these channels to every parameter, else the place
    where it does not.
    """
    sets = ChannelSets()
    sets.fresh(max((int(labels.max()) for labels in kept.values() if len(labels)), default=0))
    walk = ChannelWalk(graph, model, sets, RULES, couple_splits=True, known_axes=kept)
    try:
        walk.run()
    except RuntimeError as error:
        return str(error)
    return sets.last_change


def _value(graph: GraphModule, node: Node) -> Tensor:
    """What `node`, which depends on parameters alone, gives."""
    if node.op == "get_attr":
        value: Tensor = operator.attrgetter(str(node.target))(graph)
        return value
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda source: _value(graph, source))
    result: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    return result


def _pools(roots: Mapping[Axis, Tensor], producers: Iterable[Axis], sets: ChannelSets) -> tuple[Pool, ...]:
    signatures: dict[int, list[Occurrence]] = {}
    for axis, labels in roots.items():
        values, counts = labels.unique(return_counts=True)
        for root, count in zip(values.tolist(), counts.tolist(), strict=True):
            if sets.frozen_because(root) is None:
                signatures.setdefault(root, []).append(Occurrence(axis, count))
    members: dict[tuple[Occurrence, ...], list[int]] = {}
    for root, found in signatures.items():
        members.setdefault(tuple(found), []).append(root)
    outputs = set(producers)
    pools = []
    for occurrences, alike in members.items():
        made_by = tuple(occurrence for occurrence in occurrences if occurrence.axis in outputs)
        if made_by:
            pools.append(Pool(tuple(sorted(alike)), occurrences, made_by))
    return tuple(pools)


def _skipped(roots: Mapping[Axis, Tensor], producers: Iterable[Axis], sets: ChannelSets) -> tuple[SkippedLayers, ...]:
    layers: dict[str, dict[str, int]] = {}
    for axis in producers:
        for root in roots[axis].tolist():
            reason = sets.frozen_because(root)
            if reason is not None:
                counts = layers.setdefault(reason, {})
                layer = axis.layer
                counts[layer] = counts.get(layer, 0) + 1
    return tuple(SkippedLayers(tuple(counts), max(counts.values()), reason) for reason, counts in layers.items())
