"""The page of `kernelpress sweep` and `search`: what each trial reached, the Pareto fronts, the best within limits."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kernelpress.bench.machine import Machine
from kernelpress.measure.units import ABSENT, count_text, latency_text, ratio_text
from kernelpress.report.figures import Point, scatter
from kernelpress.report.html import rendered
from kernelpress.report.record import Report

__all__ = ["TRIAL_HEADER", "Limits", "Reached", "SweepReport", "Trial", "render_sweep"]

TRIAL_HEADER = (
    "trial", "accuracy", "lost", "latency", "measured", "over emitted", "theoretical", "realisation", "FLOPs",
    "parameters", "remark",
)  # fmt: skip


@dataclass(frozen=True)
class Reached:
    """What a trial reached: accuracies 0…1, latencies in ms, costs of one image, speed-ups over the dense model.

    `measured` is over the fastest way to run the dense model in PyTorch, `over_emitted` over its emission, None where
    that was not measured; `realisation` is the latter ÷ `theoretical`, so that no gain of the kernels counts in it.
    """

    accuracy: float
    dense_accuracy: float
    latency_ms: float
    flops: int
    parameters: int
    measured: float
    over_emitted: float | None
    theoretical: float | None

    @property
    def realisation(self) -> float | None:
        """What is measured of the theoretical speed-up; None where either is unknown."""
        return None if self.over_emitted is None or not self.theoretical else self.over_emitted / self.theoretical

    @classmethod
    def of(cls, report: Report, dense_emitted: str) -> Reached:
        """What the report of the trial's run says; `dense_emitted` names the emitted dense model, if that is there."""
        speedup, pressed, dense = report.comparison.speedup(report.pressed), report.points[-1], report.points[0]
        was_measured = any(profile.name == dense_emitted for profile in report.comparison.profiles)
        return cls(
            pressed.accuracy,
            dense.accuracy,
            report.comparison[report.pressed].latency.median,
            pressed.flops,
            pressed.parameters,
            speedup.measured,
            report.comparison.against(dense_emitted).speedup(report.pressed).measured if was_measured else None,
            speedup.theoretical,
        )


@dataclass(frozen=True)
class Trial:
    """One run: its name, the options that it changes by their paths, its folder, and what came of it."""

    name: str
    options: dict[str, Any]
    folder: str
    reached: Reached | None = None
    failure: str = ""
    """Why it reached nothing, or what it does not reach of what its recipe requires."""

    def cells(self) -> list[str]:
        """What stands under `TRIAL_HEADER`."""
        reached, remark = self.reached, " ".join(self.failure.split())
        if reached is None:
            return [self.name, *[ABSENT] * (len(TRIAL_HEADER) - 2), remark]
        return [
            self.name,
            f"{reached.accuracy:.2%}",
            f"{100 * (reached.dense_accuracy - reached.accuracy):.2f}",
            latency_text(reached.latency_ms),
            ratio_text(reached.measured),
            ratio_text(reached.over_emitted),
            ratio_text(reached.theoretical),
            ABSENT if reached.realisation is None else f"{reached.realisation:.2f}",
            count_text(reached.flops),
            count_text(reached.parameters),
            remark,
        ]


@dataclass(frozen=True)
class Limits:
    """What the best trial must keep to; None does not matter."""

    max_ms: float | None = None
    min_accuracy: float | None = None
    max_drop: float | None = None
    """Accuracy lost against the dense model of the same trial."""

    def are_kept(self, reached: Reached) -> bool:
        """Whether they are."""
        # Accuracies are counts over counts: leave room for their rounding.
        drop = reached.dense_accuracy - reached.accuracy - 1e-9
        return (
            (self.max_ms is None or reached.latency_ms <= self.max_ms)
            and (self.min_accuracy is None or reached.accuracy >= self.min_accuracy)
            and (self.max_drop is None or drop <= self.max_drop)
        )

    def __str__(self) -> str:
        told = [
            f"at most {latency_text(self.max_ms)}" if self.max_ms is not None else "",
            f"accuracy of at least {self.min_accuracy:.2%}" if self.min_accuracy is not None else "",
            f"at most {self.max_drop:.2%} of accuracy lost" if self.max_drop is not None else "",
        ]
        return ", ".join(filter(None, told)) or "no limits"


@dataclass(frozen=True)
class SweepReport:
    """All trials of a sweep or a search."""

    title: str
    date: str
    commit: str | None
    machine: Machine
    limits: Limits
    trials: tuple[Trial, ...]

    def best(self) -> Trial | None:
        """The most accurate trial within a limit of latency alone, the fastest within limits that speak of accuracy;
        None where no trial keeps to them, or there are none."""
        if self.limits == Limits():
            return None
        by_accuracy = self.limits.min_accuracy is None and self.limits.max_drop is None

        def rank(reached: Reached) -> tuple[float, float]:
            order = (-reached.accuracy, reached.latency_ms)
            return order if by_accuracy else (order[1], order[0])

        kept = [(rank(t.reached), t) for t in self.trials if t.reached is not None and self.limits.are_kept(t.reached)]
        return min(kept, key=lambda pair: pair[0])[1] if kept else None

    def front(self, cost: Callable[[Reached], float]) -> tuple[Trial, ...]:
        """The Pareto front, from the cheapest on: trials than which none is as accurate for less of the cost."""
        found: list[Trial] = []
        done = [(cost(t.reached), -t.reached.accuracy, t) for t in self.trials if t.reached is not None]
        for _, loss, trial in sorted(done, key=lambda item: item[:2]):
            if not found or found[-1].reached is None or -loss > found[-1].reached.accuracy:
                found.append(trial)
        return tuple(found)

    def verdict(self) -> str:
        """Which trial is the best, in a line; nothing without limits."""
        if self.limits == Limits():
            return ""
        best = self.best()
        if best is not None and best.reached is not None:
            reached = best.reached
            return f"best with {self.limits}: {best.name}, {latency_text(reached.latency_ms)}, {reached.accuracy:.2%}"
        return f"no trial keeps to the limits: {self.limits}"

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """The header and the rows of the table, as text."""
        return list(TRIAL_HEADER), [trial.cells() for trial in self.trials]

    def notes(self) -> list[str]:
        """What a reader of the table must know."""
        return [
            "lost: points of accuracy against the trial's own dense model. measured: speed-up over the fastest way to "
            "run that one in PyTorch, in the same rounds. Trials were timed one after the other: where two are close, "
            "their speed-ups say more than their latencies."
        ]

    def to_json(self) -> str:
        """The report as JSON."""
        best = self.best()
        fronts = {name: [trial.name for trial in self.front(cost)] for name, cost, *_ in _COSTS}
        told = {**asdict(self), "best": best and best.name, "fronts": fronts}
        return json.dumps(told, indent=1, ensure_ascii=False, default=str)


_COSTS: tuple[tuple[str, Callable[[Reached], float], float, str], ...] = (
    ("latency", lambda reached: reached.latency_ms, 1.0, "latency [ms]"),
    ("FLOPs", lambda reached: reached.flops, 1e-6, "MFLOP per image"),
)
"""What accuracy is held against: its name, itself, its scale and its label."""


def render_sweep(report: SweepReport) -> str:
    """One self-contained page. Raises `ImportError` without jinja2 or matplotlib."""
    header, rows = report.cells()
    best = report.best()
    return rendered(
        "sweep.html.j2",
        report=report,
        header=header,
        rows=rows,
        best_index=None if best is None else report.trials.index(best),
        figures=[
            (f"Accuracy against {name}", _figure(report.trials, report.front(cost), cost, scale, label))
            for name, cost, scale, label in _COSTS
            if any(trial.reached for trial in report.trials)
        ],
    )


def _figure(
    trials: Sequence[Trial], front: Sequence[Trial], cost: Callable[[Reached], float], scale: float, label: str
) -> str:
    """All trials, those of the front named and joined."""
    points = [
        Point(trial.name if trial in front else "", scale * cost(reached), 100 * reached.accuracy, trial in front)
        for trial in trials
        if (reached := trial.reached) is not None
    ]
    return scatter(points, label, "test accuracy [%]", is_joined=True)
