"""Kernel benchmarks on the layer shapes of real networks, beside the peers and the roofline of this machine."""

from kernelpress.bench.backends import BackendRow, CannotRunError, backend_table, run_backends
from kernelpress.bench.contest import Row
from kernelpress.bench.layers import ALL_FAMILIES, FAMILIES, Layer, layers
from kernelpress.bench.machine import Machine, describe_machine
from kernelpress.bench.roofline import Roofline, measure_roofline
from kernelpress.bench.run import run, table

__all__ = [
    "ALL_FAMILIES",
    "FAMILIES",
    "BackendRow",
    "CannotRunError",
    "Layer",
    "Machine",
    "Roofline",
    "Row",
    "backend_table",
    "describe_machine",
    "layers",
    "measure_roofline",
    "run",
    "run_backends",
    "table",
]
