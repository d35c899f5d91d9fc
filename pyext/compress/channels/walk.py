"""One pass over an exported graph that labels every tensor element with the channel it belongs to."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from kernelpress.compress.channels.sets import FIXED, ChannelSets, compact, varying_axes
from kernelpress.runtime.torch_private import OpOverload, pytree
from kernelpress.trace import module_of

__all__ = ["Axis", "ChannelWalk", "Count", "LayerCall", "Rule", "along", "arguments", "describe", "fixed", "shape_of"]

aten = torch.ops.aten
_COPIES = (aten.to, aten._to_copy, aten.clone, aten.detach, aten.alias, aten.contiguous)


class Axis(NamedTuple):
    """One dimension of a parameter or buffer, by its qualified name."""

    parameter: str
    dim: int

    @property
    def layer(self) -> str:
        """Qualified name of the layer whose weight it is."""
        return self.parameter.rpartition(".")[0].partition(".parametrizations.")[0]


class Count(NamedTuple):
    """An attribute in which a module states how many channels, or groups of them, it works on; `place` in a tuple."""

    module: str
    attribute: str
    place: int | None = None


@dataclass(frozen=True)
class LayerCall:
    """One convolution or linear layer in the graph: its weight's axes and its FLOPs at the example inputs.

    `node`: its name in the graph. `entering`: labels of the channels it reads, which lie along `dim` of its input.
    `leaving`: labels of those it makes. `is_depthwise`: it makes each of the channels that it reads.
    """

    output: Axis
    input: Axis
    flops: int
    node: str
    dim: int
    entering: Tensor
    leaving: Tensor
    is_depthwise: bool


class ChannelWalk:
    """Carries labels from every weight's output axis to every axis that consumes them.

    A tensor's labels are an integer tensor of its shape, mostly expanded along all axes but one, so data movement is
    understood by moving the labels with the very same operation. Element-wise operations unite the labels that meet;
    whatever is not understood freezes those that enter it, with the reason. With `known_axes`, a pruned model is
    checked: parameters carry the labels given there instead of fresh ones.

    `rules`: what each operation does with labels. `couple_splits`: see `find_dependencies`.
    """

    def __init__(
        self,
        graph: GraphModule,
        model: nn.Module,
        sets: ChannelSets,
        rules: Mapping[Any, Rule],
        *,
        couple_splits: bool,
        known_axes: Mapping[Axis, Tensor] | None = None,
    ) -> None:
        self.sets = sets
        self.couple_splits = couple_splits
        self.modules = dict(model.named_modules())
        self.tensors = _canonical_names(model)
        named = [*model.named_parameters(), *model.named_buffers()]
        self.sizes = {name: tuple(tensor.shape) for name, tensor in named}
        self.trained = {name for name, _ in model.named_parameters()}
        self.axes: dict[Axis, Tensor] = dict(known_axes or {})
        self.producers: dict[Axis, None] = {}
        self.calls: list[LayerCall] = []
        self.counts: dict[Count, Tensor] = {}
        self.weights: dict[str, Node] = {}
        self.weight_norms: dict[str, tuple[str, int]] = {}
        self.opaque: dict[str, tuple[int, str]] = {}
        self._graph = graph
        self._rules = rules
        self.is_checking = known_axes is not None
        self._labels: dict[Node, Any] = {}
        self._pinned: dict[str, str] = {}
        self._read_along: dict[str, int] = {}
        self._divided: list[tuple[Tensor, Node]] = []

    def run(self) -> None:
        """Fills what the walk finds.

        `axes`; `producers`, the output axes of trained weights, in order; `weights`, the node of each one's value;
        `weight_norms`, magnitude → (direction, dimension); `calls`; `counts`, attribute → labels of what it counts;
        `opaque`, layer → (output channels, why its weight cannot be cut).
        """
        of_parameters: set[Node] = set()
        for node in self._graph.graph.nodes:
            if node.op == "get_attr" or (node.op == "call_function" and of_parameters.issuperset(node.all_input_nodes)):
                # Labelled where it is read: a weight may be computed, and is followed by its layer's rule.
                of_parameters.add(node)
            elif node.op == "output":
                for source in node.all_input_nodes:
                    for labels in pytree.tree_leaves(self.read(source)):
                        self.sets.freeze(labels, "an output of the network")
            elif node.op == "placeholder":
                self._labels[node] = fixed(node)
            elif node.op == "call_function":
                self.read(node)
        for blocks, node in self._divided:
            rows = self.sets.unfrozen(blocks).sort(1).values
            if bool((rows != rows[:1]).any()):
                self.alike(blocks, node)
        for axis, labels in self.axes.items():
            if axis.parameter in self._pinned:
                self.sets.freeze(labels, self._pinned[axis.parameter])
            elif axis.dim != self._read_along.get(axis.parameter, axis.dim):
                self.sets.freeze(labels, f"{axis.parameter} is used as a whole")

    def _call(self, node: Node) -> Any:
        target = node.target
        if target is operator.getitem:
            container, index = node.args
            return self.read(container)[index]  # type: ignore[arg-type]
        if not pytree.tree_any(lambda value: isinstance(value, Tensor), node.meta.get("val")):
            return None
        rule = self._rules.get(target)
        if rule is not None:
            return rule(self, node, arguments(node))
        if isinstance(target, OpOverload) and torch.Tag.pointwise in target.tags:
            return self.pointwise(node)
        return self.unknown(node, "is not understood")

    def name_of(self, value: Any) -> str | None:
        """The first name of the parameter or buffer that a node reads, or None."""
        return self.tensors.get(str(value.target)) if isinstance(value, Node) and value.op == "get_attr" else None

    def factors(self, value: Node) -> list[str]:
        """The parameters and buffers of which `value` is the element-wise product or the like; empty for any other."""
        name = self.name_of(value)
        if name is not None:
            return [name]
        target, sources = value.target, value.all_input_nodes
        if not isinstance(target, OpOverload):
            return []
        if target is aten._weight_norm.default:
            direction, magnitude = (self.name_of(source) for source in sources)
            dim = value.args[2] if len(value.args) > 2 else 0
            if direction is None or magnitude is None or not isinstance(dim, int) or dim not in (0, 1):
                return []
            self.weight_norms[magnitude] = (direction, dim)
            return [direction, magnitude]
        if torch.Tag.pointwise not in target.tags and target.overloadpacket not in _COPIES:
            return []
        if any(shape_of(source) != shape_of(value) for source in sources):
            return []
        found = [self.factors(source) for source in sources]
        return [name for names in found for name in names] if all(found) else []

    def read(self, value: Node) -> Any:
        """Labels of an argument; a parameter (layer scale, per-channel constant) has an axis of its own."""
        if value.op != "get_attr":
            if value not in self._labels:
                self._labels[value] = self.canonical(self._call(value))
            return self._labels[value]
        shape = shape_of(value)
        name = self.name_of(value)
        if name is None:
            return fixed(value)
        dims = [dim for dim in range(len(shape)) if Axis(name, dim) in self.axes]
        dims = dims or [dim for dim, size in enumerate(shape) if size > 1]
        if len(dims) > 1:
            # The one that is as long as some layer's channels; if that is wrong, they will not meet.
            widths = {len(self.axes[axis]) for axis in self.producers}
            dims = [dim for dim in dims if shape[dim] in widths] or dims
            self._read_along.setdefault(name, dims[0])
        return along(self.axis(name, dims[0], shape[dims[0]]), dims[0], shape) if dims else fixed(value)

    def axis(self, parameter: str, dim: int, size: int) -> Tensor:
        """Labels along a dimension of a parameter, fresh where it has none: [size]."""
        axis = Axis(parameter, dim)
        if axis not in self.axes:
            # A single channel cannot be removed.
            self.axes[axis] = self.sets.fresh(size) if size > 1 else torch.full((1,), FIXED)
        if len(self.axes[axis]) != size:
            raise RuntimeError(f"{parameter}: dimension {dim} has {size} positions, expected {len(self.axes[axis])}")
        return self.axes[axis]

    def tie(self, parameter: str, dim: int, labels: Tensor) -> None:
        """Says that `labels` meet the parameter along `dim`."""
        axis = Axis(parameter, dim)
        if axis in self.axes:
            self.sets.unite(self.axis(parameter, dim, len(labels)), labels, f"the channels that meet {parameter}")
        else:
            self.axes[axis] = labels.clone()

    def tie_vectors(self, node: Node, values: list[Any], labels: Tensor, dim: int = 0) -> None:
        """Says that `labels` meet the parameters among `values` along `dim`; a computed one freezes them."""
        for value in values:
            if isinstance(value, Node):
                names = self.factors(value)
                if not names:
                    self.sets.freeze(labels, f"{describe(node)} has a computed parameter")
                for name in names:
                    self.tie(name, dim, labels)

    def states(self, node: Node, attribute: str, value: Any) -> bool:
        """Whether the module that ran `node` states `value` in an attribute, which can be changed with the channels."""
        module = self.modules.get(module_of(node))
        return module is not None and vars(module).get(attribute) == value

    def count(self, node: Node, attribute: str, labels: Tensor, place: int | None = None) -> None:
        """Says that the module that ran `node` states in `attribute` how many of `labels` there are."""
        key = Count(module_of(node), attribute, place)
        known = self.counts.setdefault(key, labels)
        if len(known) == len(labels):
            self.sets.unite(known, labels, f"{describe(node)} runs on several tensors")

    def only_along(self, labels: Tensor, axis: int, node: Node) -> Tensor:
        """Labels along `axis`: [size]; frozen if they also vary elsewhere."""
        if not varying_axes(labels) <= {axis % labels.dim()}:
            self.sets.freeze(labels, f"{describe(node)} mixes channels with positions")
            return torch.full((labels.size(axis),), FIXED)
        line = labels.movedim(axis, 0)
        while line.dim() > 1:
            line = line.select(1, 0)
        return line

    def alike(self, blocks: Tensor, node: Node) -> Tensor:
        """Unites the rows of `blocks`, [groups, channels]: every group keeps the same channels."""
        self.sets.unite(blocks[1:], blocks[:1].expand_as(blocks[1:]), f"{describe(node)} divides channels")
        return self.sets.find(blocks)

    def alike_in_number(self, blocks: Tensor, node: Node) -> Tensor:
        """Has every group, a row of `blocks`, keep as many channels, once all is known that unites them: the same ones
        where nothing else sees to it."""
        self._divided.append((blocks, node))
        return self.sets.find(blocks)

    def pointwise(self, node: Node) -> Any:
        """Labels of an element-wise operation."""
        operands = [self.read(source) for source in node.all_input_nodes if isinstance(source.meta["val"], Tensor)]
        result = operands[0]
        for operand in operands[1:]:
            result = self.meet(result, operand, describe(node))
        return result.expand(shape_of(node))

    def meet(self, a: Tensor, b: Tensor, place: str) -> Tensor:
        """Labels of an element-wise operation of `a` and `b`."""
        shape = torch.broadcast_shapes(a.shape, b.shape)
        a, b = (self.canonical(x[(None,) * (len(shape) - x.dim()) + (...,)]) for x in (a, b))
        if not _are_fixed(a) and not _are_fixed(b) and varying_axes(a) != varying_axes(b):
            a, b = (self._unless_of_no_channels(labels, place) for labels in (a, b))
        for labelled, other in ((a, b), (b, a)):
            if not _are_fixed(other):
                continue
            axes = varying_axes(labelled)
            if not axes and not self.is_checking:
                axes = {axis for axis, size in enumerate(labelled.shape) if size > 1}
            if any(other.size(axis) > 1 for axis in axes):
                self.sets.freeze(labelled, f"{place} combines them with channels that stay")
            return labelled.expand(shape)
        if varying_axes(a) != varying_axes(b):
            for labels in (a, b):
                self.sets.freeze(labels, f"{place} combines channels with positions")
        else:
            self.sets.unite(compact(a), compact(b), f"{place} combines channels")
        return a.expand(shape)

    def _unless_of_no_channels(self, labels: Tensor, place: str) -> Tensor:
        """Labels of a parameter that no layer's channels have met are of no channels, if it lies along another axis."""
        made = [self.sets.find(self.axes[axis]) for axis in self.producers]
        if made and bool(torch.isin(labels, torch.cat(made)).any()):
            return labels
        self.sets.freeze(labels, f"{place} weighs whole tensors by them")
        return torch.full_like(compact(labels), FIXED).expand(labels.shape)

    def apply(self, node: Node) -> Any:
        """Moves labels with the very operation of `node`."""

        def labels_of(value: Node) -> Any:
            return self.read(value) if isinstance(value.meta["val"], Tensor) else value.meta["val"]

        values, kwargs = torch.fx.map_arg((node.args, node.kwargs), labels_of)
        return node.target(*values, **kwargs)  # type: ignore[operator]

    def unknown(self, node: Node, why: str) -> Any:
        """Freezes everything that enters `node`."""
        self._keep(node, f"{describe(node)} {why}")
        return fixed(node)

    def _keep(self, node: Node, reason: str) -> None:
        for source in node.all_input_nodes:
            name = self.name_of(source)
            if name is not None:
                self._pinned.setdefault(name, reason)
            elif source not in self._labels:
                self._keep(source, reason)
            for labels in pytree.tree_leaves(self._labels.get(source)):
                if isinstance(labels, Tensor):
                    self.sets.freeze(labels, reason)

    def canonical(self, labels: Any) -> Any:
        """The same labels, by their representatives and expanded along every axis where they are constant."""
        return pytree.tree_map(
            lambda x: compact(self.sets.find(compact(x))).expand(x.shape) if isinstance(x, Tensor) else x, labels
        )


Rule: TypeAlias = Callable[[ChannelWalk, Node, dict[str, Any]], Any]
"""(walk, node, its arguments by name) → labels of what the node returns."""


def _canonical_names(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter and buffer → the first name of the same tensor."""
    first: dict[int, str] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of an ATen call by name, defaults included."""
    assert isinstance(node.target, OpOverload)
    values = {}
    for index, argument in enumerate(node.target._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        values[argument.name] = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name, default)
    return values


def describe(node: Node) -> str:
    """The operation and the module that ran it, for reasons."""
    name = str(node.target).split(".")[1] if isinstance(node.target, OpOverload) else node.name
    module = module_of(node)
    return f"{name} in {module}" if module else name


def shape_of(node: Node) -> tuple[int, ...]:
    """Sizes of the tensor that `node` gives."""
    return tuple(node.meta["val"].shape)


def along(labels: Tensor, axis: int, shape: tuple[int, ...]) -> Tensor:
    """Labels of a tensor of `shape` whose channels are `labels` along `axis`."""
    return labels.view([-1 if dim == axis else 1 for dim in range(len(shape))]).expand(shape)


def fixed(node: Node) -> Any:
    """Labels of what has no channels, in the form of what `node` gives."""
    return pytree.tree_map(
        lambda value: torch.full((1,) * value.dim(), FIXED).expand(value.shape) if isinstance(value, Tensor) else value,
        node.meta["val"],
    )


def _are_fixed(labels: Tensor) -> bool:
    return bool((compact(labels) == FIXED).all())
