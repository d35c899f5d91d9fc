"""Fused kernels: depthwise → pointwise pairs of MobileNet V1, inverted residuals of MobileNet V2.

pytest benchmarks/bench_separable.py --threads 2 --record
"""

from collections.abc import Callable

from kernelpress.bench import Case, Row

FAMILY = "separable"


def test_separable(bench: Callable[[Case], Row], case: Case) -> None:
    assert bench(case).ms
