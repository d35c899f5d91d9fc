"""Chains of low rank: a depthwise column and row of taps as one kernel, and products and convolutions through few
channels as one layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch.fx import GraphModule, Node

from kernelpress.emit.fuse.match import Match
from kernelpress.emit.fuse.stages import Stage
from kernelpress.emit.graph import attribute, constant_node, only_user, shape, value

__all__ = ["lowrank_layers", "whole_depthwise"]


def whole_depthwise(graph_module: GraphModule, stages: list[Stage]) -> Iterator[Stage]:
    """Depthwise k×1 → depthwise 1×k, in either order, as the depthwise k×k convolution by the product of both: more
    products in theory, but one pass over the image, and what `inverted_residual` is made of."""
    before = {stage.output: stage for stage in stages if _is_bare(stage, "depthwise_conv2d")}
    products: dict[tuple[Node, Node], Node] = {}
    for stage in stages:
        first = before.get(stage.x) if stage.kind == "depthwise_conv2d" and only_user(stage.x) is not None else None
        axes = None if first is None else (_axis(first), _axis(stage))
        if first is None or axes not in ((0, 1), (1, 0)):
            continue
        key = (first.weight, stage.weight)
        if key not in products:
            weights = [attribute(graph_module, str(node.target)).detach() for node in key]
            product = (weights[0].double() * weights[1].double()).to(weights[0].dtype)
            products[key] = constant_node(graph_module, f"{stage.weight.target}_whole", product, first.weight)
        rows, columns = (first, stage) if axes == (0, 1) else (stage, first)
        geometry = {name: [sizes[0], columns.geometry[name][1]] for name, sizes in rows.geometry.items()}
        nodes = first.nodes | stage.nodes
        yield replace(stage, x=first.x, weight=products[key], nodes=nodes, geometry=geometry)


def lowrank_layers(stages: list[Stage]) -> Iterator[Match]:
    """Two products, and 1×1 → k×k → 1×1, with nothing between. Not on the CPU, where the layers one after the other are
    as fast."""
    before: dict[Node, Stage] = {}
    for stage in stages:
        is_plain = stage.geometry.get("groups", 1) == 1
        if is_plain and any(_is_bare(stage, kind) for kind in ("linear", "pointwise_conv2d", "conv2d")):
            before[stage.output] = stage
    for last in stages:
        middle = _producer(before, last.x)
        if middle is None or last.input_scale is not None or _is_on_cpu(last.x):
            continue
        if last.kind == middle.kind == "linear":
            yield _match("lowrank_linear", last, {"first_weight": middle.weight}, middle)
        first = _producer(before, middle.x)
        if first is not None and (first.kind, middle.kind, last.kind) == _TUCKER:
            weights = {"first_weight": first.weight, "core_weight": middle.weight}
            geometry = {name: middle.geometry[name] for name in ("stride", "padding", "dilation")}
            yield _match("lowrank_conv2d", last, weights | geometry, middle, first)


_TUCKER = ("pointwise_conv2d", "conv2d", "pointwise_conv2d")


def _match(op: str, last: Stage, further: dict[str, Any], *others: Stage) -> Match:
    epilogue = {"bias": last.bias, "residual": last.residual, "activation": last.activation}
    given = {"x": others[-1].x, "last_weight": last.weight, **further, **epilogue}
    nodes = last.nodes.union(*(stage.nodes for stage in others))
    return Match(op, nodes, last.output, given, parts=1 + len(others))


def _is_on_cpu(node: Node) -> bool:
    return bool(value(node).device.type == "cpu")


def _producer(before: dict[Node, Stage], x: Node) -> Stage | None:
    return before.get(x) if only_user(x) is not None else None


def _is_bare(stage: Stage, kind: str) -> bool:
    """Whether it is a layer of this kind without anything but its weight."""
    ends = (stage.bias, stage.residual, stage.input_scale)
    return stage.kind == kind and stage.activation == "identity" and all(end is None for end in ends)


def _axis(stage: Stage) -> int | None:
    """The dimension of the image that a depthwise convolution of one filter a channel moves over, if over one alone."""
    sizes: Any = shape(stage.weight)
    if sizes[0] != shape(stage.x)[1]:  # type: ignore[index]
        return None
    axis = 1 if sizes[2] == 1 else 0
    is_still = [sizes[3 - axis], stage.geometry["stride"][1 - axis], stage.geometry["padding"][1 - axis]] == [1, 1, 0]
    return axis if is_still else None
