"""Build, checks and benchmarks on this machine's CUDA device: what `make gpu` runs.

It needs Python, torch and nvcc; Triton's kernels take part where triton is installed. Everything it makes lies under
`build/gpu/`, results in `benchmarks/results/<device>/`, and in the folder that GPU_OUT names.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from gpu import folder_name, link_packages
from gpu.stages import Result, Stage, run_beside

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "gpu"
FAMILIES = ("depthwise", "separable", "int8", "sparse", "grouped", "ghost", "dense")

ALL_SECONDS, FAMILY_SECONDS = 450.0, 165.0
BUILD_SECONDS, CHECK_SECONDS = 200.0, 90.0
LEAST_SECONDS = 10.0
"""A benchmark with less time than this is not begun."""

STARTING_SECONDS = 12.0
"""Of a benchmark's process: torch, the device, the ceilings."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the stages; returns 1 where one failed."""
    parser = argparse.ArgumentParser(prog="gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--family", choices=(*FAMILIES, "models"), help="this one alone")
    parser.add_argument(
        "--out", type=Path, default=os.environ.get("GPU_OUT") or None, help="a copy of results and logs"
    )
    parser.add_argument("--seconds", type=float, default=None, help="time for all of it")
    parser.add_argument(
        "--triton", action="store_true", help="models may run on Triton's kernels too: minutes of compiling a model"
    )
    parser.add_argument("--dry-run", action="store_true", help="no build, no device: everything once, tiny, on the CPU")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    seconds = options.seconds or (FAMILY_SECONDS if options.family else ALL_SECONDS)

    def left() -> float:
        return seconds - (time.monotonic() - begin)

    reason = _reason_against(device=not options.dry_run)
    if reason is not None:
        print(f"make gpu: {reason}", file=sys.stderr)
        return 1
    folder = WORK / "dry-run" if options.dry_run else ROOT / "benchmarks" / "results"
    device = "dry run" if options.dry_run else import_module("torch").cuda.get_device_name()
    logs = WORK / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    site = link_packages(ROOT, WORK / "site")
    environment = _environment(site)
    results: list[Result] = []

    def run(*stages: Stage) -> bool:
        print(f"== {', '.join(stage.name for stage in stages)}", flush=True)
        ended = run_beside(stages, environment, ROOT, logs)
        results.extend(ended)
        for result in ended:
            print(f"-- {result.name}: {result.outcome} after {result.seconds:.0f} s\n{result.last_lines}", flush=True)
        return all(result.is_good for result in ended)

    if options.dry_run or run(_build(environment)):
        link_packages(ROOT, site)
        run(*_checks(options.family, options.dry_run, min(CHECK_SECONDS, left())))
        results += _absent(options.dry_run)
        _benchmarks(options, folder, run, left)
    _report(results, seconds - left(), folder / folder_name(device), logs, options.out)
    return int(not all(result.is_good for result in results))


def _reason_against(*, device: bool) -> str | None:
    """Why nothing can run here, None where it can."""
    try:
        torch = import_module("torch")
    except ImportError as error:
        return f"{error}: {sys.executable} needs torch; `make gpu PYTHON=...` takes another Python"
    if not device:
        return None
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False: this needs an NVIDIA GPU and a torch built for it"
    if _nvcc() is None:
        return "nvcc: not found; install the CUDA toolkit, or name it by CUDACXX or CUDA_HOME"
    return None


def _nvcc() -> str | None:
    sys.path.insert(0, str(ROOT))
    try:
        found: str | None = import_module("build_native").find_nvcc()
    finally:
        sys.path.remove(str(ROOT))
    return found


def _environment(site: Path) -> dict[str, str]:
    """Of every stage: the checkout's packages first, no network, caches of its own."""
    paths = [site, ROOT / "benchmarks", ROOT / "tests", os.environ.get("PYTHONPATH", "")]
    compiler = _nvcc()
    return {
        **os.environ,
        **({} if compiler is None else {"CUDACXX": compiler}),
        "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "KERNELPRESS_CACHE": str(WORK / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(WORK / "inductor"),
        "TRITON_CACHE_DIR": str(WORK / "triton"),
    }


def _python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)


def _build(environment: Mapping[str, str]) -> Stage:
    """The CUDA kernels, for the device of this machine alone. Those for processors are not needed here."""
    major, minor = import_module("torch").cuda.get_device_capability()
    chosen = {"KERNELPRESS_CUDA_ARCHS": environment.get("KERNELPRESS_CUDA_ARCHS") or f"{major}{minor}"}
    return Stage("build", _python("build_native.py", "cuda"), BUILD_SECONDS, chosen)


def _checks(family: str | None, is_dry: bool, seconds: float) -> list[Stage]:
    """All that must be right, side by side: they need little of the device."""
    chosen = ["--family", family] if family in FAMILIES else []
    dry = ["--dry-run"] if is_dry else []
    if family == "models":
        return [Stage("capture", _python("-m", "gpu.networks", "capture", *dry), seconds)]
    stages = [
        Stage(check, _python("-m", "gpu.checks", check, *chosen, *dry), seconds)
        for check in (("ops", "smallest") if is_dry else ("golden", "ops", "opcheck"))
    ]
    if find_spec("triton") is not None and not is_dry:
        # Each kernel is compiled as it is first called, which takes a processor a second: families side by side.
        stages += [
            Stage(f"triton-{name}", _python("-m", "gpu.checks", "triton", "--family", name), seconds)
            for name in FAMILIES
            if family in (None, name)
        ]
    sanitizer = None if is_dry else find_sanitizer()
    if sanitizer is not None:
        stages += [
            Stage(
                tool,
                (
                    *(sanitizer, "--tool", tool, "--kernel-name", "kns=kernelpress", "--error-exitcode", "9"),
                    *_python("-m", "gpu.checks", "smallest", *chosen),
                ),
                seconds,
                # Each tensor in an allocation of its own, so that an access beside it is seen.
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )
            for tool in ("memcheck", "racecheck")
        ]
    if family is None:
        stages.append(Stage("capture", _python("-m", "gpu.networks", "capture", *dry), seconds))
    return stages


def find_sanitizer() -> str | None:
    """compute-sanitizer, on the PATH or in the toolkit."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = ["compute-sanitizer", *(f"{home}/bin/compute-sanitizer" for home in homes if home)]
    return next(filter(None, map(shutil.which, places)), None)


def _absent(is_dry: bool) -> list[Result]:
    """Checks that are left out, and why."""
    if is_dry:
        return []
    left_out = []
    if find_spec("triton") is None:
        left_out.append(Result("triton", "skipped", 0.0, "not installed: pip install triton"))
    if find_sanitizer() is None:
        left_out.append(Result("compute-sanitizer", "skipped", 0.0, "not installed; the CUDA toolkit has it"))
    return left_out


def _benchmarks(options: argparse.Namespace, folder: Path, run: Callable[..., bool], left: Callable[[], float]) -> None:
    """One family after the other, alone on the device, each with its share of what time is left."""
    wanted = [options.family] if options.family else [*FAMILIES, "models"]
    for index, name in enumerate(wanted):
        # Whole models compile longest: they count three times.
        shares = sum(3 if other == "models" else 1 for other in wanted[index:])
        limit = left() * (3 if name == "models" else 1) / shares
        if limit < LEAST_SECONDS:
            print(f"== bench-{name}: no time left", flush=True)
            continue
        inside = str(max(limit - STARTING_SECONDS, 5.0))
        module = ("gpu.networks", "bench") if name == "models" else ("gpu.kernels", name)
        flags = ["--dry-run"] * options.dry_run + ["--triton"] * (options.triton and name == "models")
        command = _python("-m", *module, "--seconds", inside, "--out", str(folder), *flags)
        run(Stage(f"bench-{name}", command, limit, may_be_stopped=True))


def _report(results: Sequence[Result], seconds: float, folder: Path, logs: Path, out: Path | None) -> None:
    lines = [f"{result.name}: {result.outcome}, {result.seconds:.0f} s" for result in results]
    text = "\n".join([*lines, f"{seconds:.0f} s in all"]) + "\n"
    logs.mkdir(parents=True, exist_ok=True)
    (logs / "summary.txt").write_text(text, encoding="utf-8")
    print(f"== summary\n{text}", flush=True)
    print(f"Results: {folder.relative_to(ROOT)}/README.md", flush=True)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        if folder.is_dir():
            shutil.copytree(folder, out / folder.name, dirs_exist_ok=True)
        said = [f"===== {log.name}\n{log.read_text('utf-8', 'replace')}\n" for log in sorted(logs.iterdir())]
        (out / "log.txt").write_text("".join(said), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
