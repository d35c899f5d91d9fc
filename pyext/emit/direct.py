"""Runs an emitted graph without the dispatcher: the same code on the same parameters, its layers as bound calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from kernelpress.emit.graph import operator_of
from kernelpress.ops.calls.bound import ParameterSlot, ParameterWatch, bound_call
from kernelpress.ops.registry import Operator
from kernelpress.runtime.interception import PLAIN_TYPES, is_intercepted
from kernelpress.runtime.torch_private import any_requires_grad, global_forward_hooks, global_forward_pre_hooks, pytree

__all__ = ["Direct"]

_PLAIN_INPUTS = PLAIN_TYPES | {int, float, bool, str, type(None)}


@dataclass(frozen=True)
class Direct:
    """A graph module's code on bound calls. `forward(body, *inputs)` computes what `body(*inputs)` does."""

    body: GraphModule
    code: str
    watch: Any
    forward: Callable[..., Any]

    @classmethod
    def of(cls, body: GraphModule) -> Direct:
        """The module as it is now; its parameters are looked up at each run, and may change in any way."""
        graph = Graph()
        graph.set_codegen(body.graph._codegen)
        graph.output(graph.graph_copy(body.graph, {}))
        reads = [node for node in graph.nodes if node.op == "get_attr"]
        slots = {node: slot for node in reads if (slot := _slot(body, node)) is not None}
        watch = ParameterWatch(tuple(slots.values()))
        for node in list(graph.nodes):
            if (operator := operator_of(node)) is not None:
                _bind(graph, node, operator, slots, watch)
        for node in reads:
            if not node.users:
                graph.erase_node(node)
        python = graph.python_code("self")
        namespace = dict(python.globals)
        exec(python.src, namespace)
        return cls(body, body._code, watch, namespace["forward"])

    def serves(self, body: GraphModule) -> bool:
        """Whether `body` is still the module that this was made of, and its code the same."""
        return self.body is body and self.code is body._code

    def may_run(self, inputs: tuple[Any, ...]) -> bool:
        """Whether nothing takes part in a run that only the module's own call would serve: modes, transforms, traces,
        hooks, other kinds of tensors, wanted gradients."""
        body = self.body
        if is_intercepted() or body._forward_hooks or body._forward_pre_hooks or _has_global_hooks():
            return False
        flat = inputs
        if not _are_plain(flat):
            flat = tuple(pytree.tree_leaves(flat))
            if not _are_plain(flat):
                return False
        if torch.is_grad_enabled() and any_requires_grad(*flat):
            return False
        return self.watch.look()


def _are_plain(inputs: tuple[Any, ...]) -> bool:
    return all(type(x) in _PLAIN_INPUTS for x in inputs)


def _has_global_hooks() -> bool:
    return bool(global_forward_hooks or global_forward_pre_hooks)


def _slot(body: GraphModule, node: Node) -> ParameterSlot | None:
    """Where the module keeps what the node reads, if it is a parameter or a buffer."""
    path, _, name = str(node.target).rpartition(".")
    owner = body.get_submodule(path)
    tables: tuple[Any, ...] = (owner._parameters, owner._buffers)
    return next((ParameterSlot(table, name) for table in tables if name in table), None)


def _bind(graph: Graph, node: Node, operator: Operator, slots: dict[Node, ParameterSlot], watch: Any) -> None:
    """Puts a bound call in place of an op's overload, unless its backend is open or a parameter or option computed."""
    settings = [value for name, value in node.kwargs.items() if name not in operator.tensors]
    if any(isinstance(leaf, Node) for leaf in pytree.tree_leaves(settings)):
        return
    bindings: tuple[Any, Any, str] = operator.signature.bind(node.args, node.kwargs)
    tensors, options, backend = bindings
    sources: dict[int, Node] = {position: source for position, source in enumerate(tensors) if source is not None}
    given = {position: source for position, source in sources.items() if position in operator.activations}
    parameters = {position: source for position, source in sources.items() if position not in given}
    if backend == "auto" or not all(source in slots for source in parameters.values()):
        return
    function = bound_call(
        operator,
        {position: slots[source] for position, source in parameters.items()},
        tuple(given),
        options,
        backend,
        watch,
    )
    with graph.inserting_before(node):
        call = graph.call_function(function, tuple(given.values()))
    node.replace_all_uses_with(call)
    graph.erase_node(node)
