"""Writes what models spell out, activations in arithmetic and channel shuffles in reshapes, as the one ATen operation
that it is."""

from __future__ import annotations

import math

import torch
from torch.fx import Graph, GraphModule, Node

from kernelpress.emit.graph import arguments, number, shape, value
from kernelpress.emit.quantized import canonicalize_quantization
from kernelpress.emit.quantized_rows import own_ranges
from kernelpress.ops.calls.aten import activation_of_call
from kernelpress.runtime.torch_private import OpOverload

__all__ = ["activation_of", "canonicalize"]

aten = torch.ops.aten

_RESHAPES = (
    aten.reshape.default,
    aten.view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)
_EXCHANGES = (aten.transpose.int, aten.swapaxes.default, aten.swapdims.default)


def activation_of(node: Node) -> str | None:
    """The epilogue's name of the activation that `node` applies to its first argument, or None."""
    return activation_of_call(node.target, node.args, node.kwargs) if node.op == "call_function" else None


def canonicalize(graph_module: GraphModule) -> GraphModule:
    """Rewrites, in place, clamps to [0, ∞) and [0, 6] as relu and relu6, (x + 3 clipped to [0, 6]) / 6 as hardsigmoid,
    x · hardsigmoid(x) as hardswish and x · sigmoid(x) as silu, groups of channels exchanged with the channels in them
    as channel_shuffle, quantizations in one way; returns the module."""
    graph = graph_module.graph
    canonicalize_quantization(graph_module)
    own_ranges(graph)
    for rewrite in (_clip, _hard_sigmoid, _gated, _shuffle):
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


def _shuffle(graph: Graph, node: Node) -> None:
    """[N, g · k, H, W] → [N, g, k, …] → [N, k, g, …] → [N, k · g, H, W], however the pixels are flattened meanwhile."""
    sizes = shape(node)
    if node.target not in _RESHAPES or sizes is None or len(sizes) != 4 or not _may_be_shuffled(node):
        return
    exchanged = _behind_copies(node.args[0])
    if exchanged is None or not _exchanges_groups(exchanged):
        return
    split = _behind_copies(exchanged.args[0])
    if split is None or split.target not in _RESHAPES:
        return
    x, grouped = split.args[0], shape(split)
    if shape(x) != sizes or grouped is None or len(grouped) < 3:
        return
    _, groups, per_group, *pixels = grouped
    if not isinstance(groups, int) or not isinstance(per_group, int):
        return
    if groups * per_group == sizes[1] and math.prod(pixels) == math.prod(sizes[2:]):
        _rewrite(graph, node, aten.channel_shuffle.default, x, groups)


def _may_be_shuffled(node: Node) -> bool:
    return value(node).is_floating_point() or value(node).dtype == torch.int8


def _behind_copies(node: object) -> Node | None:
    while isinstance(node, Node) and node.target in (aten.contiguous.default, aten.clone.default):
        node = node.args[0]
    return node if isinstance(node, Node) else None


def _exchanges_groups(node: Node) -> bool:
    """Whether `node` exchanges dimensions 1 and 2 and nothing else."""
    rank = len(shape(node) or ())
    if rank < 3:
        return False
    if node.target in _EXCHANGES:
        _, first, second = node.args
        return {first % rank, second % rank} == {1, 2}  # type: ignore[operator]
    if node.target is aten.permute.default:
        return [d % rank for d in arguments(node)["dims"]] == [0, 2, 1, *range(3, rank)]
    return False


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


def _rewrite(graph: Graph, node: Node, target: OpOverload, *args: object) -> None:
    with graph.inserting_before(node):
        whole = graph.call_function(target, args)  # type: ignore[arg-type]
    whole.meta = dict(node.meta)
    node.replace_all_uses_with(whole)
    graph.erase_node(node)
