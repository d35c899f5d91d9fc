"""Graph modules as `pickle` takes them apart and puts them together: node by node.

torch pickles one as the source of its `forward`, which it traces again: that loses how inputs are taken out of
containers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from kernelpress.emit.graph import attribute
from kernelpress.runtime.torch_private import HigherOrderOperator, OpOverload

__all__ = ["Portable"]


@dataclass(frozen=True)
class Portable:
    """A graph module that can be pickled, with the tensors that it reads; its nodes' `meta` stays behind."""

    module: GraphModule

    def __reduce__(self) -> tuple[Callable[..., Portable], tuple[Any, ...]]:
        graph = self.module.graph
        nodes = [
            (node.op, _named(node.target), *map_aggregate((node.args, node.kwargs), _named), node.name)
            for node in graph.nodes
        ]
        targets = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
        read = {target: attribute(self.module, target) for target in sorted(targets)}
        attributes = {name: Portable(x) if isinstance(x, GraphModule) else x for name, x in read.items()}
        return _rebuild, (nodes, graph._codegen, attributes)


@dataclass(frozen=True)
class _Reference:
    """The node of this name."""

    name: str


@dataclass(frozen=True)
class _Operator:
    """The operator that is found in `torch.ops` along this path."""

    path: tuple[str, ...]


def _named(part: Any) -> Any:
    """A node or an operator by its name; functions are pickled by theirs."""
    if isinstance(part, Node):
        return _Reference(part.name)
    if isinstance(part, OpOverload):
        return _Operator((part.namespace, part._opname, part._overloadname))
    if isinstance(part, HigherOrderOperator):
        return _Operator(("higher_order", part.name()))
    return part


def _rebuild(nodes: list[tuple[Any, ...]], codegen: Any, attributes: dict[str, Any]) -> Portable:
    graph = Graph()
    made: dict[str, Node] = {}

    def meant(part: Any) -> Any:
        if isinstance(part, _Operator):
            return functools.reduce(getattr, part.path, torch.ops)
        return made[part.name] if isinstance(part, _Reference) else part

    for op, target, args, kwargs, name in nodes:
        given: tuple[Any, Any] = map_aggregate((args, kwargs), meant)
        made[name] = graph.create_node(op, meant(target), *given, name=name)
    graph.set_codegen(codegen)
    root = {name: x.module if isinstance(x, Portable) else x for name, x in attributes.items()}
    return Portable(GraphModule(root, graph))
