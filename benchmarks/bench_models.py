"""Whole networks in other runtimes and ours, in float32, in int8, or with zeros: processes run in turn, round by round.

python benchmarks/bench_models.py --models mobilenet_v1 mobilenet_v2 --threads 2 --batch 1 --rounds 6
python benchmarks/bench_models.py --dtype int8 --models mobilenet_v1 resnet50
python benchmarks/bench_models.py --sparsity 0.9 --block 4 --models mobilenet_v1 resnet50
python benchmarks/bench_models.py --dtype int8 --sparsity 0.9 --depth 4 --models mobilenet_v1
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recording import RESULTS, model_cells, save, title_of, verdict_on
from rich.console import Console
from rich.table import Table

from kernelpress.bench.model_contest import CONTESTS, ModelResult, Runtime, compare
from kernelpress.bench.tables import console_table

__all__ = ["KEY", "add_runtimes", "chosen_runtimes", "contest_parser", "main", "positive", "run", "table"]

TABLE_WIDTH = 130
NAMES = list(dict.fromkeys(runtime.name for contest in CONTESTS.values() for runtime in contest))


def table(result: ModelResult) -> Table:
    """One network's runtimes as a rich table."""
    told = asdict(result)
    return console_table(f"{result.model}, {title_of(told)}", model_cells(told), verdict_on(told))


def contest_parser(description: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """Options of a contest: which networks, how long, and where its results go."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", metavar="MODEL", default=DEFAULT_MODELS, help="names as in recipes")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--rounds", type=positive, default=rounds)
    parser.add_argument("--iterations", type=positive, default=30, help="calls in a burst")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    return parser


def add_runtimes(parser: argparse.ArgumentParser, default: list[str]) -> None:
    """The option which runtimes take part, by their names."""
    told = ", ".join(NAMES)
    parser.add_argument("--runtimes", nargs="+", metavar="RUNTIME", choices=NAMES, default=default, help=told)


def chosen_runtimes(options: argparse.Namespace, contest: str = "fp32") -> list[Runtime]:
    """Those that `add_runtimes` let choose, of that contest."""
    return [runtime for runtime in CONTESTS[contest] if runtime.name in options.runtimes]


def run(
    options: argparse.Namespace,
    runtimes: Sequence[Runtime],
    tell: Callable[[ModelResult], str] | None = None,
    **more: Any,
) -> list[ModelResult]:
    """Compares the networks asked for, prints a table each and what there is to tell of it."""
    console = Console(width=max(Console().width, TABLE_WIDTH))
    results = []
    for model in options.models:
        timing = {name: getattr(options, name) for name in ("threads", "rounds", "iterations")}
        report = functools.partial(console.print, style="dim")
        results.append(compare(model, runtimes=runtimes, report=report, **timing, **more))
        console.print(table(results[-1]), *([tell(results[-1])] if tell else []))
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Compares the networks asked for, prints a table each and, unless told not to, records it at once."""
    parser = contest_parser(__doc__, rounds=6)
    add_runtimes(parser, NAMES)
    parser.add_argument("--dtype", choices=["fp32", "int8"], default="fp32", help="int8: as each quantizes for itself")
    parser.add_argument("--sparsity", type=float, default=0.0, help="share of weights that are zero, at random")
    parser.add_argument("--block", type=positive, default=1, help="output channels that zeros span")
    parser.add_argument("--depth", type=positive, default=1, help="input channels that zeros span")
    parser.add_argument("--batch", type=positive, default=1)
    parser.add_argument("--size", type=positive, default=224, help="rows and columns of the image")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    if not 0 <= options.sparsity < 1:
        parser.error(f"--sparsity: expected a share from 0 to 1, got {options.sparsity}")
    parts = [*["int8"] * (options.dtype == "int8"), *["sparse"] * (options.sparsity > 0)]
    contest, name = "_".join(parts) or "fp32", "_".join(["models", *parts])
    key = (*KEY, "sparsity", "block", "depth") if options.sparsity else KEY

    def record(result: ModelResult) -> str:
        return f"recorded in {save(name, [result], options.results, key=key)}"

    tell = None if options.no_record else record
    asked = {option: getattr(options, option) for option in ("batch", "size", "dtype", "sparsity", "block", "depth")}
    run(options, chosen_runtimes(options, contest), tell, **asked)


KEY = ("model", "batch", "size", "threads")
"""What tells results apart: those of other runs stay beside them."""
DEFAULT_MODELS = ["mobilenet_v1", "mobilenet_v2", "resnet18", "resnet50"]


def positive(text: str) -> int:
    """The option's value, a whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return value


if __name__ == "__main__":
    main()
