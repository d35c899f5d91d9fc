"""Plans on a CUDA device: an emitted model at fixed shapes as one CUDA graph over memory of its own."""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from kernelpress.emit.assemble import owned_copy
from kernelpress.emit.emitted import EmittedModel
from kernelpress.emit.examples import Example
from kernelpress.emit.graph import operator_of
from kernelpress.emit.plans.recapture import fingerprint, reduced
from kernelpress.ops import registry
from kernelpress.ops.registry import Run
from kernelpress.runtime.cuda_graph import record
from kernelpress.runtime.torch_private import pytree
from kernelpress.trace.contract import Contract

__all__ = ["CudaPlan"]


class CudaPlan:
    """A model captured on a CUDA device: call it with inputs of the captured shapes and dtypes, in any memory format.

    A call copies the inputs to where the graph reads them, runs it on the current stream, and copies the outputs: they
    are new tensors at each call and do not require grad. Intermediate tensors lie in a pool that belongs to this plan,
    so calls wait for one another, whichever threads and streams they come from; plans of their own run at the same
    time. Raises `ValueError` for inputs of another shape, dtype, device or structure.

    The weights are those of the moment of capture, in memory of the plan's own. Copies and pickles are equal plans,
    made anew from a copy of `model`; `TypeError` where that has other weights by now.
    """

    def __init__(
        self,
        model: EmittedModel,
        inputs: Sequence[Any],
        contract: Contract,
        device: torch.device,
    ) -> None:
        """`inputs`: the flat inputs, whose tensors on `device` become the plan's own; `contract`: what they are.

        Raises `RuntimeError` where an operation of the model cannot be part of a CUDA graph.
        """
        self.model = model
        self.device = device
        self._contract = contract
        self._out_spec: Any = model.body._out_spec
        self._inputs = list(inputs)
        self._tensors = [(i, x) for i, x in enumerate(inputs) if isinstance(x, Tensor)]
        # The graph reads weights where they are, whatever happens to the model's: it has others.
        self._layers = layers = _Layers(owned_copy(model.body))
        self._weights = fingerprint(model.body)
        flat = self._inputs
        try:
            self._recording = record(lambda: layers.run(*flat, enable_io_processing=False), device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise RuntimeError(f"model: cannot be captured as a CUDA graph, at {layers.running}: {reason}") from error
        self._results = pytree.tree_leaves(self._recording.outputs)
        self._lock = threading.Lock()
        self._done = torch.cuda.Event()
        # Memory must not go back to the allocator while the last call still runs on it.
        weakref.finalize(self, self._done.synchronize).atexit = False

    @property
    def arena_bytes(self) -> int:
        """Bytes of the graph's own pool."""
        return self._recording.pool_bytes

    @property
    def steps(self) -> list[str]:
        """What runs, in order: `native depthwise_conv2d`, `native linear[triton]`, `torch conv2d[cudnn]`,
        `torch aten.cat.default`."""
        return list(self._layers.steps.values())

    @property
    def native_steps(self) -> int:
        """How many of the steps are kernels of ours."""
        return sum(step.startswith("native ") for step in self.steps)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        examples = [
            Example(tuple(x.shape), x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else Example(plain=x)
            for x in self._inputs
        ]
        return reduced(self.model, self._weights, examples)

    def __len__(self) -> int:
        return len(self._layers.steps)

    def __repr__(self) -> str:
        native, others = self.native_steps, len(self) - self.native_steps
        return f"CudaPlan({native} native steps, {others} torch steps, pool of {self.arena_bytes} bytes)"

    def __call__(self, *inputs: Any) -> Any:
        """The model's outputs for `inputs`, in the structure that the model returns; the device may still work."""
        flat = self._contract.require(inputs)
        given = [flat[i].detach() for i, _ in self._tensors]
        with torch.no_grad(), self._lock, torch.cuda.device(self.device):
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(self._done)
            for (_, own), tensor in zip(self._tensors, given, strict=True):
                own.copy_(tensor, non_blocking=True)
            self._recording.replay()
            leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self._results]
            self._done.record(stream)
        return pytree.tree_unflatten(leaves, self._out_spec)


def _step(op: str, backend: str) -> str:
    if backend == "cuda":
        return f"native {op}"
    return f"{'native' if backend == 'triton' else 'torch'} {op}[{backend}]"


class _Layers(Interpreter):
    """Runs an emitted graph with its layers prepared once: what they packed stays as long as this object does.

    `steps` names what runs by node, `running` the node of the moment.
    """

    def __init__(self, body: torch.fx.GraphModule) -> None:
        super().__init__(body)
        self.steps: dict[Node, str] = {}
        self.running = "the inputs"
        self._runs: dict[Node, Run] = {}

    def run_node(self, n: Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        self.running = n.name
        layer = operator_of(n)
        if layer is not None:
            return self._run_layer(n, layer)
        result = super().run_node(n)
        if n not in self.steps and n.target is not operator.getitem and not self._is_view(n, result):
            self.steps[n] = f"torch {n.target}"
        return result

    def _run_layer(self, n: Node, entry: registry.Operator) -> Tensor:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        tensors, options, backend = entry.signature.bind(args, kwargs)
        run = self._runs.get(n)
        if run is None:
            problem = registry.problem_of(entry, tensors, options, registry.requested_backend(backend))
            chosen = registry.implementation(problem, registry.requested_backend(backend))
            run = chosen.prepare(problem, tensors)
            self.steps[n] = _step(entry.name, chosen.backend)
            sources: list[Any] = entry.signature.bind(n.args, n.kwargs)[0]
            parameters = [s for i, s in enumerate(sources) if i not in entry.activations]
            if all(s is None or s.op == "get_attr" for s in parameters):  # others are computed at each run
                self._runs[n] = run
        return run(tensors)

    def _is_view(self, n: Node, result: Any) -> bool:
        """Whether a result is the memory of an argument: nothing then runs."""
        sources = [self.env[source] for source in n.all_input_nodes if source in self.env]
        held = {t.untyped_storage()._cdata for t in pytree.tree_leaves(sources) if isinstance(t, Tensor)}
        made = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        in_place = str(n.target).partition(".")[2].partition(".")[0].endswith("_")
        return bool(made) and not in_place and all(t.untyped_storage()._cdata in held for t in made)
