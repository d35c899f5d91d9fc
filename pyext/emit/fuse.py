"""Finds where kernelpress layers fit on a folded graph: which nodes each could replace, and with which arguments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from kernelpress.emit.canonical import activation_of
from kernelpress.emit.graph import arguments, constant_tensor, only_user, shape, value

__all__ = ["Match", "find_matches"]

aten = torch.ops.aten

FLATTENS = (aten.flatten.using_ints, aten.reshape.default, aten.view.default, aten.squeeze.dims)


@dataclass(frozen=True)
class Match:
    """One kernelpress layer that can stand for `nodes`, of which only `output` is read by the rest of the graph.

    `arguments` are the op's by name; graph nodes among them are its inputs. `parts` counts the layers fused into one:
    1 for a convolution with its epilogue, 2 for a separable convolution, 3 for an inverted residual.
    """

    op: str
    nodes: frozenset[Node]
    output: Node
    arguments: dict[str, Any]
    parts: int = 1


@dataclass(frozen=True)
class _Stage:
    """A convolution or linear layer with the epilogue (residual, activation) and prologue (SE scale) around it."""

    kind: str
    x: Node
    weight: Node
    bias: Node | None
    nodes: frozenset[Node]
    output: Node
    residual: Node | None = None
    activation: str = "identity"
    input_scale: Node | None = None
    geometry: dict[str, Any] = field(default_factory=dict)

    def match(self) -> Match:
        given: dict[str, Any] = {"x": self.x, "weight": self.weight, "bias": self.bias, "residual": self.residual}
        if self.kind == "pointwise_conv2d":
            given["input_scale"] = self.input_scale
        given |= self.geometry | {"activation": self.activation}
        return Match(self.kind, self.nodes, self.output, given)


def find_matches(graph_module: GraphModule) -> list[Match]:
    """Every place where a kernelpress layer could stand, overlapping ones included; values that others read stay."""
    stages = [stage for node in graph_module.graph.nodes for stage in _stages(graph_module, node)]
    matches = [stage.match() for stage in stages]
    matches += _chains(stages)
    for node in graph_module.graph.nodes:
        matches += _pools(node)
    return matches


def _stages(graph_module: GraphModule, node: Node) -> Iterator[_Stage]:
    """The layer at `node` with its activation, without and with the SE scale before it and the sum behind it.

    An epilogue costs a layer of ours next to nothing, so an activation is never left out. A sum may be: another layer
    may need it for its own epilogue.
    """
    bare = _bare_stage(graph_module, node)
    if bare is None:
        return
    for stage in (bare, *_with_input_scale(bare)):
        yield _with_activation(stage)
        for summed in _with_residual(stage):
            yield _with_activation(summed)


def _bare_stage(graph_module: GraphModule, node: Node) -> _Stage | None:
    if node.op != "call_function" or node.target not in (aten.conv2d.default, aten.conv2d.padding, aten.linear.default):
        return None
    given = arguments(node)
    x, weight, bias = given["input"], given["weight"], given["bias"]
    weight_tensor = constant_tensor(graph_module, weight)
    if weight_tensor is None or (bias is not None and constant_tensor(graph_module, bias) is None):
        return None
    if not weight_tensor.is_floating_point() or value(x).dtype != weight_tensor.dtype:
        return None
    if node.target is aten.linear.default:
        return _Stage("linear", x, weight, bias, frozenset({node}), node)
    if len(shape(x) or ()) != 4:
        return None
    geometry = _geometry(given, weight_tensor)
    if geometry is None:
        return None
    kind = _convolution_kind(weight_tensor, geometry)
    if kind == "pointwise_conv2d":
        geometry = {}
    elif kind == "depthwise_conv2d":
        del geometry["groups"]
    return _Stage(kind, x, weight, bias, frozenset({node}), node, geometry=geometry)


def _geometry(given: dict[str, Any], weight: Tensor) -> dict[str, Any] | None:
    """stride, padding, dilation as pairs, and groups; None for paddings that differ between the sides."""
    stride, dilation = _pair(given["stride"]), _pair(given["dilation"])
    padding = given["padding"]
    if padding == "valid":
        padding = [0, 0]
    elif padding == "same":
        span = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        if any(s % 2 for s in span):
            return None
        padding = [s // 2 for s in span]
    return {"stride": stride, "padding": _pair(padding), "dilation": dilation, "groups": given["groups"]}


def _pair(sizes: Any) -> list[int]:
    sizes = [sizes] if isinstance(sizes, int) else list(sizes)
    return sizes * 2 if len(sizes) == 1 else sizes


def _convolution_kind(weight: Tensor, geometry: dict[str, Any]) -> str:
    """A convolution over one channel is dense: it mixes nothing, but it has no channels to run along either."""
    channels = weight.shape[1] * geometry["groups"]
    if geometry["groups"] == channels and channels > 1:
        return "depthwise_conv2d"
    is_pointwise = tuple(weight.shape[2:]) == (1, 1) and geometry["stride"] == [1, 1] and geometry["padding"] == [0, 0]
    return "pointwise_conv2d" if is_pointwise and geometry["groups"] == 1 else "conv2d"


def _with_activation(stage: _Stage) -> _Stage:
    user = only_user(stage.output)
    name = activation_of(user) if user is not None else None
    if user is None or name is None:
        return stage
    return replace(stage, activation=name, nodes=stage.nodes | {user}, output=user)


def _with_residual(stage: _Stage) -> Iterator[_Stage]:
    user = only_user(stage.output)
    if user is None or user.target is not aten.add.Tensor or arguments(user)["alpha"] != 1:
        return
    residual = user.args[1] if user.args[0] is stage.output else user.args[0]
    if not isinstance(residual, Node) or residual is stage.output:
        return
    if shape(residual) == shape(stage.output) and value(residual).dtype == value(stage.output).dtype:
        yield replace(stage, residual=residual, nodes=stage.nodes | {user}, output=user)


def _with_input_scale(stage: _Stage) -> Iterator[_Stage]:
    """Squeeze-and-excitation: a pointwise convolution of x · s with s [N, C, 1, 1]."""
    product = stage.x
    if stage.kind != "pointwise_conv2d" or product.target is not aten.mul.Tensor or only_user(product) is None:
        return
    for x, scale in (product.args[:2], product.args[1::-1]):
        sizes = shape(product)
        if sizes is not None and shape(x) == sizes and shape(scale) == (*sizes[:2], 1, 1) and shape(scale) != sizes:
            if value(x).dtype == value(scale).dtype == value(product).dtype:  # type: ignore[arg-type]
                yield replace(stage, x=x, input_scale=scale, nodes=stage.nodes | {product})  # type: ignore[arg-type]
            return


def _chains(stages: list[_Stage]) -> Iterator[Match]:
    """Depthwise → pointwise, alone and behind a pointwise or dense layer, where nobody else reads what lies between."""
    by_output: dict[Node, list[_Stage]] = {}
    for stage in stages:
        by_output.setdefault(stage.output, []).append(stage)

    def producers(x: Node, kind: str) -> Iterator[_Stage]:
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


def _separable(depthwise: _Stage, project: _Stage) -> Match:
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


def _inverted_residual(expand: _Stage, depthwise: _Stage, project: _Stage) -> Match:
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


def _is_plain_stem(stem: _Stage, depthwise: _Stage) -> bool:
    return (
        stem.geometry["groups"] == 1
        and stem.geometry["dilation"] == [1, 1]
        and depthwise.geometry["dilation"] == [1, 1]
    )


def _separable_stem(stem: _Stage, depthwise: _Stage, project: _Stage) -> Match:
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


def _pools(node: Node) -> Iterator[Match]:
    if node.op != "call_function":
        return
    if node.target is aten.max_pool2d.default:
        given = arguments(node)
        if not given["ceil_mode"] and _pair(given["dilation"]) == [1, 1] and len(shape(node) or ()) == 4:
            kernel = _pair(given["kernel_size"])
            sizes = {
                "kernel_size": kernel,
                "stride": _pair(given["stride"] or kernel),
                "padding": _pair(given["padding"]),
            }
            yield Match("max_pool2d", frozenset({node}), node, {"x": given["self"], **sizes})
        return
    x = _averaged_image(node)
    if x is None:
        return
    if len(shape(node) or ()) == 2:
        yield Match("global_avg_pool2d", frozenset({node}), node, {"x": x})
        return
    flat = only_user(node)
    if flat is not None and flat.target in FLATTENS and flat.args[0] is node and shape(flat) == (shape(node) or ())[:2]:
        yield Match("global_avg_pool2d", frozenset({node, flat}), flat, {"x": x})


def _averaged_image(node: Node) -> Node | None:
    """x [N, C, H, W] if `node` is its mean over all pixels, of shape [N, C, 1, 1] or [N, C]."""
    if node.target is aten.adaptive_avg_pool2d.default:
        x, is_global = node.args[0], _pair(node.args[1]) == [1, 1]
    elif node.target is aten.mean.dim:
        given = arguments(node)
        x = given["self"]
        is_global = given["dim"] is not None and {d % 4 for d in given["dim"]} == {2, 3} and given["dtype"] is None
    else:
        return None
    is_image = isinstance(x, Node) and len(shape(x) or ()) == 4 and value(x).is_floating_point()
    return x if is_global and is_image else None  # type: ignore[return-value]
