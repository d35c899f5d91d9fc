"""Folds what is constant at inference: BatchNorm and other per-channel affine steps go into the weights before them,
identities and computations on constants go altogether."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from kernelpress.emit.distribute import CONVOLUTIONS, distribute
from kernelpress.emit.graph import (
    arguments,
    attribute,
    constant_node,
    constant_tensor,
    delete_attribute,
    number,
    only_user,
    shape,
    value,
)
from kernelpress.emit.quantized import hand_on_quantized, remember_quantized
from kernelpress.runtime.torch_private import OpOverload
from kernelpress.trace import module_of
from kernelpress.trace.regions import DROPOUTS, aliased, reads_layout, writes

__all__ = ["fold"]

aten = torch.ops.aten

IDENTITIES = (
    aten.alias.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.lift_fresh_copy.default,
)

LARGEST_CONSTANT = 1 << 20
"""A computation on constants is folded only if its result has at most this many elements more than its inputs."""


def fold(graph_module: GraphModule, *, splits_shared: bool = True) -> GraphModule:
    """Folds in place and returns the module; weights are combined in float64 and rounded once to their own dtype.

    `splits_shared`: a weight that several layers read becomes several weights where different steps follow; otherwise
    such steps stay.
    """
    before = [_memory_of_output(node) for node in _outputs(graph_module)]
    _remove_identities(graph_module)
    _evaluate_constants(graph_module)
    distribute(graph_module)
    _fold_affine_steps(graph_module, splits_shared)
    _keep_outputs_apart(graph_module, before)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def _outputs(graph_module: GraphModule) -> list[Node]:
    found: list[Node] = []
    torch.fx.map_arg(graph_module.graph.output_node().args, found.append)
    return found


def _memory_of_output(node: Node) -> Node:
    """The node whose memory the caller is handed."""
    while (source := aliased(node)) is not None and not _copies_into_order(node, source):
        node = source
    return node


def _copies_into_order(node: Node, source: Node) -> bool:
    """Whether it makes contiguous what was not."""
    return node.target is aten.contiguous.default and str(value(node).stride()) != str(value(source).stride())


def _keep_outputs_apart(graph_module: GraphModule, before: Sequence[Node]) -> None:
    """Copies outputs that would hand the caller an input, a constant, or another output, where the model did not."""
    output, outputs = graph_module.graph.output_node(), _outputs(graph_module)
    after = [_memory_of_output(node) for node in outputs]
    copies: list[Node] = []
    for i, (node, memory) in enumerate(zip(outputs, after, strict=True)):
        handed_on = memory.op in ("placeholder", "get_attr") and memory is not before[i]
        shared = any(memory is other and before[i] is not before[j] for j, other in enumerate(after[:i]))
        if (handed_on or shared) and isinstance(value(node), Tensor):
            with graph_module.graph.inserting_before(output):
                node = graph_module.graph.call_function(aten.clone.default, (node,))
            node.meta = dict(outputs[i].meta)
        copies.append(node)
    given = iter(copies)
    output.args = torch.fx.map_arg(output.args, lambda _: next(given))


def _remove_identities(graph_module: GraphModule) -> None:
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)


def _is_identity(node: Node) -> bool:
    if any(map(reads_layout, node.users)):
        return False
    if node.target in DROPOUTS:
        given = arguments(node)
        return not given["train"] or given["p"] == 0
    if node.target in IDENTITIES:
        # A result that aliases an input or a parameter would hand the caller's own memory back.
        return isinstance(node.args[0], Node) and node.args[0].op == "call_function"
    if node.target in (aten.to.dtype, aten._to_copy.default):
        source, result = value(node.args[0]), value(node)  # type: ignore[arg-type]
        unchanged = isinstance(source, Tensor) and source.dtype == result.dtype and source.device == result.device
        return unchanged and node.args[0].op == "call_function"  # type: ignore[union-attr]
    return False


def _evaluate_constants(graph_module: GraphModule) -> None:
    """Replaces pure computations whose inputs are all constants by their result."""
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, OpOverload) or not node.all_input_nodes:
            continue
        inputs = [constant_tensor(graph_module, source) for source in node.all_input_nodes]
        if any(tensor is None for tensor in inputs) or not isinstance(value(node), Tensor) or not _is_pure(node):
            continue
        known = dict(zip(node.all_input_nodes, inputs, strict=True))
        with torch.no_grad():
            result = node.target(
                *torch.fx.map_arg(node.args, known.__getitem__), **torch.fx.map_arg(node.kwargs, known.__getitem__)
            )
        if result.numel() > LARGEST_CONSTANT + sum(tensor.numel() for tensor in inputs if tensor is not None):
            continue
        constant = constant_node(graph_module, f"{_owner(node)}{node.name}", result.clone(), node)
        remember_quantized(constant, node, known)
        node.replace_all_uses_with(constant)
        graph_module.graph.erase_node(node)


def _is_pure(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded not in node.target.tags and not writes(node)  # type: ignore[union-attr]


def _owner(node: Node) -> str:
    path = module_of(node)
    return f"{path}." if path.replace(".", "").replace("_", "").isalnum() else ""


@dataclass(frozen=True)
class _Affine:
    """y = x · scale + shift with float64 scale and shift, of shape [C] or []."""

    scale: Tensor
    shift: Tensor


def _fold_affine_steps(graph_module: GraphModule, splits_shared: bool) -> None:
    for layer in list(graph_module.graph.nodes):
        if not _is_foldable_layer(graph_module, layer):
            continue
        if not splits_shared and only_user(arguments(layer)["weight"]) is None:
            continue
        while (node := only_user(layer)) is not None and (step := _affine_step(graph_module, layer, node)) is not None:
            _fold_into(graph_module, layer, step)
            layer.meta["val"] = value(node)
            node.replace_all_uses_with(layer)
            graph_module.graph.erase_node(node)


def _is_foldable_layer(graph_module: GraphModule, node: Node) -> bool:
    if node.op != "call_function" or node.target not in (*CONVOLUTIONS, aten.linear.default):
        return False
    given = arguments(node)
    has_known_bias = given["bias"] is None or constant_tensor(graph_module, given["bias"]) is not None
    return constant_tensor(graph_module, given["weight"]) is not None and has_known_bias


def _affine_step(graph_module: GraphModule, layer: Node, node: Node) -> _Affine | None:
    """`node` as a per-channel affine function of the output of `layer`, if it is one."""
    if node.target is aten.batch_norm.default:
        return _batch_norm_step(graph_module, layer, node)
    if node.target not in (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor):
        return None
    given = arguments(node)
    if shape(node) != shape(layer) or value(node).dtype != value(layer).dtype:
        return None
    is_first = given["self"] is layer
    constant = _channel_constant(graph_module, given["other"] if is_first else given["self"], layer)
    if constant is None:
        return None
    one, zero = torch.ones_like(constant), torch.zeros_like(constant)
    if node.target is aten.mul.Tensor:
        return _Affine(constant, zero)
    if node.target is aten.div.Tensor:
        return _Affine(1 / constant, zero) if is_first else None
    alpha = float(given["alpha"]) if node.target is aten.add.Tensor else -float(given["alpha"])
    return _Affine(one, constant * alpha) if is_first else _Affine(one * alpha, constant)


def _batch_norm_step(graph_module: GraphModule, layer: Node, node: Node) -> _Affine | None:
    given = arguments(node)
    if given["input"] is not layer or (layer.target is aten.linear.default and len(shape(layer) or ()) != 2):
        return None
    mean, variance = (constant_tensor(graph_module, given[name]) for name in ("running_mean", "running_var"))
    weight, bias = (constant_tensor(graph_module, given[name]) for name in ("weight", "bias"))
    unknown = (given["weight"] is not None and weight is None) or (given["bias"] is not None and bias is None)
    if given["training"] or mean is None or variance is None or unknown:
        return None
    scale = torch.rsqrt(variance.double() + given["eps"])
    if weight is not None:
        scale = scale * weight.double()
    shift = -mean.double() * scale
    return _Affine(scale, shift if bias is None else shift + bias.double())


def _channel_constant(graph_module: GraphModule, argument: Any, layer: Node) -> Tensor | None:
    """`argument` in float64 as one number [] or one number per output channel [C] of `layer`, or None."""
    plain = number(argument)
    if plain is not None:
        return torch.tensor(plain, dtype=torch.float64)
    tensor, sizes = constant_tensor(graph_module, argument), shape(layer)
    if tensor is None or sizes is None or not tensor.is_floating_point():
        return None
    if tensor.numel() == 1:
        return tensor.double().reshape(())
    channel_dim = len(sizes) - 1 if layer.target is aten.linear.default else 1
    padded = (1,) * (len(sizes) - tensor.dim()) + tuple(tensor.shape)
    expected = tuple(sizes[channel_dim] if dim == channel_dim else 1 for dim in range(len(sizes)))
    return tensor.double().reshape(-1) if padded == expected else None


def _fold_into(graph_module: GraphModule, layer: Node, step: _Affine) -> None:
    """Replaces the constants of `layer` so that it computes `layer · scale + shift`."""
    given = arguments(layer)
    old_weight = attribute(graph_module, str(given["weight"].target)).detach()
    old_bias = constant_tensor(graph_module, given["bias"])
    scale, shift = (t.to(old_weight.device).expand(len(old_weight)).contiguous() for t in (step.scale, step.shift))
    weight = old_weight.double() * scale.reshape(-1, *(1,) * (old_weight.dim() - 1))
    bias = shift if old_bias is None else old_bias.double() * scale + shift
    for name, tensor in (("weight", weight), ("bias", bias)):
        _rebind(graph_module, layer, name, tensor.to(old_weight.dtype))
    hand_on_quantized(given["weight"], arguments(layer)["weight"], scale)


def _rebind(graph_module: GraphModule, layer: Node, name: str, tensor: Tensor) -> None:
    """Gives `layer` the constant `tensor` as its `weight` or `bias`, under its old name unless others read that one."""
    given = arguments(layer)
    old = given[name]
    target = (
        str(old.target) if old is not None else f"{str(given['weight'].target).rpartition('.')[0]}.bias".lstrip(".")
    )
    readers = [node for node in layer.graph.nodes if node.op == "get_attr" and node.target == target]
    if old is not None and sum(len(node.users) for node in readers) == 1:
        delete_attribute(graph_module, target)
    node = constant_node(graph_module, target, tensor, given["weight"])
    position = 1 if name == "weight" else 2
    layer.kwargs = {key: kept for key, kept in layer.kwargs.items() if key != name}
    layer.args = (*layer.args[:position], node, *layer.args[position + 1 :])
