"""The same layers on several backends, side by side: on the CPU by the host's clock, on a CUDA device by its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kernelpress.bench import ours
from kernelpress.bench.calls import Call
from kernelpress.bench.contest import (
    KINDS,
    TF32_TOLERANCE,
    TOLERANCE,
    Contestant,
    expected_of,
    hold,
    kind_of,
    refuse_any,
)
from kernelpress.bench.layers import Layer, layers
from kernelpress.bench.peers import MOVES
from kernelpress.bench.tables import console_table, number_text
from kernelpress.measure.units import ABSENT, latency_text, ratio_text
from kernelpress.ops import registry
from kernelpress.runtime.clock import Timing, threads_set_to, time_alternately
from kernelpress.runtime.device_clock import time_graphs

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["DEVICES", "DTYPES", "BackendRow", "CannotRunError", "backend_table", "run_backends"]

DEVICES = ("cpu", "cuda")

DTYPES = ("fp32", "fp16", "bf16")

MOVING = MOVES | {"depthwise_conv2d", "int8_depthwise_conv2d", "squeeze_excite"}
"""Ops whose rate is told in GB/s; that of the others is in GFLOP/s."""

_NOT_IMPLEMENTED = "has no implementation on it"


@dataclass(frozen=True)
class BackendRow:
    """A layer on every backend, in the order asked for; `dtype` is that of its arithmetic."""

    layer: Layer
    device: str
    dtype: str
    entries: tuple[Contestant, ...]

    @property
    def unit(self) -> str:
        """Of the rate: GB/s of compulsory traffic for ops that move memory, else GFLOP/s."""
        return "GB/s" if self.layer.op in MOVING else "GFLOP/s"

    def rate(self, entry: Contestant) -> float | None:
        """What an entry reaches, in the row's unit."""
        is_moving = self.layer.op in MOVING
        work = self.layer.traffic_bytes(KINDS[self.dtype]) if is_moving else self.layer.flops
        return None if entry.ms is None else work / entry.ms * 1e-6

    def ratio(self, entry: Contestant) -> float | None:
        """The first backend's time ÷ an entry's: above 1 the entry is faster; None where one of them has no time."""
        first = self.entries[0].ms
        return None if first is None or entry.ms is None else first / entry.ms


class CannotRunError(RuntimeError):
    """A backend can run none of a family's layers."""


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
    only: Sequence[Layer] | None = None,
) -> list[BackendRow]:
    """Times every layer of `family` (or those of `only`) on every backend in turn, one row a layer.

    `cpu` runs as steps of a captured plan, what runs on a CUDA device as CUDA graphs from a flushed cache, all others
    through their op. Kernels run in the tile configurations that calls of theirs would (see `KERNELPRESS_AUTOTUNE`).
    `budget_seconds` is the measuring time of one backend at one layer. Layers of the family int8 are in int8 whatever
    the `dtype`.

    Raises `ValueError` for an unknown family, backend, device or dtype, `CannotRunError` with the reason where a
    backend can run none of the layers, `RuntimeError` where there is no such device or results disagree with the
    reference.
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
    chosen = layers(family, batch=batch) if only is None else tuple(only)
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("device: torch.cuda.is_available() is False; `kernelpress doctor` tells why")
    where = torch.device(device)
    refusals = [_refusals(layer, names, where, KINDS[dtype]) for layer in chosen]
    for name in names:
        if all(reasons[name] is not None for reasons in refusals):
            telling = [reasons[name] for reasons in refusals if not str(reasons[name]).endswith(_NOT_IMPLEMENTED)]
            reason = telling[0] if telling else refusals[0][name]
            kind = kind_of(chosen[0].dtype or KINDS[dtype])
            raise CannotRunError(f"backends: {name!r} cannot run {family} on {device} in {kind}: {reason}")
    with threads_set_to(threads), torch.no_grad():
        return [
            _measured(layer, reasons, where, KINDS[dtype], rounds, budget_seconds)
            for layer, reasons in zip(chosen, refusals, strict=True)
        ]


def _refusals(layer: Layer, backends: Sequence[str], device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """Why a backend cannot run a layer, None where it can."""
    tensors, options = layer.make(device, dtype)
    implemented = registry.why_not(layer.op, *tensors, **options)
    return {name: implemented.get(name, f"{layer.op} {_NOT_IMPLEMENTED}") for name in backends}


def _measured(
    layer: Layer,
    refusals: Mapping[str, str | None],
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    budget_seconds: float,
) -> BackendRow:
    call, kind = (layer.op, *layer.make(device, dtype)), layer.dtype or dtype
    calls = {name: ours.on_backend(*call, name) for name, reason in refusals.items() if reason is None}
    tolerance = TF32_TOLERANCE if device.type == "cuda" and kind == torch.float32 else TOLERANCE[kind]
    timed, _ = hold(calls, expected_of(*call), tolerance, lambda able: _timings(able, device, rounds, budget_seconds))
    refuse_any(timed, f"{layer.op} {layer.title}")
    by_name = {entry.name: entry for entry in timed}
    entries = tuple(by_name.get(name, Contestant(name, None, None, why)) for name, why in refusals.items())
    return BackendRow(layer, device.type, kind_of(kind), entries)


def _timings(calls: Mapping[str, Call], device: torch.device, rounds: int, budget_seconds: float) -> dict[str, Timing]:
    if device.type == "cuda":
        return time_graphs(calls, device, budget_seconds=budget_seconds, rounds=rounds)
    return time_alternately(calls, budget_seconds=budget_seconds, rounds=rounds)


def backend_table(rows: Sequence[BackendRow]) -> Table:
    """The rows as a rich table, to be printed by `rich.print`; below it what could not run, and why.

    Raises `ValueError` for no rows.
    """
    if not rows:
        raise ValueError("rows: expected at least one row, got none")
    units, first = list(dict.fromkeys(row.unit for row in rows)), rows[0]
    header, cells = ["network", "layer"], [[row.layer.network, row.layer.title] for row in rows]
    for at, backend in enumerate(entry.name for entry in first.entries):
        header += [backend, " or ".join(units), *([f"vs {first.entries[0].name}"] if at else [])]
        for row, of_row in zip(rows, cells, strict=True):
            entry = row.entries[at]
            unit = f" {row.unit}" if len(units) > 1 and entry.ms is not None else ""
            of_row += [
                ABSENT if entry.ms is None else latency_text(entry.ms),
                number_text(row.rate(entry), ".1f") + unit,
            ]
            of_row += [ratio_text(row.ratio(entry))] if at else []
    return console_table(f"{first.layer.family} on {first.device}, {first.dtype}", (header, cells), _caption(rows))


def _caption(rows: Sequence[BackendRow]) -> str:
    lines = [
        "time: median of the best round; vs: the first backend's time over this one's, above 1× this one is faster"
    ]
    refused = {(entry.name, row.layer.op): entry.reason for row in rows for entry in row.entries if entry.reason}
    lines += [f"{backend} cannot run {op}: {reason}" for (backend, op), reason in refused.items()]
    return "\n".join(lines)
