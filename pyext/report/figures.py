"""The figure of accuracy in a report, as an SVG in a data URI."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kernelpress.report.record import StepPoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["accuracy_figure"]

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


def accuracy_figure(points: Sequence[StepPoint], *, against: str) -> str:
    """Test accuracy over latency in ms (`against="latency"`) or over MFLOPs (`against="flops"`)."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    if against not in ("latency", "flops"):
        raise ValueError(f"against: expected latency or flops, got {against!r}")
    shown = [
        (point, cost)
        for point in points
        if (cost := point.latency_ms if against == "latency" else point.flops * 1e-6) is not None
    ]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        axes = figure.subplots()
        for point, cost in shown:
            is_final = point is points[-1]
            colour = ACCENT if is_final else MUTED
            axes.scatter([cost], [100 * point.accuracy], s=70 if is_final else 46, color=colour, zorder=3)
            axes.annotate(
                f"{point.name}\n{100 * point.accuracy:.1f} %", (cost, 100 * point.accuracy),
                xytext=(7, 0), textcoords="offset points", fontsize=11, va="center",
            )  # fmt: skip
        axes.margins(y=0.3)
        axes.set_xlim(0, 1.35 * max(cost for _, cost in shown))
        axes.set_xlabel("latency [ms]" if against == "latency" else "MFLOP per image")
        axes.set_ylabel("test accuracy [%]")
        axes.grid()
        return _as_uri(figure)
