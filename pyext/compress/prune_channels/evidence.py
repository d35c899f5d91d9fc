"""What criteria look at: a model's weights, and what its layers read of batches of data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from kernelpress.compress.channels.dependency import Axis, Dependencies, LayerCall, Pool
from kernelpress.runtime.torch_private import pytree
from kernelpress.trace import TraceError, trace

__all__ = ["Batches", "Evidence", "Loss", "Read", "batches_of"]

Loss = Callable[[Any, Any], Tensor]
"""(output of the model, target of the batch) → a scalar."""

Visit = Callable[[LayerCall, Tensor, Callable[..., Any]], None]
"""(layer, what it reads, the layer as a function of (input, weight, bias, …, groups=…) with its other arguments)"""


@dataclass(frozen=True)
class Batches:
    """Batches as (inputs of `forward`, target), the loss of an output, and the model's graph at any size of batch."""

    model: nn.Module
    batches: tuple[tuple[tuple[Any, ...], Any], ...]
    loss: Loss

    def with_graphs(self, calls: Iterable[LayerCall]) -> Iterator[tuple[GraphModule, tuple[Any, ...], Any]]:
        """Each batch with the graph that takes it; the nodes of `calls` have the same names in all of them."""
        for inputs, target in self.batches:
            sizes = tuple(getattr(x, "shape", x) for x in pytree.tree_leaves(inputs))
            if sizes not in self._graphs:
                self._graphs[sizes] = _graph_for(self.model, inputs, {call.node for call in calls})
            yield self._graphs[sizes], inputs, target

    @cached_property
    def _graphs(self) -> dict[Any, GraphModule]:
        return {}


def batches_of(model: nn.Module, example_inputs: tuple[Any, ...], data: Iterable[Any], loss: Loss | None) -> Batches:
    """`data` read once and held, on the device of the model.

    A batch is what `forward` takes by position, alone or with a target behind it. Raises `ValueError` for no batch, or
    one of another form.
    """
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    count, found = len(example_inputs), []
    for batch in data:
        parts = (batch,) if isinstance(batch, Tensor) else tuple(batch)
        if len(parts) == 2 and isinstance(parts[0], (tuple, list)):
            parts = (*parts[0], parts[1])
        if not count <= len(parts) <= count + 1:
            raise ValueError(
                f"data: expected batches of the {count} inputs of forward, alone or with a target, "
                f"got {len(parts)} parts"
            )
        moved = pytree.tree_map(lambda x: x.detach().clone().to(device) if isinstance(x, Tensor) else x, parts)
        found.append((moved[:count], moved[count] if len(parts) > count else None))
    if not found:
        raise ValueError("data: expected at least one batch, got none")
    return Batches(model, tuple(found), loss or _cross_entropy)


@dataclass(frozen=True)
class Read:
    """A layer that reads the channels of a pool: `columns` [sets, positions] are theirs among the channels it reads."""

    call: LayerCall
    columns: Tensor

    def of(self, channels: Tensor) -> Tensor:
        """[..., channels of the layer] → [..., sets, positions]."""
        return channels[..., self.columns.to(channels.device)]


@dataclass(frozen=True)
class Evidence:
    """The channels that are left of `pools`, after those of the sets in `removed`, and what is known of them."""

    dependencies: Dependencies
    pools: tuple[Pool, ...]
    removed: frozenset[int]
    data: Batches | None

    @cached_property
    def reads(self) -> tuple[tuple[Read, ...], ...]:
        """For each pool the layers that read it; a depthwise one hands on what it reads and counts as none."""
        return tuple(
            tuple(read for call in self.dependencies.calls if (read := _read(pool, call)) is not None)
            for pool in self.pools
        )

    def filters(self, axis: Axis) -> Tensor:
        """What is left of a weight as [filters, elements], float64 on the CPU; none of its filters is left out."""
        weight = self.dependencies.weights[axis.parameter].to("cpu", torch.float64)
        for dim in range(weight.dim()):
            labels = self.dependencies.axes.get(Axis(axis.parameter, dim))
            if labels is not None and dim != axis.dim and self.removed:
                weight = weight.index_select(dim, (~self._is_removed(labels)).nonzero().flatten())
        return weight.movedim(axis.dim, 0).flatten(1)

    def left(self, axis: Axis) -> Tensor:
        """Which positions of an axis are left."""
        return ~self._is_removed(self.dependencies.axes[axis])

    def sums(self, pool: Pool, axis: Axis, values: Tensor) -> Tensor:
        """`values` at the positions of an axis, summed over each set of the pool: [sets]."""
        labels, roots = self.dependencies.axes[axis], torch.tensor(pool.roots)
        inside = torch.isin(labels, roots)
        sums = torch.zeros(len(roots), dtype=torch.float64)
        return sums.index_add_(0, torch.searchsorted(roots, labels[inside]), values[inside])

    def visit(self, visit: Visit) -> None:
        """Runs the model on all data, without what is removed, and shows `visit` what each layer reads."""
        for graph, inputs, _ in self._data.with_graphs(self.dependencies.calls):
            with torch.no_grad():
                self._run(graph, inputs, visit, lambda _, x: x)

    def gate_gradients(self) -> Iterator[dict[str, tuple[Tensor, int]]]:
        """For each batch, by the nodes of layers: the derivative of the loss by gates of 1 on each channel that the
        layer reads, of every row of the batch: [rows, channels], and how many positions share a gate."""
        for graph, inputs, target in self._data.with_graphs(self.dependencies.calls):
            gates: dict[str, tuple[Tensor, int]] = {}

            def gated(call: LayerCall, x: Tensor, gates: dict[str, tuple[Tensor, int]] = gates) -> Tensor:
                rows = x.size(0) if call.dim else 1
                gate = torch.ones(rows, x.size(call.dim), dtype=x.dtype, device=x.device, requires_grad=True)
                gates[call.node] = gate, x.numel() // max(1, gate.numel())
                shape = [rows] + [1] * (x.dim() - 1)
                shape[call.dim] = x.size(call.dim)
                return x * gate.view(shape)

            with torch.enable_grad():
                loss = self._loss(self._run(graph, inputs, lambda *_: None, gated), target)
                found = torch.autograd.grad(loss, [gate for gate, _ in gates.values()], materialize_grads=True)
            for (node, (_, positions)), gradient in zip(list(gates.items()), found, strict=True):
                if not bool(gradient.isfinite().all()):
                    raise ValueError(f"data: the gradients of what {self._layer(node)} reads hold NaN or Inf")
                gates[node] = gradient.to("cpu", torch.float64), positions
            yield gates

    @property
    def _data(self) -> Batches:
        assert self.data is not None
        return self.data

    def _is_removed(self, labels: Tensor) -> Tensor:
        return torch.isin(labels, torch.tensor(sorted(self.removed), dtype=labels.dtype))

    def _layer(self, node: str) -> str:
        return next(call.output.layer for call in self.dependencies.calls if call.node == node)

    def _loss(self, output: Any, target: Any) -> Tensor:
        loss = self._data.loss(output, target)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ValueError(f"loss: expected a scalar tensor that depends on the output, got {loss!r}")
        if not bool(loss.isfinite().all()):
            raise ValueError(f"loss: expected a finite number, got {loss.item()} of a batch of data")
        return loss

    def _run(
        self, graph: GraphModule, inputs: tuple[Any, ...], visit: Visit, enter: Callable[[LayerCall, Tensor], Tensor]
    ) -> Any:
        calls = {call.node: call for call in self.dependencies.calls if not call.is_depthwise}
        kept = {name: ~self._is_removed(call.entering) for name, call in calls.items()}

        class Watched(Interpreter):
            def run_node(self, n: Node) -> Any:
                call = calls.get(n.name)
                if call is None:
                    return super().run_node(n)
                (x, *others), options = self.fetch_args_kwargs_from_env(n)
                if not bool(x.isfinite().all()):
                    raise ValueError(f"data: the activations that {call.output.layer} reads hold NaN or Inf")
                if not bool(kept[n.name].all()):
                    mask = kept[n.name].to(x.device, x.dtype)
                    x = x * mask.view([-1 if dim == call.dim else 1 for dim in range(x.dim())])
                x = enter(call, x)
                result = n.target(x, *others, **options)  # type: ignore[operator]
                visit(call, x, lambda x, weight, groups: _again(n, others, options, x, weight, groups))
                return result

        return Watched(graph).run(*inputs)


def _again(node: Node, others: list[Any], options: Mapping[str, Any], x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """The convolution of `node` with another weight, without bias."""
    names = [argument.name for argument in node.target._schema.arguments][1:]  # type: ignore[union-attr]
    stated = {**dict(zip(names, others, strict=False)), **options, "weight": weight, "bias": None, "groups": groups}
    result: Tensor = node.target(x, **stated)  # type: ignore[operator]
    return result


def _read(pool: Pool, call: LayerCall) -> Read | None:
    inside = torch.isin(call.entering, torch.tensor(pool.roots)).nonzero().flatten()
    if call.is_depthwise or not len(inside):
        return None
    columns = inside[call.entering[inside].argsort(stable=True)]
    return Read(call, columns.view(len(pool.roots), -1))


def _graph_for(model: nn.Module, inputs: tuple[Any, ...], nodes: set[str]) -> GraphModule:
    shapes = ", ".join(str(list(x.shape)) for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor))
    try:
        graph = trace(model, inputs, dynamic_batch=False)
    except (TraceError, RuntimeError) as error:
        raise ValueError(f"data: the model does not take a batch of {shapes}: {error}") from error
    if not nodes <= {node.name for node in graph.graph.nodes}:
        raise ValueError(f"data: at a batch of {shapes} the model runs other layers than at example_inputs")
    return graph


def _cross_entropy(output: Any, target: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise ValueError(
            f"loss: expected a function (output, target) -> scalar, as the model returns no tensor but a "
            f"{type(output).__name__}; got None"
        )
    if not isinstance(target, Tensor):
        raise ValueError("data: expected batches (inputs, target) for a criterion that needs gradients, got no target")
    return F.cross_entropy(output, target)
