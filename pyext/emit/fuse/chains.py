"""Convolutions in a row as one layer: depthwise → pointwise, alone and behind a pointwise or dense one."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from kernelpress.emit.fuse.match import Match
from kernelpress.emit.fuse.stages import Stage
from kernelpress.emit.graph import only_user, shape

__all__ = ["chains"]


def chains(stages: list[Stage]) -> Iterator[Match]:
    """Depthwise → pointwise, alone and behind a pointwise or dense layer, where nobody else reads what lies between."""
    by_output: dict[Node, list[Stage]] = {}
    for stage in stages:
        by_output.setdefault(stage.output, []).append(stage)

    def producers(x: Node, kind: str) -> Iterator[Stage]:
        if only_user(x) is not None:
            yield from (
                s for s in by_output.get(x, ()) if s.kind == kind and s.residual is None and s.input_scale is None
            )

    for project in stages:
        if project.kind != "pointwise_conv2d" or project.input_scale is not None:
            continue
        for depthwise in producers(project.x, "depthwise_conv2d"):
            if shape(depthwise.weight)[0] != shape(depthwise.x)[1]:  # type: ignore[index]
                continue
            yield _separable(depthwise, project)
            for expand in producers(depthwise.x, "pointwise_conv2d"):
                yield _inverted_residual(expand, depthwise, project)
            for stem in producers(depthwise.x, "conv2d"):
                if _is_plain_stem(stem, depthwise) and project.residual is None:
                    yield _separable_stem(stem, depthwise, project)


def _separable(depthwise: Stage, project: Stage) -> Match:
    given = {
        "x": depthwise.x,
        "depthwise_weight": depthwise.weight,
        "depthwise_bias": depthwise.bias,
        "pointwise_weight": project.weight,
        "pointwise_bias": project.bias,
        "residual": project.residual,
        **depthwise.geometry,
        "depthwise_activation": depthwise.activation,
        "activation": project.activation,
    }
    return Match("separable_conv2d", depthwise.nodes | project.nodes, project.output, given, parts=2)


def _inverted_residual(expand: Stage, depthwise: Stage, project: Stage) -> Match:
    given = {
        "x": expand.x,
        "expand_weight": expand.weight,
        "expand_bias": expand.bias,
        "depthwise_weight": depthwise.weight,
        "depthwise_bias": depthwise.bias,
        "project_weight": project.weight,
        "project_bias": project.bias,
        "residual": project.residual,
        **depthwise.geometry,
        "expand_activation": expand.activation,
        "depthwise_activation": depthwise.activation,
        "activation": project.activation,
    }
    nodes = expand.nodes | depthwise.nodes | project.nodes
    return Match("inverted_residual", nodes, project.output, given, parts=3)


def _is_plain_stem(stem: Stage, depthwise: Stage) -> bool:
    return (
        stem.geometry["groups"] == 1
        and stem.geometry["dilation"] == [1, 1]
        and depthwise.geometry["dilation"] == [1, 1]
    )


def _separable_stem(stem: Stage, depthwise: Stage, project: Stage) -> Match:
    given = {
        "x": stem.x,
        "stem_weight": stem.weight,
        "stem_bias": stem.bias,
        "depthwise_weight": depthwise.weight,
        "depthwise_bias": depthwise.bias,
        "pointwise_weight": project.weight,
        "pointwise_bias": project.bias,
        "stem_stride": stem.geometry["stride"],
        "stem_padding": stem.geometry["padding"],
        "stride": depthwise.geometry["stride"],
        "padding": depthwise.geometry["padding"],
        "stem_activation": stem.activation,
        "depthwise_activation": depthwise.activation,
        "activation": project.activation,
    }
    nodes = stem.nodes | depthwise.nodes | project.nodes
    return Match("separable_stem", nodes, project.output, given, parts=3)
