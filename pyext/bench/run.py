"""Times the kernels of a family case by case, in turn with their peers, and states what they reach of the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernelpress.bench import ours
from kernelpress.bench.peers import peers as peer_calls
from kernelpress.bench.peers import random_inputs
from kernelpress.bench.roofline import Roofline, measure_roofline
from kernelpress.bench.shapes import Case, cases
from kernelpress.measure.latency import Timing, threads_set_to, time_alternately
from kernelpress.measure.units import ABSENT, latency_text, ratio_text

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Contestant", "Row", "judged", "measure_case", "run", "table"]

DEVICES = ("cpu",)
OURS = "kernelpress"
UNFUSED = "kernelpress unfused"

MAX_RELATIVE_ERROR = 1e-4
"""Results further apart than this are no contestants: a fast wrong kernel must not enter a table."""


@dataclass(frozen=True)
class Contestant:
    """One way to run a case: the best round's median in ms, and how far the worst round lies above it (0.1 is 10 %)."""

    name: str
    ms: float
    spread: float


@dataclass(frozen=True)
class Row:
    """One case, measured. Ratios are times of the other over ours: above 1 ours is faster."""

    family: str
    op: str
    network: str
    layer: str
    threads: int
    backend: str
    ms: float
    spread: float
    flops: int
    traffic_bytes: int
    roofline_fraction: float | None
    """Least time that this machine's measured peaks allow ÷ measured time."""
    limited_by: str | None
    best_peer: str | None
    ratio: float | None
    """Best peer's time ÷ ours."""
    unfused_ratio: float | None
    """Time of our own stages one by one ÷ ours; for fused ops."""
    relative_error: float
    """Against eager on the same float32 inputs."""
    contestants: tuple[Contestant, ...]

    @property
    def gflops(self) -> float:
        """GFLOP/s reached."""
        return self.flops / self.ms * 1e-6

    @property
    def gbs(self) -> float:
        """GB/s of compulsory traffic reached."""
        return self.traffic_bytes / self.ms * 1e-6


def run(
    family: str,
    device: str = "cpu",
    peers: bool = False,
    *,
    with_inductor: bool = False,
    batch: int = 1,
    threads: int | None = None,
    rounds: int = 5,
    budget_seconds: float = 0.3,
    only: Sequence[Case] | None = None,
) -> list[Row]:
    """Benchmarks every case of `family` (or those of `only`), one row each.

    `peers` times eager in both memory formats and oneDNN in turn with ours; `with_inductor` adds `torch.compile` to
    them, which compiles for seconds a case. `budget_seconds` is the measuring time of one contestant at one case,
    `threads` torch's number of threads (`None`: as it is).

    Raises `ValueError` for an unknown family or device and for counts that are not positive, `RuntimeError` where
    results disagree.
    """
    if device not in DEVICES:
        raise ValueError(f"device: expected one of {', '.join(DEVICES)}, or `run_backends`; got {device!r}")
    chosen = cases(family, batch=batch) if only is None else tuple(only)
    roofline = measure_roofline(threads)
    rows = [
        measure_case(
            case,
            roofline,
            peers=peers,
            with_inductor=with_inductor,
            rounds=rounds,
            budget_seconds=budget_seconds,
        )
        for case in chosen
    ]
    return judged(rows, measure_roofline(threads, again=True))


def judged(rows: Sequence[Row], roofline: Roofline) -> list[Row]:
    """The rows, with what they reach of `roofline`."""
    return [
        replace(
            row,
            roofline_fraction=None
            if (bound := roofline.bound_ms(row.flops, row.traffic_bytes)) is None
            else bound / row.ms,
            limited_by=roofline.limited_by(row.flops, row.traffic_bytes),
        )
        for row in rows
    ]


def measure_case(
    case: Case,
    roofline: Roofline,
    *,
    peers: bool = False,
    with_inductor: bool = False,
    rounds: int = 5,
    budget_seconds: float = 0.3,
) -> Row:
    """Benchmarks one case with as many threads as `roofline` was measured with, on fresh random inputs.

    Raises `RuntimeError` where ours or a peer disagrees with eager.
    """
    with threads_set_to(roofline.threads), torch.no_grad():
        inputs = random_inputs(case)
        calls = {OURS: ours.fused(case, inputs)}
        if len(case.stages) > 1:
            calls[UNFUSED] = ours.unfused(case, inputs)
        competitors = peer_calls(case, inputs, with_inductor=with_inductor)
        expected = competitors["eager"]()
        errors = {name: relative_error(call(), expected) for name, call in calls.items()}
        if peers:
            calls |= competitors
            errors |= {name: relative_error(call(), expected) for name, call in competitors.items()}
        for name, error in errors.items():
            if not error <= MAX_RELATIVE_ERROR:
                raise RuntimeError(f"{case.op} {case.label}: {name} differs from eager by {error:.1e} (relative)")
        timings = time_alternately(calls, budget_seconds=budget_seconds, rounds=rounds)
        backend = ours.backend_of(case, inputs)
    row = _row(case, roofline.threads, backend, timings, errors[OURS], [n for n in competitors if n in timings])
    return judged([row], roofline)[0]


def relative_error(result: Tensor, expected: Tensor) -> float:
    """‖result − expected‖ / ‖expected‖, in float64."""
    difference = torch.linalg.vector_norm(result.double() - expected.double())
    return float(difference / torch.linalg.vector_norm(expected.double()))


def _row(
    case: Case, threads: int, backend: str, timings: dict[str, Timing], error: float, peer_names: Sequence[str]
) -> Row:
    mine = timings[OURS]
    best_peer = min(peer_names, key=lambda name: timings[name].median, default=None)
    return Row(
        family=case.family,
        op=case.op,
        network=case.network,
        layer=case.label,
        threads=threads,
        backend=backend,
        ms=mine.median,
        spread=mine.spread,
        flops=case.flops,
        traffic_bytes=case.traffic_bytes,
        roofline_fraction=None,
        limited_by=None,
        best_peer=best_peer,
        ratio=None if best_peer is None else timings[best_peer].median / mine.median,
        unfused_ratio=timings[UNFUSED].median / mine.median if UNFUSED in timings else None,
        relative_error=error,
        contestants=tuple(Contestant(name, timing.median, timing.spread) for name, timing in timings.items()),
    )


def table(rows: Sequence[Row], roofline: Roofline | None = None) -> Table:
    """The rows as a rich table, to be printed by `rich.print`; `roofline` adds the peaks they are measured against.

    Raises `ValueError` for no rows.
    """
    from rich.table import Table

    if not rows:
        raise ValueError("rows: expected at least one row, got none")
    with_unfused = any(row.unfused_ratio is not None for row in rows)
    with_peers = any(row.ratio is not None for row in rows)
    view = Table(title=f"{rows[0].family}, {rows[0].threads} threads, fp32", caption=_caption(rows, roofline))
    view.add_column("network")
    view.add_column("layer", no_wrap=True)
    numbers = ["time", "spread", "GFLOP/s", "GB/s", "of roofline"]
    numbers += ["vs unfused"] if with_unfused else []
    numbers += ["vs best peer"] if with_peers else []
    for name in numbers:
        view.add_column(name, justify="right", no_wrap=True)
    if with_peers:
        view.add_column("best peer")
    for row in rows:
        cells = [row.network, row.layer, latency_text(row.ms), f"{row.spread:.0%}"]
        cells += [f"{row.gflops:.1f}", f"{row.gbs:.1f}", _fraction_text(row)]
        cells += [ratio_text(row.unfused_ratio)] if with_unfused else []
        cells += [ratio_text(row.ratio), row.best_peer or ABSENT] if with_peers else []
        view.add_row(*cells)
    return view


def _fraction_text(row: Row) -> str:
    if row.roofline_fraction is None:
        return ABSENT
    return f"{row.roofline_fraction:.0%} {row.limited_by}"


def _caption(rows: Sequence[Row], roofline: Roofline | None) -> str:
    lines = ["time: median of the best round; spread: worst round over best"]
    if any(row.ratio is not None or row.unfused_ratio is not None for row in rows):
        lines.append("vs: the other's time over ours, above 1× ours is faster")
    backends = sorted({row.backend for row in rows})
    lines.append(f"backend: {', '.join(backends)}")
    if roofline is not None:
        fma = "FMA peak unknown" if roofline.fma_gflops is None else f"FMA {roofline.fma_gflops:.0f} GFLOP/s"
        copies = f"{roofline.l2_gbs:.0f} / {roofline.llc_gbs:.0f} / {roofline.memory_gbs:.0f} GB/s"
        lines.append(f"measured peaks: {fma}; copy in L2 / last-level cache / memory {copies}")
        if roofline.fma_absent_because:
            lines.append(f"no native kernels: {roofline.fma_absent_because}")
    return "\n".join(lines)
