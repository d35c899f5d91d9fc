"""The contest of peers and ours: each computes what is right, all are timed in turn, and their best rounds count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernelpress import ops
from kernelpress.bench.calls import Call
from kernelpress.bench.layers import Layer
from kernelpress.bench.roofline import Ceilings
from kernelpress.ops.registry import Tensors
from kernelpress.runtime.clock import Timing

__all__ = [
    "KINDS",
    "MODEL_TOLERANCE",
    "OURS",
    "OURS_DENSE",
    "OURS_FLOAT",
    "PARTIAL",
    "TF32_TOLERANCE",
    "TOLERANCE",
    "TRITON",
    "UNFUSED",
    "Contestant",
    "Row",
    "expected_of",
    "hold",
    "judged",
    "kind_of",
    "reason_of",
    "refuse_any",
    "relative_error",
    "row_of",
]

OURS, UNFUSED, TRITON = "kernelpress", "kernelpress unfused", "kernelpress on Triton"

OURS_FLOAT, OURS_DENSE = "kernelpress float32", "kernelpress dense"
"""Of int8, and of zeros left out or a chain of low rank: no peers, but what these have to beat."""

PARTIAL = "_int_mm alone"
"""A peer that computes something less, and so is never the best."""

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2, torch.int8: 1e-2}
"""Largest ‖result − expected‖ / ‖expected‖ by the dtype computed in: a fast wrong kernel must not enter a table."""

TF32_TOLERANCE = 2e-3
"""Of float32 where tensor cores may take it as TF32."""

MODEL_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.int8: 1.0}
"""Of whole models, which round at every layer. Random weights amplify what int8 rounds to tens of per cent of the
output, whoever computes it; its error is stated, and only what has little to do with the output is refused."""

KINDS: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
}
"""Of arithmetic."""

Clock = Callable[[Mapping[str, Call]], Mapping[str, Timing]]
"""Times calls in turn."""


@dataclass(frozen=True)
class Contestant:
    """One way to run a layer: the best round's median in ms, and how far the worst round lies above it (0.1 is 10 %);
    or why it did not."""

    name: str
    ms: float | None
    spread: float | None = None
    reason: str | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.reason if self.ms is None else f'{self.ms:.4f}'}"


@dataclass(frozen=True)
class Row:
    """One layer, measured. Ratios are times of the other over ours: above 1 ours is faster; all is None that has no
    time."""

    family: str
    op: str
    network: str
    layer: str
    batch: int
    kind: str
    """Of the arithmetic: fp32, bf16 or int8."""
    threads: int | None
    """On the CPU."""
    backend: str
    flops: int
    traffic_bytes: int
    relative_error: float | None
    contestants: tuple[Contestant, ...]
    ms: float | None = None
    spread: float | None = None
    tflops: float | None = None
    gbs: float | None = None
    """Of compulsory traffic."""
    roofline_fraction: float | None = None
    """Least time that this machine's measured peaks allow ÷ measured time."""
    limited_by: str | None = None
    best_peer: str | None = None
    ratio: float | None = None
    """Best peer's time ÷ ours."""
    unfused_ratio: float | None = None
    """Time of our own stages one by one ÷ ours; for fused ops."""
    triton_ratio: float | None = None
    dense_flops: int | None = None
    """Of the layer whose place a chain of low rank took."""
    realisation: float | None = None
    """That layer's time in our own emission ÷ ours, beside the ratio of FLOPs."""


def hold(
    calls: Mapping[str, Call | None],
    expected: Tensor,
    tolerance: float,
    time: Clock,
    *,
    unjudged: frozenset[str] = frozenset(),
    read: Callable[[Tensor], Tensor] = lambda result: result,
) -> tuple[tuple[Contestant, ...], dict[str, float]]:
    """Runs every call there is once for its result, then times them in turn; the contestants, and errors by name.

    Who cannot run or is further than `tolerance` from `expected` is kept with the reason. Those in `unjudged` compute
    something else and are not compared. `read` makes of a result what is compared.
    """
    able: dict[str, Call] = {}
    refused: list[Contestant] = []
    errors: dict[str, float] = {}
    for name, call in calls.items():
        if call is None:
            continue
        try:
            with torch.no_grad():
                result = call()
        except Exception as error:  # a peer may fail in any way
            refused.append(Contestant(name, None, None, reason_of(error)))
            continue
        if name not in unjudged:
            errors[name] = relative_error(read(result), expected)
            if not errors[name] <= tolerance:
                refused.append(Contestant(name, None, None, f"its result is off by {errors[name]:.1e}"))
                continue
        able[name] = call
    timings = time(able) if able else {}
    timed = [Contestant(name, timing.median, timing.spread) for name, timing in timings.items()]
    return (*timed, *refused), errors


def expected_of(op: str, tensors: Tensors, options: Mapping[str, Any]) -> Tensor:
    """What an op means on these tensors, floating ones in float32."""
    exact = [t.float() if t is not None and t.is_floating_point() else t for t in tensors]
    with torch.no_grad():
        result: Tensor = getattr(ops, op)(*exact, **options, backend="reference")
    return result


def row_of(
    layer: Layer,
    kind: str,
    backend: str,
    contestants: tuple[Contestant, ...],
    error: float | None,
    ceilings: Ceilings,
    *,
    threads: int | None = None,
) -> Row:
    """The row of a contest."""
    row = Row(
        *(layer.family, layer.op, layer.network, layer.label, layer.batch, kind, threads, backend, layer.flops),
        traffic_bytes=layer.traffic_bytes(KINDS[kind]),
        relative_error=error,
        contestants=contestants,
    )
    return judged(row, ceilings)


def judged(row: Row, ceilings: Ceilings) -> Row:
    """The row with its rates and ratios."""
    times = {entry.name: entry.ms for entry in row.contestants if entry.ms is not None}
    row = replace(row, limited_by=ceilings.limited_by(row.flops, row.traffic_bytes, row.kind))
    if OURS not in times:
        return row
    mine = times.pop(OURS)
    own = {name: times.pop(name) / mine if name in times else None for name in (UNFUSED, TRITON, OURS_DENSE)}
    gained = own[OURS_DENSE]
    peers = {name: ms for name, ms in times.items() if name != PARTIAL}
    best = min(peers, key=peers.__getitem__, default=None)
    bound = ceilings.bound_ms(row.flops, row.traffic_bytes, row.kind)
    return replace(
        row,
        ms=mine,
        spread=next(entry.spread for entry in row.contestants if entry.name == OURS),
        tflops=row.flops / mine * 1e-9,
        gbs=row.traffic_bytes / mine * 1e-6,
        roofline_fraction=None if bound is None else bound / mine,
        best_peer=best,
        ratio=None if best is None else peers[best] / mine,
        unfused_ratio=own[UNFUSED],
        triton_ratio=own[TRITON],
        realisation=gained * row.flops / row.dense_flops if gained and row.dense_flops else None,
    )


def refuse_any(contestants: Iterable[Contestant], layer: str) -> None:
    """Raises `RuntimeError` for the first contestant that has a reason instead of a time."""
    for contestant in contestants:
        if contestant.reason is not None:
            raise RuntimeError(f"{layer}: {contestant.name}: {contestant.reason}")


def relative_error(result: Tensor, expected: Tensor) -> float:
    """‖result − expected‖ / ‖expected‖, in float64 on the CPU, else in float32; infinite where the shapes differ or
    something is NaN."""
    if result.shape != expected.shape:
        return float("inf")
    exact = torch.float64 if result.device.type == "cpu" else torch.float32
    result, expected = result.to(exact), expected.to(exact)
    norm = torch.linalg.vector_norm
    error = float(norm(result - expected) / norm(expected).clamp_min(1e-30))
    return error if error == error else float("inf")


def reason_of(error: Exception) -> str:
    """The kind of an error and its first line."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def kind_of(dtype: torch.dtype) -> str:
    """`fp32` for `torch.float32`."""
    return next(name for name, known in KINDS.items() if known == dtype)
