"""Result files: JSON beside a description of the machine, and the Markdown page that shows all of them."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from kernelpress.bench import FAMILIES, describe_machine
from kernelpress.bench.contest import OURS, fraction_text
from kernelpress.files import write_atomically
from kernelpress.measure.units import ABSENT, ratio_text

__all__ = ["RESULTS", "load_all", "markdown", "save", "when", "write", "write_markdown", "write_page"]

RESULTS = Path(__file__).resolve().parent / "results"


def save(name: str, results: Sequence[Any], folder: Path = RESULTS, **context: Any) -> Path:
    """Writes `results` (dataclasses) as `<folder>/<machine>/<name>.json` and renews the page; returns the file's path.

    `context` is noted beside them, as are machine, versions, commit and date.
    """
    machine = describe_machine()
    path = folder / machine.slug / f"{name}.json"
    write(path, {"machine": asdict(machine)}, results, **context)
    write_page(folder)
    return path


def write(path: Path, about: Mapping[str, object], results: Sequence[Any], **context: Any) -> None:
    """Writes `results` (dataclasses) as JSON, with commit and date, behind what they are about and before `context`."""
    revision, modified = _commit()
    content = {
        **about,
        "commit": revision,
        "modified_since_commit": modified,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        **{
            key: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
            for key, value in context.items()
        },
        "results": [asdict(result) for result in results],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


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
        loaded = load_all(machine_folder, ("models", *FAMILIES, "overhead"))
        loaded = {name: payload for name, payload in loaded.items() if "machine" in payload}
        if not loaded:
            continue
        machine = next(iter(loaded.values()))["machine"]
        lines += [f"## {machine['processor']}, {machine['cpus']} processors", ""]
        for name, payload in loaded.items():
            lines += [f"### {_TITLES[name]}", "", _provenance(payload), ""]
            render = {"models": _model_tables, "overhead": _overhead_table}.get(name, _kernel_table)
            lines += [*render(payload), ""]
    page = folder / "README.md"
    write_markdown(page, lines)
    return page


_TITLES: Mapping[str, str] = {
    "models": "Whole models, float32",
    "dense": "Dense kernels, float32",
    "depthwise": "Depthwise kernels, float32",
    "separable": "Separable and inverted-residual kernels, float32",
    "overhead": "Overhead of a call on the CPU",
}


def _provenance(payload: Mapping[str, Any]) -> str:
    machine = payload["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"])
    system = f"{machine['system']}, Python {machine['python']}, kernels for {machine['kernel_variant']}"
    return f"{when(payload)}; {system}; {versions}."


def _model_tables(payload: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for result in payload["results"]:
        lines += [
            f"**{result['model']}**, batch {result['batch']}, {result['size']}×{result['size']}, "
            f"{result['threads']} threads, {result['iterations']} calls a round",
            "",
        ]
        timed = {r["runtime"]: r["rounds_ms"] for r in result["runtimes"] if r["rounds_ms"]}
        best = {name: min(rounds) for name, rounds in timed.items()}
        ours = best.get(OURS)
        rows = []
        for runtime in result["runtimes"]:
            name = runtime["runtime"]
            if name not in timed:
                rows.append([name, *[ABSENT] * 6, f"skipped: {runtime['skipped']}"])
                continue
            rounds = sorted(timed[name])
            rows.append(
                [
                    name,
                    f"{rounds[0]:.2f}",
                    f"{statistics.median(rounds):.2f}",
                    f"{rounds[-1]:.2f}",
                    ABSENT if ours is None or name == OURS else f"{best[name] / ours:.2f}×",
                    f"{runtime['relative_error']:.0e}",
                    ABSENT if runtime["idle_cpu_share"] is None else f"{runtime['idle_cpu_share']:.1%}",
                    runtime["settings"],
                ]
            )
        header = ["runtime", "best ms", "median", "worst", "time ÷ ours", "error", "CPU while idle", "settings"]
        lines += [*markdown(header, rows, text=(0, 7)), ""]
        peers = {name: value for name, value in best.items() if name != OURS}
        if ours is not None and peers:
            fastest = min(peers, key=lambda name: peers[name])
            lines += [f"Best peer: {fastest}; ours takes {ours / peers[fastest]:.2f} of its time.", ""]
    return lines[:-1]


def _kernel_table(payload: Mapping[str, Any]) -> list[str]:
    roofline = payload["roofline"]
    fma = roofline["fma_gflops"]
    rows = [
        [
            row["network"],
            row["layer"],
            row["backend"],
            f"{row['ms']:.4f}",
            f"{row['spread']:.0%}",
            f"{row['flops'] / row['ms'] * 1e-6:.1f}",
            f"{row['traffic_bytes'] / row['ms'] * 1e-6:.1f}",
            fraction_text(row["roofline_fraction"], row["limited_by"]),
            ratio_text(row["unfused_ratio"]),
            ratio_text(row["ratio"]),
            row["best_peer"] or ABSENT,
        ]
        for row in payload["results"]
    ]
    header = ["network", "layer", "backend", "best ms", "spread", "GFLOP/s", "GB/s"]
    header += ["of roofline", "unfused ÷ ours", "best peer ÷ ours", "best peer"]
    fma_text = "unknown" if fma is None else f"{fma:.0f} GFLOP/s"
    peaks = (
        f"{roofline['threads']} threads. Measured peaks: FMA {fma_text}, copy "
        f"{roofline['l2_gbs']:.0f} GB/s in L2, {roofline['llc_gbs']:.0f} in the last-level cache, "
        f"{roofline['memory_gbs']:.0f} in memory (read + written)."
    )
    return [peaks, "", *markdown(header, rows, text=(0, 1, 2, 10))]


def _overhead_table(payload: Mapping[str, Any]) -> list[str]:
    rows = [
        [row["path"], *(f"{row[key]:.1f}" for key in ("best_us", "median_us", "overhead_us"))]
        for row in payload["results"]
    ]
    return markdown(["path", "best µs", "median µs", "over the kernel"], rows, text=(0,))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int]) -> list[str]:
    """A Markdown table; the columns in `text` are aligned to the left, numbers to the right."""
    rule = [":--" if index in text else "--:" for index in range(len(header))]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [header, rule, *rows]]


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
