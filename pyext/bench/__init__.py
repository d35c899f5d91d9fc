"""Kernel benchmarks on the layer shapes of real networks, beside the peers and the roofline of this machine."""

from kernelpress.bench.backends import BackendRow, CannotRunError, backend_table, run_backends
from kernelpress.bench.contest import Row
from kernelpress.bench.layers import ALL_FAMILIES, Layer, layer_of_case, layers
from kernelpress.bench.machine import Machine, describe_machine
from kernelpress.bench.roofline import Roofline, measure_roofline
from kernelpress.bench.run import run, table
from kernelpress.bench.shapes import FAMILIES, Case, Stage, cases

__all__ = [
    "ALL_FAMILIES",
    "FAMILIES",
    "BackendRow",
    "CannotRunError",
    "Case",
    "Layer",
    "Machine",
    "Roofline",
    "Row",
    "Stage",
    "backend_table",
    "cases",
    "describe_machine",
    "layer_of_case",
    "layers",
    "measure_roofline",
    "run",
    "run_backends",
    "table",
]
