"""Grouped convolutions, the channel shuffles behind them, and shuffles of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.fx import GraphModule, Node

from kernelpress.emit.fuse.match import Match
from kernelpress.emit.fuse.stages import Stage, bare_stage, epilogues, with_activation
from kernelpress.emit.graph import arguments, only_user, shape, value

__all__ = ["concatenated", "grouped_stages", "shuffles"]

aten = torch.ops.aten


def grouped_stages(graph_module: GraphModule, node: Node) -> Iterator[Stage]:
    """The grouped convolution at `node`, and any convolution but a depthwise one that a shuffle follows.

    The op shuffles before it adds the residual and applies the activation, which treats all channels alike: so the
    shuffle may also stand behind an activation, but not behind a sum.
    """
    bare = bare_stage(graph_module, node)
    if bare is None or bare.kind not in ("conv2d", "pointwise_conv2d"):
        return
    grouped = _as_grouped(bare)
    if grouped.geometry["groups"] > 1:
        yield from epilogues(grouped)
    shuffled = _with_shuffle(grouped)
    if shuffled is not None:
        yield from epilogues(shuffled)
        return
    shuffled = _with_shuffle(with_activation(grouped))
    if shuffled is not None:
        yield shuffled


def _as_grouped(stage: Stage) -> Stage:
    geometry = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1, **stage.geometry, "shuffle": 1}
    return replace(stage, kind="grouped_conv2d", geometry=geometry)


def _with_shuffle(stage: Stage) -> Stage | None:
    shuffle = only_user(stage.output)
    groups = None if shuffle is None else _shuffle_groups(shuffle)
    if shuffle is None or groups is None:
        return None
    geometry = {**stage.geometry, "shuffle": groups}
    return replace(stage, geometry=geometry, nodes=stage.nodes | {shuffle}, output=shuffle)


def shuffles(node: Node) -> Iterator[Match]:
    """The channel shuffle that `node` is, alone and with the concatenation of two tensors before it."""
    groups = _shuffle_groups(node)
    if groups is None:
        return
    x: Node = node.args[0]  # type: ignore[assignment]
    yield Match("channel_shuffle", frozenset({node}), node, {"x": x, "groups": groups})
    parts = concatenated(x)
    if only_user(x) is not None and len(parts) == 2:
        halves = {"a": parts[0], "b": parts[1], "groups": groups}
        yield Match("shuffle_concat", frozenset({x, node}), node, halves)


def _shuffle_groups(node: Node) -> int | None:
    if node.target is not aten.channel_shuffle.default or len(shape(node) or ()) != 4:
        return None
    groups = arguments(node)["groups"]
    is_value = value(node).is_floating_point() or value(node).dtype == torch.int8
    return groups if is_value and isinstance(groups, int) else None


def concatenated(node: Node) -> list[Node]:
    """The images of one dtype whose channels `node` puts one behind the other; none if it does anything else."""
    if node.target is not aten.cat.default or len(shape(node) or ()) != 4:
        return []
    given = arguments(node)
    parts = list(given["tensors"])
    same = all(len(shape(part) or ()) == 4 and value(part).dtype == value(node).dtype for part in parts)
    return parts if same and given["dim"] in (1, -3) else []
