"""A layer with our way to run it and everybody else's, and the row that comes of timing them in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gpu.place import Call, Place
from gpu.roofline import Roofline
from kernelpress.bench import Layer
from kernelpress.measure.latency import Timing

__all__ = [
    "BATCHES",
    "OURS",
    "TRITON",
    "Contest",
    "Contestant",
    "Row",
    "Workload",
    "measure",
    "reason_of",
    "with_inductor",
]

BATCHES = (32, 256, 1)

OURS = "kernelpress"
TRITON = "kernelpress on Triton"
UNFUSED = "kernelpress unfused"
INDUCTOR = "Inductor"

MAX_RELATIVE_ERROR = 3e-2
"""To the result in float32, or exactly computed: results further apart are no contestants."""


@dataclass(frozen=True)
class Contest:
    """A layer on tensors of its own. `ours` runs it, `triton` on our Triton kernel where that is another one, `parts`
    our kernels one by one where the op fuses several; `peers` by name. `expected` is the result in float32. Peers in
    `partial` compute something less: they are timed, but are never the best. Results of peers in `other_values` are not
    compared. `eager`, in plain torch, is what Inductor compiles."""

    backend: str
    ours: Call
    peers: dict[str, Call]
    expected: Call
    triton: Call | None = None
    parts: Call | None = None
    partial: frozenset[str] = frozenset()
    other_values: frozenset[str] = frozenset()
    eager: Call | None = None


@dataclass(frozen=True)
class Workload:
    """A layer at one shape, made when it is its turn; `kind` names the ceiling of its arithmetic."""

    family: str
    op: str
    network: str
    layer: str
    batch: int
    kind: str
    flops: int
    traffic_bytes: int
    make: Callable[[], Contest]

    @classmethod
    def of(cls, layer: Layer, make: Callable[[], Contest]) -> Workload:
        """One of `kernelpress.bench`, in bfloat16 or int8."""
        return cls(
            *(layer.family, layer.op, layer.network, layer.label, layer.batch),
            kind="int8" if layer.dtype == torch.int8 else "bf16",
            flops=layer.flops,
            traffic_bytes=layer.traffic_bytes(torch.bfloat16),
            make=make,
        )


@dataclass(frozen=True)
class Contestant:
    """One way to run a layer: the median of the best round in ms and the spread of the rounds; or why it did not."""

    name: str
    ms: float | None
    spread: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Row:
    """One layer, measured. Ratios are times of the other over ours: above 1 ours is faster."""

    family: str
    op: str
    network: str
    layer: str
    batch: int
    kind: str
    backend: str
    ms: float | None
    flops: int
    traffic_bytes: int
    tflops: float | None
    gbs: float | None
    roofline_fraction: float | None
    limited_by: str
    best_peer: str | None
    ratio: float | None
    unfused_ratio: float | None
    triton_ratio: float | None
    relative_error: float | None
    contestants: tuple[Contestant, ...] = field(default=())


def measure(workload: Workload, place: Place, roofline: Roofline) -> Row:
    """Runs a layer's contestants once for their results, then times them in turn.

    A peer that cannot run, or computes something else, is kept with the reason. Ours too: the row then has no time.
    """
    contest = workload.make()
    expected = _expected(contest)
    own = {OURS: contest.ours, TRITON: contest.triton, UNFUSED: contest.parts}
    candidates = {name: call for name, call in own.items() if call is not None} | contest.peers
    calls: dict[str, Call] = {}
    refused: dict[str, str] = {}
    errors: dict[str, float] = {}
    for name, call in candidates.items():
        try:
            with torch.no_grad():
                result = call()
        except Exception as error:  # a peer may fail in any way
            refused[name] = reason_of(error)
            continue
        if name not in contest.partial | contest.other_values:
            errors[name] = relative_error(result, expected)
            if not errors[name] <= MAX_RELATIVE_ERROR:
                refused[name] = f"its result is off by {errors[name]:.1e}"
                continue
        calls[name] = call
    del expected
    timings = place.time(calls) if calls else {}
    row = Row(
        *(workload.family, workload.op, workload.network, workload.layer, workload.batch, workload.kind),
        backend=contest.backend,
        ms=None,
        flops=workload.flops,
        traffic_bytes=workload.traffic_bytes,
        tflops=None,
        gbs=None,
        roofline_fraction=None,
        limited_by=roofline.limited_by(workload.kind, workload.flops, workload.traffic_bytes),
        best_peer=None,
        ratio=None,
        unfused_ratio=None,
        triton_ratio=None,
        relative_error=errors.get(OURS),
        contestants=(
            *[Contestant(name, timing.median, timing.spread) for name, timing in timings.items()],
            *[Contestant(name, None, None, reason) for name, reason in refused.items()],
        ),
    )
    return _judged(row, roofline, contest.partial)


def with_inductor(row: Row, workload: Workload, place: Place, roofline: Roofline) -> Row:
    """The row with Inductor among the contestants, compiled here and timed in turn with ours; as it was if there is
    nothing to compile."""
    contest = workload.make()
    if contest.eager is None or row.ms is None:
        return row
    try:
        compiled = torch.compile(contest.eager, dynamic=False, backend="eager" if place.is_dry else "inductor")
        with torch.no_grad():
            error = relative_error(compiled(), _expected(contest))
        if not error <= MAX_RELATIVE_ERROR:
            raise RuntimeError(f"its result is off by {error:.1e}")
        timings: Mapping[str, Timing] = place.time({OURS: contest.ours, INDUCTOR: compiled})
    except Exception as error:  # Inductor fails in as many ways as it has parts
        added = Contestant(INDUCTOR, None, None, reason_of(error))
    else:
        # Beside our time in the same minutes, put on the scale of the row's.
        scale = row.ms / timings[OURS].median
        added = Contestant(INDUCTOR, timings[INDUCTOR].median * scale, timings[INDUCTOR].spread)
    finally:
        torch.compiler.reset()
    return _judged(replace(row, contestants=(*row.contestants, added)), roofline, contest.partial)


def _expected(contest: Contest) -> Tensor:
    """The result in float32, without a search for cuDNN's best way to it."""
    search, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        with torch.no_grad():
            return contest.expected()
    finally:
        torch.backends.cudnn.benchmark = search


def relative_error(result: Tensor, expected: Tensor) -> float:
    """‖result − expected‖ / ‖expected‖, in float32; infinite where the shapes differ or something is NaN."""
    if result.shape != expected.shape:
        return float("inf")
    difference = torch.linalg.vector_norm(result.float() - expected.float())
    error = float(difference / torch.linalg.vector_norm(expected.float()).clamp_min(1e-30))
    return error if error == error else float("inf")


def reason_of(error: Exception) -> str:
    """The kind of an error and its first line."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def _judged(row: Row, roofline: Roofline, partial: frozenset[str]) -> Row:
    times = {entry.name: entry.ms for entry in row.contestants if entry.ms is not None}
    if OURS not in times:
        return row
    mine = times.pop(OURS)
    unfused, on_triton = times.pop(UNFUSED, None), times.pop(TRITON, None)
    peers = {name: ms for name, ms in times.items() if name not in partial}
    best = min(peers, key=peers.__getitem__, default=None)
    bound = roofline.bound_ms(row.kind, row.flops, row.traffic_bytes)
    return replace(
        row,
        ms=mine,
        tflops=row.flops / mine * 1e-9,
        gbs=row.traffic_bytes / mine * 1e-6,
        roofline_fraction=bound / mine,
        best_peer=best,
        ratio=None if best is None else peers[best] / mine,
        unfused_ratio=None if unfused is None else unfused / mine,
        triton_ratio=None if on_triton is None else on_triton / mine,
    )
