"""What a report tells, as data: the same record becomes the HTML page and the JSON file."""

from __future__ import annotations

import subprocess
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from kernelpress.bench.machine import Machine
from kernelpress.emit.candidates import ORIGINAL
from kernelpress.emit.record import EmissionRecord, PlaceRecord
from kernelpress.measure import Comparison

__all__ = ["AccuracyPoint", "LayerRealisation", "Report", "Requirement", "commit_of", "layer_realisations", "now"]


@dataclass(frozen=True)
class AccuracyPoint:
    """Test accuracy 0…1 at one point of the run, and what the model costs there; latency in ms where measured."""

    name: str
    accuracy: float
    flops: int
    parameters: int
    latency_ms: float | None


@dataclass(frozen=True)
class LayerRealisation:
    """One place of the dense model beside the same place of the pressed one; times in ms, of one inference."""

    name: str
    dense_flops: int
    pressed_flops: int
    dense_ms: float
    """The original operations in the faster memory format."""
    pressed_ms: float
    choice: str

    @property
    def theoretical(self) -> float | None:
        """FLOP ratio."""
        return self.dense_flops / self.pressed_flops if self.pressed_flops and self.dense_flops else None

    @property
    def measured(self) -> float:
        """Time ratio."""
        return self.dense_ms / self.pressed_ms

    @property
    def realisation(self) -> float | None:
        """Measured ÷ theoretical speed-up."""
        return None if self.theoretical is None else self.measured / self.theoretical


@dataclass(frozen=True)
class Requirement:
    """One promise of the recipe, and whether the run kept it."""

    name: str
    wanted: str
    got: str
    is_met: bool


@dataclass(frozen=True)
class Report:
    """A whole run."""

    title: str
    date: str
    commit: str | None
    machine: Machine
    recipe: dict[str, Any]
    comparison: Comparison
    pressed: str
    """Which contestant is the product."""
    accuracies: tuple[AccuracyPoint, ...]
    layers: tuple[LayerRealisation, ...]
    emission: EmissionRecord
    requirements: tuple[Requirement, ...]
    stage_seconds: dict[str, float]
    notes: tuple[str, ...] = ()

    def headline(self) -> str:
        """The run in one line: measured and theoretical speed-up, and their ratio."""
        ratio = self.comparison.speedup(self.pressed)
        theory = "" if ratio.theoretical is None else f", theoretical {ratio.theoretical:.1f}×"
        realised = "" if ratio.realisation is None else f", realisation {ratio.realisation:.1f}"
        pace = f"{ratio.measured:.1f}× faster" if ratio.measured >= 1 else f"{1 / ratio.measured:.1f}× slower"
        return f"{pace}{theory}{realised}"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        return {
            "title": self.title,
            "headline": self.headline(),
            "date": self.date,
            "commit": self.commit,
            "machine": asdict(self.machine),
            "comparison": self.comparison.to_dict(),
            "pressed": self.pressed,
            "accuracies": [asdict(point) for point in self.accuracies],
            "layers": [
                {
                    **asdict(layer),
                    "theoretical": layer.theoretical,
                    "measured": layer.measured,
                    "realisation": layer.realisation,
                }
                for layer in self.layers
            ],
            "emission": self.emission.to_json(),
            "requirements": [asdict(requirement) for requirement in self.requirements],
            "stage_seconds": self.stage_seconds,
            "notes": list(self.notes),
            "recipe": self.recipe,
        }


def layer_realisations(dense: EmissionRecord, pressed: EmissionRecord) -> tuple[LayerRealisation, ...]:
    """Place by place, what the dense model's original operations take and what the pressed model's chosen ones do.

    Both models have the same operations; where the two emissions drew their places differently, those that share
    operations are taken together. A place whose original operations were not timed is left out.
    """
    groups: list[tuple[set[str], list[PlaceRecord], list[PlaceRecord]]] = []
    for record in (dense, pressed):
        for place in record.places:
            merged = (set(place.operations), [place], []) if record is dense else (set(place.operations), [], [place])
            for group in [group for group in groups if group[0] & merged[0]]:
                groups.remove(group)
                merged = (merged[0] | group[0], group[1] + merged[1], group[2] + merged[2])
            groups.append(merged)

    layers = []
    for _, before, after in groups:
        originals = [_original_ms(place) for place in before]
        pressed_ms = sum(place.milliseconds for place in after)
        if not after or not before or pressed_ms <= 0 or any(time is None for time in originals):
            continue
        layers.append(
            LayerRealisation(
                name=" + ".join(dict.fromkeys(place.name or place.operations[0] for place in after)),
                dense_flops=sum(place.flops for place in before),
                pressed_flops=sum(place.flops for place in after),
                dense_ms=sum(time for time in originals if time is not None),
                pressed_ms=pressed_ms,
                choice=" + ".join(dict.fromkeys(place.choice for place in after)),
            )
        )
    return tuple(layers)


def _original_ms(place: PlaceRecord) -> float | None:
    """Time of the operations as they came, in the faster memory format; `None` where they were not timed."""
    times = [
        candidate.milliseconds
        for candidate in place.candidates
        if candidate.milliseconds is not None and candidate.name.startswith(f"{ORIGINAL}[")
    ]
    return min(times, default=None)


def commit_of(folder: Path) -> str | None:
    """The commit checked out around `folder`, with `+changes` for a modified tree; `None` outside a git checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "--short=12", "HEAD")
    if not commit:
        return None
    return f"{commit}+changes" if git("status", "--porcelain", "--untracked-files=no") else commit


def now() -> str:
    """The date and time in UTC, to the minute."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
