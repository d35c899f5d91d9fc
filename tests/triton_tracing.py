"""Run as a program, without Triton's interpreter: what tracing makes of ops on the backend "triton", as JSON.

python triton_tracing.py ops        op → its launches as they are called, and as they stand in the traced graph
python triton_tracing.py whole      the ops in the traced graph of a call on another backend, and of an export
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from cuda_cases import CASES, OpCase
from interpreting import INTERPRETED
from torch import Tensor, nn

import kernelpress  # noqa: F401 - registers the ops
from kernelpress.kernels.triton.launch import launching_with
from kernelpress.ops import registry
from kernelpress.ops.backends import triton as backend
from kernelpress.runtime.torch_private import (
    aot_autograd,
    kernel_side_table,
    mark_dynamic,
    triton_kernel_wrapper_functional,
)
from kernelpress.runtime.triton_private import GPUTarget, set_driver


class Driver:
    """Of a GPU that is not there: kernels can be compiled for it."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


def launches_of_call(call: Callable[[], Tensor]) -> list[dict[str, Any]]:
    """What a call launches."""
    found: list[dict[str, Any]] = []

    def record(kernel: Any, grid: tuple[int], arguments: Any, constants: dict[str, Any], configuration: Any) -> None:
        given = {**dict(zip(kernel.arg_names, arguments, strict=False)), **constants}
        found.append(_described(kernel, [*grid, 1, 1], given))

    with launching_with(record):
        call()
    return found


def launches_of_graph(graph: torch.fx.Graph) -> list[dict[str, Any]]:
    """The launches that stand in a traced graph; symbolic sizes as the example had them."""
    found = []
    for node in graph.nodes:
        if node.target is triton_kernel_wrapper_functional:
            constants = kernel_side_table.get_constant_args(node.kwargs["constant_args_idx"])
            kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            while not hasattr(kernel, "arg_names") or hasattr(kernel, "configs"):
                kernel = kernel.fn
            given = {**node.kwargs["kwargs"], **constants}
            values = {name: v.meta["val"] if isinstance(v, torch.fx.Node) else v for name, v in given.items()}
            grid = [v.meta["val"] if isinstance(v, torch.fx.Node) else v for v in node.kwargs["grid"][0]]
            assert node.kwargs["tensors_to_clone"] == ["y"], "a launch writes y alone"
            found.append(_described(kernel, grid, values))
    return found


def _described(kernel: Any, grid: list[Any], given: dict[str, Any]) -> dict[str, Any]:
    plain = {name: _plain(value) for name, value in given.items() if value is not None}
    return {"kernel": kernel.__name__, "grid": [_number(size) for size in grid], "given": plain}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return [str(value.dtype), [_number(size) for size in value.shape], [_number(step) for step in value.stride()]]
    return _number(value) if isinstance(value, int | torch.SymInt) else value


def _number(size: Any) -> int:
    return size.node.hint if isinstance(size, torch.SymInt) else int(size)


def traced(call: Callable[..., Tensor], *tensors: Tensor) -> torch.fx.Graph:
    """The graph that a compiler behind AOTDispatcher gets; it is not run."""
    graphs: list[torch.fx.Graph] = []

    def keep(module: torch.fx.GraphModule, examples: Any) -> Any:
        graphs.append(module.graph)
        output = module.graph.output_node().args[0]
        return lambda *given: [torch.zeros([_number(size) for size in node.meta["val"].shape]) for node in output]

    torch.compiler.reset()
    compiler = aot_autograd(fw_compiler=keep)
    with torch.no_grad():
        torch.compile(call, backend=compiler, fullgraph=True)(*tensors)
    return graphs[0]


def both(case: OpCase, dynamic: bool) -> dict[str, Any]:
    """The launches of a case, called and traced, there for any batch where `dynamic`."""
    tensors, overload = list(case.tensors(case.dtypes[0])), getattr(torch.ops.kernelpress, case.op).default
    held = [t for t in tensors if t is not None]

    def call(*given: Tensor) -> Tensor:
        rest = iter(given)
        return overload(*[None if t is None else next(rest) for t in tensors], **case.options, backend="triton")

    with torch.no_grad():
        called = launches_of_call(lambda: call(*held))
    if dynamic:
        for at in registry.operator(case.op).activations:
            if at < len(tensors) and (t := tensors[at]) is not None:
                mark_dynamic(t, 0)
    return {"called": called, "traced": launches_of_graph(traced(call, *held))}


def ops() -> dict[str, Any]:
    """One case of every op with a Triton kernel, the batch a number and a symbol."""
    has_kernel = {e.name for e in registry.operators() if any(i.backend == "triton" for i in e.implementations)}
    chosen = {case.op: case for case in reversed(CASES) if case.op in has_kernel}
    return {
        f"{op}{', any batch' * dynamic}": both(case, dynamic)
        for op, case in chosen.items()
        for dynamic in (False, True)
    }


class Pointwise(nn.Module):
    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.kernelpress.pointwise_conv2d(x, weight)


def whole() -> dict[str, list[str]]:
    """Functions in the graph of an op on the backend "reference", and in an export."""
    x, weight = torch.randn(2, 8, 4, 4), torch.randn(8, 8, 1, 1)
    reference = traced(lambda x, w: torch.ops.kernelpress.pointwise_conv2d(x, w, backend="reference"), x, weight)
    exported = torch.export.export(Pointwise(), (x, weight)).run_decompositions({}).graph
    found = {"reference": reference, "exported": exported}
    return {name: [str(n.target) for n in graph.nodes if n.op == "call_function"] for name, graph in found.items()}


if __name__ == "__main__":
    set_driver(Driver())
    with backend.TARGET.changed(**INTERPRETED):
        print(json.dumps({"ops": ops, "whole": whole}[sys.argv[1]]()))
