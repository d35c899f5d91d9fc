"""Whole networks against eager PyTorch, Inductor, ONNX Runtime and OpenVINO: processes run in turn, round by round.

python benchmarks/bench_models.py --models mobilenet_v1 mobilenet_v2 --threads 2 --batch 1 --rounds 6
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from recording import RESULTS, model_cells, save, title_of, verdict_on
from rich.console import Console
from rich.table import Table

from kernelpress import models
from kernelpress.bench.model_contest import RUNTIMES, ModelResult, compare
from kernelpress.bench.tables import console_table

__all__ = ["DEFAULT_MODELS", "main", "positive", "table"]

TABLE_WIDTH = 130


def table(result: ModelResult) -> Table:
    """One network's runtimes as a rich table."""
    told = asdict(result)
    return console_table(f"{result.model}, {title_of(told)}, fp32", model_cells(told), verdict_on(told))


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
