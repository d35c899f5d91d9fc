"""`emit`: any exportable module in, the fastest exact arrangement of kernelpress layers and original operations out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils.flop_counter import FlopCounterMode

import kernelpress.ops  # noqa: F401  (registers torch.ops.kernelpress)
from kernelpress.emit.assemble import assemble, channels_last_copy, copy_of, owned_copy, with_constants
from kernelpress.emit.cache import TimingCache, device_key
from kernelpress.emit.candidates import Candidate, candidates_for, original
from kernelpress.emit.canonical import canonicalize
from kernelpress.emit.choose import FUSION_MARGINS, ONLY_NATIVE, TORCH_MARGIN, Choice, choose
from kernelpress.emit.emitted import EmittedModel
from kernelpress.emit.evaluate import Conversions, Cost, Evaluation, evaluate, runnable
from kernelpress.emit.examples import Example, example_values
from kernelpress.emit.fold import fold
from kernelpress.emit.fuse import find_matches
from kernelpress.emit.norms import settle_instance_norms
from kernelpress.emit.plans.plan import Plan, capture
from kernelpress.emit.plans.shares import Division, division_of
from kernelpress.emit.quantized import is_rounding, without_fake
from kernelpress.emit.quantized_rows import quantized_rows
from kernelpress.emit.record import CandidateRecord, EmissionRecord, PlaceRecord
from kernelpress.emit.ties import Comparison, compare, moved_by_rounding
from kernelpress.emit.tolerance import INT8_TOLERANCE, TURNED_SHARE, tolerance_of
from kernelpress.emit.zeros import shares_of_zeros, unskipped_zeros
from kernelpress.measure.race import Heat, race
from kernelpress.ops.calls import packing, prepared
from kernelpress.ops.layout import PIXELS
from kernelpress.preserve import outside_modes, own_tensors
from kernelpress.progress import Phase, phases
from kernelpress.runtime.device_clock import time_graphs
from kernelpress.runtime.torch_private import pytree
from kernelpress.trace import checked_inputs, module_of, trace
from kernelpress.trace.contract import Contract
from kernelpress.trace.regions import regions, writes_undone

__all__ = ["emit"]

MODEL_SECONDS = 0.5
MODEL_ROUNDS = 5
"""On CUDA devices."""
MODEL_HEATS = (Heat(2, 2.0), Heat(10, 1.2), Heat(40, 1.0))

UNSTEADY = 2.0
"""How much further from a quantized original an emitted model may be than that is from itself, rounded otherwise."""


def emit(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    dynamic_batch: bool = True,
    tolerance: float | None = None,
    exact_nonfinite: bool = False,
    cache: bool = True,
    progress: bool = True,
    cost: Cost | None = None,
) -> EmittedModel:
    """Makes `model`, in eval mode, as fast as its layers can be executed on its device; the model itself stays
    untouched.

    Every layer is timed at the shapes that `example_inputs` (what `forward` takes by position) lead to: on our kernels,
    fused with its neighbours and not, and as it came, in both memory formats. The cheapest cover of the graph is kept;
    if the whole is then not faster than the original, the original is. `EmittedModel.record` tells what was decided.

    `tolerance`: largest relative error ‖y − y₀‖ / ‖y₀‖ of a layer to the original one; by default 1e-4 in float32,
    1e-10 in float64, 1e-2 in float16, 5e-2 in bfloat16; of int8 values never less than 5e-3. `exact_nonfinite`: NaN and
    infinity reach just the values that depend on them, which rules Winograd's convolution out. `cache`: reuse and
    remember times on disk. `progress`: draw a progress bar on terminals. `cost`: milliseconds of a candidate, instead
    of timing (for tests, and for other devices' models).

    Raises `TraceError` for a model that cannot be exported, `TypeError` and `ValueError` for other bad arguments.
    """
    if tolerance is not None and not 0 < tolerance < float("inf"):
        raise ValueError(f"tolerance: expected a positive number, got {tolerance!r}")
    inputs = own_tensors(checked_inputs(model, example_inputs))
    model = without_fake(model)
    with outside_modes(model), phases(progress) as phase:
        phase("exporting", 1)
        traced = settle_instance_norms(trace(model, inputs, dynamic_batch=dynamic_batch))
        flat = pytree.tree_leaves((inputs, {}))
        layers = _Layers(traced, flat, tolerance, exact_nonfinite, cache, cost)
        division = division_of(layers.contract, flat) if layers.device.type == "cpu" and cost is None else None
        models: list[EmittedModel] = []
        is_shared = False
        if division is not None:
            models = layers.arranged(division.first(flat), phase, division)
            phase("timing shares of the batch", 1)
            best, run = _fastest(models, inputs, cache)
            models, is_shared = [best], isinstance(run, Plan) and run.images_at_once is not None
        if not is_shared:
            models += layers.arranged(flat, phase)
            phase("timing plans", 1)
            best = models[0] if len(models) == 1 else _fastest(models, inputs, cache)[0]
        phase("comparing with the original", 1)
        body, record = _faster_of(traced, best.body, best.record, inputs, layers.whole_bound, is_measured=cost is None)
        body = owned_copy(body)  # until here its weights are the model's own
        return EmittedModel(body, record, best.examples, best.contract)


class _Layers:
    """The layers of an exported model, timed at some shapes and put together to models."""

    def __init__(
        self,
        traced: GraphModule,
        flat: Sequence[Any],
        tolerance: float | None,
        exact_nonfinite: bool,
        cache: bool,
        cost: Cost | None,
    ) -> None:
        """`flat`: the example inputs; the others as `emit` takes them."""
        self.contract: Contract = traced.meta["contract"]
        self._graph_module = graph_module = fold(canonicalize(copy_of(traced)))
        self._examples = example_values(graph_module, flat)
        bound = tolerance or max(tolerance_of(example.dtype) for example in self._examples.values())
        # Few values of a layer are rounded to the other side; behind several layers, these change the rounding of many.
        self.whole_bound = max(bound, INT8_TOLERANCE) if any(map(is_rounding, graph_module.graph.nodes)) else bound
        self._candidates = [c for c in _candidates(graph_module) if not (exact_nonfinite and c.mixes_inputs)]
        self._order = {node: i for i, node in enumerate(graph_module.graph.nodes)}
        self._flops: dict[frozenset[Node], int] = {}
        self._zeros = shares_of_zeros(graph_module)
        self.device = _device(traced, flat)
        self._key = device_key(self.device)
        self._tolerance, self._cache, self._cost = tolerance, cache, cost

    def arranged(self, flat: Sequence[Any], phase: Phase, division: Division | None = None) -> list[EmittedModel]:
        """Models of the covers that are cheapest by the times of layers on these inputs. `division`: these are the
        first share of the example inputs; times are those of all shares."""
        what = "timing layers" if division is None else "timing layers on shares of the batch"
        rounds, copies = (1, 1) if division is None else (division.rounds, division.threads)
        times = TimingCache(self.device, enabled=self._cache and self._cost is None)
        examples = self._examples if division is None else example_values(self._graph_module, flat)
        advance = phase(what, len(self._candidates))
        evaluations = evaluate(
            self._graph_module, self._candidates, examples, self._tolerance, times, self._cost, advance, copies
        )
        _forget_trials(self._graph_module)
        turning = Conversions(self._graph_module, examples, times, self._cost, copies)
        evaluations = [replace(e, milliseconds=e.milliseconds and e.milliseconds * rounds) for e in evaluations]
        margins = FUSION_MARGINS if self._cost is None else FUSION_MARGINS[:1]
        torch_margin = TORCH_MARGIN if division is None else ONLY_NATIVE
        found: dict[frozenset[Candidate], list[Choice]] = {}
        for margin in margins:
            choices = choose(evaluations, self._order, lambda *form: turning(*form) * rounds, margin, torch_margin)
            found.setdefault(frozenset(choice.chosen for choice in choices), choices)
        return [self._emitted(choices) for choices in found.values()]

    def _emitted(self, choices: Sequence[Choice]) -> EmittedModel:
        graph_module, examples = self._graph_module, self._examples
        places = []
        for choice in choices:
            nodes = choice.chosen.nodes
            if nodes not in self._flops:
                self._flops[nodes] = _flops(graph_module, nodes, examples, self._order)
            zeros = unskipped_zeros(self._zeros, choice)
            places.append(_place_record(choice, self._flops[nodes], zeros, examples, self._order))
        body = assemble(graph_module, [choice.chosen for choice in choices])
        record = EmissionRecord(tuple(places), self._key)
        inputs = tuple(examples[node] for node in graph_module.graph.nodes if node.op == "placeholder")
        return EmittedModel(body, record, inputs, self.contract)


def _forget_trials(graph_module: GraphModule) -> None:
    """Candidates ran on the model's own weights, which live on with whatever was packed from them, several times their
    size; nobody will run on that."""
    for tensor in (*graph_module.parameters(), *graph_module.buffers()):
        packing.forget(tensor)
    prepared.clear()


def _fastest(
    models: Sequence[EmittedModel], inputs: tuple[Any, ...], cache: bool
) -> tuple[EmittedModel, Callable[..., Any]]:
    """The model that takes the least time as a whole, captured, and what was timed."""
    device = _device_of(inputs)
    runs = [_captured(model, inputs, cache) if device.type == "cpu" else model for model in models]
    if len(models) == 1:
        return models[0], runs[0]
    with writes_undone(*(model.body for model in models)):
        milliseconds = _time_models({str(i): functools.partial(run, *inputs) for i, run in enumerate(runs)}, device)
    best = min(range(len(models)), key=lambda i: milliseconds[str(i)])
    return models[best], runs[best]


def _captured(model: EmittedModel, inputs: tuple[Any, ...], cache: bool) -> Callable[..., Any]:
    """The model's plan, or the model itself if it cannot be one."""
    try:
        return capture(model, *inputs, cache=cache)
    except ValueError:
        return model


def _time_models(calls: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Milliseconds of whole models; on CUDA devices as graphs by the device's clock."""
    if device.type == "cuda":
        timings = time_graphs(calls, device, budget_seconds=MODEL_SECONDS, rounds=MODEL_ROUNDS, flush_cache=False)
        return {name: timing.median for name, timing in timings.items()}
    return race(calls, [{(name,) for name in calls}], heats=MODEL_HEATS, until_decided=True)


def _device_of(inputs: tuple[Any, ...]) -> torch.device:
    tensors = (t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor))
    return next((t.device for t in tensors), torch.device("cpu"))


def _device(traced: GraphModule, inputs: Sequence[Any]) -> torch.device:
    tensors = [*traced.parameters(), *traced.buffers(), *(x for x in inputs if isinstance(x, Tensor))]
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    return (floats or tensors)[0].device


def _candidates(graph_module: GraphModule) -> list[Candidate]:
    """All candidates, in the order of the nodes they end at; every covered node also stands alone as it came."""
    order = {node: i for i, node in enumerate(graph_module.graph.nodes)}
    matches = sorted(find_matches(graph_module), key=lambda match: order[match.output])
    found: dict[tuple[str, frozenset[Node]], Candidate] = {}
    for match in matches:
        for candidate in candidates_for(match, order):
            found.setdefault((candidate.label, candidate.nodes), candidate)
    for nodes in _apart({node for match in matches for node in match.nodes}, order):
        alone = original(nodes, PIXELS)
        found.setdefault((alone.label, alone.nodes), alone)
    return sorted(found.values(), key=lambda candidate: order[candidate.output])


def _apart(nodes: Collection[Node], order: Mapping[Node, int]) -> Iterator[list[Node]]:
    """Each of these nodes; in one those that hand several results on."""
    together = [rows.nodes for node in nodes if (rows := quantized_rows(node)) is not None]
    inner = {node for rows in together for node in rows}
    yield from map(list, together)
    yield from ([node] for node in sorted(nodes, key=order.__getitem__) if node not in inner)


def _place_record(
    choice: Choice, flops: int, zeros: str, examples: Mapping[Node, Example], order: Mapping[Node, int]
) -> PlaceRecord:
    nodes = sorted(choice.chosen.nodes, key=order.__getitem__)
    weighed = [_candidate_record(evaluation) for evaluation in choice.considered]
    if choice.parts:
        label = " + ".join(part.candidate.label for part in choice.parts)
        weighed.append(CandidateRecord(label, sum(part.milliseconds or 0.0 for part in choice.parts), None))
    name = module_of(nodes[0]) or nodes[0].name
    operations = tuple(node.name for node in nodes)
    modules = tuple(dict.fromkeys(filter(None, map(module_of, nodes))))
    shape = examples[choice.chosen.output].shape
    reason = "; ".join(filter(None, (choice.reason, zeros)))
    return PlaceRecord(
        name, operations, shape, flops, choice.chosen.label, reason, choice.milliseconds, tuple(weighed), modules
    )


def _candidate_record(evaluation: Evaluation) -> CandidateRecord:
    return CandidateRecord(evaluation.candidate.label, evaluation.milliseconds, evaluation.error, evaluation.refusal)


def _flops(
    graph_module: GraphModule, nodes: frozenset[Node], examples: Mapping[Node, Example], order: Mapping[Node, int]
) -> int:
    """Of the operations as they came."""
    candidate = original(sorted(nodes, key=order.__getitem__), PIXELS)
    inputs = {node: examples[node].random() for node in candidate.inputs}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        runnable(graph_module, candidate, inputs)()
    return int(counter.get_total_flops())


def _faster_of(
    traced: GraphModule,
    body: GraphModule,
    record: EmissionRecord,
    inputs: tuple[Any, ...],
    tolerance: float,
    *,
    is_measured: bool,
) -> tuple[GraphModule, EmissionRecord]:
    """The emitted graph if it is exact and faster than the original in both memory formats, else the original."""
    originals = {
        "contiguous": with_constants(traced, copy_of(traced).graph),
        "channels_last": channels_last_copy(traced),
    }
    flat, bound = pytree.tree_leaves((inputs, {})), 10 * tolerance
    found = compare(originals["contiguous"], body, flat, bound)
    if not found.error <= bound and any(map(is_rounding, traced.graph.nodes)):
        bound = max(bound, UNSTEADY * moved_by_rounding(originals["contiguous"], flat, bound))
    notes = tuple(f"{node.target} stays as it came: {module_of(node) or node.name}" for node in regions(traced.graph))
    record = replace(record, error=found.error, differing=found.differing, decided=found.elements, notes=notes)
    refusal = _refusal(found, bound)
    if refusal is not None:
        return originals["contiguous"], replace(
            record, kept_original=True, differing=0, reason=f"kept the original: {refusal}"
        )
    if not is_measured:
        return body, record
    modules = {"emitted": body} | originals
    with writes_undone(*modules.values()):
        milliseconds = _time_models(
            {name: functools.partial(module, *inputs) for name, module in modules.items()}, _device_of(inputs)
        )
    fastest = min(originals, key=milliseconds.__getitem__)
    record = replace(record, original_milliseconds=milliseconds[fastest], emitted_milliseconds=milliseconds["emitted"])
    if milliseconds["emitted"] <= milliseconds[fastest]:
        return body, record
    return originals[fastest], replace(
        record, kept_original=True, reason=f"kept the original in {fastest} memory: it is faster"
    )


def _refusal(found: Comparison, bound: float) -> str | None:
    """Why the emitted model cannot stand for the original."""
    if not found.error <= bound:
        return f"the emitted model's error {found.error:.1e} is above {bound:.1e}"
    share = max(TURNED_SHARE, bound)
    if found.turned > share:
        return f"{found.turned:.1%} of {found.decision} turned over at ties, above {share:.1%}"
    return None
