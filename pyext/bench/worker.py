"""The process of one contestant in a comparison of whole networks, and how it talks: JSON lines on stdout, one command
a line on stdin.

It loads its model, calls it until warm, saves its output and says that it is ready. Then it sleeps on stdin: at `round`
it times a burst and answers with the median, at `memory` it tells what it holds, at the end of input it ends. So one
works at a time.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import timeit
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Array", "Contestant", "Job", "serve"]

Array = NDArray[np.float32]

WARMUP_CALLS = 10
SETTLE_CALLS = 5
"""Calls before each burst, for caches and threads to be back after the others' turns."""
ENOUGH_SECONDS = 1.0
"""After which neither a warm-up nor settling begins another call: long calls are warm before."""
RESET_PEAK = "5"
"""Written to /proc/self/clear_refs: the highest resident memory is counted anew (Linux, proc(5))."""


@dataclass(frozen=True)
class Job:
    """What to run: a network by name, with the weights, input and further files that lie in `folder`."""

    model: str
    runtime: str
    folder: str
    threads: int
    batch: int
    iterations: int
    begun: float = 0.0
    """When the process was started, in seconds of the system's clock."""
    sparsity: float = 0.0
    """Share of zeros in the weights of convolutions, but the first and depthwise ones."""
    block: int = 1
    """Output channels that zeros span."""
    depth: int = 1
    """Input channels that they span."""

    @property
    def weights_file(self) -> Path:
        return Path(self.folder) / "weights.safetensors"

    @property
    def onnx_file(self) -> Path:
        return Path(self.folder) / "model.onnx"

    @property
    def emitted_file(self) -> Path:
        return Path(self.folder) / "model.pt2"

    @property
    def input_file(self) -> Path:
        return Path(self.folder) / "input.npy"

    @property
    def calibration_file(self) -> Path:
        return Path(self.folder) / "calibration.npy"

    @property
    def output_file(self) -> Path:
        return Path(self.folder) / f"output-{self.runtime}.npy"

    def load_input(self) -> Array:
        """The input, float32 [N, 3, H, W]."""
        return np.load(self.input_file, allow_pickle=False)

    def calibration_batches(self) -> list[Array]:
        """The images that quantizers calibrate on, in batches of the input's shape."""
        images = np.load(self.calibration_file, allow_pickle=False)
        return [images[i : i + self.batch] for i in range(0, len(images) - self.batch + 1, self.batch)]

    def save(self) -> Path:
        """Writes the job, begun now, beside its files, for a process to read."""
        path = Path(self.folder) / f"job-{self.runtime}.json"
        path.write_text(json.dumps(asdict(replace(self, begun=time.time()))), encoding="utf-8")
        return path


@dataclass(frozen=True)
class Contestant:
    """A loaded model: `call` runs it once, `to_array` turns what it returns into logits; `settings` is for tables."""

    call: Callable[[], Any]
    to_array: Callable[[Any], Array]
    settings: str


def serve(job_file: str, load: Callable[[Job], Contestant]) -> None:
    """Runs a contestant's process. A package that is absent is reported as a skip."""
    answers = _private_stdout()
    job = Job(**json.loads(Path(job_file).read_text(encoding="utf-8")))
    torch.set_num_threads(job.threads)
    imported, held = time.time(), _resident_bytes("VmRSS")
    try:
        contestant = load(job)
    except ImportError as error:
        _say(answers, skipped=f"{error}; `pip install kernelpress[peers]` installs it")
        return
    loaded = time.time()
    contestant.call()
    seconds = {"import_s": imported - job.begun, "load_s": loaded - imported, "first_s": time.time() - loaded}
    result = _settled(contestant.call, WARMUP_CALLS)
    np.save(job.output_file, contestant.to_array(result))
    _count_peak_anew()
    _say(answers, settings=contestant.settings, seconds=seconds)
    for line in sys.stdin:
        if line.strip() == "round":
            _say(answers, median_ms=_burst_median(contestant.call, job.iterations))
        elif line.strip() == "memory":
            peak = _resident_bytes("VmHWM")
            _say(answers, peak_bytes=None if peak is None or held is None else peak - held)
        else:
            raise ValueError(f"command: expected 'round' or 'memory', got {line.strip()!r}")


def _private_stdout() -> TextIO:
    """Keeps stdout for answers; what libraries print there goes to stderr instead."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _say(answers: TextIO, **values: object) -> None:
    print(json.dumps(values), file=answers, flush=True)


def _burst_median(call: Callable[[], object], iterations: int) -> float:
    """Median milliseconds of `iterations` calls, back to back."""
    _settled(call, SETTLE_CALLS)
    return statistics.median(timeit.repeat(call, number=1, repeat=iterations)) * 1e3


def _settled(call: Callable[[], Any], calls: int) -> Any:
    """What the last of so many calls gave, or of those that were begun in time."""
    end = time.perf_counter() + ENOUGH_SECONDS
    result = call()
    for _ in range(calls - 1):
        if time.perf_counter() > end:
            break
        result = call()
    return result


def _resident_bytes(field: str) -> int | None:
    """`VmRSS`, the memory of this process now, or `VmHWM`, its peak; `None` where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:"))


def _count_peak_anew() -> None:
    try:
        Path("/proc/self/clear_refs").write_text(RESET_PEAK, encoding="ascii")
    except OSError:
        return  # then the peak is that since the process began
