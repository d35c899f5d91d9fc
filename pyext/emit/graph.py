"""Small questions about fx graphs, and small edits of them, that every step of emission needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from kernelpress.ops.calls.aten import arguments_of
from kernelpress.ops.registry import Operator, operators
from kernelpress.runtime.torch_private import OpOverload
from kernelpress.trace.regions import is_written

__all__ = [
    "arguments",
    "attribute",
    "channels_last_if_image",
    "constant_node",
    "constant_tensor",
    "delete_attribute",
    "number",
    "only_user",
    "operator_of",
    "set_attribute",
    "shape",
    "shares_memory_within",
    "value",
]


def value(node: Node) -> Any:
    """What `node` computes at trace time: a fake tensor, a (symbolic) number, or a nest of them."""
    return node.meta.get("val")


def shape(node: object) -> tuple[Any, ...] | None:
    """Shape of the tensor that `node` computes (the batch may be symbolic), or None if it is no tensor."""
    tensor = value(node) if isinstance(node, Node) else None
    return tuple(tensor.shape) if isinstance(tensor, Tensor) else None


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of an operator call by their schema names, defaults included."""
    return arguments_of(node.target, node.args, node.kwargs)


def only_user(node: Node) -> Node | None:
    """The one node that reads `node`, or None if nobody or several do."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def operator_of(node: Node) -> Operator | None:
    """The op of ours that `node` calls; None for a call of another namespace."""
    target = node.target
    if not isinstance(target, OpOverload) or target.namespace != "kernelpress":
        return None
    return next((operator for operator in operators() if operator.name == target._opname), None)


def number(argument: Any) -> float | None:
    """`argument` as a float if it is a plain number."""
    return float(argument) if isinstance(argument, (int, float)) and not isinstance(argument, bool) else None


def attribute(module: nn.Module, target: str) -> Any:
    """The parameter, buffer or constant that a `get_attr` node of `module` with this target reads."""
    *owners, name = target.split(".")
    for owner in owners:
        module = getattr(module, owner)
    return getattr(module, name)


def constant_tensor(graph_module: GraphModule, argument: object) -> Tensor | None:
    """The tensor behind a `get_attr` node, or None if `argument` is anything else or a buffer that the graph writes."""
    if not isinstance(argument, Node) or argument.op != "get_attr" or is_written(argument):
        return None
    found = attribute(graph_module, str(argument.target))
    return found.detach() if isinstance(found, Tensor) else None


def constant_node(graph_module: GraphModule, target: str, tensor: Tensor, like: Node) -> Node:
    """A `get_attr` node before `like` for a new constant; `like` lends the fake mode of its value."""
    with graph_module.graph.inserting_before(like):
        node = graph_module.graph.get_attr(set_attribute(graph_module, target, tensor))
    fake = value(like)
    node.meta["val"] = fake.fake_mode.from_tensor(tensor, static_shapes=True) if hasattr(fake, "fake_mode") else tensor
    return node


def set_attribute(graph_module: GraphModule, target: str, tensor: Tensor) -> str:
    """Stores `tensor` as a frozen parameter (a buffer if it is not of a float type) under `target`, or under the next
    free name if that is taken; returns the name."""
    *owners, name = target.split(".")
    owner: nn.Module = graph_module
    for part in owners:
        if not isinstance(getattr(owner, part, None), nn.Module):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    free, count = name, 0
    while hasattr(owner, free):
        count += 1
        free = f"{name}_{count}"
    tensor = tensor.detach()
    if tensor.is_floating_point():
        owner.register_parameter(free, nn.Parameter(tensor, requires_grad=False))
    else:
        owner.register_buffer(free, tensor)
    return ".".join([*owners, free])


def delete_attribute(graph_module: GraphModule, target: str) -> None:
    """Forgets the parameter or buffer stored under `target`."""
    owner, _, name = target.rpartition(".")
    delattr(attribute(graph_module, owner) if owner else graph_module, name)


def channels_last_if_image(tensor: Tensor) -> Tensor:
    """4-dimensional float tensors in channels_last memory, everything else as it is."""
    if tensor.dim() == 4 and tensor.is_floating_point():
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor


def shares_memory_within(tensor: Tensor) -> bool:
    """Whether several elements of `tensor` may lie at one address, as in expanded tensors and overlapping windows."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False
