"""Runs a network in every runtime, process by process in turn, and checks that they compute the same."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kernelpress.bench.contest import MODEL_TOLERANCE, OURS
from peers.networks import export_onnx, prepare
from peers.protocol import Answer, Job

__all__ = ["RUNTIMES", "ModelResult", "Runtime", "RuntimeResult", "compare"]

SETTLE_SECONDS = 0.25
"""Sleep before each burst: worker threads of the runtime before may spin for some tens of milliseconds."""


@dataclass(frozen=True)
class Runtime:
    """A contestant: its name in tables and in `peers.runtimes`, further arguments, and the folder to import kernelpress
    from, if not this checkout's."""

    name: str
    loader: str
    arguments: tuple[str, ...] = ()
    needs_onnx: bool = False
    import_from: str = ""


RUNTIMES = (
    Runtime("eager", "eager", ("contiguous",)),
    Runtime("eager channels_last", "eager", ("channels_last",)),
    Runtime("Inductor", "inductor", ("contiguous",)),
    Runtime("Inductor channels_last", "inductor", ("channels_last",)),
    Runtime("ONNX Runtime", "ort", needs_onnx=True),
    Runtime("OpenVINO", "openvino", needs_onnx=True),
    Runtime(OURS, "ours", ("captured",)),
)


@dataclass(frozen=True)
class RuntimeResult:
    """One runtime on one network: the median of each round in ms, in the order they ran, or why there is none."""

    runtime: str
    settings: str = ""
    rounds_ms: tuple[float, ...] = ()
    relative_error: float | None = None
    """Largest difference of a logit from eager's ÷ the largest logit."""
    idle_cpu_share: float | None = None
    """Processor time that it took while others were timed ÷ that time; near 0 if it disturbed nobody."""
    skipped: str | None = None

    @property
    def best_ms(self) -> float | None:
        return min(self.rounds_ms, default=None)


@dataclass(frozen=True)
class ModelResult:
    """A network in all runtimes, at one batch, image size and number of threads."""

    model: str
    batch: int
    size: int
    threads: int
    seed: int
    iterations: int
    runtimes: tuple[RuntimeResult, ...]


def compare(
    model: str,
    *,
    runtimes: Sequence[Runtime] = RUNTIMES,
    threads: int,
    batch: int = 1,
    size: int = 224,
    rounds: int = 6,
    iterations: int = 30,
    seed: int | None = None,
    report: Callable[[str], None] = print,
) -> ModelResult:
    """Times `model` (a name of `kernelpress.models`) in every runtime: `rounds` rounds of `iterations` calls each.

    Weights and input are drawn from `seed`, a fresh one if `None`. A runtime whose logits differ from the first
    runtime's by more than `MODEL_TOLERANCE` is reported as skipped, with the error.
    """
    seed = int.from_bytes(os.urandom(4), "little") if seed is None else seed
    with tempfile.TemporaryDirectory(prefix="kernelpress-bench-") as folder:
        network, x = prepare(model, batch, size, seed)
        weights = {name: weight.numpy() for name, weight in network.state_dict().items()}
        job = Job(model, weights, x, f"{folder}/model.onnx", threads, iterations)
        onnx_missing = _try_export(network, job) if any(runtime.needs_onnx for runtime in runtimes) else None
        del network
        results: dict[str, RuntimeResult] = {}
        running: dict[str, _Process] = {}
        try:
            for runtime in runtimes:
                if runtime.needs_onnx and onnx_missing:
                    results[runtime.name] = RuntimeResult(runtime.name, skipped=onnx_missing)
                    continue
                process = _Process(runtime, job, Path(folder))
                results[runtime.name] = process.start()
                if results[runtime.name].skipped is None:
                    running[runtime.name] = process
                report(f"{model}: {runtime.name} {results[runtime.name].skipped or 'ready'}")
            _check_outputs(results, running)
            _run_rounds(results, running, rounds)
        finally:
            for process in running.values():
                process.stop()
    return ModelResult(model, batch, size, threads, seed, iterations, tuple(results.values()))


class _Process:
    """A runtime's process and the talk with it (see `peers.protocol`)."""

    def __init__(self, runtime: Runtime, job: Job, folder: Path) -> None:
        self.name = runtime.name
        self.pipe, theirs = Pipe()
        self.logits = np.empty(0)
        self.said = folder / f"{runtime.name}.txt"
        with self.said.open("wb") as said:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "peers.runtimes", str(theirs.fileno()), runtime.loader, *runtime.arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                cwd=Path(__file__).resolve().parents[1],
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": str(job.threads),
                    "PYTHONPATH": os.pathsep.join(
                        filter(None, [runtime.import_from, os.environ.get("PYTHONPATH", "")])
                    ),
                    # Emission times its candidates in this very run, not in some busier hour before.
                    "KERNELPRESS_CACHE": str(folder / "timings"),
                },
            )
        theirs.close()
        with contextlib.suppress(OSError):  # its end is told when it should answer
            self.pipe.send(job)

    def start(self) -> RuntimeResult:
        """Waits until the model is loaded and warm; a runtime that fails to load it is skipped with its last words."""
        try:
            answer: Answer = self._answer()
        except RuntimeError as error:
            return RuntimeResult(self.name, skipped=str(error))
        if answer.logits is None:
            self.stop()
            return RuntimeResult(self.name, skipped=answer.skipped)
        self.logits = answer.logits.astype(np.float64)
        return RuntimeResult(self.name, settings=answer.settings)

    def round(self) -> float:
        """Has it time one burst; the median in ms."""
        self.pipe.send("round")
        return float(self._answer())

    def cpu_seconds(self) -> float | None:
        """Processor time of all its threads so far; `None` where the system does not tell."""
        try:
            fields = Path(f"/proc/{self.popen.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        except OSError:
            return None
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """Ends the talk, upon which it ends."""
        self.pipe.close()
        self.popen.wait(timeout=60)

    def _answer(self) -> Any:
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.popen.wait(timeout=60)
        last_words = self.said.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"process ended with status {self.popen.returncode}: {''.join(last_words)}")


def _try_export(network: torch.nn.Module, job: Job) -> str | None:
    """Exports the network to ONNX; where the packages for it are absent, says which."""
    try:
        export_onnx(network, torch.from_numpy(job.x), job.onnx_file)
    except ImportError as error:
        return f"no ONNX export: {error}; `pip install kernelpress[peers]` installs it"
    return None


def _check_outputs(results: dict[str, RuntimeResult], running: dict[str, _Process]) -> None:
    """Notes each runtime's error against the first; those beyond the tolerance leave the contest."""
    if not running:
        return
    expected = next(iter(running.values())).logits
    for name in list(running):
        error = float(np.abs(running[name].logits - expected).max() / np.abs(expected).max())
        results[name] = replace(results[name], relative_error=error)
        if not error <= MODEL_TOLERANCE[torch.float32]:
            results[name] = replace(results[name], skipped=f"logits differ from eager's by {error:.1e}")
            running.pop(name).stop()


def _run_rounds(results: dict[str, RuntimeResult], running: dict[str, _Process], rounds: int) -> None:
    """The rounds, each beginning with another runtime so that nobody always follows the same one."""
    medians: dict[str, list[float]] = {name: [] for name in running}
    idle_cpu = dict.fromkeys(running, 0.0)
    idle_time = dict.fromkeys(running, 0.0)
    names = list(running)
    for index in range(rounds):
        first = index % len(names) if names else 0
        for name in names[first:] + names[:first]:
            time.sleep(SETTLE_SECONDS)
            before = {other: running[other].cpu_seconds() for other in names}
            start = time.perf_counter()
            medians[name].append(running[name].round())
            elapsed = time.perf_counter() - start
            for other in names:
                used, until = before[other], running[other].cpu_seconds()
                if other != name and used is not None and until is not None:
                    idle_cpu[other] += until - used
                    idle_time[other] += elapsed
    for name in names:
        share = idle_cpu[name] / idle_time[name] if idle_time[name] else None
        results[name] = replace(results[name], rounds_ms=tuple(medians[name]), idle_cpu_share=share)
