"""Runs a network in every runtime, process by process in turn, and checks that they compute the same.

Each runtime is a process of `bench.runtimes`; what it costs is its time in turn with the others, how long it took to
its first result, the memory that it holds and, where the machine counts it, energy.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kernelpress.bench.contest import KINDS, MODEL_TOLERANCE, OURS, OURS_DENSE, OURS_FLOAT
from kernelpress.bench.processes import Start, Worker, WorkerError, rounds_in_turn
from kernelpress.bench.twins import build, export_onnx, prepare
from kernelpress.bench.worker import Job
from kernelpress.emit import emit
from kernelpress.measure import count_flops, count_parameters
from kernelpress.measure.energy import energy_per_call
from kernelpress.measure.memory import weight_bytes
from kernelpress.runtime.clock import threads_set_to

__all__ = ["CONTESTS", "RUNTIMES", "STOCK_AND_OURS", "ModelResult", "Runtime", "RuntimeResult", "compare"]


@dataclass(frozen=True)
class Runtime:
    """A contestant: its name in tables and in `bench.runtimes`, further arguments, and the folder to import kernelpress
    from, if not this checkout's."""

    name: str
    loader: str
    arguments: tuple[str, ...] = ()
    needs_onnx: bool = False
    needs_emitted: bool = False
    import_from: str = ""

    @property
    def slug(self) -> str:
        return "-".join([self.loader, *self.arguments, *([Path(self.import_from).name] if self.import_from else [])])


RUNTIMES = (
    Runtime("eager", "eager", ("contiguous",)),
    Runtime("eager channels_last", "eager", ("channels_last",)),
    Runtime("Inductor", "inductor", ("contiguous",)),
    Runtime("Inductor channels_last", "inductor", ("channels_last",)),
    Runtime("ONNX Runtime", "ort", needs_onnx=True),
    Runtime("OpenVINO", "openvino", needs_onnx=True),
    Runtime("ncnn", "ncnn"),
    Runtime("ExecuTorch", "executorch"),
    Runtime(OURS, "ours", ("captured",)),
)
STOCK_AND_OURS = (
    RUNTIMES[0],
    Runtime("torch.compile", "inductor", ("contiguous",)),
    Runtime(OURS, "ours", ("loaded",), needs_emitted=True),
)
"""What a user has without further packages."""

INT8_RUNTIMES = (
    Runtime("ONNX Runtime", "ort", ("int8",), needs_onnx=True),
    Runtime("OpenVINO", "openvino", ("int8",), needs_onnx=True),
    Runtime("ExecuTorch", "executorch", ("int8",)),
    Runtime("Inductor", "inductor_int8"),
    Runtime(OURS_FLOAT, "ours", ("captured",)),
    Runtime(OURS, "ours_int8"),
)

SPARSE_RUNTIMES = (
    Runtime("ONNX Runtime", "ort", needs_onnx=True),
    Runtime("OpenVINO", "openvino", needs_onnx=True),
    Runtime("DeepSparse", "deepsparse"),
    Runtime(OURS_DENSE, "ours", ("dense",)),
    Runtime(OURS, "ours", ("captured",)),
)

INT8_SPARSE_RUNTIMES = (
    *INT8_RUNTIMES[:3],
    Runtime(OURS_DENSE, "ours_int8", ("dense",)),
    INT8_RUNTIMES[-1],
)

CONTESTS: Mapping[str, Sequence[Runtime]] = {
    "fp32": RUNTIMES,
    "int8": INT8_RUNTIMES,
    "sparse": SPARSE_RUNTIMES,
    "int8_sparse": INT8_SPARSE_RUNTIMES,
}
"""Who meets: in each arithmetic, and on networks with zeros."""


@dataclass(frozen=True)
class RuntimeResult:
    """One runtime on one network: the median of each round in ms, in the order they ran, or why there is none."""

    runtime: str
    settings: str = ""
    rounds_ms: tuple[float, ...] = ()
    relative_error: float | None = None
    """Largest difference of a logit from eager's in float32 ÷ the largest logit."""
    idle_cpu_share: float | None = None
    """Processor time that it took while others were timed ÷ that time; near 0 if it disturbed nobody."""
    skipped: str | None = None
    start: Start | None = None
    peak_bytes: int | None = None
    """Resident memory at its highest while it ran, above that after the imports; `None` where the system tells none."""
    joules: float | None = None
    """Of one call; `None` where `energy_reason` says why."""
    energy_reason: str | None = None

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
    flops: int | None = None
    """Per inference, of the whole batch; a multiplication and its addition count as two."""
    parameters: int | None = None
    weight_bytes: int | None = None
    emission_s: float | None = None
    """How long emission took for the runtime that loads what it made."""
    dtype: str = "fp32"
    sparsity: float = 0.0
    block: int = 1
    depth: int = 1


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
    dtype: str = "fp32",
    sparsity: float = 0.0,
    block: int = 1,
    depth: int = 1,
    report: Callable[[str], None] = print,
) -> ModelResult:
    """Times `model` (a name of `kernelpress.models`) in every runtime: `rounds` rounds of `iterations` calls each.

    Weights and input are drawn from `seed`, a fresh one if `None`; `sparsity` is the share of zeros among the weights
    of convolutions (but the first and depthwise ones), which span `block` output and `depth` input channels. A runtime
    whose logits differ from eager's in float32 by more than `MODEL_TOLERANCE` of `dtype` is reported as skipped, with
    the error.
    """
    seed = int.from_bytes(os.urandom(4), "little") if seed is None else seed
    with tempfile.TemporaryDirectory(prefix="kernelpress-bench-") as folder:
        job = Job(model, "", folder, threads, batch, iterations, sparsity=sparsity, block=block, depth=depth)
        network = prepare(job, size, seed)
        with threads_set_to(threads), torch.no_grad():
            expected = network(torch.from_numpy(job.load_input())).double().numpy()
        facts: dict[str, Any] = {
            "flops": count_flops(network, torch.from_numpy(job.load_input())),
            "parameters": count_parameters(network),
            "weight_bytes": weight_bytes(network),
        }
        onnx_missing = _try_export(network, job) if any(runtime.needs_onnx for runtime in runtimes) else None
        del network
        if any(runtime.needs_emitted for runtime in runtimes):
            facts["emission_s"] = _emit(job)
        results: dict[str, RuntimeResult] = {}
        running: dict[str, Worker] = {}
        try:
            for runtime in runtimes:
                if runtime.needs_onnx and onnx_missing:
                    results[runtime.name] = RuntimeResult(runtime.name, skipped=onnx_missing)
                    continue
                worker = _worker(runtime, replace(job, runtime=runtime.slug))
                try:
                    settings, start = worker.start()
                    results[runtime.name] = RuntimeResult(runtime.name, settings, start=start)
                    running[runtime.name] = worker
                except WorkerError as error:
                    results[runtime.name] = RuntimeResult(runtime.name, skipped=str(error))
                report(f"{model}: {runtime.name} {results[runtime.name].skipped or 'ready'}")
            _check_outputs(results, running, expected, MODEL_TOLERANCE[KINDS[dtype]])
            for name, timed in rounds_in_turn(running, rounds).items():
                energy = energy_per_call(running[name].round, device=torch.device("cpu"))
                results[name] = replace(
                    results[name],
                    rounds_ms=timed.milliseconds,
                    idle_cpu_share=timed.idle_cpu_share,
                    peak_bytes=running[name].peak_bytes(),
                    joules=None if energy.joules is None else energy.joules / iterations,
                    energy_reason=energy.reason,
                )
        finally:
            for worker in running.values():
                worker.stop()
    facts |= {"dtype": dtype, "sparsity": sparsity, "block": block, "depth": depth}
    return ModelResult(model, batch, size, threads, seed, iterations, tuple(results.values()), **facts)


def _worker(runtime: Runtime, job: Job) -> Worker:
    path = os.pathsep.join(filter(None, (runtime.import_from, os.environ.get("PYTHONPATH", ""))))
    return Worker(
        job,
        [sys.executable, "-m", "kernelpress.bench.runtimes"],
        [runtime.loader, *runtime.arguments],
        environment={"PYTHONPATH": path},
    )


def _emit(job: Job) -> float:
    """Emits the network of `job` and saves it where its process looks; the seconds that emission took."""
    with threads_set_to(job.threads):
        begin = time.perf_counter()
        emitted = emit(build(job, plain=False), (torch.from_numpy(job.load_input()),), cache=False, progress=False)
        seconds = time.perf_counter() - begin
    emitted.save(job.emitted_file)
    return seconds


def _try_export(network: torch.nn.Module, job: Job) -> str | None:
    """Exports the network to ONNX; where the packages for it are absent, says which."""
    try:
        export_onnx(network, torch.from_numpy(job.load_input()), job.onnx_file)
    except ImportError as error:
        return f"no ONNX export: {error}; `pip install kernelpress[peers]` installs it"
    return None


def _check_outputs(
    results: dict[str, RuntimeResult], running: dict[str, Worker], expected: NDArray[np.float64], tolerance: float
) -> None:
    """Notes each runtime's error; those beyond the tolerance leave the contest."""
    for name in list(running):
        error = float(np.abs(running[name].output() - expected).max() / np.abs(expected).max())
        results[name] = replace(results[name], relative_error=error)
        if not error <= tolerance:
            results[name] = replace(results[name], skipped=f"logits differ from eager's by {error:.1e}")
            running.pop(name).stop()
