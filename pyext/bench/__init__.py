"""Kernel benchmarks on the layer shapes of real networks, beside the peers and the roofline of this machine."""

from kernelpress.bench.backends import BackendRow, backend_table, run_backends
from kernelpress.bench.machine import Machine, describe_machine
from kernelpress.bench.roofline import Roofline, measure_roofline
from kernelpress.bench.run import Row, run, table
from kernelpress.bench.shapes import FAMILIES, Case, Stage, cases

__all__ = [
    "FAMILIES",
    "BackendRow",
    "Case",
    "Machine",
    "Roofline",
    "Row",
    "Stage",
    "backend_table",
    "cases",
    "describe_machine",
    "measure_roofline",
    "run",
    "run_backends",
    "table",
]
