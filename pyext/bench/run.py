"""Times the kernels of a family layer by layer, in turn with their peers; states what they reach of the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from kernelpress.bench import ours
from kernelpress.bench.contest import (
    OURS,
    TOLERANCE,
    UNFUSED,
    Row,
    expected_of,
    hold,
    judged,
    kind_of,
    refuse_any,
    row_of,
)
from kernelpress.bench.int8_peers import SATURATING, signed
from kernelpress.bench.layers import FAMILIES, Layer, layers
from kernelpress.bench.peers import peers as peer_calls
from kernelpress.bench.roofline import Roofline, measure_roofline
from kernelpress.bench.tables import console_table, layer_cells
from kernelpress.runtime.clock import threads_set_to, time_alternately

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["measure_layer", "run", "table"]

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
    only: Sequence[Layer] | None = None,
) -> list[Row]:
    """Benchmarks every layer of `family`, one of `FAMILIES` (or those of `only`), one row each.

    `peers` times eager in both memory formats and oneDNN in turn with ours, of int8 layers oneDNN and FBGEMM;
    `with_inductor` adds `torch.compile` to those in float32, which compiles for seconds a layer. `budget_seconds` is
    the measuring time of one contestant at one layer, `threads` torch's number of threads (`None`: as it is).

    Raises `ValueError` for an unknown family or device and for counts that are not positive, `RuntimeError` where
    results disagree.
    """
    if device not in DEVICES:
        raise ValueError(f"device: expected one of {', '.join(DEVICES)}, or `run_backends`; got {device!r}")
    if family not in FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {family!r}")
    chosen = layers(family, batch=batch) if only is None else only
    roofline = measure_roofline(threads)
    settings: Any = {"peers": peers, "with_inductor": with_inductor, "rounds": rounds, "budget_seconds": budget_seconds}
    rows = [measure_layer(layer, roofline, **settings) for layer in chosen]
    roofline = measure_roofline(threads, again=True)
    return [judged(row, roofline) for row in rows]


def measure_layer(
    layer: Layer,
    roofline: Roofline,
    *,
    peers: bool = False,
    with_inductor: bool = False,
    rounds: int = 5,
    budget_seconds: float = 0.3,
) -> Row:
    """Benchmarks one layer with as many threads as `roofline` was measured with, on fresh random inputs.

    Raises `RuntimeError` where ours or a peer disagrees with the reference. An int8 peer that does is kept with the
    reason: without VNNI, FBGEMM saturates at 16 bits everywhere.
    """
    dtype = layer.dtype or torch.float32
    with threads_set_to(roofline.threads), torch.no_grad():
        call = (layer.op, *layer.make(torch.device("cpu"), torch.float32))
        backend = ours.backend_of(*call)
        contestants, errors = hold(
            {
                OURS: ours.on_backend(*call, backend),
                UNFUSED: ours.unfused(*call),
                **(peer_calls(*call, with_inductor=with_inductor) if peers else {}),
            },
            expected_of(*call),
            TOLERANCE[dtype],
            lambda able: time_alternately(able, budget_seconds=budget_seconds, rounds=rounds),
            unjudged=frozenset({SATURATING}),
            read=signed,
        )
    strict = [entry for entry in contestants if dtype != torch.int8 or entry.name == OURS]
    refuse_any(strict, f"{layer.op} {layer.title}")
    return row_of(layer, kind_of(dtype), backend, contestants, errors[OURS], roofline, threads=roofline.threads)


def table(rows: Sequence[Row], roofline: Roofline | None = None) -> Table:
    """The rows as a rich table, to be printed by `rich.print`; `roofline` adds the peaks they are measured against.

    Raises `ValueError` for no rows.
    """
    if not rows:
        raise ValueError("rows: expected at least one row, got none")
    title = f"{rows[0].family}, {rows[0].threads} threads, {rows[0].kind}"
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
