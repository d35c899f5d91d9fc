"""How the driver and a runtime's process talk: JSON lines on stdout, one command a line on stdin.

The process loads its model, calls it until warm, saves its output and says it is ready. Then it sleeps on stdin: at
`round` it times a burst and answers with the median, at the end of input it ends. So one runtime works at a time.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import timeit
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Job:
    """What to run: a network of `kernelpress.models` with the weights, input and ONNX file that lie in `folder`."""

    model: str
    runtime: str
    folder: str
    threads: int
    batch: int
    iterations: int

    @property
    def weights_file(self) -> Path:
        return Path(self.folder) / "weights.safetensors"

    @property
    def onnx_file(self) -> Path:
        return Path(self.folder) / "model.onnx"

    @property
    def input_file(self) -> Path:
        return Path(self.folder) / "input.npy"

    @property
    def output_file(self) -> Path:
        return Path(self.folder) / f"output-{self.runtime}.npy"

    def load_input(self) -> Array:
        """The input, float32 [N, 3, H, W]."""
        return np.load(self.input_file, allow_pickle=False)


@dataclass(frozen=True)
class Contestant:
    """A loaded model: `call` runs it once, `to_array` turns what it returns into logits; `settings` is for tables."""

    call: Callable[[], Any]
    to_array: Callable[[Any], Array]
    settings: str


def serve(job_text: str, load: Callable[[Job], Contestant]) -> None:
    """Runs a runtime's process, its job told in JSON. A package that is absent is reported as a skip."""
    answers = _private_stdout()
    job = Job(**json.loads(job_text))
    torch.set_num_threads(job.threads)
    try:
        contestant = load(job)
    except ImportError as error:
        _say(answers, skipped=f"{error}; `pip install kernelpress[peers]` installs it")
        return
    for _ in range(WARMUP_CALLS):
        result = contestant.call()
    np.save(job.output_file, contestant.to_array(result))
    _say(answers, settings=contestant.settings)
    for line in sys.stdin:
        if line.strip() != "round":
            raise ValueError(f"command: expected 'round', got {line.strip()!r}")
        _say(answers, median_ms=_burst_median(contestant.call, job.iterations))


def _private_stdout() -> TextIO:
    """Keeps stdout for answers; what libraries print there goes to stderr instead."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _say(answers: TextIO, **values: object) -> None:
    print(json.dumps(values), file=answers, flush=True)


def _burst_median(call: Callable[[], object], iterations: int) -> float:
    """Median milliseconds of `iterations` calls, back to back."""
    timeit.repeat(call, number=1, repeat=SETTLE_CALLS)
    return statistics.median(timeit.repeat(call, number=1, repeat=iterations)) * 1e3
