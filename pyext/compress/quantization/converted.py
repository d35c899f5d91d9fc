"""What torchao's conversion leaves, as an ordinary module: constants under the names that their layers had, what is
left of a shared layer's BatchNorm in the scales of its weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from kernelpress.compress.quantization.places import Places
from kernelpress.compress.quantization.ranges import SMALLEST
from kernelpress.emit.assemble import copy_of
from kernelpress.emit.graph import arguments, attribute, constant_node, constant_tensor, delete_attribute, only_user

__all__ = ["finished", "fold_shared", "set_bias"]

aten = torch.ops.aten


def finished(converted: GraphModule, places: Places) -> GraphModule:
    """A module of the same graph, which can be copied, saved and emitted."""
    module = copy_of(converted)
    nodes = {node.name: node for node in module.graph.nodes}
    for node in module.graph.nodes:
        node.meta.pop("quantization_annotation", None)
    new: dict[str, str] = {}
    for layer in places.layers:
        dequantize = arguments(nodes[layer.node.name])["weight"]
        new[str(dequantize.args[0].target)] = str(layer.weight.target)
        new[str(dequantize.args[1].target)] = f"{layer.weight.target}_scale"
        dequantize.args = (*dequantize.args[:2], None, *dequantize.args[3:])
    module.graph.eliminate_dead_code()
    return _with_names(module, module.graph, new)


def fold_shared(module: GraphModule, places: Places) -> GraphModule:
    """A module in which what is left of BatchNorms behind layers that share a weight is in a scale of that weight for
    each layer, and in its bias."""
    folded = copy_of(module)
    nodes = {node.name: node for node in folded.graph.nodes}
    for layer in places.layers:
        _fold_into_scale(folded, [nodes[node.name] for node in layer.chain])
    folded.graph.eliminate_dead_code()
    return _with_names(folded, folded.graph, {})


def _fold_into_scale(module: GraphModule, chain: list[Node]) -> None:
    """Takes factors of channels, all above zero, and terms behind a layer into its weight's scale and its bias."""
    layer = chain[0]
    dequantize = arguments(layer)["weight"]
    for node in chain[1:]:
        constant = constant_tensor(module, node.args[1]) if len(node.args) == 2 else None
        if constant is None:
            return
        step, bias = constant.flatten().double(), constant_tensor(module, arguments(layer)["bias"])
        shift = torch.zeros_like(step) if bias is None else bias.double()
        if node.target is aten.mul.Tensor:
            scale_node = dequantize.args[1]
            scale = attribute(module, str(scale_node.target)).double() * step
            if not bool((scale >= SMALLEST).all()):
                return
            new = constant_node(module, str(scale_node.target), scale, dequantize)
            path, _, name = str(new.target).rpartition(".")
            delattr(module.get_submodule(path), name)
            module.get_submodule(path).register_buffer(name, scale.float())
            dequantize.update_arg(1, new)
            shift = shift * step
        else:
            shift = shift + step
        set_bias(module, layer, shift.to(constant.dtype))
        node.replace_all_uses_with(layer)
        module.graph.erase_node(node)


def set_bias(module: GraphModule, layer: Node, bias: Tensor) -> None:
    """Gives `layer` a bias of its own."""
    given = arguments(layer)
    if given["bias"] is not None and only_user(given["bias"]) is layer:
        delete_attribute(module, str(given["bias"].target))
    node = constant_node(module, f"{given['weight'].args[0].target.rpartition('.')[0]}.bias".lstrip("."), bias, layer)
    layer.kwargs = {name: value for name, value in layer.kwargs.items() if name != "bias"}
    layer.args = (*layer.args[:2], node, *layer.args[3:])


def _with_names(module: GraphModule, graph: Graph, new: dict[str, str]) -> GraphModule:
    """`graph` as a module that owns what it reads: int8 weights as parameters that nothing trains, other constants as
    they were, `new` ones by other names."""
    root: dict[str, Any] = {}
    given: dict[str, str] = {}
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        old = str(node.target)
        found: Any = attribute(module, old)
        if old not in given:
            given[old] = _free(root, new.get(old, old))
            if isinstance(found, Tensor):
                is_parameter = isinstance(found, nn.Parameter) or found.dtype == torch.int8
                found = nn.Parameter(found.detach(), False) if is_parameter else found
            root[given[old]] = found
        node.target = given[old]
    finished_module = GraphModule(root, graph)
    finished_module.graph.lint()
    return finished_module


def _free(taken: dict[str, Any], name: str) -> str:
    count = 1
    free = name
    while free in taken:
        free, count = f"{name}_{count}", count + 1
    return free
