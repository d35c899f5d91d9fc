"""Ghost modules: a convolution, a depthwise one on its result, and the concatenation of both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from kernelpress.emit.fuse.grouped import concatenated
from kernelpress.emit.fuse.match import Match
from kernelpress.emit.fuse.stages import Stage, summed
from kernelpress.emit.graph import arguments, only_user, shape

__all__ = ["ghosts"]

aten = torch.ops.aten


def ghosts(stages: list[Stage]) -> Iterator[Match]:
    """cat([y, depthwise(y)]), cut to its first channels or not, without and with the sum behind it."""
    by_output: dict[Node, list[Stage]] = {}
    for stage in stages:
        if stage.residual is None and stage.input_scale is None:
            by_output.setdefault(stage.output, []).append(stage)
    for cheap in (stage for found in by_output.values() for stage in found):
        whole = _concatenation(cheap) if _is_cheap(cheap) else None
        if whole is None:
            continue
        for primary in by_output.get(cheap.x, ()):
            if _is_primary(primary) and set(primary.output.users) == {_first(cheap), whole}:
                yield from _matches(primary, cheap, whole)


def _is_cheap(stage: Stage) -> bool:
    """A depthwise convolution that the op takes; what is concatenated to its input has kept the size anyhow."""
    if stage.kind != "depthwise_conv2d":
        return False
    return stage.geometry["stride"] == [1, 1] and stage.geometry["dilation"] == [1, 1]


def _is_primary(stage: Stage) -> bool:
    if stage.kind == "conv2d":
        return bool(stage.geometry["groups"] == 1 and stage.geometry["dilation"] == [1, 1])
    return stage.kind == "pointwise_conv2d"


def _first(stage: Stage) -> Node:
    """The convolution of a stage."""
    return next(node for node in stage.nodes if stage.weight in node.all_input_nodes)


def _concatenation(cheap: Stage) -> Node | None:
    """What puts the output of `cheap` behind its input."""
    whole = only_user(cheap.output)
    return whole if whole is not None and concatenated(whole) == [cheap.x, cheap.output] else None


def _matches(primary: Stage, cheap: Stage, whole: Node) -> Iterator[Match]:
    nodes = primary.nodes | cheap.nodes | {whole}
    cut = only_user(whole)
    if cut is not None and _keeps_first_channels(cut, at_least=shape(primary.output)[1]):  # type: ignore[index]
        nodes, whole = nodes | {cut}, cut
    for stage in (joined := replace(primary, nodes=nodes, output=whole, activation="identity"), *summed(joined)):
        given: dict[str, Any] = {
            "x": primary.x,
            "primary_weight": primary.weight,
            "primary_bias": primary.bias,
            "cheap_weight": cheap.weight,
            "cheap_bias": cheap.bias,
            "residual": stage.residual,
            "stride": primary.geometry.get("stride", [1, 1]),
            "padding": primary.geometry.get("padding", [0, 0]),
            "activation": primary.activation,
            "cheap_activation": cheap.activation,
            "out_channels": int(shape(whole)[1]),  # type: ignore[index]
        }
        yield Match("ghost_conv2d", stage.nodes, stage.output, given, parts=2)


def _keeps_first_channels(node: Node, *, at_least: int) -> bool:
    if node.target is not aten.slice.Tensor:
        return False
    given = arguments(node)
    is_of_channels = given["dim"] in (1, -3) and given["start"] in (None, 0) and given["step"] == 1
    return bool(is_of_channels and shape(node)[1] >= at_least)  # type: ignore[index]
