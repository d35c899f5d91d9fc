"""The figures of accuracy in a report, as SVG in data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kernelpress.report.record import Curves, StepPoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Point", "accuracy_figure", "curves_figure", "scatter"]

INK = "#1d2433"
MUTED = "#8a93a6"
GRID = "#e6e9f0"
ACCENT = "#0f766e"

STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 12,
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


def _as_uri(figure: Figure) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()


@dataclass(frozen=True)
class Point:
    """A point of a scatter plot with its label; `is_ours` has the colour of the product."""

    label: str
    x: float
    y: float
    is_ours: bool


def accuracy_figure(points: Sequence[StepPoint], *, against: str) -> str:
    """Test accuracy over latency in ms (`against="latency"`) or over MFLOPs (`against="flops"`)."""
    if against not in ("latency", "flops"):
        raise ValueError(f"against: expected latency or flops, got {against!r}")
    shown = [
        Point(f"{point.name}\n{100 * point.accuracy:.1f} %", cost, 100 * point.accuracy, point is points[-1])
        for point in points
        if (cost := point.latency_ms if against == "latency" else point.flops * 1e-6) is not None
    ]
    return scatter(shown, "latency [ms]" if against == "latency" else "MFLOP per image", "test accuracy [%]")


def curves_figure(figure: Curves) -> str:
    """Lines with their spread as bars, named beside their ends."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        drawn = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = drawn.subplots()
        colours = mpl.colormaps["tab20" if len(figure.curves) > 10 else "tab10"]
        for index, curve in enumerate(figure.curves):
            x, y, low, high = zip(*curve.points, strict=True)
            spread = [[b - a for a, b in zip(low, y, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
            bars = spread if any(map(any, spread)) else None
            axes.errorbar(
                x, y, yerr=bars, label=curve.name, color=colours(index % 20), marker="o", markersize=4, capsize=3
            )
        if figure.percent_left:
            axes.set_xscale("log")
            axes.invert_xaxis()
            ticks = sorted({point[0] for curve in figure.curves for point in curve.points})
            axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
            axes.minorticks_off()
        axes.set_title(figure.title, fontsize=12)
        axes.set_xlabel(figure.x_label)
        axes.set_ylabel(figure.y_label)
        axes.grid()
        axes.legend(fontsize=8, ncols=1 + len(figure.curves) // 8)
        return _as_uri(drawn)


def scatter(points: Sequence[Point], x_label: str, y_label: str, *, is_joined: bool = False) -> str:
    """Labelled points; `is_joined` draws a line through ours."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        axes = figure.subplots()
        for point in points:
            colour = ACCENT if point.is_ours else MUTED
            axes.scatter([point.x], [point.y], s=70 if point.is_ours else 46, color=colour, zorder=3)
            axes.annotate(
                point.label, (point.x, point.y), xytext=(7, 0), textcoords="offset points", fontsize=11, va="center"
            )
        if is_joined:
            front = sorted((point.x, point.y) for point in points if point.is_ours)
            axes.plot(*zip(*front, strict=True), color=ACCENT, linewidth=1)
        axes.margins(y=0.3)
        axes.set_xlim(0, 1.35 * max(point.x for point in points))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid()
        return _as_uri(figure)
