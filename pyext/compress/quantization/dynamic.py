"""Dynamic quantization: linear layers alone, their weights in int8, each row of what they read by a scale that is found
when it comes."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from kernelpress.compress.quantization.places import Layer, Places
from kernelpress.emit.graph import arguments
from kernelpress.emit.quantized_rows import dynamically_quantized

__all__ = ["linear_places", "with_found_scales"]

ONLY_LINEAR = "dynamic quantization is of linear layers"


def linear_places(places: Places) -> Places:
    """What of these places dynamic quantization takes: layers, and no tensors between them."""
    linear = tuple(layer for layer in places.layers if _is_linear(layer))
    others = tuple((layer, ONLY_LINEAR) for layer in places.layers if not _is_linear(layer))
    return Places(linear, (), (*places.floats, *others))


def _is_linear(layer: Layer) -> bool:
    return layer.node.target is torch.ops.aten.linear.default


def with_found_scales(quantized: GraphModule, places: Places) -> GraphModule:
    """Rounds what the int8 layers read by scales that are found at each call, in place; returns the graph."""
    own = {node.name: node for node in quantized.graph.nodes}
    rounded: dict[Node, Node] = {}
    for layer in places.layers:
        node = own[layer.node.name]
        x = arguments(node)["input"]
        if x not in rounded:
            rounded[x] = dynamically_quantized(quantized.graph, x, node)
        node.replace_input_with(x, rounded[x])
    quantized.graph.lint()
    quantized.recompile()
    return quantized
