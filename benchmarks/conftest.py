"""Kernel benchmarks under pytest-benchmark: one group a shape, our op under the fixture, peers timed in turn beside it.

`--record` writes what was measured to `benchmarks/results/`; `--inductor` adds `torch.compile` to the peers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import recording
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from rich.console import Console

from kernelpress.bench import FAMILIES, Layer, Roofline, Row, layers, measure_roofline, ours, table
from kernelpress.bench.blocks import BLOCKS, LOW_RANK, Block, blocks, low_rank, measure_block
from kernelpress.bench.contest import judged
from kernelpress.bench.run import measure_layer
from kernelpress.runtime.clock import threads_set_to

TABLE_WIDTH = 160

_BLOCKS = {BLOCKS: blocks, LOW_RANK: low_rank}

_rows = pytest.StashKey[dict[str, list[Row]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernelpress benchmarks")
    group.addoption("--threads", type=int, default=None, help="torch's number of threads (default: as it is)")
    group.addoption("--batch", type=int, default=1, help="batch of every shape")
    group.addoption(
        "--inductor", action="store_true", help="torch.compile as a further peer; compiles for seconds a shape"
    )
    group.addoption("--budget", type=float, default=0.5, help="seconds of measuring a contestant and shape")
    group.addoption("--record", action="store_true", help="write the families measured in full to --results")
    group.addoption("--results", type=Path, default=recording.RESULTS, help="folder of the result files")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_rows] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Gives a benchmark that takes `layer` those of all families with peers, one that takes `block` all blocks."""
    batch = metafunc.config.getoption("batch")
    if "block" in metafunc.fixturenames:
        found = [block for made in _BLOCKS.values() for block in made(batch)]
        metafunc.parametrize("block", found, ids=[f"{it.family} {it.network} {it.label}" for it in found])
    if "layer" in metafunc.fixturenames:
        chosen = [layer for family in FAMILIES for layer in layers(family, batch=batch)]
        metafunc.parametrize("layer", chosen, ids=[f"{it.family} {it.network} {it.title}" for it in chosen])


@pytest.fixture(scope="session")
def roofline(pytestconfig: pytest.Config) -> Roofline:
    return measure_roofline(pytestconfig.getoption("threads"))


@pytest.fixture
def bench(benchmark: BenchmarkFixture, roofline: Roofline, pytestconfig: pytest.Config) -> Callable[[Layer], Row]:
    """Measures a layer twice over: in turn with its peers, for row and ratios; and alone, for pytest-benchmark."""

    def measure(layer: Layer) -> Row:
        row = measure_layer(
            layer,
            roofline,
            peers=True,
            with_inductor=pytestconfig.getoption("inductor"),
            budget_seconds=pytestconfig.getoption("budget"),
        )
        benchmark.group = f"{layer.network} {layer.op} {layer.title}"
        names = ("roofline_fraction", "limited_by", "best_peer", "ratio", "unfused_ratio", "spread")
        rates = {"GFLOP/s": None if row.tflops is None else row.tflops * 1e3, "GB/s": row.gbs}
        benchmark.extra_info.update({**rates, **{name: getattr(row, name) for name in names}})
        with threads_set_to(roofline.threads), torch.no_grad():
            call = (layer.op, *layer.make(torch.device("cpu"), torch.float32))
            benchmark(ours.on_backend(*call, row.backend))
        pytestconfig.stash[_rows].setdefault(layer.family, []).append(row)
        return row

    return measure


@pytest.fixture
def bench_block(roofline: Roofline, pytestconfig: pytest.Config) -> Callable[[Block], Row]:
    """Measures a block in turn with its peers."""

    def measure(block: Block) -> Row:
        budget, with_inductor = pytestconfig.getoption("budget"), pytestconfig.getoption("inductor")
        row = measure_block(block, roofline, with_inductor=with_inductor, budget_seconds=budget)
        pytestconfig.stash[_rows].setdefault(block.family, []).append(row)
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
        batch = config.getoption("batch")
        complete = len(rows) == len(_BLOCKS[family](batch) if family in _BLOCKS else layers(family, batch=batch))
        if config.getoption("record") and complete:
            recording.save(family, stashed[family], config.getoption("results"), roofline=roofline)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for rows in config.stash[_rows].values():
        console = Console(width=TABLE_WIDTH)
        with console.capture() as captured:
            console.print(table(rows, measure_roofline(config.getoption("threads"))))
        terminalreporter.write_line(captured.get())
