"""Moves what works channel by channel to the parts of images, next to the layers that take it over.

act(norm(cat(a, b)) + x)  →  cat(act(norm₁(a) + x₁), act(norm₂(b) + x₂))        for layers a and b
split(x · gate)           →  x₁ · gate₁, x₂ · gate₂                            where layers read the parts
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node, map_arg

from kernelpress.emit.canonical import activation_of
from kernelpress.emit.graph import arguments, constant_node, constant_tensor, only_user, shape, value

__all__ = ["CONVOLUTIONS", "distribute"]

aten = torch.ops.aten

CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default)
_SPLITS = (aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default)
_VECTORS = ("weight", "bias", "running_mean", "running_var")


def distribute(graph_module: GraphModule) -> None:
    """Rewrites the graph in place; a part of a concatenation must be read by that alone."""
    for node in list(graph_module.graph.nodes):
        if node.target is aten.cat.default:
            _before_concatenation(graph_module, node)
        elif node.target in _SPLITS:
            _behind_split(node)


def _before_concatenation(graph_module: GraphModule, whole: Node) -> None:
    dim, sizes = arguments(whole)["dim"], shape(whole) or ()
    if len(sizes) != 4 or dim not in (1, -3):
        return
    if not all(part.target in CONVOLUTIONS and only_user(part) is whole for part in arguments(whole)["tensors"]):
        return
    while (node := only_user(whole)) is not None and (made := _part_by_part(graph_module, node, whole)):
        joined = _call(node, aten.cat.default, made, dim)
        node.replace_all_uses_with(joined)
        graph_module.graph.erase_node(node)
        graph_module.graph.erase_node(whole)
        whole = joined


def _part_by_part(graph_module: GraphModule, node: Node, whole: Node) -> list[Node]:
    """What an activation, a sum with another image or a norm by running statistics makes of each part of `whole`;
    nothing where `node` is anything else."""
    parts: list[Node] = arguments(whole)["tensors"]
    if activation_of(node) is not None:
        return [_call(node, node.target, part, *node.args[1:], **node.kwargs) for part in parts]
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + shape(part)[1])  # type: ignore[index]
    ranges = list(zip(parts, ends[:-1], ends[1:], strict=True))
    other = _added(node, whole)
    if other is not None:
        slices = [_call(node, aten.slice.Tensor, other, 1, begin, end) for _, begin, end in ranges]
        return [_call(node, aten.add.Tensor, part, of) for part, of in zip(parts, slices, strict=True)]
    if not _is_norm_of(graph_module, node, whole):
        return []
    _, *names = (argument.name for argument in node.target._schema.arguments)  # type: ignore[union-attr]
    made = []
    for i, (part, begin, end) in enumerate(ranges):
        given = arguments(node)
        for name in _VECTORS:
            vector = constant_tensor(graph_module, given[name])
            if vector is not None:
                part_of = constant_node(graph_module, f"{given[name].target}_{i}", vector[begin:end].clone(), node)
                given[name] = part_of
        made.append(_call(node, node.target, part, *(given[name] for name in names)))
    return made


def _added(node: Node, whole: Node) -> Node | None:
    """The image that `node` adds to `whole`, if it does."""
    if node.target is not aten.add.Tensor or arguments(node)["alpha"] != 1:
        return None
    other = next((x for x in node.args[:2] if x is not whole), None)
    if not isinstance(other, Node) or shape(other) != shape(whole) or value(other).dtype != value(whole).dtype:
        return None
    return other


def _is_norm_of(graph_module: GraphModule, node: Node, whole: Node) -> bool:
    if node.target is not aten.batch_norm.default:
        return False
    given = arguments(node)
    constants = {name: constant_tensor(graph_module, given[name]) for name in _VECTORS}
    is_known = all(given[name] is None or constants[name] is not None for name in _VECTORS)
    has_statistics = constants["running_mean"] is not None and constants["running_var"] is not None
    return given["input"] is whole and not given["training"] and is_known and has_statistics


def _behind_split(split: Node) -> None:
    product = split.args[0]
    if not isinstance(product, Node) or product.target is not aten.mul.Tensor or only_user(product) is not split:
        return
    sizes, dim = shape(product) or (), arguments(split)["dim"]
    reads = [only_user(part) for part in split.users]
    if len(sizes) != 4 or dim not in (1, -3) or not all(r is not None and r.target in CONVOLUTIONS for r in reads):
        return
    for x, gate in (product.args[:2], product.args[1::-1]):
        if shape(x) == sizes and shape(gate) == (*sizes[:2], 1, 1):
            images, gates = (_call(split, split.target, of, *split.args[1:], **split.kwargs) for of in (x, gate))
            for part in list(split.users):
                factors = [_call(part, operator.getitem, of, part.args[1]) for of in (images, gates)]
                part.replace_all_uses_with(_call(part, aten.mul.Tensor, *factors))
                split.graph.erase_node(part)
            split.graph.erase_node(split)
            split.graph.erase_node(product)
            return


def _call(before: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A call in front of `before`, as a part of what that is."""
    with before.graph.inserting_before(before):
        made = before.graph.call_function(target, args, kwargs)
    known = map_arg((made.args, made.kwargs), value)
    made.meta = {**before.meta, "val": target(*known[0], **known[1])}
    return made
