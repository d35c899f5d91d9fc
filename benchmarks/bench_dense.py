"""Dense kernels: stems, 3×3, pointwise and linear layers of ResNets and MobileNets.

pytest benchmarks/bench_dense.py --threads 2 --record
"""

from collections.abc import Callable

from kernelpress.bench import Case, Row

FAMILY = "dense"


def test_dense(bench: Callable[[Case], Row], case: Case) -> None:
    assert bench(case).ms
