"""How the driver and a runtime's process talk: whatever pickles, through a pipe of their own.

The process gets its job, loads its model, calls it until warm, and answers with what it computed. Then it sleeps: at
each message it times a burst and answers with the median, at the end of messages it ends. So one runtime works at a
time.
"""

from __future__ import annotations

import statistics
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Answer", "Array", "Contestant", "Job", "serve"]

Array = NDArray[np.float32]

WARMUP_CALLS = 10
SETTLE_CALLS = 5
"""Calls before each burst, for caches and threads to be back after the others' turns."""


@dataclass(frozen=True)
class Job:
    """What to run: a network of `kernelpress.models` with these weights on the input `x` [N, 3, H, W], which lies as
    ONNX in `onnx_file` where a runtime needs that."""

    model: str
    weights: dict[str, Array]
    x: Array
    onnx_file: str
    threads: int
    iterations: int


@dataclass(frozen=True)
class Contestant:
    """A loaded model: `call` runs it once, `to_array` turns what it returns into logits; `settings` is for tables."""

    call: Callable[[], Any]
    to_array: Callable[[Any], Array]
    settings: str


@dataclass(frozen=True)
class Answer:
    """That of a process which is ready, or skips its job because of a package that is absent."""

    logits: Array | None = None
    settings: str = ""
    skipped: str | None = None


def serve(pipe: Connection, load: Callable[[Job], Contestant]) -> None:
    """Runs a runtime's process."""
    job: Job = pipe.recv()
    torch.set_num_threads(job.threads)
    try:
        contestant = load(job)
    except ImportError as error:
        pipe.send(Answer(skipped=f"{error}; `pip install kernelpress[peers]` installs it"))
        return
    for _ in range(WARMUP_CALLS):
        result = contestant.call()
    pipe.send(Answer(contestant.to_array(result), contestant.settings))
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        pipe.send(_burst_median(contestant.call, job.iterations))


def _burst_median(call: Callable[[], object], iterations: int) -> float:
    """Median milliseconds of `iterations` calls, back to back."""
    timeit.repeat(call, number=1, repeat=SETTLE_CALLS)
    return statistics.median(timeit.repeat(call, number=1, repeat=iterations)) * 1e3
