"""Emission: any exportable module becomes a graph of the fastest layers measured, and that graph a plan."""

from __future__ import annotations

from kernelpress.emit.cache import cache_folder
from kernelpress.emit.candidates import Candidate
from kernelpress.emit.emitted import EmittedModel
from kernelpress.emit.files.archive import load, save
from kernelpress.emit.layer_costs import layer_energies, layer_times, plan_latencies
from kernelpress.emit.pipeline import emit
from kernelpress.emit.plans.cuda_plan import CudaPlan
from kernelpress.emit.plans.plan import Plan, capture
from kernelpress.emit.record import CandidateRecord, EmissionRecord, PlaceRecord

__all__ = [
    "Candidate",
    "CandidateRecord",
    "CudaPlan",
    "EmissionRecord",
    "EmittedModel",
    "PlaceRecord",
    "Plan",
    "cache_folder",
    "capture",
    "emit",
    "layer_energies",
    "layer_times",
    "load",
    "plan_latencies",
    "save",
]
