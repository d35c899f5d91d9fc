"""The report of a press run, of several, and of a comparison of networks: a self-contained HTML page each."""

from kernelpress.report.html import render_html, render_json
from kernelpress.report.networks import Accuracy, NetworkComparison, render_networks
from kernelpress.report.record import (
    Curve,
    Curves,
    Gain,
    LayerRealisation,
    Reading,
    Report,
    Requirement,
    StepPoint,
    commit_of,
    layer_realisations,
    now,
)
from kernelpress.report.sweeps import TRIAL_HEADER, Limits, Reached, SweepReport, Trial, render_sweep

__all__ = [
    "TRIAL_HEADER",
    "Accuracy",
    "Curve",
    "Curves",
    "Gain",
    "LayerRealisation",
    "Limits",
    "NetworkComparison",
    "Reached",
    "Reading",
    "Report",
    "Requirement",
    "StepPoint",
    "SweepReport",
    "Trial",
    "commit_of",
    "layer_realisations",
    "now",
    "render_html",
    "render_json",
    "render_networks",
    "render_sweep",
]
