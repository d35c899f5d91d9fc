"""The report of a press run, and that of a comparison of networks: a self-contained HTML page each."""

from kernelpress.report.html import render_html, render_json
from kernelpress.report.networks import Accuracy, NetworkComparison, render_networks
from kernelpress.report.record import (
    Curve,
    Curves,
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
    "Accuracy",
    "Curve",
    "Curves",
    "LayerRealisation",
    "NetworkComparison",
    "Reading",
    "Report",
    "Requirement",
    "StepPoint",
    "commit_of",
    "layer_realisations",
    "now",
    "render_html",
    "render_json",
    "render_networks",
]
