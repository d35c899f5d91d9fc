"""Which channels of which layers can only be removed together, found on the exported graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from torch.fx import GraphModule

from kernelpress.compress.channel_sets import FIXED, ChannelSets
from kernelpress.compress.channel_walk import Axis, ChannelWalk, LayerCall
from kernelpress.compress.record import SkippedLayers

__all__ = ["Axis", "Dependencies", "LayerCall", "Occurrence", "Pool", "contradiction", "find_dependencies"]


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
        return tuple(dict.fromkeys(axis.parameter.rpartition(".")[0] for axis, _ in self.producers))


@dataclass(frozen=True)
class Dependencies:
    """The labels along every axis of every parameter that depends on channels, and what follows from them.

    `axes[axis][i]` is the set of position i; `FIXED` where it must stay. `calls`: every convolution and linear layer
    in the graph with its FLOPs.
    """

    axes: Mapping[Axis, Tensor]
    pools: tuple[Pool, ...]
    skipped: tuple[SkippedLayers, ...]
    calls: tuple[LayerCall, ...]


def find_dependencies(
    graph: GraphModule, model: nn.Module, *, ignore: Iterable[str] = (), couple_splits: bool = True
) -> Dependencies:
    """Walks `graph`, the static export of `model` by `trace`, and groups its channels.

    `ignore`: qualified names of layers whose output channels stay. With `couple_splits`, a reshape or chunk that
    divides an axis of channels (channel shuffle, heads) is understood as equal blocks that are pruned alike;
    without, such channels stay.

    Source of the grouping: Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023, section 3; here each
    channel is labelled and the labels are carried through the operations themselves, so that concatenation,
    flattening and shuffling need no rules of their own.
    """
    sets = ChannelSets()
    walk = ChannelWalk(graph, model, sets, couple_splits=couple_splits)
    walk.run()
    ignored = set(ignore)
    for axis in walk.producers:
        if (layer := axis.parameter.rpartition(".")[0]) in ignored:
            sets.freeze(walk.axes[axis], f"{layer} is ignored on request")

    roots = {axis: sets.find(labels) for axis, labels in walk.axes.items()}
    pools = _pools(roots, walk.producers, sets)
    axes = {axis: _mask_frozen(labels, sets) for axis, labels in roots.items()}
    return Dependencies(axes, pools, _skipped(roots, walk.producers, sets), tuple(walk.calls))


def contradiction(graph: GraphModule, model: nn.Module, kept: Mapping[Axis, Tensor]) -> str | None:
    """Checks a pruned model: `kept` says which original channel each position of each axis should carry.

    Returns None if the graph of the pruned model brings exactly these channels to every parameter, else the place
    where it does not.
    """
    sets = ChannelSets()
    sets.fresh(max((int(labels.max()) for labels in kept.values() if len(labels)), default=0))
    walk = ChannelWalk(graph, model, sets, couple_splits=True, known_axes=kept)
    try:
        walk.run()
    except RuntimeError as error:
        return str(error)
    return sets.last_change


def _mask_frozen(roots: Tensor, sets: ChannelSets) -> Tensor:
    masked = roots.clone()
    for root in roots.unique().tolist():
        if sets.frozen_because(root) is not None:
            masked[roots == root] = FIXED
    return masked


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
                layer = axis.parameter.rpartition(".")[0]
                counts[layer] = counts.get(layer, 0) + 1
    return tuple(SkippedLayers(tuple(counts), max(counts.values()), reason) for reason, counts in layers.items())
