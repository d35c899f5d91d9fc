"""Convolutions and linear layers of a folded graph, with what their epilogues and prologues can take over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from kernelpress.emit.canonical import activation_of
from kernelpress.emit.fuse.match import Match
from kernelpress.emit.graph import arguments, constant_tensor, only_user, shape, value

__all__ = ["Stage", "bare_stage", "epilogues", "pair", "stages_at", "summed", "with_activation"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Stage:
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
        """The layer of the op called `kind`."""
        given: dict[str, Any] = {"x": self.x, "weight": self.weight, "bias": self.bias, "residual": self.residual}
        if self.kind == "pointwise_conv2d":
            given["input_scale"] = self.input_scale
        given |= self.geometry | {"activation": self.activation}
        flattened = () if self.input_scale is None else ("input_scale",)
        return Match(self.kind, self.nodes, self.output, given, flattened=flattened)


def stages_at(graph_module: GraphModule, node: Node) -> Iterator[Stage]:
    """The layer at `node` with its activation, without and with the SE scale before it and the sum behind it.

    An epilogue costs a layer of ours next to nothing, so an activation is never left out. A sum may be: another layer
    may need it for its own epilogue.
    """
    bare = bare_stage(graph_module, node)
    if bare is None:
        return
    for stage in (bare, *_with_input_scale(bare)):
        yield from epilogues(stage)


def epilogues(stage: Stage) -> Iterator[Stage]:
    """`stage` with the activation behind it, without and with a sum before that."""
    yield with_activation(stage)
    for added in summed(stage):
        yield with_activation(added)


def bare_stage(graph_module: GraphModule, node: Node) -> Stage | None:
    """The convolution or linear layer at `node` alone, or None where there is none with constant weights."""
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
        return Stage("linear", x, weight, bias, frozenset({node}), node)
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
    return Stage(kind, x, weight, bias, frozenset({node}), node, geometry=geometry)


def _geometry(given: dict[str, Any], weight: Tensor) -> dict[str, Any] | None:
    """stride, padding, dilation as pairs, and groups; None for paddings that differ between the sides."""
    stride, dilation = pair(given["stride"]), pair(given["dilation"])
    padding = given["padding"]
    if padding == "valid":
        padding = [0, 0]
    elif padding == "same":
        span = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        if any(s % 2 for s in span):
            return None
        padding = [s // 2 for s in span]
    return {"stride": stride, "padding": pair(padding), "dilation": dilation, "groups": given["groups"]}


def pair(sizes: Any) -> list[int]:
    """(height, width) of one or two integers."""
    sizes = [sizes] if isinstance(sizes, int) else list(sizes)
    return sizes * 2 if len(sizes) == 1 else sizes


def _convolution_kind(weight: Tensor, geometry: dict[str, Any]) -> str:
    """A convolution over one channel is dense: it mixes nothing, but it has no channels to run along either."""
    channels = weight.shape[1] * geometry["groups"]
    if geometry["groups"] == channels and channels > 1:
        return "depthwise_conv2d"
    is_pointwise = tuple(weight.shape[2:]) == (1, 1) and geometry["stride"] == [1, 1] and geometry["padding"] == [0, 0]
    return "pointwise_conv2d" if is_pointwise and geometry["groups"] == 1 else "conv2d"


def with_activation(stage: Stage) -> Stage:
    """`stage` with the activation that alone reads it, if there is one."""
    user = only_user(stage.output)
    name = activation_of(user) if user is not None else None
    if user is None or name is None:
        return stage
    return replace(stage, activation=name, nodes=stage.nodes | {user}, output=user)


def summed(stage: Stage) -> Iterator[Stage]:
    """`stage` with the sum that alone reads it, if one of its epilogue's kind does."""
    user = only_user(stage.output)
    if user is None or user.target is not aten.add.Tensor or arguments(user)["alpha"] != 1:
        return
    residual = user.args[1] if user.args[0] is stage.output else user.args[0]
    if not isinstance(residual, Node) or residual is stage.output:
        return
    if shape(residual) == shape(stage.output) and value(residual).dtype == value(stage.output).dtype:
        yield replace(stage, residual=residual, nodes=stage.nodes | {user}, output=user)


def _with_input_scale(stage: Stage) -> Iterator[Stage]:
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
