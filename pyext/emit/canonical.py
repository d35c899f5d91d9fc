"""Writes activations that models spell out in arithmetic as the one ATen operation they are."""

from __future__ import annotations

import math

import torch
from torch.fx import Graph, GraphModule, Node

from kernelpress.emit.graph import arguments, number

__all__ = ["activation_of", "canonicalize"]

aten = torch.ops.aten

_NAMES = {
    aten.relu.default: "relu",
    aten.relu6.default: "relu6",
    aten.silu.default: "silu",
    aten.hardswish.default: "hardswish",
    aten.hardsigmoid.default: "hardsigmoid",
    aten.sigmoid.default: "sigmoid",
    aten.gelu.default: "gelu",
    aten.hardtanh.default: "relu6",
}


def activation_of(node: Node) -> str | None:
    """The epilogue's name of the activation that `node` applies to its first argument, or None."""
    name = _NAMES.get(node.target) if node.op == "call_function" else None  # type: ignore[call-overload]
    if node.target is aten.hardtanh.default and not _clips_to(node, 0, 6):
        return None
    if node.target is aten.gelu.default and arguments(node)["approximate"] != "none":
        return None
    return name


def canonicalize(graph_module: GraphModule) -> GraphModule:
    """Rewrites, in place, clamps to [0, ∞) and [0, 6] as relu and relu6, (x + 3 clipped to [0, 6]) / 6 as hardsigmoid,
    x · hardsigmoid(x) as hardswish and x · sigmoid(x) as silu; returns the module."""
    graph = graph_module.graph
    for rewrite in (_clip, _hard_sigmoid, _gated):
        for node in list(graph.nodes):
            if node.op == "call_function":
                rewrite(graph, node)
    graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def _clip(graph: Graph, node: Node) -> None:
    if node.target not in (aten.clamp.default, aten.clamp_min.default, aten.relu6.default):
        return
    given = arguments(node)
    if node.target is aten.relu6.default or _clips_to(node, 0, 6):
        _rewrite(graph, node, aten.hardtanh.default, given["self"], 0, 6)
    elif number(given["min"]) == 0 and given.get("max") is None:
        _rewrite(graph, node, aten.relu.default, given["self"])


def _hard_sigmoid(graph: Graph, node: Node) -> None:
    clipped = _scaled_by_sixth(node)
    x = _clipped_shift(clipped)
    if x is not None:
        _rewrite(graph, node, aten.hardsigmoid.default, x)


def _gated(graph: Graph, node: Node) -> None:
    """x · gate(x), also with the sixth of hardsigmoid taken from the product."""
    product = _scaled_by_sixth(node)
    if product is not None and product.target is aten.mul.Tensor:
        for x, gate in (product.args[:2], product.args[1::-1]):
            if isinstance(x, Node) and _clipped_shift(gate) is x:
                return _rewrite(graph, node, aten.hardswish.default, x)
    if node.target is aten.mul.Tensor:
        for x, gate in (node.args[:2], node.args[1::-1]):
            if isinstance(gate, Node) and isinstance(x, Node) and gate.args and gate.args[0] is x:
                if gate.target is aten.hardsigmoid.default:
                    return _rewrite(graph, node, aten.hardswish.default, x)
                if gate.target is aten.sigmoid.default:
                    return _rewrite(graph, node, aten.silu.default, x)
    return None


def _clips_to(node: Node, low: float, high: float) -> bool:
    if node.target not in (aten.hardtanh.default, aten.clamp.default):
        return False
    given = arguments(node)
    low_name, high_name = ("min_val", "max_val") if node.target is aten.hardtanh.default else ("min", "max")
    return number(given[low_name]) == low and number(given[high_name]) == high


def _scaled_by_sixth(node: object) -> Node | None:
    """a of a / 6 or a · 1/6."""
    if not isinstance(node, Node) or node.target not in (aten.div.Tensor, aten.mul.Tensor):
        return None
    a, b = node.args[0], number(node.args[1])
    if not isinstance(a, Node) or b is None:
        return None
    return a if math.isclose(b, 6 if node.target is aten.div.Tensor else 1 / 6, rel_tol=1e-6) else None


def _clipped_shift(node: object) -> Node | None:
    """x of relu6(x + 3)."""
    if not isinstance(node, Node) or not _clips_to(node, 0, 6):
        return None
    shifted = node.args[0]
    if not isinstance(shifted, Node) or shifted.target is not aten.add.Tensor or number(shifted.args[1]) != 3:
        return None
    return shifted.args[0] if isinstance(shifted.args[0], Node) and not shifted.kwargs else None


def _rewrite(graph: Graph, node: Node, target: torch._ops.OpOverload, *args: object) -> None:
    with graph.inserting_before(node):
        whole = graph.call_function(target, args)  # type: ignore[arg-type]
    whole.meta = dict(node.meta)
    node.replace_all_uses_with(whole)
    graph.erase_node(node)
