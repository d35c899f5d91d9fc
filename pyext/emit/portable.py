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
from torch.fx.node import map_aggregate, map_arg

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
            (node.op, _named(node.target), *map_arg((node.args, node.kwargs), lambda n: _Reference(n.name)), node.name)
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


def _named(target: Any) -> Any:
    """An operator by its name; functions are pickled by theirs."""
    if isinstance(target, OpOverload):
        return _Operator((target.namespace, target._opname, target._overloadname))
    if isinstance(target, HigherOrderOperator):
        return _Operator(("higher_order", target.name()))
    return target


def _rebuild(nodes: list[tuple[Any, ...]], codegen: Any, attributes: dict[str, Any]) -> Portable:
    graph = Graph()
    made: dict[str, Node] = {}

    def node_of(argument: Any) -> Any:
        return made[argument.name] if isinstance(argument, _Reference) else argument

    for op, target, args, kwargs, name in nodes:
        if isinstance(target, _Operator):
            target = functools.reduce(getattr, target.path, torch.ops)
        args, kwargs = map_aggregate((args, kwargs), node_of)
        made[name] = graph.create_node(op, target, args, kwargs, name)
    graph.set_codegen(codegen)
    root = {name: x.module if isinstance(x, Portable) else x for name, x in attributes.items()}
    return Portable(GraphModule(root, graph))
