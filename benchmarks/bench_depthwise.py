"""Depthwise kernels: every map size of MobileNet V1, and the larger windows of MobileNet V3 and ConvNeXt.

pytest benchmarks/bench_depthwise.py --threads 2 --record
"""

from collections.abc import Callable

from kernelpress.bench import Case, Row

FAMILY = "depthwise"


def test_depthwise(bench: Callable[[Case], Row], case: Case) -> None:
    assert bench(case).ms
