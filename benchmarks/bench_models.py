"""Whole networks against eager PyTorch, Inductor, ONNX Runtime and OpenVINO: processes run in turn, round by round.

python benchmarks/bench_models.py --models mobilenet_v1 mobilenet_v2 --threads 2 --batch 1 --rounds 6
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from peers.contest import RUNTIMES, ModelResult, compare
from recording import RESULTS, save
from rich.console import Console
from rich.table import Table

from kernelpress import models
from kernelpress.bench.contest import OURS
from kernelpress.measure.units import ABSENT, latency_text, ratio_text

__all__ = ["DEFAULT_MODELS", "main", "positive", "table"]

TABLE_WIDTH = 130


def table(result: ModelResult) -> Table:
    """One network's runtimes as a rich table."""
    title = f"{result.model}, batch {result.batch}, {result.size}×{result.size}, {result.threads} threads, fp32"
    view = Table(title=title, caption=_verdict(result))
    view.add_column("runtime", no_wrap=True)
    for name in ("best", "median", "worst", "vs best peer", "error", "CPU while idle"):
        view.add_column(name, justify="right", no_wrap=True)
    view.add_column("settings")
    for runtime in result.runtimes:
        if not runtime.rounds_ms:
            view.add_row(runtime.runtime, *[ABSENT] * 6, f"skipped: {runtime.skipped}")
            continue
        rounds = runtime.rounds_ms
        view.add_row(
            runtime.runtime,
            *[latency_text(ms) for ms in (min(rounds), statistics.median(rounds), max(rounds))],
            ratio_text(result.ratio(runtime.runtime)),
            f"{runtime.relative_error:.0e}",
            ABSENT if runtime.idle_cpu_share is None else f"{runtime.idle_cpu_share:.1%}",
            runtime.settings,
        )
    return view


def _verdict(result: ModelResult) -> str:
    peer, ours = result.best_peer(), next((r for r in result.runtimes if r.runtime == OURS), None)
    if peer is None or ours is None or ours.best_ms is None:
        return "best, median, worst of the rounds' medians"
    return f"best peer: {peer.runtime}; ours takes {ours.best_ms / min(peer.rounds_ms):.2f} of its time (best rounds)"


def main(arguments: Sequence[str] | None = None) -> None:
    """Compares the networks asked for, prints a table each and, unless told not to, records them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", metavar="MODEL", choices=models.names(), default=DEFAULT_MODELS)
    names = [runtime.name for runtime in RUNTIMES]
    parser.add_argument("--runtimes", nargs="+", metavar="RUNTIME", choices=names, default=names, help=", ".join(names))
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--batch", type=positive, default=1)
    parser.add_argument("--size", type=positive, default=224, help="rows and columns of the image")
    parser.add_argument("--rounds", type=positive, default=6)
    parser.add_argument("--iterations", type=positive, default=30, help="calls in a burst")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args(arguments)

    console = Console(width=max(Console().width, TABLE_WIDTH))
    chosen = [runtime for runtime in RUNTIMES if runtime.name in options.runtimes]
    results = []
    for model in options.models:
        result = compare(
            model,
            runtimes=chosen,
            threads=options.threads,
            batch=options.batch,
            size=options.size,
            rounds=options.rounds,
            iterations=options.iterations,
            report=lambda text: console.print(text, style="dim"),
        )
        console.print(table(result))
        results.append(result)
    if not options.no_record:
        console.print(f"recorded in {save('models', results, options.results)}")


DEFAULT_MODELS = ["mobilenet_v1", "mobilenet_v2", "resnet18", "resnet50"]


def positive(text: str) -> int:
    """The option's value, a whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return value


if __name__ == "__main__":
    main()
