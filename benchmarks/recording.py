"""Result files: JSON beside a description of the machine, and the Markdown page that shows all of them."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from kernelpress.bench import Roofline, describe_machine
from kernelpress.bench.contest import OURS, OURS_DENSE, OURS_FLOAT
from kernelpress.bench.tables import Cells, layer_cells, markdown, number_text
from kernelpress.files import write_atomically
from kernelpress.files.plain import from_plain
from kernelpress.measure.units import ABSENT, ratio_text
from kernelpress.report import TRIAL_HEADER, Trial

__all__ = [
    "RESULTS",
    "Method",
    "load_all",
    "mean_and_spread",
    "method_cells",
    "model_cells",
    "save",
    "sparsity_cells",
    "title_of",
    "verdict_on",
    "when",
    "write",
    "write_markdown",
    "write_page",
]

RESULTS = Path(__file__).resolve().parent / "results"


def save(name: str, results: Sequence[Any], folder: Path = RESULTS, *, key: Sequence[str] = (), **context: Any) -> Path:
    """Writes `results` (dataclasses) as `<folder>/<machine>/<name>.json` and renews the page; returns the file's path.

    `context` is noted beside them, as are machine, versions, commit and date. With a `key`, the fields that tell rows
    apart, rows of the file that `results` lacks stay where they are, with the machine, commit and date of theirs.
    """
    machine = describe_machine()
    path = folder / machine.slug / f"{name}.json"
    for earlier in load_all(path.parent, [name]).values() if key else ():
        results = _merged(earlier, results, key)
    write(path, {"machine": asdict(machine)}, results, **context)
    write_page(folder)
    return path


def _merged(earlier: Mapping[str, Any], results: Sequence[Any], key: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of an earlier file, `recorded` as that says, and in their place or behind them the new ones."""
    recorded = {name: earlier[name] for name in ("machine", "commit", "modified_since_commit", "date")}
    rows = [{"recorded": recorded, **row} for row in earlier["results"]] + [asdict(result) for result in results]
    return list({tuple(row[field] for field in key): row for row in rows}.values())


def write(path: Path, about: Mapping[str, object], results: Sequence[Any], **context: Any) -> None:
    """Writes `results` (dataclasses, or what became of such) as JSON, with commit and date, behind what they are about
    and before `context`."""
    revision, modified = _commit()
    content = {
        **about,
        "commit": revision,
        "modified_since_commit": modified,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        **{key: _plain(value) for key, value in context.items()},
        "results": [_plain(result) for result in results],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def write_markdown(page: Path, lines: Sequence[str]) -> None:
    """Writes a page of these lines."""
    write_atomically(page, ("\n".join(lines).rstrip() + "\n").encode())


def load_all(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """The result files of these names that are there."""
    files = {name: folder / f"{name}.json" for name in names}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items() if path.exists()}


def when(content: Mapping[str, Any]) -> str:
    """Date and commit of a result file."""
    changes = " with uncommitted changes" if content["modified_since_commit"] else ""
    return f"{content['date']}; commit {content['commit'] or 'unknown'}{changes}"


def write_page(folder: Path = RESULTS) -> Path:
    """Writes `<folder>/README.md` from the JSON files of processors that lie under `folder`."""
    lines = [
        "# Benchmark results",
        "",
        "Written by the benchmarks from the JSON files beside this page, never by hand; losses stay in.",
        "Times are medians: `best` is the best round's, beside it the middle and the worst round. Ratios are the",
        "other's time ÷ ours, between best rounds: above 1× ours is faster.",
        "",
    ]
    for machine_folder in sorted(path for path in folder.iterdir() if path.is_dir()):
        loaded = load_all(machine_folder, _TITLES)
        loaded = {name: payload for name, payload in loaded.items() if "machine" in payload}
        if not loaded:
            continue
        machine = next(iter(loaded.values()))["machine"]
        lines += [f"## {machine['processor']}, {machine['cpus']} processors", ""]
        for name, payload in loaded.items():
            lines += [f"### {_TITLES[name]}", "", _provenance(payload), ""]
            lines += [*_RENDERERS.get(name, _kernel_table)(payload), ""]
    page = folder / "README.md"
    write_markdown(page, lines)
    return page


_TITLES: Mapping[str, str] = {
    "models": "Whole models, float32",
    "models_int8": "Whole models, int8",
    "models_sparse": "Whole models with zeros, float32",
    "models_int8_sparse": "Whole models with zeros, int8",
    "growth": "Whole models by batch, image and threads, float32",
    "dense": "Dense kernels, float32",
    "depthwise": "Depthwise kernels, float32",
    "separable": "Separable and inverted-residual kernels, float32",
    "grouped": "Grouped convolutions and channel shuffles, float32",
    "ghost": "Ghost modules, float32",
    "squeeze_excite": "Squeeze-and-excitation, float32",
    "int8": "int8 kernels",
    "blocks": "Blocks of networks, emitted and captured, float32",
    "sparsity": "Layers by the share of zeros, float32",
    "low_rank": "Chains of low rank, emitted and captured, float32",
    "overhead": "Overhead of a call on the CPU",
    "distill": "What losses of distillation gain",
    "methods": "Methods of compression, each alone and combined",
}


def _provenance(payload: Mapping[str, Any]) -> str:
    machine = payload["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"])
    system = f"{machine['system']}, Python {machine['python']}, kernels for {machine['kernel_variant']}"
    return f"{when(payload)}; {system}; {versions}."


def _summary(payload: Mapping[str, Any]) -> list[str]:
    """A row for each network, batch, size and number of threads: best rounds, and when it was recorded."""
    results = payload["results"]
    names = list(dict.fromkeys(row["runtime"] for result in results for row in result["runtimes"]))
    header = ["model", "batch", "image", "threads", *(f"{name}, ms" for name in names)]
    header += ["GFLOP/s", "ours ÷ best peer", "recorded"]
    rows = []
    for result in results:
        best, flops, verdict = _best_rounds(result), result.get("flops"), _share_of_best_peer(result)
        rows.append(
            [
                *(
                    result["model"] + _zeros_of(result),
                    str(result["batch"]),
                    f"{result['size']}×{result['size']}",
                    str(result["threads"]),
                ),
                *(number_text(best.get(name), ".2f") for name in names),
                number_text(flops / best[OURS] * 1e-6 if flops and OURS in best else None, ".0f"),
                number_text(verdict and verdict[1], ".2f"),
                when(result.get("recorded", payload)),
            ]
        )
    return markdown((header, rows))


def _model_tables(payload: Mapping[str, Any]) -> list[str]:
    lines = [*_summary(payload), ""]
    for result in payload["results"]:
        lines += [f"**{result['model']}**, {title_of(result)}", "", *markdown(model_cells(result)), ""]
        lines += [f"{verdict_on(result)}.", ""] if verdict_on(result) else []
    return lines[:-1]


def title_of(result: Mapping[str, Any]) -> str:
    """What a model was timed at."""
    return (
        f"batch {result['batch']}, {result['size']}×{result['size']}, {result['threads']} threads, "
        f"{result['iterations']} calls a round, {result.get('dtype', 'fp32')}{_zeros_of(result)}"
    )


def _zeros_of(result: Mapping[str, Any]) -> str:
    if not result.get("sparsity"):
        return ""
    block = (result["block"], result["depth"])
    return f", {result['sparsity']:.0%} zeros" + f" in {block[0]}×{block[1]} blocks" * (block != (1, 1))


def model_cells(result: Mapping[str, Any]) -> Cells:
    """The runtimes of a model as result files have them."""
    header = ["runtime", "best ms", "median", "worst", "time ÷ ours", "error", "CPU while idle", "settings"]
    best, rows = _best_rounds(result), []
    for runtime in result["runtimes"]:
        name, rounds = runtime["runtime"], sorted(runtime["rounds_ms"])
        if not rounds:
            rows.append([name, *[ABSENT] * 6, f"skipped: {runtime['skipped']}"])
            continue
        times = [f"{ms:.2f}" for ms in (rounds[0], statistics.median(rounds), rounds[-1])]
        ratio = ratio_text(None if name == OURS or OURS not in best else best[name] / best[OURS])
        numbers = [number_text(runtime["relative_error"], ".0e"), number_text(runtime["idle_cpu_share"], ".1%")]
        rows.append([name, *times, ratio, *numbers, runtime["settings"]])
    return header, rows


def verdict_on(result: Mapping[str, Any]) -> str:
    """Who is the best peer, by its best round, and how much of its time ours takes; nothing without both."""
    found = _share_of_best_peer(result)
    return "" if found is None else f"Best peer: {found[0]}; ours takes {found[1]:.2f} of its time"


def _share_of_best_peer(result: Mapping[str, Any]) -> tuple[str, float] | None:
    best = {name: ms for name, ms in _best_rounds(result).items() if name not in (OURS_DENSE, OURS_FLOAT)}
    ours, peer = best.pop(OURS, None), min(best, key=best.__getitem__, default=None)
    return None if ours is None or peer is None else (peer, ours / best[peer])


def _best_rounds(result: Mapping[str, Any]) -> dict[str, float]:
    return {row["runtime"]: min(row["rounds_ms"]) for row in result["runtimes"] if row["rounds_ms"]}


def _kernel_table(payload: Mapping[str, Any]) -> list[str]:
    return [Roofline(**payload["roofline"]).told(), "", *markdown(layer_cells(payload["results"]))]


def _overhead_table(payload: Mapping[str, Any]) -> list[str]:
    rows = [
        [row["path"], *(f"{row[key]:.1f}" for key in ("best_us", "median_us", "overhead_us"))]
        for row in payload["results"]
    ]
    return markdown((["path", "best µs", "median µs", "over the kernel"], rows))


def sparsity_cells(results: Sequence[Mapping[str, Any]]) -> Cells:
    """Milliseconds of layers, a column for each share of zeros, and from which share on they are faster than dense."""
    header = ["layer", "kernel", *(f"{share:.0%}" for share in results[0]["shares"]), "faster from"]
    rows = [
        [
            row["layer"],
            row["kernel"],
            *(f"{ms:.3f}" for ms in row["milliseconds"]),
            number_text(row["break_even"], ".0%"),
        ]
        for row in results
    ]
    return header, rows


def _gain_table(payload: Mapping[str, Any]) -> list[str]:
    told = (
        f"A ResNet-56 teaches a ResNet-8 on {payload['images']} digits of {payload['image_size']} pixels; accuracy on "
        f"{payload['tested']} others, mean ± standard deviation over seeds, each with images and weights of its own; "
        "the gain is over the student alone of the same seed and as many epochs, in points."
    )
    rows = []
    for row in payload["results"]:
        accuracies = [100 * accuracy for accuracy in row["accuracies"]]
        gain = mean_and_spread(row["gains"]) if row["gains"] else ABSENT
        rows.append([row["name"], str(row["epochs"]), str(len(accuracies)), mean_and_spread(accuracies), gain])
    return [told, "", *markdown((["losses", "epochs", "seeds", "accuracy, %", "gain, points"], rows))]


@dataclass(frozen=True)
class Method:
    """What a method of compression reached on a network."""

    network: str
    trial: Trial


def method_cells(results: Sequence[Mapping[str, Any]]) -> Cells:
    """A row for each network and method, as result files have them."""
    methods = [from_plain(Method, result, "methods") for result in results]
    return ["network", *TRIAL_HEADER], [[method.network, *method.trial.cells()] for method in methods]


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation of the values."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


_RENDERERS: Mapping[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "models": _model_tables,
    "models_int8": _model_tables,
    "models_sparse": _model_tables,
    "models_int8_sparse": _model_tables,
    "growth": _summary,
    "overhead": _overhead_table,
    "sparsity": lambda payload: markdown(sparsity_cells(payload["results"])),
    "distill": _gain_table,
    "methods": lambda payload: markdown(method_cells(payload["results"])),
}


def _commit() -> tuple[str | None, bool]:
    """The commit checked out, and whether anything but results has changed since."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(RESULTS.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/results")
        return git("rev-parse", "--short=12", "HEAD"), bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return None, False
