"""The same layers on several backends, side by side: on the CPU by the host's clock, on a CUDA device by its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernelpress.bench import ours
from kernelpress.bench.peers import LayerInputs, eager, random_inputs
from kernelpress.bench.run import relative_error
from kernelpress.bench.shapes import FLOAT_BYTES, Case, cases
from kernelpress.measure.device_clock import time_graphs
from kernelpress.measure.latency import Timing, threads_set_to, time_alternately
from kernelpress.measure.units import ABSENT, latency_text, ratio_text
from kernelpress.ops import registry

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["DEVICES", "DTYPES", "BackendRow", "Entry", "backend_table", "run_backends"]

DEVICES = ("cpu", "cuda")

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

MAX_RELATIVE_ERROR = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""To eager in float32; of float32 as tensor cores round it to TF32."""

MOVING = frozenset({"depthwise"})
"""Families whose rate is told in GB/s; that of the others is in GFLOP/s."""

_NOT_IMPLEMENTED = "has no implementation on it"


@dataclass(frozen=True)
class Entry:
    """A layer on one backend: the median of the best round in ms, or why the backend cannot run it."""

    backend: str
    ms: float | None
    reason: str | None = None


@dataclass(frozen=True)
class BackendRow:
    """A layer on every backend, in the order asked for."""

    family: str
    op: str
    network: str
    layer: str
    device: str
    dtype: str
    flops: int
    traffic_bytes: int
    entries: tuple[Entry, ...]

    def rate(self, entry: Entry) -> float | None:
        """What an entry reaches: GB/s of compulsory traffic for families that move memory, else GFLOP/s."""
        work = self.traffic_bytes if self.family in MOVING else self.flops
        return None if entry.ms is None else work / entry.ms * 1e-6

    def ratio(self, entry: Entry) -> float | None:
        """The first backend's time ÷ an entry's: above 1 the entry is faster; None where one of them has no time."""
        first = self.entries[0].ms
        return None if first is None or entry.ms is None else first / entry.ms


def run_backends(
    family: str,
    backends: Sequence[str],
    device: str = "cpu",
    *,
    dtype: str = "fp32",
    batch: int = 1,
    threads: int | None = None,
    rounds: int = 5,
    budget_seconds: float = 0.1,
    only: Sequence[Case] | None = None,
) -> list[BackendRow]:
    """Times every case of `family` (or those of `only`) on every backend in turn, one row a case.

    `cpu` runs as steps of a captured plan, what runs on a CUDA device as CUDA graphs from a flushed cache, all others
    through their op. Kernels run in the tile configurations that calls of theirs would (see `KERNELPRESS_AUTOTUNE`).
    `budget_seconds` is the measuring time of one backend at one case.

    Raises `ValueError` for an unknown family, backend, device or dtype, `RuntimeError` with the reason where a backend
    can run none of the cases, and where results disagree with eager.
    """
    names = list(dict.fromkeys(backends))
    unknown = [name for name in names if name not in registry.BACKENDS]
    if unknown or not names:
        raise ValueError(
            f"backends: expected some of {', '.join(registry.BACKENDS)}, got {', '.join(unknown) or 'none'}"
        )
    if device not in DEVICES:
        raise ValueError(f"device: expected one of {', '.join(DEVICES)}, got {device!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    chosen = cases(family, batch=batch) if only is None else tuple(only)
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("device: torch.cuda.is_available() is False; `kernelpress doctor` tells why")
    where = torch.device(device)
    refusals = [_refusals(case, names, where, dtype) for case in chosen]
    for name in names:
        if all(reasons[name] is not None for reasons in refusals):
            telling = [reasons[name] for reasons in refusals if not str(reasons[name]).endswith(_NOT_IMPLEMENTED)]
            reason = telling[0] if telling else refusals[0][name]
            raise RuntimeError(f"backends: {name!r} cannot run {family} on {device} in {dtype}: {reason}")
    with threads_set_to(threads), torch.no_grad():
        return [
            _measured(case, reasons, where, dtype, rounds, budget_seconds)
            for case, reasons in zip(chosen, refusals, strict=True)
        ]


def _inputs(case: Case, device: torch.device) -> LayerInputs:
    with device:
        return random_inputs(case)


def _refusals(case: Case, backends: Sequence[str], device: torch.device, dtype: str) -> dict[str, str | None]:
    """Why a backend cannot run a case, None where it can."""
    tensors, options = ours.arguments(case, _inputs(case, device).to(DTYPES[dtype]))
    implemented = registry.why_not(case.op, *tensors, **options)
    return {name: implemented.get(name, f"{case.op} {_NOT_IMPLEMENTED}") for name in backends}


def _measured(
    case: Case,
    refusals: Mapping[str, str | None],
    device: torch.device,
    dtype: str,
    rounds: int,
    budget_seconds: float,
) -> BackendRow:
    exact = _inputs(case, device)
    inputs, expected = exact.to(DTYPES[dtype]), eager(case, exact)()
    calls = {name: ours.on_backend(case, inputs, name) for name, reason in refusals.items() if reason is None}
    for name, call in calls.items():
        error = relative_error(call(), expected)
        if not error <= MAX_RELATIVE_ERROR[DTYPES[dtype]]:
            raise RuntimeError(f"{case.op} {case.label}: {name} differs from eager by {error:.1e} (relative)")
    timings = _timings(calls, device, rounds, budget_seconds) if calls else {}
    return BackendRow(
        *(case.family, case.op, case.network, case.label, device.type, dtype),
        flops=case.flops,
        traffic_bytes=case.traffic_bytes * DTYPES[dtype].itemsize // FLOAT_BYTES,
        entries=tuple(
            Entry(name, timings[name].median if name in timings else None, reason) for name, reason in refusals.items()
        ),
    )


def _timings(
    calls: Mapping[str, Callable[[], Tensor]], device: torch.device, rounds: int, budget_seconds: float
) -> dict[str, Timing]:
    if device.type == "cuda":
        return time_graphs(calls, device, budget_seconds=budget_seconds, rounds=rounds)
    return time_alternately(calls, budget_seconds=budget_seconds, rounds=rounds)


def backend_table(rows: Sequence[BackendRow]) -> Table:
    """The rows as a rich table, to be printed by `rich.print`; below it what could not run, and why.

    Raises `ValueError` for no rows.
    """
    from rich.table import Table

    if not rows:
        raise ValueError("rows: expected at least one row, got none")
    backends = [entry.backend for entry in rows[0].entries]
    unit = "GB/s" if rows[0].family in MOVING else "GFLOP/s"
    view = Table(title=f"{rows[0].family} on {rows[0].device}, {rows[0].dtype}", caption=_caption(rows))
    view.add_column("network")
    view.add_column("layer", no_wrap=True)
    for at, name in enumerate(backends):
        for column in (name, unit, *([f"vs {backends[0]}"] if at else [])):
            view.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        cells = [row.network, row.layer]
        for at, entry in enumerate(row.entries):
            rate = row.rate(entry)
            cells += [ABSENT if entry.ms is None else latency_text(entry.ms), ABSENT if rate is None else f"{rate:.1f}"]
            cells += [ratio_text(row.ratio(entry))] if at else []
        view.add_row(*cells)
    return view


def _caption(rows: Sequence[BackendRow]) -> str:
    lines = [
        "time: median of the best round; vs: the first backend's time over this one's, above 1× this one is faster"
    ]
    refused = {(entry.backend, row.op): entry.reason for row in rows for entry in row.entries if entry.reason}
    lines += [f"{backend} cannot run {op}: {reason}" for (backend, op), reason in refused.items()]
    return "\n".join(lines)
