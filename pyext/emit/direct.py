"""Runs an emitted graph without the dispatcher: the same code on the same parameters, its layers as typed functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from kernelpress import ops
from kernelpress.emit.graph import operator_of
from kernelpress.runtime.interception import PLAIN_TYPES, is_intercepted
from kernelpress.runtime.torch_private import any_requires_grad, global_forward_hooks, global_forward_pre_hooks, pytree

__all__ = ["Direct"]

_PLAIN_INPUTS = PLAIN_TYPES | {int, float, bool, str, type(None)}


@dataclass(frozen=True)
class Direct:
    """A graph module's code on typed functions. `forward(body, *inputs)` computes what `body(*inputs)` does."""

    body: GraphModule
    code: str
    forward: Callable[..., Any]

    @classmethod
    def of(cls, body: GraphModule) -> Direct:
        """The module as it is now; its parameters are looked up at each run, and may change in any way."""
        graph = Graph()
        graph.set_codegen(body.graph._codegen)
        graph.output(graph.graph_copy(body.graph, {}))
        for node in list(graph.nodes):
            if (operator := operator_of(node)) is not None:
                node.target = getattr(ops, operator.name)
                node.kwargs = {
                    name: tuple(value) if isinstance(value, list) else value for name, value in node.kwargs.items()
                }
            elif node.op == "get_attr" and (read := _reader(body, str(node.target))) is not None:
                with graph.inserting_before(node):
                    node.replace_all_uses_with(graph.call_function(read))
                graph.erase_node(node)
        python = graph.python_code("self")
        namespace = dict(python.globals)
        exec(python.src, namespace)
        return cls(body, body._code, namespace["forward"])

    def serves(self, body: GraphModule) -> bool:
        """Whether `body` is still the module that this was made of, and its code the same."""
        return self.body is body and self.code is body._code

    def may_run(self, inputs: tuple[Any, ...]) -> bool:
        """Whether nothing takes part in a run that only the module's own call would serve: modes, transforms, traces,
        hooks, other kinds of tensors, gradients wanted of inputs."""
        body = self.body
        if is_intercepted() or body._forward_hooks or body._forward_pre_hooks or _has_global_hooks():
            return False
        flat = inputs
        if not _are_plain(flat):
            flat = tuple(pytree.tree_leaves(flat))
            if not _are_plain(flat):
                return False
        return not (torch.is_grad_enabled() and any_requires_grad(*flat))


def _reader(body: GraphModule, target: str) -> Callable[[], Any] | None:
    """A function that gives what stands under a name now, if it is a parameter or a buffer: quicker than by the
    module's attributes."""
    path, _, name = target.rpartition(".")
    owner: Any = body.get_submodule(path)
    table = next((table for table in (owner._parameters, owner._buffers) if name in table), None)
    if table is None:
        return None

    def read() -> Any:
        try:
            return table[name]
        except KeyError:
            return getattr(owner, name)

    return read


def _are_plain(inputs: tuple[Any, ...]) -> bool:
    return all(type(x) in _PLAIN_INPUTS for x in inputs)


def _has_global_hooks() -> bool:
    return bool(global_forward_hooks or global_forward_pre_hooks)
