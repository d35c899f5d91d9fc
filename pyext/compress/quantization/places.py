"""Where a graph computes in int8: the layers, what is fused with them, and the tensors that lie between in int8.

A tensor is quantized where it is made, once for all who read it, if an int8 layer or an int8 operation wants it so;
what only moves values about has the scale of what it moves.

    conv → [BatchNorm's remains] → [+ residual] → [activation] → int8        a layer with its end
    add, gate · image → [activation] → int8                                  an int8 operation, if all it reads is int8
    pad, shuffle, slice, concatenation, maximum, nearest neighbour           one scale with what they read
    average                                                                  int8 to int8, by a scale of its own
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from kernelpress.emit.canonical import activation_of
from kernelpress.emit.graph import arguments, constant_tensor, number, only_user, shape, value
from kernelpress.trace import module_of

__all__ = ["MOST_PRODUCTS", "Layer", "Places", "Point", "find_places", "layer_nodes"]

aten = torch.ops.aten

MOST_PRODUCTS = 65536
"""Of one output, whose sum int32 still holds."""

Point = Node | tuple[Node, Node]
"""A tensor for all its readers, or for one of them."""

_CONVOLUTIONS = (aten.conv2d.default, aten.conv2d.padding)
_TRANSPOSED = (aten.conv_transpose2d.input,)
_OTHER_LAYERS: Mapping[Any, str] = {
    aten.conv1d.default: "1-D convolutions have no int8 kernel",
    aten.conv1d.padding: "1-D convolutions have no int8 kernel",
    aten.conv3d.default: "3-D convolutions have no int8 kernel",
    aten.conv3d.padding: "3-D convolutions have no int8 kernel",
    aten.conv_transpose1d.default: "transposed 1-D convolutions have no int8 kernel",
    aten.conv_transpose3d.input: "transposed 3-D convolutions have no int8 kernel",
}
_MOVES = frozenset(
    {
        aten.channel_shuffle.default,
        aten.native_channel_shuffle.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.flatten.using_ints,
        aten.permute.default,
        aten.pixel_shuffle.default,
        aten.pixel_unshuffle.default,
        aten.reshape.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.transpose.int,
        aten.unsqueeze.default,
        aten.view.default,
        aten.max_pool2d.default,
        aten.adaptive_max_pool2d.default,
        aten.upsample_nearest2d.default,
        aten.upsample_nearest2d.vec,
    }
)
_PADS = frozenset({aten.pad.default, aten.constant_pad_nd.default})
_SPLITS = frozenset(
    {aten.chunk.default, aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.unbind.int}
)
_CONCATENATIONS = frozenset({aten.cat.default, aten.concat.default})
_AVERAGES = frozenset({aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default})
_AFFINE = frozenset({aten.mul.Tensor, aten.add.Tensor})


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer that computes in int8, with the nodes behind it up to its end."""

    node: Node
    name: str
    chain: tuple[Node, ...]
    """From `node` to what the layer hands on."""
    residual: Node | None = None
    """What a sum in the chain adds."""
    axis: int = 0
    """Dimension of the weight that its output channels are."""

    @property
    def end(self) -> Node:
        """What the layer hands on."""
        return self.chain[-1]

    @property
    def weight(self) -> Node:
        """The node that reads its weight."""
        return arguments(self.node)["weight"]


@dataclass(frozen=True)
class Places:
    """What is int8 in a graph: layers, groups of tensors of one scale, and the layers that stay float, with reasons."""

    layers: tuple[Layer, ...]
    groups: tuple[tuple[Point, ...], ...]
    floats: tuple[tuple[Layer, str], ...]


def layer_nodes(graph_module: GraphModule) -> Iterator[Node]:
    """The convolutions and linear layers of a graph."""
    known = {*_CONVOLUTIONS, *_TRANSPOSED, *_OTHER_LAYERS, aten.linear.default}
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and node.target in known:
            yield node


def find_places(graph_module: GraphModule, ignored: Mapping[str, str]) -> Places:
    """The int8 places of a folded, functional graph; `ignored`: layers that stay float by name, with the reason."""
    search = _Search(graph_module)
    layers: list[Layer] = []
    floats: list[tuple[Layer, str]] = []
    for node, name in _named(graph_module).items():
        reason = ignored.get(name) or ignored.get(name.partition("@")[0]) or _refusal(graph_module, node)
        layer = search.layer(node, name)
        if reason is None:
            layers.append(layer)
        else:
            floats.append((layer, reason))
    return Places(tuple(layers), search.groups(layers), tuple(floats))


def _named(graph_module: GraphModule) -> dict[Node, str]:
    """Each layer's name: its module's, with the node's behind @ where that runs more than one."""
    names = {node: module_of(node) or node.name for node in layer_nodes(graph_module)}
    count = list(names.values()).count
    return {node: name if count(name) == 1 else f"{name}@{node.name}" for node, name in names.items()}


def _refusal(graph_module: GraphModule, node: Node) -> str | None:
    """Why a layer cannot be int8, or None."""
    if node.target in _OTHER_LAYERS:
        return _OTHER_LAYERS[node.target]
    given = arguments(node)
    weight = constant_tensor(graph_module, given["weight"])
    if weight is None:
        return "its weight is computed at each call"
    if weight.dtype != torch.float32 or value(node).dtype != torch.float32:
        return f"its weight is {weight.dtype}, int8 layers are made of float32"
    if node.target in _TRANSPOSED and given["groups"] != 1:
        return f"a transposed convolution of {given['groups']} groups has no scale per output channel"
    if weight.numel() == 0:
        return "its weight is empty"
    products = weight.numel() // weight.shape[1 if node.target in _TRANSPOSED else 0]
    if products > MOST_PRODUCTS:
        return f"{products} products of an output, int32 holds the sum of {MOST_PRODUCTS}"
    return None


@dataclass
class _Search:
    """Follows int8 through a graph: forward where it comes from, backward where it is wanted."""

    graph_module: GraphModule
    absorbed: dict[Node, Node] = field(default_factory=dict)
    """A sum, and the layer's result in it that is never handed on by itself."""

    def layer(self, node: Node, name: str) -> Layer:
        """The layer at `node` with what its kernel computes behind it."""
        chain, residual = [node], None
        while (user := only_user(chain[-1])) is not None and self._is_affine(user, chain[-1]):
            chain.append(user)
        if (user := only_user(chain[-1])) is not None and _is_sum(user) and self._absorbs(user, chain[-1]):
            residual = _other(user, chain[-1])
            chain.append(user)
        return Layer(node, name, (*chain, *_activation(chain[-1])), residual, axis=int(node.target in _TRANSPOSED))

    def _is_affine(self, node: Node, source: Node) -> bool:
        """What is left of a BatchNorm: a constant for each channel, times or plus `source`."""
        if node.target not in _AFFINE or node.args[0] is not source or node.kwargs or shape(node) != shape(source):
            return False
        constant, sizes = constant_tensor(self.graph_module, node.args[1]), shape(node) or (0,)
        return constant is not None and constant.numel() == (sizes[1] if len(sizes) > 2 else sizes[-1])

    def _absorbs(self, added: Node, result: Node) -> bool:
        """A sum goes into one of the layers whose results it reads, the later one."""
        order = {node: i for i, node in enumerate(self.graph_module.graph.nodes)}
        other = _other(added, result)
        if added in self.absorbed or (self._is_bare(other) and order[other] > order[result]):
            return False
        self.absorbed[added] = result
        return True

    def _is_bare(self, node: Node) -> bool:
        """Whether `node` is a layer's result for one reader, before any activation."""
        while only_user(node) is not None and node.target in _AFFINE and self._is_affine(node, node.args[0]):  # type: ignore[arg-type]
            node = node.args[0]  # type: ignore[assignment]
        return only_user(node) is not None and node.target in (*_CONVOLUTIONS, *_TRANSPOSED, aten.linear.default)

    def groups(self, layers: Sequence[Layer]) -> tuple[tuple[Point, ...], ...]:
        """The tensors that are int8, those of one scale together."""
        inputs = {layer.node: arguments(layer.node)["input"] for layer in layers}
        sources = self._sources(layers, set(inputs.values()))
        wanted: set[Node] = set()
        for node in reversed(self.graph_module.graph.nodes):
            wanted.update([inputs[node]] if node in inputs else ())
            wanted.update(sources.get(node) or () if node in wanted else ())
        read_in_int8 = {source for node in wanted for source in sources.get(node) or ()}
        groups: dict[Point, list[Point]] = {}
        for node in [node for node in self.graph_module.graph.nodes if node in wanted]:
            if sources[node] is None and node not in read_in_int8:
                # Made in float, and read in float by others than layers.
                readers: list[Point] = [(node, user) for user in node.users if inputs.get(user) is node]  # type: ignore[misc]
                groups.update(dict.fromkeys(readers, readers))
                continue
            groups[node] = [node]
            for source in sources[node] or () if _shares_scale(node) else ():
                if (merged := groups[source]) is not groups[node]:
                    merged.extend(groups[node])
                    groups.update(dict.fromkeys(groups[node], merged))
        order = {node: i for i, node in enumerate(self.graph_module.graph.nodes)}
        distinct = {id(group): group for group in groups.values()}.values()
        return tuple(
            tuple(sorted(group, key=lambda p: order[p] if isinstance(p, Node) else order[p[1]])) for group in distinct
        )

    def _sources(self, layers: Sequence[Layer], inputs: set[Node]) -> dict[Node, list[Node] | None]:
        """Of each tensor that can be int8: the int8 tensors that it is made of besides a layer's input, None where it
        is made in float and a layer reads it."""
        ends = {layer.end: layer for layer in layers}
        inner = {node for layer in layers for node in layer.chain[:-1]}
        found: dict[Node, list[Node] | None] = {}
        for node in [node for node in self.graph_module.graph.nodes if node not in inner]:
            if node in ends:
                residual = ends[node].residual
                # A residual in float comes with a result in float.
                if residual is None or residual in found:
                    found[node] = [] if residual is None else [residual]
            elif (reads := _reads(node)) is not None and all(source in found for source in reads):
                found[(_activation(node) or [node])[0] if node.target in _AFFINE else node] = reads
            if node in inputs:
                found.setdefault(node, None)
        return found


def _is_sum(node: Node) -> bool:
    """Whether `node` is the sum of two tensors of its shape."""
    if node.target is not aten.add.Tensor or arguments(node)["alpha"] != 1:
        return False
    a, b = node.args[:2]
    is_of_nodes = isinstance(a, Node) and isinstance(b, Node) and "get_attr" not in (a.op, b.op)
    return is_of_nodes and a is not b and shape(a) == shape(b) == shape(node)


def _other(added: Node, operand: Node) -> Node:
    return added.args[1] if added.args[0] is operand else added.args[0]  # type: ignore[return-value]


def _reads(node: Node) -> list[Node] | None:
    """The tensors that an operation reads which has a meaning in int8, or None."""
    if node.op != "call_function":
        return None
    if _is_move(node) or node.target in _AVERAGES or _is_mean_of_pixels(node):
        return [node.args[0]]  # type: ignore[list-item]
    if node.target is operator.getitem and node.args[0].target in _SPLITS:  # type: ignore[union-attr,operator]
        return [node.args[0].args[0]]  # type: ignore[union-attr,list-item]
    if node.target in _CONCATENATIONS:
        return list(node.args[0])  # type: ignore[arg-type]
    return list(node.args[:2]) if _is_sum(node) else _gated(node)  # type: ignore[arg-type]


def _shares_scale(node: Node) -> bool:
    return _is_move(node) or node.target in (*_CONCATENATIONS, operator.getitem)


def _activation(node: Node) -> list[Node]:
    """The activation that alone reads `node`, if there is one."""
    user = only_user(node)
    return [user] if user is not None and activation_of(user) is not None else []


def _is_move(node: Node) -> bool:
    """Whether the values of a node are some of those that it reads, or zero."""
    if node.target not in _PADS:
        return node.target in _MOVES
    given = arguments(node)
    filled = given.get("value") or 0
    return given.get("mode", "constant") != "constant" or number(filled) == 0


def _is_mean_of_pixels(node: Node) -> bool:
    if node.target is not aten.mean.dim:
        return False
    given = arguments(node)
    rank = len(shape(given["self"]) or ())
    return rank == 4 and given["dim"] is not None and {d % rank for d in given["dim"]} == {2, 3}


def _gated(node: Node) -> list[Node] | None:
    """The image and the gate [N, C, 1, 1] of a product, or None."""
    if node.target is not aten.mul.Tensor or not all(isinstance(argument, Node) for argument in node.args):
        return None
    sizes, factors = shape(node), [shape(argument) for argument in node.args]
    if sizes is None or len(sizes) != 4 or sizes not in factors or (*sizes[:2], 1, 1) not in factors:
        return None
    return list(node.args)  # type: ignore[arg-type]
