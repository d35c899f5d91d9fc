"""Puts graphs together: copies, the chosen fragments in their places, and the constants that a graph reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from kernelpress.emit.candidates import Candidate, constant, form_of, mark_channels_last, turned
from kernelpress.emit.graph import attribute
from kernelpress.emit.quantized import merge_quantization
from kernelpress.ops.layout import PIXELS, Layout
from kernelpress.trace.regions import is_written

__all__ = ["assemble", "channels_last_copy", "copy_of", "owned_copy", "with_constants"]


def copy_of(graph_module: GraphModule) -> GraphModule:
    """Another graph over the same tensors."""
    graph = Graph()
    graph.set_codegen(graph_module.graph._codegen)
    graph.output(graph.graph_copy(graph_module.graph, {}))
    return GraphModule(graph_module, graph)


def owned_copy(graph_module: GraphModule) -> GraphModule:
    """Another graph over copies of the tensors: what is written to one of the two is not seen by the other."""
    whole = copy_of(graph_module)
    copies: dict[Any, Any] = {}
    for target in {str(node.target) for node in whole.graph.nodes if node.op == "get_attr"}:
        found, (owner, _, name) = attribute(whole, target), target.rpartition(".")
        if isinstance(found, Tensor):
            form = (found.data_ptr(), found.shape, found.stride(), found.dtype)  # two of one form stay one
            copied = copies.setdefault(form, found.detach().clone())
            found = nn.Parameter(copied, found.requires_grad) if isinstance(found, nn.Parameter) else copied
        elif isinstance(found, GraphModule):
            found = owned_copy(found)
        setattr(whole.get_submodule(owner), name, found)
    return whole


def assemble(graph_module: GraphModule, chosen: Sequence[Candidate]) -> GraphModule:
    """A copy of the graph in which the chosen fragments stand for the nodes they cover, each on values in the forms
    that it reads."""
    by_output = {candidate.output: candidate for candidate in chosen}
    covered = {node for candidate in chosen for node in candidate.nodes}
    graph = Graph()
    graph.set_codegen(graph_module.graph._codegen)
    new: dict[Node, Node] = {}
    forms: dict[tuple[Node, Layout], Node] = {}

    def read(node: Node, form: Layout | None) -> Node:
        if form is None:
            return new[node]
        if (node, form) not in forms:
            forms[node, form] = turned(graph, new[node], form)
        return forms[node, form]

    for node in graph_module.graph.nodes:
        if node in by_output:
            candidate = by_output[node]
            given = zip(candidate.placeholders, candidate.inputs, candidate.reads, strict=True)
            result = graph.graph_copy(candidate.fragment, {own: read(outer, form) for own, outer, form in given})
            assert isinstance(result, Node)
            new[node], form = result, candidate.gives
            result.meta = dict(node.meta)
        elif node not in covered:
            new[node] = graph.node_copy(node, lambda source: read(source, form_of(source, PIXELS)))
            form = form_of(node, PIXELS)
        else:
            continue
        if form is not None:
            forms[node, form] = new[node]
    merge_quantization(graph)
    return with_constants(graph_module, graph)


def with_constants(graph_module: GraphModule, graph: Graph) -> GraphModule:
    """`graph` as a module that owns just the constants it reads, each in the memory format it is read in, and a copy of
    each buffer that it writes."""
    root: dict[str, Any] = {}
    graph.eliminate_dead_code()
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        tensor = constant(graph_module, node)
        if is_written(node):
            tensor = tensor.clone()
        elif isinstance(tensor, Tensor):
            target = _target_for(root, str(node.target), tensor)
            node.target, tensor = target, nn.Parameter(tensor.detach(), False) if tensor.is_floating_point() else tensor
        root.setdefault(str(node.target), tensor)
    graph.lint()
    return GraphModule(root, graph)


def _target_for(root: Mapping[str, Any], target: str, tensor: Tensor) -> str:
    """`target`, or another name if a tensor of another memory format has taken it."""
    taken = root.get(target)
    return target if taken is None or taken.stride() == tensor.stride() else f"{target}_{len(root)}"


def channels_last_copy(traced: GraphModule) -> GraphModule:
    """The original graph with its images in channels_last from the first operation on."""
    whole = copy_of(traced)
    nodes = [node for node in whole.graph.nodes if node.op == "call_function"]
    for node in nodes:
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                mark_channels_last(source)
    for node in [n for n in whole.graph.nodes if n.op == "placeholder"]:
        tensor = node.meta.get("val")
        if isinstance(tensor, Tensor) and tensor.dim() == 4 and tensor.is_floating_point():
            with whole.graph.inserting_before(nodes[0] if nodes else whole.graph.output_node()):
                image = whole.graph.call_function(torch.ops.aten.contiguous.default, (node,))
                image.kwargs = {"memory_format": torch.channels_last}
                image.meta = dict(node.meta)
            node.replace_all_uses_with(image, delete_user_cb=lambda user, image=image: user is not image)
    return with_constants(traced, whole.graph)
