"""The command line: `press`, `sweep`, `search`, `profile`, `compare`, `bench`, `doctor`.

Exit status: 0 done, 1 the result is not what the recipe requires, 2 the user's mistake (one line, no traceback; set
`KERNELPRESS_TRACEBACK=1` to see where it rose), 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kernelpress

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["main"]

_RESUMED = ("press", "sweep", "search")
_GPU_BACKENDS = ("cuda", "triton", "cudnn")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (by default the process's own) and return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except KeyboardInterrupt:
        again = "; the same command goes on from the last finished step" if options.command in _RESUMED else ""
        print(f"\nkernelpress: interrupted{again}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) has left: nothing to say, and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("KERNELPRESS_TRACEBACK"):
            raise
        print(f"kernelpress: error: {error}", file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kernelpress", description=kernelpress.__doc__.splitlines()[0].partition(": ")[2]
    )
    parser.add_argument("--version", action="version", version=f"kernelpress {kernelpress.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    press = commands.add_parser("press", help="compress, emit, measure, write the report")
    press.add_argument("recipe", type=Path, help="a YAML file; see recipes/")
    sweep = commands.add_parser("sweep", help="press a recipe with every combination of values that it lists")
    sweep.add_argument("recipe", type=Path, help="a YAML file with a section sweep; see docs/sweep.md")
    for command in (press, sweep):
        command.add_argument(
            "--output", type=Path, metavar="DIR", help="where to write, instead of the recipe's own folder"
        )
        command.add_argument("--fresh", action="store_true", help="do every step again, whatever the folder holds")
        command.add_argument(
            "--set",
            type=_option,
            action="append",
            default=[],
            metavar="PATH=VALUE",
            help="another value of an option of the recipe, such as steps.0.train.epochs=3",
        )
    press.set_defaults(run=_press)
    sweep.add_argument(
        "--max-ms", type=float, metavar="MS", help="name the most accurate trial of at most this latency"
    )
    sweep.add_argument("--min-accuracy", type=float, metavar="SHARE", help="name the fastest of at least this accuracy")
    sweep.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="on Ray Tune, each trial with a node of the cluster to itself (without ADDRESS: on this machine)",
    )
    sweep.set_defaults(run=_sweep)

    search = commands.add_parser("search", help="press a model by every recipe that ships, keep the fastest")
    search.add_argument("model", metavar="MODEL", help="a name as recipes have it, such as resnet20 or timm:…")
    search.add_argument("--latency", type=_milliseconds, required=True, metavar="TIME", help="2ms, 350us: at most")
    search.add_argument("--max-drop", type=float, default=0.01, help="accuracy that may be lost (default %(default)s)")
    search.add_argument("--data", default="digits", help="digits, or a folder of images by class (default digits)")
    search.add_argument("--size", type=_positive, default=32, help="height and width of the images (default 32)")
    search.add_argument("--weights", type=Path, help="a safetensors file to start from, instead of training")
    search.add_argument("--epochs", type=_positive, default=10, help="of training without weights (default 10)")
    search.add_argument("--batch", type=_positive, default=1, help="images per inference (default 1)")
    search.add_argument("--threads", type=_positive, help="torch's number of threads (default: as it is)")
    search.add_argument("--recipes", type=Path, nargs="+", metavar="FILE", help="instead of those that ship")
    search.add_argument(
        "--output", type=Path, default=Path("results/search"), metavar="DIR", help="default %(default)s"
    )
    search.set_defaults(run=_search)

    profile = commands.add_parser("profile", help="what a model costs, in real and proxy metrics")
    profile.add_argument(
        "model",
        metavar="MODEL",
        help="a name of kernelpress.models, timm:… (torchvision:, transformers:), package.module:factory, a .pt2 file",
    )
    profile.add_argument("--batch", type=_positive, default=1, help="images per inference (default 1)")
    profile.add_argument(
        "--size", type=_positive, help="height and width of the images (default 224, or what a file was made for)"
    )
    profile.add_argument(
        "--channels", type=_positive, help="channels of the images (default 3, or what a file was made for)"
    )
    profile.add_argument("--threads", type=_positive, help="torch's number of threads (default: as it is)")
    profile.add_argument("--per-layer", action="store_true", help="also time and FLOPs of every layer")
    profile.add_argument("--emit", action="store_true", help="also the model emitted onto native kernels and captured")
    profile.set_defaults(run=_profile)

    compare = commands.add_parser("compare", help="networks in eager PyTorch, torch.compile and kernelpress, as a page")
    compare.add_argument("models", nargs="+", metavar="MODEL", help="as in profile, without files")
    compare.add_argument(
        "--output", type=Path, default=Path("results/compare"), metavar="DIR", help="default %(default)s"
    )
    compare.add_argument("--batch", type=_positive, default=1, help="images per inference (default 1)")
    compare.add_argument("--size", type=_positive, default=224, help="height and width of the images (default 224)")
    compare.add_argument("--threads", type=_positive, help="torch's number of threads (default: as it is)")
    compare.add_argument("--rounds", type=_positive, default=4, help="of each runtime in turn (default 4)")
    compare.set_defaults(run=_compare)

    bench = commands.add_parser("bench", help="kernel microbenchmarks")
    bench.add_argument("--family", help="one family of kernels (default: all)")
    bench.add_argument(
        "--backends",
        type=_names,
        metavar="A,B",
        help="these side by side, such as cuda,triton; see doctor",
    )
    bench.add_argument("--device", help="cpu or cuda (default: cuda where all --backends are a GPU's, else cpu)")
    bench.add_argument("--dtype", help="with --backends: fp32 (default), fp16 or bf16; int8 layers are int8")
    bench.add_argument("--batch", type=_positive, default=1, help="images per inference (default 1)")
    bench.add_argument("--peers", action="store_true", help="time PyTorch's own ways in turn with ours")
    bench.add_argument("--threads", type=_positive, help="torch's number of threads (default: as it is)")
    bench.set_defaults(run=_bench)

    doctor = commands.add_parser("doctor", help="what this machine can run, and why not")
    doctor.set_defaults(run=_doctor)
    return parser


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return value


def _milliseconds(text: str) -> float:
    number, unit = text.rstrip("µmsu "), text[len(text.rstrip("µmsu ")) :].strip()
    factor = {"": 1.0, "ms": 1.0, "us": 1e-3, "µs": 1e-3, "s": 1e3}.get(unit)
    try:
        value = float(number) * (factor or 0.0)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a time such as 2ms or 350us, got {text!r}")
    return value


def _option(text: str) -> tuple[str, Any]:
    """A path and its value, as YAML has it."""
    path, equals, value = text.partition("=")
    if not path or not equals:
        raise argparse.ArgumentTypeError(f"expected PATH=VALUE, got {text!r}")
    try:
        import yaml
    except ImportError as error:
        raise argparse.ArgumentTypeError("takes PyYAML: pip install 'kernelpress[cli]'") from error
    try:
        return path, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"expected a value in YAML, got {value!r}") from error


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _console() -> Console:
    try:
        from rich.console import Console
    except ImportError as error:
        raise ImportError("the command line takes rich: pip install 'kernelpress[cli]'") from error
    # Tables read badly when folded: where nobody watches, lines are as long as they are.
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


def _press_module() -> Any:
    try:
        from kernelpress import press
    except ImportError as error:
        raise ImportError(f"press takes {error.name}: pip install 'kernelpress[all]'") from error
    return press


def _teller(console: Console) -> Callable[[str], None]:
    """Prints a line with what stands before its colon in bold."""

    def tell(line: str) -> None:
        step, colon, rest = line.partition(": ")
        console.print(f"[bold]{step}[/bold]: " if colon else line, end="" if colon else "\n", soft_wrap=True)
        if colon:
            console.print(rest, markup=False, soft_wrap=True)

    return tell


def _press(options: argparse.Namespace) -> int:
    console = _console()
    module = _press_module()
    failure = None
    try:
        report = module.press(
            module.load_recipe(options.recipe, dict(options.set)),
            output=options.output,
            fresh=options.fresh,
            tell=_teller(console),
            progress=console.is_terminal,
        )
    except module.RequirementError as error:
        failure, report = error, error.report
    _print_comparison(console, report.comparison, report.pressed)
    console.print(f"\n[bold]{report.headline()}[/bold] (against {report.comparison.baseline})")
    if failure is not None:
        print(f"kernelpress: the recipe's requirements are not met: {failure}", file=sys.stderr)
        return 1
    return 0


def _sweep(options: argparse.Namespace) -> int:
    console = _console()
    module = _press_module()
    from kernelpress.report import Limits

    report = module.sweep(
        options.recipe,
        options=dict(options.set),
        limits=Limits(max_ms=options.max_ms, min_accuracy=options.min_accuracy),
        output=options.output,
        fresh=options.fresh,
        ray=options.ray,
        tell=_teller(console),
        progress=console.is_terminal,
    )
    return _print_trials(console, report)


def _search(options: argparse.Namespace) -> int:
    console = _console()
    report = _press_module().search(
        options.model,
        latency_ms=options.latency,
        max_drop=options.max_drop,
        data=options.data,
        image_size=options.size,
        weights=options.weights,
        epochs=options.epochs,
        batch=options.batch,
        threads=options.threads,
        recipes=options.recipes,
        output=options.output,
        tell=_teller(console),
        progress=console.is_terminal,
    )
    return _print_trials(console, report)


def _print_trials(console: Console, report: Any) -> int:
    """The table of a sweep or search, and its best trial; 1 where none keeps to the limits."""
    header, rows = report.cells()
    best = report.best()
    _print_table(console, header, rows, [trial is best for trial in report.trials])
    for note in report.notes():
        console.print(note, style="dim", markup=False)
    if report.verdict():
        console.print(f"\n{report.verdict()}", style="bold", markup=False)
    return 1 if report.verdict() and best is None else 0


def _print_comparison(console: Console, comparison: Any, ours: str | None = None) -> None:
    header, rows = comparison.cells()
    _print_table(console, header, rows, [entry.name == ours for entry in comparison.profiles])
    for note in comparison.notes():
        console.print(note, style="dim", markup=False)


def _print_table(console: Console, header: list[str], rows: list[list[str]], is_ours: list[bool]) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for index, title in enumerate(header):
        table.add_column(title, justify="left" if index == 0 else "right", no_wrap=True)
    for row, stands_out in zip(rows, is_ours, strict=True):
        table.add_row(*row, style="bold green" if stands_out else None)
    console.print()
    console.print(table)


def _profile(options: argparse.Namespace) -> int:
    console = _console()
    import torch

    from kernelpress import measure
    from kernelpress.emit import EmittedModel
    from kernelpress.measure.contestants import torch_contestants
    from kernelpress.runtime.clock import threads_set_to

    model = _model(options.model)
    with threads_set_to(options.threads):
        if isinstance(model, EmittedModel):
            image = _image_of(model, options)
            contestants: dict[str, Any] = {"emitted": model, "captured": kernelpress.capture(model, image)}
        else:
            image = torch.randn(options.batch, options.channels or 3, options.size or 224, options.size or 224)
            contestants = dict(torch_contestants(model, (image,), ("eager", "channels_last"))[0])
            if options.emit:
                contestants["captured"] = kernelpress.capture(kernelpress.emit(model, image), image)
        comparison = measure.compare(contestants, image)
        console.print(f"[bold]{options.model}[/bold], images {'×'.join(map(str, image.shape))}")
        _print_comparison(console, comparison)
        if isinstance(model, EmittedModel):
            if options.per_layer:
                console.print("\n" + model.summary(), markup=False, soft_wrap=True)
        elif options.per_layer:
            console.print(
                "\n" + measure.layer_table(measure.profile_layers(model, image)), markup=False, soft_wrap=True
            )
    return 0


def _compare(options: argparse.Namespace) -> int:
    console = _console()
    import torch

    from kernelpress import models
    from kernelpress.bench import describe_machine
    from kernelpress.bench.contest import OURS
    from kernelpress.bench.model_contest import STOCK_AND_OURS, compare
    from kernelpress.files import write_atomically
    from kernelpress.report import Accuracy, NetworkComparison, commit_of, now, render_networks

    for name in options.models:
        models.build(name)
    accuracies, results = {}, []
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        published = models.published(name) if name in models.names() else None
        if published is not None and published.accuracy is not None:
            accuracies[name] = Accuracy(published.accuracy, published.accuracy_source)
        results.append(
            compare(
                name,
                runtimes=STOCK_AND_OURS,
                threads=options.threads or torch.get_num_threads(),
                batch=options.batch,
                size=options.size,
                rounds=options.rounds,
                report=lambda text: console.print(text, style="dim", markup=False),
            )
        )
        comparison = NetworkComparison(
            now(), commit_of(Path(__file__).parent), describe_machine(), tuple(results), accuracies
        )
        told = json.dumps(comparison.to_dict(), indent=1, ensure_ascii=False)
        write_atomically(options.output / "comparison.json", told.encode())
        write_atomically(options.output / "comparison.html", render_networks(comparison).encode())
    header, rows = comparison.cells()
    _print_table(console, header, rows, [row[1] == OURS for row in rows])
    for note in comparison.notes():
        console.print(note, style="dim", markup=False)
    console.print(f"\nwritten: {options.output / 'comparison.html'}, comparison.json", markup=False)
    return 0


def _image_of(model: Any, options: argparse.Namespace) -> Any:
    """Random images of the form that an emitted model was made for, with the batch, channels and size asked for."""
    import torch

    (example,) = model.example_inputs()
    _, channels, height, width = example.shape
    size = (options.size, options.size) if options.size else (height, width)
    return torch.randn(options.batch, options.channels or channels, *size)


def _model(name: str) -> Any:
    """The module that a name, a file or `package.module:factory` stands for."""
    from kernelpress import models

    if name.endswith(".pt2"):
        if not Path(name).is_file():
            raise FileNotFoundError(f"MODEL: {name} does not exist")
        return kernelpress.load(name)
    return models.build(name).eval()


def _bench(options: argparse.Namespace) -> int:
    console = _console()
    from kernelpress import bench

    device = options.device or ("cuda" if options.backends and set(options.backends) <= set(_GPU_BACKENDS) else "cpu")
    backends = options.backends or (_backends_of_a_gpu() if device == "cuda" else None)
    if backends is None and options.dtype:
        raise ValueError("dtype: takes --backends")
    if backends is not None and options.peers:
        raise ValueError("peers: not with --backends or --device cuda; `make gpu` has all peers")
    if backends is not None:
        return _bench_backends(options, backends, device)
    if options.family in bench.ALL_FAMILIES and options.family not in bench.FAMILIES:
        raise ValueError(f"family: {options.family} takes --backends; without, {', '.join(bench.FAMILIES)}")
    for family in bench.FAMILIES if options.family is None else (options.family,):
        rows = bench.run(family, device, options.peers, batch=options.batch, threads=options.threads)
        console.print(bench.table(rows, bench.measure_roofline(options.threads)))
    return 0


def _bench_backends(options: argparse.Namespace, backends: list[str], device: str) -> int:
    """Backends side by side; of all families those that every backend runs some of."""
    console = _console()
    from kernelpress import bench

    left_out: list[bench.CannotRunError] = []
    families = bench.ALL_FAMILIES if options.family is None else (options.family,)
    for family in families:
        try:
            rows = bench.run_backends(
                *(family, backends, device),
                dtype=options.dtype or "fp32",
                batch=options.batch,
                threads=options.threads,
            )
        except bench.CannotRunError as refusal:
            left_out.append(refusal)
            if len(left_out) == len(families):
                raise
            continue
        console.print(bench.backend_table(rows))
    for reason in left_out:
        console.print(f"left out: {reason}", markup=False)
    return 0


def _backends_of_a_gpu() -> list[str]:
    """Those that run something here, or the first if none does: it will tell why."""
    from kernelpress.ops import availability

    usable = [
        name for name in _GPU_BACKENDS if any(reasons.get(name, "") is None for reasons in availability().values())
    ]
    return usable or list(_GPU_BACKENDS[:1])


def _doctor(_: argparse.Namespace) -> int:
    console = _console()
    from kernelpress.doctor import examine

    marks = {True: "[green]✓[/green]", False: "[yellow]✗[/yellow]", None: " "}
    section = ""
    for finding in examine():
        if finding.section != section:
            section = finding.section
            console.print(f"\n[bold]{section}[/bold]")
        console.print(f"  {marks[finding.is_ok]} {finding.name:<20} ", end="")
        console.print(finding.detail, markup=False, soft_wrap=True)
    return 0
