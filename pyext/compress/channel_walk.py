"""One pass over an exported graph that labels every tensor element with the channel it belongs to."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from kernelpress.compress.channel_sets import FIXED, ChannelSets, compact, varying_axes
from kernelpress.runtime.torch_private import OpOverload, pytree
from kernelpress.trace import module_of

__all__ = ["Axis", "ChannelWalk", "LayerCall"]

aten = torch.ops.aten


class Axis(NamedTuple):
    """One dimension of a parameter or buffer, by its qualified name."""

    parameter: str
    dim: int


@dataclass(frozen=True)
class LayerCall:
    """One convolution or linear layer in the graph: its weight's axes and its FLOPs at the example inputs."""

    output: Axis
    input: Axis
    flops: int


class ChannelWalk:
    """Carries labels from every weight's output axis to every axis that consumes them.

    A tensor's labels are an integer tensor of its shape, mostly expanded along all axes but one, so data movement is
    understood by moving the labels with the very same operation. Element-wise operations unite the labels that meet;
    whatever is not understood freezes those that enter it, with the reason. With `known_axes`, parameters carry the
    labels given there instead of fresh ones.
    """

    def __init__(
        self,
        graph: GraphModule,
        model: nn.Module,
        sets: ChannelSets,
        *,
        couple_splits: bool,
        known_axes: Mapping[Axis, Tensor] | None = None,
    ) -> None:
        self._graph = graph
        self._sets = sets
        self._couple_splits = couple_splits
        self._labels: dict[Node, Any] = {}
        self._pinned: dict[str, str] = {}
        self._tensors = _canonical_names(model)
        self._trained = {name for name, _ in model.named_parameters()}
        self.axes: dict[Axis, Tensor] = dict(known_axes or {})
        self.producers: dict[Axis, None] = {}
        self.calls: list[LayerCall] = []

    def run(self) -> None:
        """Fills `axes`, `producers` (the output axes of trained weights, in order) and `calls`."""
        for node in self._graph.graph.nodes:
            if node.op == "output":
                for source in node.all_input_nodes:
                    for labels in pytree.tree_leaves(self._read(source)):
                        self._sets.freeze(labels, "an output of the network")
            elif node.op == "placeholder":
                self._labels[node] = _fixed(node)
            elif node.op == "call_function":
                self._labels[node] = self._canonical(self._call(node))
        for axis, labels in self.axes.items():
            if axis.parameter in self._pinned:
                self._sets.freeze(labels, self._pinned[axis.parameter])

    def _call(self, node: Node) -> Any:
        target = node.target
        if target is operator.getitem:
            container, index = node.args
            return self._labels[container][index]  # type: ignore[index]
        if not pytree.tree_any(lambda value: isinstance(value, Tensor), node.meta.get("val")):
            return None
        rule = _RULES.get(target)
        if rule is not None:
            return rule(self, node, _arguments(node))
        if isinstance(target, OpOverload) and torch.Tag.pointwise in target.tags:
            return self._pointwise(node, {})
        return self._unknown(node, "is not understood")

    def _read(self, value: Any) -> Any:
        """Labels of an argument; a vector parameter (layer scale, per-channel constant) has an axis of its own."""
        if value.op != "get_attr":
            return self._labels[value]
        shape = _shape(value)
        long_dims = [dim for dim, size in enumerate(shape) if size > 1]
        name = self._tensors.get(value.target)
        if name is None or not long_dims:
            return torch.full((1,) * len(shape), FIXED).expand(shape)
        if len(long_dims) > 1:
            self._pinned.setdefault(name, f"{name} is used as a whole")
            return torch.full((1,) * len(shape), FIXED).expand(shape)
        (dim,) = long_dims
        return _along(self._axis(name, dim, shape[dim]), dim, shape)

    def _axis(self, parameter: str, dim: int, size: int) -> Tensor:
        axis = Axis(parameter, dim)
        if axis not in self.axes:
            # A single channel cannot be removed.
            self.axes[axis] = self._sets.fresh(size) if size > 1 else torch.full((1,), FIXED)
        if len(self.axes[axis]) != size:
            raise RuntimeError(f"{parameter}: dimension {dim} has {size} positions, expected {len(self.axes[axis])}")
        return self.axes[axis]

    def _tie(self, parameter: str, dim: int, labels: Tensor) -> None:
        """Says that `labels` meet the parameter along `dim`."""
        axis = Axis(parameter, dim)
        if axis in self.axes:
            self._sets.unite(self._axis(parameter, dim, len(labels)), labels, f"the channels that meet {parameter}")
        else:
            self.axes[axis] = labels.clone()

    def _tie_vectors(self, node: Node, values: list[Any], labels: Tensor) -> None:
        for value in values:
            if isinstance(value, Node):
                name = self._tensors.get(str(value.target)) if value.op == "get_attr" else None
                if name is None:
                    self._sets.freeze(labels, f"{_describe(node)} has a computed parameter")
                else:
                    self._tie(name, 0, labels)

    def _only_along(self, labels: Tensor, axis: int, node: Node) -> Tensor:
        """Labels along `axis`: [size]; frozen if they also vary elsewhere."""
        if not varying_axes(labels) <= {axis % labels.dim()}:
            self._sets.freeze(labels, f"{_describe(node)} mixes channels with positions")
            return torch.full((labels.size(axis),), FIXED)
        line = labels.movedim(axis, 0)
        while line.dim() > 1:
            line = line.select(1, 0)
        return line

    def _layer(self, node: Node, args: dict[str, Any]) -> Any:
        """Convolution and linear: labels in along the weight's input axis, fresh labels out along its output axis."""
        weight = args["weight"]
        name = self._tensors.get(str(weight.target)) if weight.op == "get_attr" else None
        if name is None:
            return self._unknown(node, "has a computed weight")
        convolves = "stride" in args
        transposed = convolves and "transpose" in str(node.target)
        groups = args.get("groups", 1)
        weight_shape, out_shape = _shape(weight), _shape(node)
        out_dim, in_dim = (1, 0) if transposed else (0, 1)
        channel_axis = len(out_shape) - (len(weight_shape) - 1) if convolves else len(out_shape) - 1
        entering = self._only_along(self._read(args["input"]), channel_axis, node)
        leaving_count = out_shape[channel_axis]
        if groups > 1 and transposed:
            self._pinned.setdefault(name, f"{_describe(node)} is transposed and grouped")
            self._sets.freeze(entering, self._pinned[name])
            leaving = torch.full((leaving_count,), FIXED)
        else:
            leaving = self._axis(name, out_dim, leaving_count)
            # A constant weight, such as a selection of channels, says nothing of which matter.
            if name in self._trained:
                self.producers[Axis(name, out_dim)] = None
            if groups == 1:
                self._tie(name, in_dim, entering)
            elif groups == len(entering):
                self._sets.unite(
                    leaving, entering.repeat_interleave(leaving_count // groups), f"{_describe(node)} is depthwise"
                )
            else:
                blocks = self._alike(entering.view(groups, -1), node)
                self._tie(name, in_dim, blocks[0])
                self._alike(leaving.view(groups, -1), node)
        self._tie_vectors(node, [args["bias"]], leaving)
        positions = math.prod(_shape(args["input"]) if transposed else out_shape)
        flops = 2 * positions * math.prod(weight_shape) // weight_shape[0]
        self.calls.append(LayerCall(Axis(name, out_dim), Axis(name, in_dim), flops))
        return _along(leaving, channel_axis, out_shape)

    def _alike(self, blocks: Tensor, node: Node) -> Tensor:
        """Unites the rows of `blocks`, [groups, channels]: every group keeps the same channels."""
        self._sets.unite(blocks[1:], blocks[:1].expand_as(blocks[1:]), f"{_describe(node)} divides channels")
        return self._sets.find(blocks)

    def _normalisation(self, node: Node, args: dict[str, Any]) -> Any:
        labels = self._read(args["input"])
        along = self._only_along(labels, 1, node)
        self._tie_vectors(node, [args[key] for key in ("weight", "bias", "running_mean", "running_var")], along)
        return _along(along, 1, _shape(node))

    def _prelu(self, node: Node, args: dict[str, Any]) -> Any:
        labels = self._read(args["self"])
        if math.prod(_shape(args["weight"])) > 1:
            self._tie_vectors(node, [args["weight"]], self._only_along(labels, 1, node))
        return labels

    def _pointwise(self, node: Node, args: dict[str, Any]) -> Any:
        operands = [self._read(source) for source in node.all_input_nodes if isinstance(source.meta["val"], Tensor)]
        result = operands[0]
        for operand in operands[1:]:
            result = self._meet(result, operand, _describe(node))
        return result.expand(_shape(node))

    def _meet(self, a: Tensor, b: Tensor, place: str) -> Tensor:
        """Labels of an element-wise operation of `a` and `b`."""
        shape = torch.broadcast_shapes(a.shape, b.shape)
        a, b = (self._canonical(x[(None,) * (len(shape) - x.dim()) + (...,)]) for x in (a, b))
        for labelled, other in ((a, b), (b, a)):
            if not (compact(other) == FIXED).all():
                continue
            axes = varying_axes(labelled) or {axis for axis, size in enumerate(labelled.shape) if size > 1}
            if any(other.size(axis) > 1 for axis in axes):
                self._sets.freeze(labelled, f"{place} combines them with channels that stay")
            return labelled.expand(shape)
        if varying_axes(a) != varying_axes(b):
            for labels in (a, b):
                self._sets.freeze(labels, f"{place} combines channels with positions")
        else:
            self._sets.unite(compact(a), compact(b), f"{place} combines channels")
        return a.expand(shape)

    def _same(self, node: Node, args: dict[str, Any]) -> Any:
        return self._read(node.args[0]).expand(_shape(node))

    def _move(self, node: Node, args: dict[str, Any]) -> Any:
        return self._apply(node)

    def _apply(self, node: Node) -> Any:
        def labels_of(value: Node) -> Any:
            return self._read(value) if isinstance(value.meta["val"], Tensor) else value.meta["val"]

        values, kwargs = torch.fx.map_arg((node.args, node.kwargs), labels_of)
        return node.target(*values, **kwargs)  # type: ignore[operator]

    def _reshape(self, node: Node, args: dict[str, Any]) -> Any:
        labels = self._read(node.args[0])
        if not self._couple_splits:
            self._sets.freeze(labels, f"{_describe(node)} reshapes channels")
        moved = self._canonical(self._apply(node))
        axes = sorted(varying_axes(moved))
        if len(axes) < 2:
            return moved
        # Blocks of channels: the innermost axis counts within a block.
        first = moved
        for axis in axes[:-1]:
            first = first.narrow(axis, 0, 1)
        self._sets.unite(compact(moved), compact(first), f"{_describe(node)} divides channels")
        return first.expand(moved.shape)

    def _at_fixed_positions(self, node: Node, args: dict[str, Any]) -> Any:
        labels = self._read(node.args[0])
        if args.get("dim", 0) % labels.dim() in varying_axes(labels):
            self._sets.freeze(labels, f"{_describe(node)} takes channels at fixed positions")
        return self._apply(node)

    def _chunk(self, node: Node, args: dict[str, Any]) -> Any:
        labels, dim = self._read(args["self"]), args.get("dim", 1)
        count = args["chunks"] if "chunks" in args else args["groups"]
        if dim % labels.dim() in varying_axes(labels):
            if self._couple_splits and labels.size(dim) % count == 0:
                first, *others = (compact(part) for part in labels.chunk(count, dim))
                for part in others:
                    self._sets.unite(first, part, f"{_describe(node)} divides channels")
            else:
                self._sets.freeze(labels, f"{_describe(node)} divides channels")
        return self._apply(node)

    def _concatenate(self, node: Node, args: dict[str, Any]) -> Any:
        tensors = [self._read(value) for value in args["tensors"]]
        dim = args["dim"] % tensors[0].dim()
        if dim not in set().union(*(varying_axes(labels) for labels in tensors)):
            result = tensors[0].narrow(dim, 0, 1)
            for labels in tensors[1:]:
                result = self._meet(result, labels.narrow(dim, 0, 1), _describe(node))
            if varying_axes(result):
                return result.expand(_shape(node))
        return torch.cat(tensors, dim)

    def _pad(self, node: Node, args: dict[str, Any]) -> Any:
        labels = self._read(args["self"])
        channels = compact(labels)
        pad = list(args["pad"])
        for k in range(len(pad) // 2):
            if channels.size(labels.dim() - 1 - k) == 1:
                pad[2 * k : 2 * k + 2] = [0, 0]
        if any(pad) and (args.get("mode", "constant") != "constant" or min(pad) < 0):
            return self._unknown(node, "takes channels at fixed positions")
        return aten.constant_pad_nd.default(channels, pad, FIXED).expand(_shape(node))

    def _spatial(self, node: Node, dims: int) -> Any:
        labels = self._read(node.args[0])
        return self._reduce(node, labels, set(range(labels.dim() - dims, labels.dim())), keepdim=True)

    def _reduction(self, node: Node, args: dict[str, Any]) -> Any:
        labels = self._read(node.args[0])
        dims = args.get("dim")
        dims = range(labels.dim()) if dims in (None, []) else [dims] if isinstance(dims, int) else dims
        axes = {dim % labels.dim() for dim in dims}
        return self._reduce(node, labels, axes, keepdim=args.get("keepdim", False))

    def _reduce(self, node: Node, labels: Tensor, axes: set[int], *, keepdim: bool) -> Any:
        if varying_axes(labels) & axes:
            self._sets.freeze(labels, f"{_describe(node)} reduces over channels")
        for axis in sorted(axes, reverse=True):
            labels = labels.narrow(axis, 0, 1) if keepdim else labels.select(axis, 0)
        return pytree.tree_map(lambda value: labels.expand(value.shape), node.meta["val"])

    def _normalises(self, node: Node, args: dict[str, Any]) -> Any:
        labels = self._read(node.args[0])
        dims = range(-len(args["normalized_shape"]), 0) if "normalized_shape" in args else [args["dim"]]
        if varying_axes(labels) & {dim % labels.dim() for dim in dims}:
            self._sets.freeze(labels, f"{_describe(node)} normalises over channels")
        return labels

    def _unknown(self, node: Node, why: str) -> Any:
        reason = f"{_describe(node)} {why}"
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                if source.target in self._tensors:
                    self._pinned.setdefault(self._tensors[str(source.target)], reason)
                continue
            for labels in pytree.tree_leaves(self._labels.get(source)):
                if isinstance(labels, Tensor):
                    self._sets.freeze(labels, reason)
        return _fixed(node)

    def _canonical(self, labels: Any) -> Any:
        """The same labels, by their representatives and expanded along every axis where they are constant."""
        return pytree.tree_map(
            lambda x: compact(self._sets.find(compact(x))).expand(x.shape) if isinstance(x, Tensor) else x, labels
        )


def _canonical_names(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter and buffer → the first name of the same tensor."""
    first: dict[int, str] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def _arguments(node: Node) -> dict[str, Any]:
    """The arguments of an ATen call by name, defaults included."""
    assert isinstance(node.target, OpOverload)
    values = {}
    for index, argument in enumerate(node.target._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        values[argument.name] = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name, default)
    return values


def _describe(node: Node) -> str:
    name = str(node.target).split(".")[1] if isinstance(node.target, OpOverload) else node.name
    module = module_of(node)
    return f"{name} in {module}" if module else name


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _along(labels: Tensor, axis: int, shape: tuple[int, ...]) -> Tensor:
    """Labels of a tensor of `shape` whose channels are `labels` along `axis`."""
    return labels.view([-1 if dim == axis else 1 for dim in range(len(shape))]).expand(shape)


def _fixed(node: Node) -> Any:
    return pytree.tree_map(
        lambda value: torch.full((1,) * value.dim(), FIXED).expand(value.shape) if isinstance(value, Tensor) else value,
        node.meta["val"],
    )


Rule = Callable[[ChannelWalk, Node, dict[str, Any]], Any]


def _rules() -> dict[Any, Rule]:
    walk = ChannelWalk
    names: dict[Rule, str] = {
        walk._layer: "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear",
        walk._normalisation: "batch_norm instance_norm",
        walk._prelu: "prelu",
        walk._pointwise: "hardswish log_sigmoid rsub threshold where true_divide divide multiply",
        walk._same: "clone contiguous detach alias to type_as _to_copy zeros_like ones_like lift_fresh_copy",
        walk._move: "permute transpose t swapaxes swapdims movedim unsqueeze squeeze expand flatten stack flip",
        walk._reshape: "reshape view unflatten reshape_as view_as",
        walk._at_fixed_positions: "slice select split split_with_sizes narrow unbind",
        walk._chunk: "chunk channel_shuffle native_channel_shuffle",
        walk._concatenate: "cat concat",
        walk._pad: "pad constant_pad_nd",
        walk._reduction: "mean sum amax amin max min var std prod",
        walk._normalises: "softmax log_softmax layer_norm",
    }
    rules = {
        overload: rule for rule, packets in names.items() for name in packets.split() for overload in _overloads(name)
    }
    for dims in (1, 2, 3):
        pools = f"max_pool{dims}d max_pool{dims}d_with_indices avg_pool{dims}d adaptive_avg_pool{dims}d"
        pads = f"adaptive_max_pool{dims}d reflection_pad{dims}d replication_pad{dims}d upsample_nearest{dims}d"
        for name in f"{pools} {pads} {_INTERPOLATIONS.get(dims, '')}".split():
            rules |= dict.fromkeys(_overloads(name), lambda walk, node, _, dims=dims: walk._spatial(node, dims))
    return rules


def _overloads(name: str) -> list[Any]:
    packet = getattr(aten, name, None)
    return [getattr(packet, overload) for overload in packet.overloads()] if packet is not None else []


_INTERPOLATIONS = {1: "upsample_linear1d", 2: "upsample_bilinear2d upsample_bicubic2d", 3: "upsample_trilinear3d"}
_RULES = _rules()
