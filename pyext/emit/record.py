"""What emission measured and decided, place by place: the records behind `EmittedModel.summary()`."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kernelpress.files.plain import from_plain, printable

__all__ = ["CandidateRecord", "EmissionRecord", "PlaceRecord", "summary_table"]


@dataclass(frozen=True)
class CandidateRecord:
    """One way to execute a place: its time, its error relative to the original there, or why it cannot serve."""

    name: str
    milliseconds: float | None
    error: float | None
    refusal: str | None = None


@dataclass(frozen=True)
class PlaceRecord:
    """One place of the model (one or more original operations) and what was decided about it."""

    name: str
    """Qualified name of the module it comes from."""
    operations: tuple[str, ...]
    """The graph nodes it covers, in execution order."""
    shape: tuple[int, ...]
    """Shape of its output for the example inputs."""
    flops: int
    """Floating-point operations of the original operations at that shape; a multiply-add is two."""
    choice: str
    reason: str
    milliseconds: float
    candidates: tuple[CandidateRecord, ...]
    modules: tuple[str, ...] = ()
    """Qualified names of the modules that its operations come from."""


@dataclass(frozen=True)
class EmissionRecord:
    """The decisions for a whole model. Times in ms; None where emission was told costs instead of measuring."""

    places: tuple[PlaceRecord, ...]
    device: str
    kept_original: bool = False
    """Whether emission left the model as it was, because nothing was faster or exact enough."""
    reason: str = ""
    original_milliseconds: float | None = None
    emitted_milliseconds: float | None = None
    error: float | None = None
    """Relative error of the emitted model's outputs to the original's, on the example inputs; also of the floats that
    comparisons, indices and roundings decide on, whose outcome is then taken from the original."""
    differing: int = 0
    """Elements of integer and boolean outputs that differ from the original's there: floats lay at a tie."""
    decided: int = 0
    """How many elements these outputs have."""
    notes: tuple[str, ...] = ()
    """What else is to be known, sub-graphs that stayed as they came."""

    def to_json(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and numbers."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, stored: Any) -> EmissionRecord:
        """The inverse of `to_json`; raises `ValueError` for anything else."""
        record = from_plain(cls, stored, "record")
        times = (record.original_milliseconds, record.emitted_milliseconds)
        if not all(time is None or time > 0 for time in times):
            raise ValueError(f"record: expected times of the models above zero, got {times}")
        return record


def summary_table(record: EmissionRecord) -> str:
    """The record as a text table: one line a place, then the totals."""
    rows: list[tuple[str, ...]] = [("place", "output", "GFLOP", "choice", "ms", "GFLOP/s", "why")]
    rows += [_row(place) for place in record.places]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    numeric = {2, 4, 5}
    lines = [_line(row, widths, numeric) for row in rows]
    lines.insert(1, "  ".join("─" * width for width in widths))
    return printable("\n".join([*lines, "", *_totals(record)]))


def _row(place: PlaceRecord) -> tuple[str, ...]:
    size = "×".join(str(extent) for extent in place.shape)
    rate = f"{place.flops / place.milliseconds * 1e-6:.1f}" if place.milliseconds > 0 else "–"
    gigaflops = f"{place.flops * 1e-9:.4f}"
    return place.name, size, gigaflops, place.choice, f"{place.milliseconds:.4f}", rate, place.reason


def _line(row: Sequence[str], widths: Sequence[int], numeric: set[int]) -> str:
    cells = (
        cell.rjust(width) if i in numeric else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join(cells).rstrip()


def _totals(record: EmissionRecord) -> list[str]:
    choices = Counter(place.choice for place in record.places)
    counted = ", ".join(f"{count} {name}" for name, count in choices.most_common())
    total = sum(place.flops for place in record.places) * 1e-9
    lines = [f"{len(record.places)} places ({counted}), {total:.3f} GFLOP, on {record.device}"]
    if record.original_milliseconds is not None and record.emitted_milliseconds is not None:
        ratio = record.original_milliseconds / record.emitted_milliseconds
        before, after = f"{record.original_milliseconds:.3f} ms", f"{record.emitted_milliseconds:.3f} ms"
        lines.append(f"original {before} (the faster memory format), emitted {after}: {ratio:.2f}×")
    if record.error is not None:
        lines.append(f"relative error to the original: {record.error:.1e}")
    if record.decided and not record.kept_original:
        lines.append(f"integers and booleans that differ, at ties: {record.differing} of {record.decided}")
    lines += record.notes
    if record.reason:
        lines.append(record.reason)
    return lines
