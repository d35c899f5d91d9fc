"""The report of a press run: one self-contained HTML page, and the same as JSON."""

from kernelpress.report.html import render_html, render_json
from kernelpress.report.record import (
    LayerRealisation,
    Reading,
    Report,
    Requirement,
    StepPoint,
    commit_of,
    layer_realisations,
    now,
)

__all__ = [
    "LayerRealisation",
    "Reading",
    "Report",
    "Requirement",
    "StepPoint",
    "commit_of",
    "layer_realisations",
    "now",
    "render_html",
    "render_json",
]
