"""The page of `kernelpress compare`: networks in several runtimes, by what they cost and what they know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kernelpress.bench.contest import OURS
from kernelpress.bench.machine import Machine
from kernelpress.bench.model_contest import ModelResult, RuntimeResult
from kernelpress.measure.units import ABSENT, count_text, energy_text, latency_text, memory_text, ratio_text
from kernelpress.report.bars import Bar, Scale
from kernelpress.report.figures import Point, scatter
from kernelpress.report.html import rendered

__all__ = ["Accuracy", "NetworkComparison", "render_networks"]


@dataclass(frozen=True)
class Accuracy:
    """ImageNet top-1 of a network in %, and who published it."""

    percent: float
    source: str


@dataclass(frozen=True)
class NetworkComparison:
    """What was measured of each network, and the accuracies that are published of some."""

    date: str
    commit: str | None
    machine: Machine
    results: tuple[ModelResult, ...]
    accuracies: dict[str, Accuracy]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        return asdict(self)

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """The table: a row for each network in each runtime."""
        header = ["network", "runtime", "time", "speed-up", "total", "weights", "peak", "energy", "FLOPs", "parameters"]
        rows = []
        for result in self.results:
            eager = result.runtimes[0].best_ms
            for entry in result.runtimes:
                best = entry.best_ms
                rows.append(
                    [
                        result.model,
                        entry.runtime,
                        entry.skipped or ABSENT if best is None else latency_text(best),
                        ratio_text(eager / best if eager and best else None),
                        ABSENT if entry.start is None else f"{entry.start.total_s:.2f} s",
                        memory_text(result.weight_bytes),
                        memory_text(entry.peak_bytes),
                        energy_text(entry.joules),
                        count_text(result.flops),
                        count_text(result.parameters),
                    ]
                )
        return header, rows

    def notes(self) -> list[str]:
        """What a reader of the table must know."""
        notes = [
            "time: best round's median of one call. total: start of a process to its first result, torch.compile's "
            "compilation included; ours loads a file that emission has written before. peak: resident memory at its "
            "highest while it runs, above that after the imports."
        ]
        emitted = [f"{r.model} {r.emission_s:.1f} s" for r in self.results if r.emission_s is not None]
        notes += [f"emission, once: {', '.join(emitted)}"] * bool(emitted)
        reasons = {entry.energy_reason for result in self.results for entry in result.runtimes if entry.energy_reason}
        return notes + [f"no energy: {reason}" for reason in sorted(reasons)]


@dataclass(frozen=True)
class _Cost:
    """A cost that the page shows as bars."""

    title: str
    of: Callable[[RuntimeResult], float | None]
    text: Callable[[float], str]


_COSTS = (
    _Cost("Inference time", lambda entry: entry.best_ms, latency_text),
    _Cost(
        "Total time: import, load, first image",
        lambda entry: None if entry.start is None else entry.start.total_s,
        lambda seconds: f"{seconds:.2f} s",
    ),
    _Cost("Peak memory", lambda entry: entry.peak_bytes, lambda value: memory_text(round(value))),
    _Cost("Energy", lambda entry: entry.joules, energy_text),
)


def render_networks(comparison: NetworkComparison) -> str:
    """One self-contained page. Raises `ImportError` without jinja2 or matplotlib."""
    header, rows = comparison.cells()
    return rendered(
        "networks.html.j2",
        comparison=comparison,
        header=header,
        rows=rows,
        ours=OURS,
        costs=[(cost.title, _bars(comparison.results, cost)) for cost in _COSTS],
        figures=_figures(comparison),
    )


def _bars(results: Sequence[ModelResult], cost: _Cost) -> Scale:
    """A bar for each network in each runtime that has this cost; none where nobody has."""
    found = [(r.model, e.runtime, value) for r in results for e in r.runtimes if (value := cost.of(e)) is not None]
    percent = 100 / max((value for *_, value in found), default=1)
    return Scale(
        tuple(
            Bar(f"{model}, {runtime}", cost.text(value), 0.0, value * percent, None, tone="ours" * (runtime == OURS))
            for model, runtime, value in found
        )
    )


def _figures(comparison: NetworkComparison) -> list[tuple[str, str]]:
    """Accuracy against FLOPs, and against latency in each runtime; none without accuracies."""
    accuracies = comparison.accuracies
    known = [(result, accuracies[result.model]) for result in comparison.results if result.model in accuracies]
    if not known:
        return []
    flops = [Point(r.model, r.flops * 1e-6, a.percent, False) for r, a in known if r.flops is not None]
    times = [
        Point(r.model if e.runtime == OURS else "", e.best_ms, a.percent, e.runtime == OURS)
        for r, a in known
        for e in r.runtimes
        if e.best_ms is not None
    ]
    label = "ImageNet top-1 [%]"
    return [
        (title, scatter(points, x_label, label))
        for title, points, x_label in (
            ("Accuracy against FLOPs", flops, "MFLOP per inference"),
            ("Accuracy against latency", times, "latency [ms]"),
        )
        if points
    ]
