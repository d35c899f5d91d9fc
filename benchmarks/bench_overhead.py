"""What a call costs beside its kernel: µs over the native kernel and the allocation of its output, on a tiny image.

pytest benchmarks/bench_overhead.py --record
"""

from __future__ import annotations

import statistics
import timeit
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import recording
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.nn import functional

import kernelpress as kp
from kernelpress import ops
from kernelpress.emit import Candidate
from kernelpress.ops.calls import prepared
from kernelpress.ops.calls.steps import native_steps

CHANNELS = 16
SHALLOW, DEEP = 4, 24
CALLS, ROUNDS = 200, 30


@dataclass(frozen=True)
class Overhead:
    """One way of calling `relu(pointwise convolution)`: µs per call, best and median round, and µs over the kernel."""

    path: str
    best_us: float
    median_us: float
    overhead_us: float


def microseconds(call: Callable[[], object], per: int = 1) -> tuple[float, float]:
    """Best and median round of a call, µs divided by `per`."""
    call()
    rounds = [seconds / CALLS * 1e6 / per for seconds in timeit.repeat(call, number=CALLS, repeat=ROUNDS)]
    return min(rounds), statistics.median(rounds)


def emitted(layers: int, x: Tensor) -> Callable[[Tensor], Any]:
    """So many convolutions one behind the other, each emitted onto the native kernel by itself."""

    def cost(candidate: Candidate) -> float:
        return 1.0 if candidate.variant == "cpu" and len(candidate.nodes) <= 2 else 100.0 * len(candidate.nodes)

    stages = [stage for _ in range(layers) for stage in (nn.Conv2d(CHANNELS, CHANNELS, 1), nn.ReLU())]
    return kp.emit(nn.Sequential(*stages).eval(), x, cost=cost, progress=False)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def rows(pytestconfig: pytest.Config) -> Iterator[list[Overhead]]:
    """Every path measured in turn; recorded at the end if asked to."""
    x = torch.randn(1, CHANNELS, 4, 4).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(CHANNELS, CHANNELS, 1, 1), torch.randn(CHANNELS)
    kernel = native_steps([("pointwise_conv2d", (x, weight, bias), {"activation": "relu"})])
    if kernel is None:
        pytest.skip("no native module")
    overload = torch.ops.kernelpress.pointwise_conv2d.default
    form = torch.empty_like(x)
    floor = sum(microseconds(call)[0] for call in (kernel, lambda: torch.empty_like(form)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared, "attempt", lambda *_: None)
        recalled = microseconds(lambda: ops.pointwise_conv2d(x, weight, bias, activation="relu"))
    measured = {
        "typed function": microseconds(lambda: ops.pointwise_conv2d(x, weight, bias, activation="relu")),
        "typed function, without its table": recalled,
        "torch.ops": microseconds(lambda: overload(x, weight, bias, activation="relu")),
        "torch: relu(conv2d)": microseconds(lambda: functional.relu(functional.conv2d(x, weight, bias))),
    }
    shallow, deep = emitted(SHALLOW, x), emitted(DEEP, x)
    few, many = microseconds(lambda: shallow(x)), microseconds(lambda: deep(x))
    best, median = ((more - less) / (DEEP - SHALLOW) for less, more in zip(few, many, strict=True))
    measured["emitted model, per layer"] = (best, median)
    found = [Overhead("kernel and allocation", floor, floor, 0.0)]
    found += [Overhead(path, best, median, best - floor) for path, (best, median) in measured.items()]
    yield found
    if pytestconfig.getoption("record"):
        recording.save("overhead", found, pytestconfig.getoption("results"))


@pytest.mark.parametrize("path", ["typed function", "emitted model, per layer"])
def test_overhead_stays_under_five_microseconds(rows: list[Overhead], path: str) -> None:
    (row,) = (row for row in rows if row.path == path)
    print(f"{row.path}: {row.best_us:.1f} µs, {row.overhead_us:.1f} µs over the kernel")
    assert row.overhead_us < 5


def test_typed_function(benchmark: BenchmarkFixture) -> None:
    x, weight = torch.randn(1, CHANNELS, 4, 4), torch.randn(CHANNELS, CHANNELS, 1, 1)
    benchmark(ops.pointwise_conv2d, x.contiguous(memory_format=torch.channels_last), weight)
