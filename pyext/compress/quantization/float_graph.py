"""The graph that is quantized: a model's own, folded, over weights of its own, each read in one place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from kernelpress.compress.quantization.places import layer_nodes
from kernelpress.emit.assemble import copy_of, owned_copy, with_constants
from kernelpress.emit.canonical import canonicalize
from kernelpress.emit.fold import fold
from kernelpress.emit.graph import arguments, constant_node, constant_tensor, shape
from kernelpress.emit.quantized import is_dequantize, is_rounding
from kernelpress.trace import trace

__all__ = ["float_graph", "plain_copy"]

aten = torch.ops.aten


def float_graph(model: nn.Module, inputs: tuple[Any, ...]) -> GraphModule:
    """The folded graph of `model` in eval mode, which shares nothing with it; its contract is `meta["contract"]`.

    BatchNorm goes into the weights before it, except where other calls read them too: there it becomes a product and a
    sum. Raises `ValueError` for a model that is quantized already and for weights that are not finite.
    """
    traced = trace(model, inputs)
    if any(is_rounding(node) or is_dequantize(node) for node in traced.graph.nodes):
        raise ValueError(f"model: {type(model).__name__} is quantized already, in whole or in part")
    graph_module = owned_copy(canonicalize(copy_of(traced)))
    graph_module.meta["contract"] = traced.meta["contract"]
    _merge_constants(graph_module)
    fold(graph_module, splits_shared=False)
    for layer in list(layer_nodes(graph_module)):
        for norm in [user for user in layer.users if user.target is aten.batch_norm.default]:
            _spell_out(graph_module, norm)
    _check_finite(graph_module, model)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def plain_copy(graph_module: GraphModule) -> GraphModule:
    """Another graph over copies of the tensors that it reads, with the values of nodes."""
    copied = owned_copy(with_constants(graph_module, copy_of(graph_module).graph))
    copied.meta.update(graph_module.meta)
    return copied


def _merge_constants(graph_module: GraphModule) -> None:
    """Reads each parameter and buffer by one node, before all that reads it."""
    first: dict[str, Node] = {}
    for node in [node for node in graph_module.graph.nodes if node.op == "get_attr"]:
        if isinstance(node.meta.get("val"), Tensor) and (known := first.setdefault(str(node.target), node)) is not node:
            node.replace_all_uses_with(known)
            graph_module.graph.erase_node(node)


def _spell_out(graph_module: GraphModule, norm: Node) -> None:
    """A BatchNorm by running statistics as x · scale + shift."""
    given = arguments(norm)
    constants = {
        name: constant_tensor(graph_module, given[name]) for name in ("running_mean", "running_var", "weight", "bias")
    }
    mean, variance = constants["running_mean"], constants["running_var"]
    if given["training"] or mean is None or variance is None:
        return
    scale = torch.rsqrt(variance.double() + given["eps"])
    if constants["weight"] is not None:
        scale = scale * constants["weight"].double()
    shift = -mean.double() * scale
    if constants["bias"] is not None:
        shift = shift + constants["bias"].double()
    result = given["input"]
    name = str(given["running_mean"].target).rpartition(".")[0]
    form = (-1, *(1,) * (len(shape(norm) or ()) - 2))
    for target, attribute, tensor in ((aten.mul.Tensor, "scale", scale), (aten.add.Tensor, "shift", shift)):
        constant = constant_node(graph_module, f"{name}.{attribute}", tensor.to(mean.dtype).reshape(form), norm)
        with graph_module.graph.inserting_before(norm):
            result = graph_module.graph.call_function(target, (result, constant))
        result.meta = dict(norm.meta)
    norm.replace_all_uses_with(result)
    graph_module.graph.erase_node(norm)


def _check_finite(graph_module: GraphModule, model: nn.Module) -> None:
    for node in graph_module.graph.nodes:
        tensor = constant_tensor(graph_module, node)
        if tensor is not None and tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"model: {node.target} of {type(model).__name__} holds NaN or infinity")
