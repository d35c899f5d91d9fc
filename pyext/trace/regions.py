"""What an exported graph holds besides functional calls: sub-graphs, writes into buffers, and operations that see how
their operands lie in memory."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from kernelpress.runtime.torch_private import HigherOrderOperator, OpOverload

__all__ = [
    "DROPOUTS",
    "aliased",
    "functionalised",
    "has_regions",
    "is_written",
    "keep_layouts",
    "mark_written",
    "memory_of",
    "not_dense",
    "reads_layout",
    "regions",
    "writes",
    "writes_undone",
]

aten = torch.ops.aten

_WRITTEN = "kernelpress_written"

_LAYOUT_READERS = frozenset({aten.as_strided.default, aten.view_as_complex.default, aten.view.dtype})
_LAYOUT_FREE_NAMESPACES = frozenset({"aten", "prims", "kernelpress", "quantized_decomposed"})
DROPOUTS = frozenset(
    getattr(aten, name + suffix).default
    for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
    for suffix in ("", "_")
)
# Their schemas do not say so, but they can return their argument itself.
_UNDECLARED_ALIASES = DROPOUTS | {aten.type_as.default, operator.getitem}
_UPDATE_STATISTICS = frozenset({aten.batch_norm.default, aten.instance_norm.default})


def regions(graph: Graph) -> list[Node]:
    """The calls of operators on sub-graphs: `cond`, `while_loop`, `map`, regions of `autocast` …"""
    return [node for node in graph.nodes if isinstance(node.target, HigherOrderOperator)]


def has_regions(graph: Graph) -> bool:
    """Whether the graph has calls that are no operations: sub-graphs, or the levels of a `vmap`."""
    return bool(regions(graph)) or any(map(_is_level, graph.nodes))


def _is_level(node: Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__module__", "").startswith("torch._functorch")


def writes(node: Node) -> bool:
    """Whether `node` writes to one of its arguments. Two norms do and their schemas do not say so: those that normalise
    by the statistics of their input, and update running ones with them."""
    if node.target in _UPDATE_STATISTICS:
        return bool(node.args[3] is not None and node.args[5])
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def aliased(node: Node) -> Node | None:
    """The argument whose memory the result of `node` may share."""
    target = node.target
    if target in _UNDECLARED_ALIASES:
        return node.args[0]  # type: ignore[return-value]
    if isinstance(target, OpOverload) and any(r.alias_info is not None for r in target._schema.returns):
        return next((a for a in node.args if isinstance(a, Node)), None)
    return None


def memory_of(node: Node) -> Node:
    """The node whose memory the result of `node` may share: itself where that is new."""
    while (source := aliased(node)) is not None:
        node = source
    return node


def functionalised(program: torch.export.ExportedProgram) -> GraphModule:
    """The program as PyTorch's own functionalisation leaves it, but that inputs are not written, and written buffers
    are the module's own: the model's keep their values. Where PyTorch fails at sub-graphs alone, they stay as they are.

    Raises `ValueError` for writes that it cannot undo.
    """
    parts = [part for part in program.graph_module.modules() if isinstance(part, GraphModule)]
    for part in parts[1:]:
        _return_copies(part)
    try:
        return _own_writes(program.run_decompositions({}).module())
    except RuntimeError as error:
        nodes = [node for part in parts for node in part.graph.nodes]
        if any(writes(node) or _is_level(node) for node in nodes):
            raise ValueError(f"model: cannot be made functional: {str(error).splitlines()[0]}") from error
        return program.module()


def _return_copies(part: GraphModule) -> None:
    """Functionalisation does not take sub-graphs that return an operand, a view of one, or one result twice."""
    output = part.graph.output_node()
    seen: set[Node] = set()

    def own(result: Node) -> Node:
        root = memory_of(result)
        is_new = root.op == "call_function" and root not in seen
        if is_new or not isinstance(result.meta.get("val"), Tensor):
            seen.add(root)
            return result
        with part.graph.inserting_before(output):
            copy = part.graph.call_function(aten.clone.default, (result,))
        copy.meta = dict(result.meta)
        return copy

    output.args = torch.fx.map_arg(output.args, own)
    part.recompile()


def _own_writes(module: GraphModule) -> GraphModule:
    for node in [node for node in module.graph.nodes if writes(node)]:
        target = node.args[0]
        if node.target is not aten.copy_.default or target.op == "call_function":
            raise ValueError(f"model: expected writes that can be made functional, got {node.target} at {node.name}")
        if target.op == "get_attr":
            owner = module.get_submodule(str(target.target).rpartition(".")[0])
            name = str(target.target).rpartition(".")[2]
            owned = getattr(owner, name).detach().clone()
            delattr(owner, name)
            owner.register_buffer(name, owned)
            node.meta["val"] = target.meta["val"]
        else:
            node.replace_all_uses_with(node.args[1])
            module.graph.erase_node(node)
    mark_written(module.graph)
    return module


def mark_written(graph: Graph) -> None:
    """Makes `is_written` true of all readers of the buffers that the graph writes."""
    targets = [node.args[0] for node in graph.nodes if writes(node)]
    for target in targets:
        if isinstance(target, Node) and target.op == "get_attr":
            for reader in graph.find_nodes(op="get_attr", target=target.target):
                reader.meta[_WRITTEN] = True


def is_written(node: Node) -> bool:
    """Whether `node` reads a buffer that the graph writes: it is no constant."""
    return _WRITTEN in node.meta


@contextmanager
def writes_undone(*modules: GraphModule) -> Iterator[None]:
    """Gives the buffers that the modules write back the values that they have now."""
    names = {(module, str(node.target)) for module in modules for node in module.graph.nodes if is_written(node)}
    buffers = [module.get_buffer(name) for module, name in names]
    values = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, values, strict=True):
                buffer.copy_(value)


def reads_layout(node: Node) -> bool:
    """Whether the result of `node` may depend on the strides of its operands: views that are told strides, sub-graphs
    with views in them, operations that are not PyTorch's, GroupNorm of single channels (E[x²] − E[x]² in one pass where
    they lie in channels_last)."""
    target = node.target
    if target is aten.group_norm.default:
        x: Any = node.args[0]
        return isinstance(x.meta.get("val"), Tensor) and node.args[1] == x.meta["val"].shape[1]
    if isinstance(target, OpOverload):
        return target in _LAYOUT_READERS or target.namespace not in _LAYOUT_FREE_NAMESPACES
    return isinstance(target, HigherOrderOperator)


def keep_layouts(graph: Graph) -> None:
    """Makes contiguous again what was so at export, before operations that see it."""
    for node in [node for node in graph.nodes if reads_layout(node)]:
        with graph.inserting_before(node):
            copies = {source: _contiguous(graph, source) for source in node.all_input_nodes if _is_contiguous(source)}
        for source, copy in copies.items():
            node.replace_input_with(source, copy)


def _contiguous(graph: Graph, source: Node) -> Node:
    copy = graph.call_function(aten.contiguous.default, (source,))
    copy.meta = {"val": source.meta["val"], "nn_module_stack": source.meta.get("nn_module_stack")}
    return copy


def _is_contiguous(source: Node) -> bool:
    value: Any = source.meta.get("val")
    if source.op == "get_attr" or not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    try:
        return value.is_contiguous()
    except RuntimeError:  # A size that depends on data: nobody knows.
        return False


def not_dense(x: Tensor) -> str | None:
    """What keeps `x` from being a dense tensor with values: its layout, a quantized dtype, the meta device."""
    if x.layout != torch.strided:
        return str(x.layout)
    return str(x.dtype) if x.is_quantized else "a tensor on the meta device" if x.is_meta else None
