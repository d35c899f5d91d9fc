"""What a report tells, as data: the same record becomes the HTML page and the JSON file."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from kernelpress.bench.machine import Machine
from kernelpress.emit.candidates import ORIGINAL
from kernelpress.emit.record import EmissionRecord, PlaceRecord
from kernelpress.measure import Comparison
from kernelpress.measure.theory import nearest_layer

__all__ = [
    "Curve",
    "Curves",
    "Gain",
    "LayerRealisation",
    "Reading",
    "Report",
    "Requirement",
    "StepPoint",
    "commit_of",
    "layer_realisations",
    "now",
]


@dataclass(frozen=True)
class StepPoint:
    """Test accuracy 0…1 at one point of the run, and what the model costs there for one image; latency in ms where
    measured."""

    name: str
    accuracy: float
    flops: int
    promised_flops: float
    """What of `flops` is left in theory, as `kernelpress.measure.promised_flops` counts."""
    parameters: int
    latency_ms: float | None


@dataclass(frozen=True)
class Gain:
    """By what a step of the run multiplied the speed-up, in theory and by the clock; None where that is not known."""

    step: str
    theoretical: float | None
    measured: float | None
    since: tuple[str, ...]
    """The steps that `measured` is about: this one, and those before it behind which nothing was timed."""


@dataclass(frozen=True)
class Curve:
    """A line of a figure: points (x, y, least y, largest y), the last two alike where nothing spreads."""

    name: str
    points: tuple[tuple[float, float, float, float], ...]


@dataclass(frozen=True)
class Curves:
    """A figure of lines; `percent_left` has x as a share in %, on a logarithmic axis that falls to the right."""

    title: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]
    percent_left: bool = False


@dataclass(frozen=True)
class Reading:
    """What one pass did: a line, a table of what it changed under `header`, remarks, figures."""

    headline: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    remarks: tuple[str, ...]
    figures: tuple[Curves, ...] = ()


@dataclass(frozen=True)
class LayerRealisation:
    """One or more layers of the dense model beside what stands in their place in the pressed one; times in ms, of one
    inference."""

    name: str
    dense_flops: int
    pressed_flops: int
    promised_flops: float
    """What of `pressed_flops` is left in theory."""
    dense_ms: float
    """The original operations in the faster memory format."""
    pressed_ms: float
    choice: str

    @property
    def theoretical(self) -> float | None:
        """Ratio of the FLOPs promised."""
        return self.dense_flops / self.promised_flops if self.promised_flops and self.dense_flops else None

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
    points: tuple[StepPoint, ...]
    """From the dense model to the pressed one as it runs."""
    gains: tuple[Gain, ...]
    """What led from the dense model in PyTorch to the pressed one: emission, and each step since."""
    passes: Mapping[str, Reading]
    """What each pass did, by the id of its step."""
    layers: tuple[LayerRealisation, ...]
    emission: EmissionRecord
    requirements: tuple[Requirement, ...]
    step_seconds: dict[str, float]
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
            "points": [asdict(point) for point in self.points],
            "gains": [asdict(gain) for gain in self.gains],
            "passes": {step: asdict(reading) for step, reading in self.passes.items()},
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
            "step_seconds": self.step_seconds,
            "notes": list(self.notes),
            "recipe": self.recipe,
        }


def layer_realisations(
    dense: EmissionRecord, pressed: EmissionRecord, layers: Iterable[str], costs: Mapping[str, tuple[int, float]]
) -> tuple[LayerRealisation, ...]:
    """Layer by layer, what the dense model's original operations take and what the pressed model's chosen ones do.

    `layers`: paths of the dense model's layers. What took a layer's place lies at its path or below it, so that path
    pairs the two; layers that either emission fused are taken together. A place of no layer, such as a sum, counts to
    the layer before it. `costs`: FLOPs, and those promised, by module of the pressed model. Layers whose original
    operations were not timed are left out.
    """
    known = tuple(layers)
    groups: list[tuple[set[str], list[PlaceRecord], list[PlaceRecord]]] = []
    for is_dense, record in ((True, dense), (False, pressed)):
        for names, places in _places_by_layers(record, known):
            merged = (names, places, []) if is_dense else (names, [], places)
            for group in [group for group in groups if group[0] & names]:
                groups.remove(group)
                merged = (merged[0] | group[0], group[1] + merged[1], group[2] + merged[2])
            groups.append(merged)

    found = []
    for names, before, after in sorted(groups, key=lambda group: min(map(known.index, group[0]))):
        originals = [_original_ms(place) for place in before]
        pressed_ms = sum(place.milliseconds for place in after)
        if not after or not before or pressed_ms <= 0 or any(time is None for time in originals):
            continue
        found.append(
            LayerRealisation(
                name=" + ".join(sorted(names, key=known.index)),
                dense_flops=sum(place.flops for place in before),
                pressed_flops=sum(place.flops for place in after),
                promised_flops=sum(place.flops * _promised_share(place, costs) for place in after),
                dense_ms=sum(time for time in originals if time is not None),
                pressed_ms=pressed_ms,
                choice=" + ".join(dict.fromkeys(place.choice for place in after)),
            )
        )
    return tuple(found)


def _places_by_layers(record: EmissionRecord, layers: tuple[str, ...]) -> list[tuple[set[str], list[PlaceRecord]]]:
    """The places of a record with the layers they execute; those of none stand with the layer before them."""
    found: list[tuple[set[str], list[PlaceRecord]]] = []
    waiting: list[PlaceRecord] = []
    for place in record.places:
        names = {layer for path in place.modules if (layer := nearest_layer(path, layers)) is not None}
        if names:
            found.append((names, [*waiting, place]))
            waiting = []
        elif found:
            found[-1][1].append(place)
        else:
            waiting.append(place)
    return found


def _promised_share(place: PlaceRecord, costs: Mapping[str, tuple[int, float]]) -> float:
    """What is left in theory of the FLOPs of a place: the share of its modules together."""
    pairs = [costs[path] for path in place.modules if path in costs]
    flops = sum(counted for counted, _ in pairs)
    return sum(promised for _, promised in pairs) / flops if flops else 1.0


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
