"""Kernel benchmarks under pytest-benchmark: one group a shape, our op under the fixture, peers timed in turn beside it.

`--record` writes what was measured to `benchmarks/results/`; `--inductor` adds `torch.compile` to the peers.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import recording
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from rich.console import Console

from kernelpress.bench import Case, Roofline, Row, cases, measure_roofline, table
from kernelpress.bench.contest import judged
from kernelpress.bench.ours import fused
from kernelpress.bench.run import measure_case
from kernelpress.runtime.clock import threads_set_to

TABLE_WIDTH = 160

_rows = pytest.StashKey[dict[str, list[Row]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernelpress benchmarks")
    group.addoption("--threads", type=int, default=None, help="torch's number of threads (default: as it is)")
    group.addoption("--batch", type=int, default=1, help="batch of every shape")
    group.addoption(
        "--inductor", action="store_true", help="torch.compile as a further peer; compiles for seconds a shape"
    )
    group.addoption("--budget", type=float, default=0.5, help="seconds of measuring a contestant and shape")
    group.addoption("--record", action="store_true", help="write the families measured in full to benchmarks/results/")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_rows] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Gives a benchmark that takes `case` the shapes of the family its module names in `FAMILY`."""
    if "case" in metafunc.fixturenames:
        chosen = cases(metafunc.module.FAMILY, batch=metafunc.config.getoption("batch"))
        metafunc.parametrize("case", chosen, ids=[f"{case.network} {case.label}" for case in chosen])


@pytest.fixture(scope="session")
def roofline(pytestconfig: pytest.Config) -> Roofline:
    return measure_roofline(pytestconfig.getoption("threads"))


@pytest.fixture
def bench(benchmark: BenchmarkFixture, roofline: Roofline, pytestconfig: pytest.Config) -> Callable[[Case], Row]:
    """Measures a case twice over: in turn with its peers, for row and ratios; and alone, for pytest-benchmark."""

    def measure(case: Case) -> Row:
        row = measure_case(
            case,
            roofline,
            peers=True,
            with_inductor=pytestconfig.getoption("inductor"),
            budget_seconds=pytestconfig.getoption("budget"),
        )
        benchmark.group = f"{case.network} {case.op} {case.label}"
        names = ("roofline_fraction", "limited_by", "best_peer", "ratio", "unfused_ratio", "spread")
        rates = {"GFLOP/s": None if row.tflops is None else row.tflops * 1e3, "GB/s": row.gbs}
        benchmark.extra_info.update({**rates, **{name: getattr(row, name) for name in names}})
        with threads_set_to(roofline.threads), torch.no_grad():
            tensors = case.make(torch.device("cpu"), torch.float32)
            benchmark(fused(case.op, tensors, case.options))
        pytestconfig.stash[_rows].setdefault(case.family, []).append(row)
        return row

    return measure


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Judges the rows by the best roofline seen, and records them if asked to: whole families only."""
    config = session.config
    stashed = config.stash[_rows]
    if not stashed:
        return
    roofline = measure_roofline(config.getoption("threads"), again=True)
    for family, rows in stashed.items():
        stashed[family] = [judged(row, roofline) for row in rows]
        complete = len(rows) == len(cases(family, batch=config.getoption("batch")))
        if config.getoption("record") and complete:
            recording.save(family, stashed[family], roofline=roofline)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for rows in config.stash[_rows].values():
        console = Console(width=TABLE_WIDTH)
        with console.capture() as captured:
            console.print(table(rows, measure_roofline(config.getoption("threads"))))
        terminalreporter.write_line(captured.get())
