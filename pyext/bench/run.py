"""Times the kernels of a family case by case, in turn with their peers, and states what they reach of the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from kernelpress.bench import ours
from kernelpress.bench.contest import OURS, TOLERANCE, UNFUSED, Row, hold, judged, refuse_any, row_of
from kernelpress.bench.layers import layer_of_case
from kernelpress.bench.peers import contiguous, eager
from kernelpress.bench.peers import peers as peer_calls
from kernelpress.bench.roofline import Roofline, measure_roofline
from kernelpress.bench.shapes import Case, cases
from kernelpress.bench.tables import console_table, layer_cells
from kernelpress.runtime.clock import threads_set_to, time_alternately

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["measure_case", "run", "table"]

DEVICES = ("cpu",)


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
    roofline = measure_roofline(threads, again=True)
    return [judged(row, roofline) for row in rows]


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
        tensors = case.make(torch.device("cpu"), torch.float32)
        calls = {OURS: ours.fused(case.op, tensors, case.options)}
        if len(case.stages) > 1:
            calls[UNFUSED] = ours.unfused(case, tensors)
        if peers:
            calls |= peer_calls(case, tensors, with_inductor=with_inductor)
        contestants, errors = hold(
            calls,
            eager(case, contiguous(tensors))(),
            TOLERANCE[torch.float32],
            lambda able: time_alternately(able, budget_seconds=budget_seconds, rounds=rounds),
        )
        backend = ours.backend_of(case.op, tensors, case.options)
    refuse_any(contestants, f"{case.op} {case.label}")
    row = row_of(layer_of_case(case), "fp32", backend, contestants, errors[OURS], threads=roofline.threads)
    return judged(row, roofline)


def table(rows: Sequence[Row], roofline: Roofline | None = None) -> Table:
    """The rows as a rich table, to be printed by `rich.print`; `roofline` adds the peaks they are measured against.

    Raises `ValueError` for no rows.
    """
    if not rows:
        raise ValueError("rows: expected at least one row, got none")
    title = f"{rows[0].family}, {rows[0].threads} threads, fp32"
    return console_table(title, layer_cells([asdict(row) for row in rows]), _caption(rows, roofline))


def _caption(rows: Sequence[Row], roofline: Roofline | None) -> str:
    lines = ["best ms: median of the best round; spread: worst round over best"]
    if any(row.ratio is not None or row.unfused_ratio is not None for row in rows):
        lines.append("÷ ours: the other's time over ours, above 1× ours is faster")
    if roofline is not None:
        lines.append(roofline.told())
        if roofline.fma_absent_because:
            lines.append(f"no native kernels: {roofline.fma_absent_because}")
    return "\n".join(lines)
