"""What candidates cost and how exact they are, on this device, at the shapes of the example inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node, map_arg

from kernelpress.emit.cache import TimingCache
from kernelpress.emit.candidates import Candidate, constant, original
from kernelpress.emit.graph import shares_memory_within
from kernelpress.measure.device_clock import time_graphs
from kernelpress.measure.race import Alternative, race
from kernelpress.ops.calls.steps import native_steps
from kernelpress.ops.tuning import search
from kernelpress.trace.regions import writes

__all__ = [
    "INT8_TOLERANCE",
    "TOLERANCES",
    "TURNED_SHARE",
    "Cost",
    "Evaluation",
    "Example",
    "empty_inner_caches",
    "evaluate",
    "example_values",
    "relative_error",
    "runnable",
    "tolerance_of",
]

Cost = Callable[[Candidate], float]
"""Milliseconds of a candidate, given instead of measured."""

SECONDS_PER_CANDIDATE = 6e-3
ROUNDS = 3
"""On CUDA devices."""

EVICTED_BYTES = 8 << 20

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

TURNED_SHARE = 0.01
"""Largest share of the elements of a comparison, an index or a rounding that may turn over, where the floats decided on
are within 10 × the tolerance of the original's, element by element; or 10 × the tolerance where that is more. Of normal
floats 0.8 % lie within 1 % of a threshold in the middle. Orders (sort, topk) have no such bound: elements change places
with their equals."""

INT8_TOLERANCE = 5e-3
"""Of int8 values: one that lies between two steps may be rounded to either, but few do. Tensors of a typical size
(30, root mean square) stay below it if one value in fifty is off by a step."""

TUNED_BACKENDS = frozenset({"cuda", "triton"})

LARGEST_BATCH_OF_CANDIDATES = 48
LARGEST_BATCH_OF_BYTES = 256 << 20
"""Candidates are timed in turn in batches; what their inputs occupy together is bounded."""


@dataclass(frozen=True)
class Example:
    """How a value of the graph looks when the example inputs run through: a tensor's form, or a plain value."""

    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    plain: Any = None

    def random(self) -> Any:
        """A fresh tensor of this form: standard normal floats, int8 values of the whole range, zeros of other
        dtypes; a plain value as it is."""
        if self.dtype is None:
            return self.plain
        empty = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        if self.dtype == torch.int8:
            return empty.random_(-128, 128)
        return empty.normal_() if self.dtype.is_floating_point else empty.zero_()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return 0 if self.dtype is None else torch.Size(self.shape).numel() * self.dtype.itemsize

    def __str__(self) -> str:
        return repr(self.plain) if self.dtype is None else f"{self.dtype}{list(self.shape)}/{list(self.stride)}"


@dataclass(frozen=True)
class Evaluation:
    """Milliseconds and relative error of one candidate, or the reason why it cannot serve."""

    candidate: Candidate
    milliseconds: float | None
    error: float | None
    refusal: str | None = None


def example_values(graph_module: GraphModule, inputs: Sequence[Any]) -> dict[Node, Example]:
    """Runs the graph once on `inputs` (flat, one per placeholder) and notes the form of every value.

    Images between operations are noted as channels_last, which is what the emitted graph hands on, graph inputs as the
    caller lays them out, and tensors whose elements share memory as dense ones. Writes into buffers are left out.
    """
    examples: dict[Node, Example] = {}

    class Recorder(Interpreter):
        def run_node(self, node: Node) -> Any:
            result = self.env[node.args[0]] if writes(node) else super().run_node(node)  # type: ignore[index]
            examples[node] = _example(result, is_input=node.op == "placeholder")
            return result

    with torch.no_grad():
        Recorder(graph_module).run(*inputs, enable_io_processing=False)
    return examples


def _example(result: Any, *, is_input: bool) -> Example:
    if not isinstance(result, Tensor) or result.layout != torch.strided:
        return Example(plain=result if isinstance(result, (int, float, bool)) else None)
    stride = torch.empty_like(result).stride() if shares_memory_within(result) else result.stride()
    if result.dim() == 4 and not is_input:
        stride = torch.empty(result.shape, device="meta").contiguous(memory_format=torch.channels_last).stride()
    return Example(tuple(result.shape), tuple(stride), result.dtype, result.device)


def evaluate(
    graph_module: GraphModule,
    candidates: Sequence[Candidate],
    examples: Mapping[Node, Example],
    tolerance: float | None,
    cache: TimingCache,
    cost: Cost | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Evaluation]:
    """Runs every candidate on random inputs of the examples' form: one evaluation each, in the order given.

    A candidate that raises, or whose output differs from that of the original operations by more than `tolerance`
    (None: that of their dtypes), is refused with the reason. Equal layers at equal shapes are timed once, in the tile
    configuration that calls run in: CUDA and Triton kernels are tuned first, unless `KERNELPRESS_AUTOTUNE=0`. `cost`
    replaces timing; `advance` is told how many candidates are done.
    """
    trials: list[_Trial] = []
    for batch in _batches(candidates, examples):
        trials += _try_batch(graph_module, batch, examples, tolerance, cache, cost)
        advance(len(batch))
    cache.save()
    alone = {trial.candidate.output: trial.key for trial in trials if _is_alone(trial.candidate)}
    return [_evaluation(trial, alone, cache, cost) for trial in trials]


@dataclass(frozen=True)
class _Trial:
    """What running a candidate told, and the name under which its time is kept."""

    candidate: Candidate
    key: str
    error: float | None
    refusal: str | None


def _evaluation(trial: _Trial, alone: Mapping[Node, str], cache: TimingCache, cost: Cost | None) -> Evaluation:
    candidate, milliseconds = trial.candidate, None
    if trial.refusal is None:
        keys = _parts_of(candidate, alone) or (trial.key,)
        times = [cache.get(key) for key in keys]
        milliseconds = cost(candidate) if cost is not None else sum(times) if None not in times else None  # type: ignore[arg-type]
    return Evaluation(candidate, milliseconds, trial.error, trial.refusal)


def _is_alone(candidate: Candidate) -> bool:
    """Whether it is one operation as it came."""
    return candidate.is_original and candidate.variant == "channels_last" and len(candidate.nodes) == 1


def _parts_of(candidate: Candidate, alone: Mapping[Node, str]) -> Alternative:
    """Names of the operations that it runs one by one, as they came; none where one of these is no candidate."""
    is_sequence = candidate.is_original and candidate.variant == "channels_last" and candidate.nodes <= alone.keys()
    return tuple(alone[node] for node in candidate.nodes) if is_sequence else ()


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
) -> list[_Trial]:
    order = {node: i for i, node in enumerate(graph_module.graph.nodes)}
    inputs: dict[Node, Any] = {}
    expected: dict[frozenset[Node], Any] = {}
    trials: list[_Trial] = []
    with_kernel: set[tuple[str, frozenset[Node]]] = set()
    for candidate in batch:
        is_first = candidate.nodes not in expected
        came = original(sorted(candidate.nodes, key=order.__getitem__), "channels_last") if is_first else candidate
        # The operations as they came may be told sizes that a layer of ours does not need.
        for node in (*candidate.inputs, *came.inputs):
            if node not in inputs:
                inputs[node] = examples[node].random()
        key = _key(graph_module, candidate, examples)
        if cost is None and candidate.variant in TUNED_BACKENDS:
            key += f"; tiles {_tuned(graph_module, candidate, inputs) or 'by heuristic'}"
        if is_first:
            expected[candidate.nodes] = runnable(graph_module, came, inputs)()
        same = (candidate.name, candidate.nodes)
        if cost is None and candidate.variant == "reference" and same in with_kernel:
            trials.append(_Trial(candidate, key, None, "not tried beside a kernel"))
            continue
        error, refusal = _check(graph_module, candidate, inputs, expected[candidate.nodes], tolerance)
        if refusal is None and not candidate.is_original:
            with_kernel.add(same)
        trials.append(_Trial(candidate, key, error, refusal))
    if cost is None:
        running = [trial for trial in trials if trial.refusal is None]
        calls = {
            trial.key: _timed(graph_module, trial.candidate, inputs)
            for trial in running
            if cache.get(trial.key) is None
            and (trial.candidate.variant != "channels_last" or _is_alone(trial.candidate))
        }
        _time(calls, _rivals(running), _device(inputs.values()), cache)
    return trials


def _rivals(trials: Sequence[_Trial]) -> list[set[Alternative]]:
    """What does the same work, place by place; an operation alone competes where it is part of a place, if it is."""
    alone = {trial.candidate.output: trial.key for trial in trials if _is_alone(trial.candidate)}
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
        known = {name: time for name in names if (time := cache.get(name)) is not None}
        times = race(calls, rivals, known=known, before_sample=empty_inner_caches)
    for name, milliseconds in times.items():
        cache.put(name, milliseconds)


def _device(values: Iterable[Any]) -> torch.device:
    return next((value.device for value in values if isinstance(value, Tensor)), torch.device("cpu"))


def empty_inner_caches() -> None:
    """In a model a layer finds its weights, and most of its input, beyond the caches of the cores: so here."""
    torch.empty(EVICTED_BYTES, dtype=torch.uint8).zero_()


def runnable(graph_module: GraphModule, candidate: Candidate, inputs: Mapping[Node, Any]) -> Callable[[], Any]:
    """The candidate as a function without arguments, bound to `inputs`.

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
            bound[names[node]] = inputs[next(given)]
        elif node.op == "get_attr":
            bound[names[node]] = constant(graph_module, node)
        elif node.op == "output":
            lines.append(f"    return {args[0]!r}")
        else:
            bound[f"f{i}"] = node.target
            given_arguments = [*map(repr, args), *(f"{name}={argument!r}" for name, argument in kwargs.items())]
            lines.append(f"    v{i} = f{i}({', '.join(given_arguments)})")
    exec("\n".join(lines), bound)
    run: Callable[[], Any] = bound["run"]
    return run


def _timed(graph_module: GraphModule, candidate: Candidate, inputs: Mapping[Node, Any]) -> Callable[[], Any]:
    """The candidate as it is timed: a layer on the `cpu` backend as the native step that plans make of it, since they
    are what speed is for; anything else as a call of torch, which it is in plans as well."""
    steps = native_steps([_op_call(graph_module, candidate, inputs)]) if candidate.variant == "cpu" else None
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
    known = dict(zip(candidate.placeholders, (inputs[node] for node in candidate.inputs), strict=True))
    known |= {node: constant(graph_module, node) for node in candidate.fragment.nodes if node.op == "get_attr"}
    for node in (node for node in candidate.fragment.nodes if node.op == "call_function"):
        args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
        if node.target.namespace == "kernelpress":
            return candidate.name, args, kwargs
        known[node] = node.target(*args, **kwargs)
    raise ValueError(f"candidate: expected a layer of ours, got {candidate.label}")


def _check(
    graph_module: GraphModule, candidate: Candidate, inputs: Mapping[Node, Any], expected: Any, tolerance: float | None
) -> tuple[float | None, str | None]:
    """The candidate's relative error to the original, and the reason if it must be refused."""
    try:
        with torch.no_grad():
            result = runnable(graph_module, candidate, inputs)()
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as refused:
        return None, str(refused).splitlines()[0]
    error = relative_error(result, expected)
    values = (expected, *(inputs[node] for node in candidate.inputs))
    tolerance = tolerance or max(tolerance_of(x.dtype) for x in values if isinstance(x, Tensor))
    if expected.dtype == torch.int8:
        tolerance = max(tolerance, INT8_TOLERANCE)
    return error, None if error <= tolerance else f"error {error:.1e} is above the tolerance {tolerance:.1e}"


def tolerance_of(dtype: torch.dtype | None) -> float:
    """The largest relative error of values of `dtype` unless another is asked for; that of float64 for what are no
    floats."""
    if dtype is None or not dtype.is_floating_point:
        return TOLERANCES[torch.float64]
    return TOLERANCES.get(dtype, TOLERANCES[torch.float32])


def relative_error(result: Tensor, expected: Tensor) -> float:
    """‖result − expected‖ / ‖expected‖ in float64; infinite where shape, dtype or the places of NaN and ±∞ differ,
    where int8 values differ by more than one step, and values of other dtypes at all."""
    if result.shape != expected.shape or result.dtype != expected.dtype or result.layout != expected.layout:
        return float("inf")
    if expected.layout != torch.strided:
        result, expected = result.to_dense(), expected.to_dense()
    if expected.is_complex():
        result, expected = (torch.view_as_real(t.resolve_conj()) for t in (result, expected))
    if expected.dtype == torch.int8:
        steps = result.int() - expected.int()
        if bool((steps.abs() > 1).any()):
            return float("inf")
    elif not expected.dtype.is_floating_point:
        return 0.0 if torch.equal(result, expected) else float("inf")
    wide = torch.promote_types(expected.dtype, torch.float32)
    a, b = result.detach().to(wide), expected.detach().to(wide)
    finite = torch.isfinite(b)
    if not finite.all():
        if not torch.equal(torch.isfinite(a), finite) or not torch.equal(
            a[~finite].nan_to_num(), b[~finite].nan_to_num()
        ):
            return float("inf")
        a, b = a[finite], b[finite]
    difference, norm = (float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in (a - b, b))
    error = difference / norm if norm > 0 else difference
    return error if error == error else float("inf")


def _key(graph_module: GraphModule, candidate: Candidate, examples: Mapping[Node, Example]) -> str:
    """What the time of a candidate depends on: its operations, their arguments, and the form of every tensor."""
    names: dict[Node, str] = {}
    lines: list[str] = []
    inputs = iter(candidate.inputs)
    for node in candidate.fragment.nodes:
        names[node] = f"%{len(names)}"
        if node.op == "placeholder":
            lines.append(str(examples[next(inputs)]))
        elif node.op == "get_attr":
            tensor = constant(graph_module, node)
            lines.append(f"{tensor.dtype}{list(tensor.shape)}/{list(tensor.stride())}")
        else:
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: _Name(names[n]))
            lines.append(f"{node.target}{args}{dict(kwargs)}")
    return "; ".join(lines)


class _Name(str):
    """A value's name that prints without quotes."""

    def __repr__(self) -> str:
        return str(self)
