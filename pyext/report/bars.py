"""The bars of a report, as positions in percent of their track: they stay readable at any width of the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kernelpress.measure import Comparison
from kernelpress.measure.units import latency_text, ratio_text
from kernelpress.report.record import Gain, LayerRealisation

__all__ = ["Bar", "Scale", "latency_bars", "realisation_bars", "waterfall_bars"]


@dataclass(frozen=True)
class Bar:
    """One bar from `start` over `length`; `mark` is another value on the track, a range if it has a `mark_length`."""

    name: str
    label: str
    start: float
    length: float
    mark: float | None
    mark_length: float = 0.0
    tone: str = ""
    """`ours`, `loss` or neither."""


@dataclass(frozen=True)
class Scale:
    """Bars on one track, and where its ticks stand."""

    bars: tuple[Bar, ...]
    ticks: tuple[tuple[str, float], ...] = ()
    origin: float = 0.0
    """Where bars start."""


def latency_bars(comparison: Comparison, pressed: str) -> Scale:
    """A bar per contestant: the best round's median, with the p10 – p90 range as its mark."""
    percent = 100 / max(entry.latency.p90 for entry in comparison.profiles)
    return Scale(
        tuple(
            Bar(
                entry.name,
                f"{latency_text(entry.latency.median)}  {ratio_text(comparison.speedup(entry.name).measured)}",
                0.0,
                entry.latency.median * percent,
                entry.latency.p10 * percent,
                (entry.latency.p90 - entry.latency.p10) * percent,
                "ours" if entry.name == pressed else "",
            )
            for entry in comparison.profiles
        )
    )


def realisation_bars(layers: Sequence[LayerRealisation]) -> Scale:
    """A bar per layer from 1 to the measured speed-up, with the theoretical one as its mark, on a logarithmic track."""
    shown = [(layer, theory) for layer in layers if (theory := layer.theoretical) is not None]
    place, ticks = _ratio_track([value for layer, theory in shown for value in (layer.measured, theory)])
    return Scale(
        tuple(
            Bar(
                layer.name,
                f"{ratio_text(layer.measured)} of {ratio_text(theory)}",
                place(min(1.0, layer.measured)),
                abs(place(layer.measured) - place(1.0)),
                place(theory),
                tone="ours" if layer.measured >= 1 else "loss",
            )
            for layer, theory in shown
        ),
        ticks,
        place(1.0),
    )


def waterfall_bars(gains: Sequence[Gain]) -> Scale:
    """A bar for what each step promises and one for what was measured of it, from what the steps before came to on, on
    a logarithmic track; steps that do neither have none."""
    rows, promised, reached = list[tuple[str, float, float, str]](), 1.0, 1.0
    for gain in gains:
        theory = gain.theoretical
        if theory is not None and not math.isclose(theory, 1.0, rel_tol=1e-3):
            rows.append((f"{gain.step}, in theory", promised, promised * theory, ""))
            promised *= theory
        if gain.measured is not None:
            tone = "ours" if gain.measured >= 1 else "loss"
            rows.append((f"{' + '.join(gain.since)}, measured", reached, reached * gain.measured, tone))
            reached *= gain.measured
    place, ticks = _ratio_track([value for _, before, after, _ in rows for value in (before, after)])
    return Scale(
        tuple(
            Bar(name, ratio_text(after / before), place(min(before, after)), abs(place(after) - place(before)), None,
                tone=tone)
            for name, before, after, tone in rows
        ),
        ticks,
        place(1.0),
    )  # fmt: skip


def _ratio_track(ratios: Sequence[float]) -> tuple[Callable[[float], float], tuple[tuple[str, float], ...]]:
    """Where a ratio stands on a logarithmic track that holds all of these and 1, and its ticks at powers of two."""
    logs = [math.log2(ratio) for ratio in ratios]
    low, high = math.floor(min([-0.5, *logs])), math.ceil(max([0.5, *logs]))

    def place(ratio: float) -> float:
        return 100 * (math.log2(ratio) - low) / (high - low)

    return place, tuple((f"{2.0**power:g}×", place(2.0**power)) for power in range(low, high + 1))
