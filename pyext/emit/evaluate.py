"""What candidates cost and how exact they are, on this device, at the shapes of the example inputs."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node, map_arg

from kernelpress.emit.cache import TimingCache
from kernelpress.emit.candidates import Candidate, constant, conversion, original
from kernelpress.emit.examples import Example
from kernelpress.emit.quantized import is_rounding, without_scales
from kernelpress.emit.quantized_rows import quantized_rows
from kernelpress.emit.tolerance import INT8_TOLERANCE, relative_error, tolerance_of
from kernelpress.measure.race import Alternative, race
from kernelpress.ops import registry
from kernelpress.ops.calls.aten import aten_steps
from kernelpress.ops.calls.steps import Before, native_steps
from kernelpress.ops.int8_sparse import share_of_cells
from kernelpress.ops.layout import DENSE, PIXELS, Layout
from kernelpress.ops.registry import NATIVE_BACKENDS
from kernelpress.ops.tuning import search
from kernelpress.runtime.device_clock import time_graphs

__all__ = ["Conversions", "Cost", "Evaluation", "evaluate", "runnable"]

Cost = Callable[[Candidate], float]
"""Milliseconds of a candidate, given instead of measured."""

SECONDS_PER_CANDIDATE = 6e-3
ROUNDS = 3
"""On CUDA devices."""

EVICTED_BYTES = 8 << 20

TUNED_BACKENDS = frozenset({"cuda", "triton"})

HEADROOM = 2.0**20
"""How much larger than at the example inputs values may be at others."""

LARGEST_BATCH_OF_CANDIDATES = 48
LARGEST_BATCH_OF_BYTES = 256 << 20
"""Candidates are timed in turn in batches; what their inputs occupy together is bounded."""


@dataclass(frozen=True)
class Evaluation:
    """Milliseconds and relative error of one candidate, or the reason why it cannot serve."""

    candidate: Candidate
    milliseconds: float | None
    error: float | None
    refusal: str | None = None


def evaluate(
    graph_module: GraphModule,
    candidates: Sequence[Candidate],
    examples: Mapping[Node, Example],
    tolerance: float | None,
    cache: TimingCache,
    cost: Cost | None = None,
    advance: Callable[[int], None] = lambda count: None,
    copies: int = 1,
) -> list[Evaluation]:
    """Runs every candidate on random inputs of the examples' form: one evaluation each, in the order given.

    A candidate that raises, or whose output differs from that of the original operations by more than `tolerance`
    (None: that of their dtypes), is refused with the reason. One that mixes inputs is compared with the original
    operations in float64, and refused where values up to `HEADROOM` times the examples' may overflow in it. Equal
    layers at equal shapes are timed once, in the tile configuration that calls run in: CUDA and Triton kernels are
    tuned first, unless `KERNELPRESS_AUTOTUNE=0`. `cost` replaces timing; `advance` is told how many candidates are
    done. `copies`: native layers are timed so many times side by side, each on one thread.
    """
    trials: list[_Trial] = []
    for batch in _batches(candidates, examples):
        trials += _try_batch(graph_module, batch, examples, tolerance, cache, cost, copies)
        advance(len(batch))
    cache.save()
    alone = _alone(trials)
    return [_evaluation(trial, alone, cache, cost) for trial in trials]


@dataclass(frozen=True)
class _Trial:
    """What running a candidate told, and the name under which its time is kept."""

    candidate: Candidate
    key: str
    error: float | None
    refusal: str | None


def _evaluation(trial: _Trial, alone: Mapping[Node, _Trial], cache: TimingCache, cost: Cost | None) -> Evaluation:
    candidate, milliseconds = trial.candidate, None
    if trial.refusal is None:
        keys = _parts_of(candidate, alone) or (trial.key,)
        times = [cache.get(key) for key in keys]
        milliseconds = cost(candidate) if cost is not None else sum(times) if None not in times else None  # type: ignore[arg-type]
    return Evaluation(candidate, milliseconds, trial.error, trial.refusal)


def _is_as_it_came(candidate: Candidate) -> bool:
    """Whether it is operations as they came, in the memory that the emitted graph hands on."""
    return candidate.is_original and candidate.gives is not DENSE


def _is_alone(candidate: Candidate) -> bool:
    """Whether it is one operation as it came, or the roundings of rows, which hand several results on."""
    return _is_as_it_came(candidate) and (len(candidate.nodes) == 1 or quantized_rows(candidate.output) is not None)


def _alone(trials: Sequence[_Trial]) -> dict[Node, _Trial]:
    """Those of operations alone by their outputs."""
    return {trial.candidate.output: trial for trial in trials if _is_alone(trial.candidate)}


def _parts_of(candidate: Candidate, alone: Mapping[Node, _Trial]) -> Alternative:
    """Names of the operations that it runs one by one, as they came; none where one of these is no candidate."""
    parts = [alone[node] for node in candidate.nodes if node in alone]
    covered = frozenset().union(*(part.candidate.nodes for part in parts))
    return tuple(part.key for part in parts) if _is_as_it_came(candidate) and covered == candidate.nodes else ()


def _batches(candidates: Sequence[Candidate], examples: Mapping[Node, Example]) -> Iterator[list[Candidate]]:
    batch: list[Candidate] = []
    seen: set[Node] = set()
    for candidate in candidates:
        seen.update(candidate.inputs)
        too_large = sum(examples[node].nbytes for node in seen) > LARGEST_BATCH_OF_BYTES
        if batch and (too_large or len(batch) == LARGEST_BATCH_OF_CANDIDATES):
            yield batch
            batch, seen = [], set(candidate.inputs)
        batch.append(candidate)
    if batch:
        yield batch


def _try_batch(
    graph_module: GraphModule,
    batch: Sequence[Candidate],
    examples: Mapping[Node, Example],
    tolerance: float | None,
    cache: TimingCache,
    cost: Cost | None,
    copies: int,
) -> list[_Trial]:
    order = {node: i for i, node in enumerate(graph_module.graph.nodes)}
    values = _Values(examples)
    known: dict[tuple[frozenset[Node], bool], Any] = {}

    def expected(nodes: frozenset[Node], exactly: bool) -> Any:
        """What the operations as they came give, which may be told sizes that a layer of ours does not need."""
        if (nodes, exactly) not in known:
            came = original(sorted(nodes, key=order.__getitem__), PIXELS)
            known[nodes, exactly] = runnable(graph_module, came, values.of(came), exactly=exactly)()
        return known[nodes, exactly]

    trials: list[_Trial] = []
    with_kernel: set[tuple[str, frozenset[Node]]] = set()
    for candidate in batch:
        inputs = values.of(candidate)
        key = _key(graph_module, candidate, examples, copies)
        if cost is None and candidate.variant in TUNED_BACKENDS:
            key += f"; tiles {_tuned(graph_module, candidate, inputs) or 'by heuristic'}"
        same = (candidate.name, candidate.nodes)
        if cost is None and candidate.variant == "reference" and same in with_kernel:
            trials.append(_Trial(candidate, key, None, "not tried beside a kernel"))
            continue
        error, refusal = _check(graph_module, candidate, inputs, expected, tolerance)
        if refusal is None and candidate.mixes_inputs:
            magnitudes = [examples[node].magnitude for node in candidate.inputs]
            refusal = _overflow(graph_module, candidate, inputs, magnitudes)
        if refusal is None and not candidate.is_original:
            with_kernel.add(same)
        trials.append(_Trial(candidate, key, error, refusal))
    if cost is None:
        running = [trial for trial in trials if trial.refusal is None]
        rivals = _rivals(running)
        asked = _to_time(running, rivals, cache)
        calls = {
            key: _timed(graph_module, trial.candidate, values.of(trial.candidate), copies)
            for key, trial in asked.items()
        }
        _time(calls, rivals, values.device, cache)
    return trials


def _to_time(running: Sequence[_Trial], rivals: Sequence[set[Alternative]], cache: TimingCache) -> dict[str, _Trial]:
    """Those of which nothing is known, and again their rivals: the machine may be in another state than when these were
    timed, half as fast with all threads, for example, where its host has moved them apart."""
    timed = {t.key: t for t in running if not _is_as_it_came(t.candidate) or _is_alone(t.candidate)}
    unknown = {key for key in timed if cache.get(key) is None}
    names = [{name for alternative in place for name in alternative} for place in rivals]
    wanted = unknown.union(*(place for place in names if place & unknown))
    return {key: trial for key, trial in timed.items() if key in wanted}


class _Values:
    """Random values of graph nodes, the same in every form that they are read in."""

    def __init__(self, examples: Mapping[Node, Example]) -> None:
        self._examples = examples
        self._known: dict[tuple[Node, Layout | None], Any] = {}

    def of(self, candidate: Candidate) -> dict[Node, Any]:
        """The inputs of a candidate, each in the form that it reads."""
        forms = zip(candidate.inputs, candidate.reads, strict=True)
        return {node: self._value(node, form) for node, form in forms}

    def _value(self, node: Node, form: Layout | None) -> Any:
        if (node, None) not in self._known:
            self._known[node, None] = self._examples[node].random()
        if (node, form) not in self._known:
            assert form is not None
            self._known[node, form] = form.copy(self._known[node, None])
        return self._known[node, form]

    @property
    def device(self) -> torch.device:
        """Of the first tensor."""
        tensors = (value for value in self._known.values() if isinstance(value, Tensor))
        return next((tensor.device for tensor in tensors), torch.device("cpu"))


class Conversions:
    """Milliseconds of turning values into other forms, measured when they are asked for, each once."""

    def __init__(
        self,
        graph_module: GraphModule,
        examples: Mapping[Node, Example],
        cache: TimingCache,
        cost: Cost | None,
        copies: int = 1,
    ) -> None:
        """As `evaluate` takes them."""
        self._graph_module, self._examples, self._cache, self._cost = graph_module, examples, cache, cost
        self._copies = copies

    def __call__(self, node: Node, given: Layout, wanted: Layout) -> float:
        """Milliseconds of turning `node`, which lies as `given`, into `wanted`."""
        candidate = conversion(node, given, wanted)
        if self._cost is not None:
            return self._cost(candidate)
        key = _key(self._graph_module, candidate, self._examples, self._copies)
        if self._cache.get(key) is None:
            values = _Values(self._examples)
            calls = {key: _timed(self._graph_module, candidate, values.of(candidate), self._copies)}
            _time(calls, [{(key,)}], values.device, self._cache)
            self._cache.save()
        return self._cache.get(key) or 0.0


def _rivals(trials: Sequence[_Trial]) -> list[set[Alternative]]:
    """What does the same work, place by place; an operation alone competes where it is part of a place, if it is."""
    alone = _alone(trials)
    places: dict[frozenset[Node], set[Alternative]] = {}
    for trial in trials:
        alternative = _parts_of(trial.candidate, alone) or (trial.key,)
        places.setdefault(trial.candidate.nodes, set()).add(alternative)
    contested = {name for place in places.values() if len(place) > 1 for names in place for name in names}
    return [place for place in places.values() if len(place) > 1 or not contested.issuperset(*place)]


def _time(
    calls: Mapping[str, Callable[[], object]],
    rivals: Sequence[set[Alternative]],
    device: torch.device,
    cache: TimingCache,
) -> None:
    """Remembers the candidates' times as layers of a plan: from caches that hold nothing of theirs, and on CUDA devices
    as graphs by the device's clock."""
    if not calls:
        return
    if device.type == "cuda":
        timings = time_graphs(calls, device, budget_seconds=SECONDS_PER_CANDIDATE, rounds=ROUNDS)
        times = {name: timing.p10 for name, timing in timings.items()}
    else:
        names = {name for place in rivals for alternative in place for name in alternative}
        known = {name: time for name in names - calls.keys() if (time := cache.get(name)) is not None}
        times = race(calls, rivals, known=known, before_sample=empty_inner_caches)
    for name, milliseconds in times.items():
        cache.put(name, milliseconds)


def empty_inner_caches() -> None:
    """In a model a layer finds its weights, and most of its input, beyond the caches of the cores: so here."""
    torch.empty(EVICTED_BYTES, dtype=torch.uint8).zero_()


def runnable(
    graph_module: GraphModule, candidate: Candidate, inputs: Mapping[Node, Any], *, exactly: bool = False
) -> Callable[[], Any]:
    """The candidate as a function without arguments, bound to `inputs`; `exactly`: all floats in float64.

    Straight-line Python, as fx generates it for the emitted graph, a hundred times as quickly as a `GraphModule`.
    """
    bound: dict[str, Any] = {"torch": torch, "device": torch.device, "inf": math.inf, "nan": math.nan}
    given = iter(candidate.inputs)
    names: dict[Node, _Name] = {}
    lines = ["def run():"]
    for i, node in enumerate(candidate.fragment.nodes):
        names[node] = _Name(f"v{i}")
        args, kwargs = map_arg((node.args, node.kwargs), names.__getitem__)
        if node.op == "placeholder":
            bound[names[node]] = _double(inputs[next(given)]) if exactly else inputs[next(given)]
        elif node.op == "get_attr":
            found = constant(graph_module, node)
            bound[names[node]] = _double(found) if exactly else found
        elif node.op == "output":
            lines.append(f"    return {args[0]!r}")
        else:
            bound[f"f{i}"] = node.target
            given_arguments = [*map(repr, args), *(f"{name}={argument!r}" for name, argument in kwargs.items())]
            lines.append(f"    v{i} = f{i}({', '.join(given_arguments)})")
    exec("\n".join(lines), bound)
    run: Callable[[], Any] = bound["run"]
    return run


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _timed(
    graph_module: GraphModule, candidate: Candidate, inputs: Mapping[Node, Any], copies: int
) -> Callable[[], Any]:
    """The candidate as it is timed: a layer on a native backend, or an operation or conversion that a kernel of ours
    computes, as the native steps that plans make of it, since they are what speed is for; anything else as a call of
    torch, which it is in plans as well."""
    steps = None
    if candidate.variant in NATIVE_BACKENDS:
        steps = native_steps(_op_calls(graph_module, candidate, inputs), copies)
    elif not candidate.nodes or (candidate.is_original and len(candidate.nodes) == 1):
        steps = aten_steps(*_last_call(graph_module, candidate, inputs), copies)
    return steps or runnable(graph_module, candidate, inputs)


def _tuned(graph_module: GraphModule, candidate: Candidate, inputs: Mapping[Node, Any]) -> str | None:
    """The tile configuration that a layer runs in, found now if nothing like it was ever tuned; None for the
    heuristic's."""
    op, args, kwargs = _op_call(graph_module, candidate, inputs)
    return search.best_known(op, *args, **kwargs)


def _op_call(
    graph_module: GraphModule, candidate: Candidate, inputs: Mapping[Node, Any]
) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """The op of a layer of ours, with what its fragment calls it on."""
    target, args, kwargs = _last_call(graph_module, candidate, inputs)
    if target.namespace != "kernelpress":
        raise ValueError(f"candidate: expected a layer of ours, got {candidate.label}")
    return candidate.name, args, kwargs


def _op_calls(
    graph_module: GraphModule, candidate: Candidate, inputs: Mapping[Node, Any]
) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """The one or two ops of a layer of ours, the second on what the first gives; none where something else is computed
    in between."""
    known: dict[Node, Any] = {
        node: inputs[outer] for node, outer in zip(candidate.placeholders, candidate.inputs, strict=True)
    }
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    for node in candidate.fragment.nodes:
        if node.op == "get_attr":
            known[node] = constant(graph_module, node)
        if node.op != "call_function":
            continue
        args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
        if getattr(node.target, "namespace", "") == "kernelpress":
            calls.append((node.target._opname, args, kwargs))
            known[node] = Before()
        elif not any(isinstance(known[source], Before) for source in node.all_input_nodes):
            known[node] = node.target(*args, **kwargs)
        elif node.target is operator.getitem:
            known[node] = Before(node.args[1])
        else:
            return []
    return calls


def _last_call(
    graph_module: GraphModule, candidate: Candidate, inputs: Mapping[Node, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """What a fragment calls last, and on what."""
    known = dict(zip(candidate.placeholders, (inputs[node] for node in candidate.inputs), strict=True))
    known |= {node: constant(graph_module, node) for node in candidate.fragment.nodes if node.op == "get_attr"}
    *before, last = (node for node in candidate.fragment.nodes if node.op == "call_function")
    for node in before:
        args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
        if getattr(node.target, "namespace", "") == "kernelpress":
            kwargs = {**kwargs, "backend": "reference"}  # its own may not run here
        known[node] = node.target(*args, **kwargs)
    args, kwargs = map_arg((last.args, last.kwargs), known.__getitem__)
    return last.target, args, kwargs


def _check(
    graph_module: GraphModule,
    candidate: Candidate,
    inputs: Mapping[Node, Any],
    truth: Callable[[frozenset[Node], bool], Any],
    tolerance: float | None,
) -> tuple[float | None, str | None]:
    """The candidate's relative error to the original, and the reason if it must be refused."""
    try:
        with torch.no_grad():
            result = runnable(graph_module, candidate, inputs)()
            expected = truth(candidate.nodes, candidate.mixes_inputs)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as refused:
        return None, str(refused).splitlines()[0]
    values = (result, *(inputs[node] for node in candidate.inputs))
    error = relative_error(_double(result) if candidate.mixes_inputs else result, expected)
    tolerance = tolerance or max(tolerance_of(x.dtype) for x in values if isinstance(x, Tensor))
    if expected.dtype == torch.int8 or any(map(is_rounding, candidate.nodes)):
        tolerance = max(tolerance, INT8_TOLERANCE)
    return error, None if error <= tolerance else f"error {error:.1e} is above the tolerance {tolerance:.1e}"


def _overflow(
    graph_module: GraphModule, candidate: Candidate, inputs: Mapping[Node, Any], magnitudes: Sequence[float]
) -> str | None:
    """Why a candidate that mixes inputs must not run on values of these magnitudes, else None."""
    assert candidate.kernel is not None
    assert candidate.kernel.input_limit is not None
    op, args, kwargs = _op_call(graph_module, candidate, inputs)
    tensors, options, _ = registry.operator(op).signature.bind(args, kwargs)
    limit = candidate.kernel.input_limit(options, *tensors)
    too_large = [magnitude for magnitude in magnitudes if not magnitude * HEADROOM <= limit]
    return f"values reach {too_large[0]:.1e}, above {limit / HEADROOM:.1e} sums might overflow" if too_large else None


def _key(graph_module: GraphModule, candidate: Candidate, examples: Mapping[Node, Example], copies: int) -> str:
    """What the time of a candidate depends on: its operations, their arguments but scales and zero points, the form of
    every tensor, how many cells of an int8 weight are skipped, and how many times it runs side by side."""
    names: dict[Node, str] = {}
    lines: list[str] = []
    inputs = zip(candidate.inputs, candidate.reads, strict=True)
    for node in candidate.fragment.nodes:
        names[node] = f"%{len(names)}"
        if node.op == "placeholder":
            outer, form = next(inputs)
            lines.append(str(examples[outer].laid(form)))
        elif node.op == "get_attr":
            tensor = constant(graph_module, node)
            lines.append(f"{tensor.dtype}{list(tensor.shape)}/{list(tensor.stride())}")
            if candidate.pattern and tensor.dtype == torch.int8 and tensor.dim() == 4:
                lines[-1] += f", {share_of_cells(tensor):.2f} of its cells"
        else:
            args, kwargs = map_arg(without_scales(node), lambda n: _Name(names[n]))
            lines.append(f"{node.target}{args}{dict(kwargs)}")
    if copies > 1:
        lines.append(f"{copies} side by side")
    return "; ".join(lines)


class _Name(str):
    """A value's name that prints without quotes."""

    def __repr__(self) -> str:
        return str(self)
