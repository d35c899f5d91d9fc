"""The figures of a report, each as one SVG in a data URI."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kernelpress.measure import Comparison
from kernelpress.measure.units import latency_text
from kernelpress.report.record import AccuracyPoint, LayerRealisation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["accuracy_figure", "latency_figure", "realisation_figure"]

INK = "#1d2433"
MUTED = "#8a93a6"
GRID = "#e6e9f0"
BAR = "#b9c3d6"
ACCENT = "#0f766e"
LOSS = "#b45309"
MAX_LAYERS = 40
"""More bars than this are unreadable: the figure keeps the places with the most dense time."""

STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "svg.hashsalt": "kernelpress",
}


def _new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _as_uri(figure: Figure) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()


def latency_figure(comparison: Comparison, pressed: str) -> str:
    """A bar per contestant: the best round's median, with the p10 – p90 range as a line."""
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        entries = comparison.profiles
        figure, axes = _new_figure(7.6, 0.9 + 0.42 * len(entries))
        places = range(len(entries))
        medians = [entry.latency.median for entry in entries]
        spans = [
            [entry.latency.median - entry.latency.p10 for entry in entries],
            [entry.latency.p90 - entry.latency.median for entry in entries],
        ]
        colours = [ACCENT if entry.name == pressed else BAR for entry in entries]
        axes.barh(places, medians, color=colours, height=0.62)
        axes.errorbar(medians, places, xerr=spans, fmt="none", ecolor=INK, elinewidth=1, capsize=2.5)
        widest = max(entry.latency.p90 for entry in entries)
        for place, entry in zip(places, entries, strict=True):
            ratio = comparison.speedup(entry.name).measured
            label = f"{latency_text(entry.latency.median)}   {ratio:.2f}×"
            axes.text(entry.latency.p90 + 0.015 * widest, place, label, va="center", fontsize=9)
        axes.set_yticks(places, [entry.name for entry in entries])
        axes.set_xlim(0, 1.28 * widest)
        axes.invert_yaxis()
        axes.set_xlabel("latency [ms]")
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        return _as_uri(figure)


def realisation_figure(layers: Sequence[LayerRealisation]) -> str:
    """Per place with FLOPs, a bar to the measured speed-up and a mark at the theoretical one; logarithmic around 1."""
    import matplotlib as mpl
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    counted = [layer for layer in layers if layer.theoretical is not None]
    kept = set(sorted(counted, key=lambda layer: layer.dense_ms, reverse=True)[:MAX_LAYERS])
    shown = [layer for layer in counted if layer in kept]
    with mpl.rc_context(STYLE):
        figure, axes = _new_figure(7.6, 1.1 + 0.24 * len(shown))
        places = range(len(shown))
        colours = [ACCENT if layer.measured >= 1 else LOSS for layer in shown]
        axes.barh(places, [layer.measured - 1 for layer in shown], left=1, color=colours, height=0.6)
        axes.scatter([layer.theoretical or 1.0 for layer in shown], places, marker="D", s=22, color=INK, zorder=3)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        axes.axvline(1, color=INK, linewidth=1)
        axes.set_yticks(places, [_shortened(layer.name) for layer in shown], fontsize=8)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlabel("speed-up over the dense model's original operations")
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        axes.legend(
            handles=[
                Patch(color=ACCENT, label="measured"),
                Line2D([], [], marker="D", linestyle="", color=INK, markersize=4.5, label="theoretical (FLOPs)"),
            ],
            loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=9,
        )  # fmt: skip
        return _as_uri(figure)


def accuracy_figure(points: Sequence[AccuracyPoint], *, against: str) -> str:
    """Test accuracy over latency in ms (`against="latency"`) or over MFLOPs (`against="flops"`)."""
    import matplotlib as mpl

    if against not in ("latency", "flops"):
        raise ValueError(f"against: expected latency or flops, got {against!r}")
    shown = [
        (point, cost)
        for point in points
        if (cost := point.latency_ms if against == "latency" else point.flops * 1e-6) is not None
    ]
    with mpl.rc_context(STYLE):
        figure, axes = _new_figure(4.4, 3.3)
        for point, cost in shown:
            is_final = point is points[-1]
            colour = ACCENT if is_final else MUTED
            axes.scatter([cost], [100 * point.accuracy], s=70 if is_final else 46, color=colour, zorder=3)
            axes.annotate(
                f"{point.name}\n{100 * point.accuracy:.1f} %", (cost, 100 * point.accuracy),
                xytext=(7, 0), textcoords="offset points", fontsize=8.5, va="center",
            )  # fmt: skip
        axes.margins(y=0.3)
        axes.set_xlim(0, 1.35 * max(cost for _, cost in shown))
        axes.set_xlabel("latency [ms]" if against == "latency" else "MFLOP per inference")
        axes.set_ylabel("test accuracy [%]")
        axes.grid()
        return _as_uri(figure)


def _shortened(name: str, limit: int = 34) -> str:
    return name if len(name) <= limit else "…" + name[-limit + 1 :]
