"""Latency of callables, measured in turn so that a noisy machine disturbs all of them alike."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from kernelpress.preserve import random_state_kept

__all__ = [
    "SAMPLE_SECONDS",
    "Timing",
    "garbage_collection_paused",
    "quantile",
    "sample_milliseconds",
    "threads_set_to",
    "time_alternately",
    "timing_of",
]

SAMPLE_SECONDS = 50e-6
"""A sample lasts at least this long: shorter calls are repeated inside one, so that the clock costs under 1 %."""

MIN_SAMPLES_PER_ROUND = 3
MAX_SAMPLES_PER_ROUND = 1000


@dataclass(frozen=True)
class Timing:
    """Latency of one callable in milliseconds; `median`, `p10` and `p90` are those of the best round."""

    median: float
    p10: float
    p90: float
    rounds: tuple[float, ...]
    """The median of every round, in the order they ran."""
    warmup: int
    """Calls made before the first sample."""
    calls: int
    """Measured calls of all rounds together."""

    @property
    def spread(self) -> float:
        """How far the worst round's median lies above the best one's, as a fraction: 0.1 is 10 %."""
        return max(self.rounds) / min(self.rounds) - 1.0


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def sample_milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Milliseconds per call over `repeats` back-to-back calls."""
    start = time.perf_counter_ns()
    for _ in range(repeats):
        call()
    _synchronize()
    return (time.perf_counter_ns() - start) / repeats * 1e-6


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Run the block without the garbage collector."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def threads_set_to(threads: int | None) -> Iterator[None]:
    """Run the block with `torch.set_num_threads(threads)`; `None` leaves the number alone."""
    if threads is None:
        yield
        return
    if not isinstance(threads, int) or isinstance(threads, bool) or threads < 1:
        raise ValueError(f"threads: expected a positive integer or None, got {threads!r}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_alternately(
    candidates: Mapping[str, Callable[[], object]],
    *,
    budget_seconds: float = 1.0,
    rounds: int = 5,
    warmup: int = 3,
    repeats: int | None = None,
    before_sample: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time every candidate, one after the other within each of `rounds` rounds; returns one `Timing` per name.

    `budget_seconds` is the measuring time of one candidate over all rounds, warm-up aside; however slow it is, a
    candidate gets three samples a round. `repeats` fixes the samples per round instead. Every candidate is called
    `warmup` times first. `before_sample` runs before each sample and is not timed: to empty caches, say. Gradients are
    off while candidates run, and so is the garbage collector; random states are put back.

    Raises `ValueError` for no candidates and for counts or a budget that are not positive; what a candidate raises
    passes through.
    """
    if not candidates:
        raise ValueError("candidates: expected at least one callable, got none")
    for name, value in (("rounds", rounds), ("warmup", warmup), ("repeats", repeats)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    if not budget_seconds > 0:
        raise ValueError(f"budget_seconds: expected a positive number, got {budget_seconds!r}")

    calls_per_sample: dict[str, int] = {}
    samples_per_round: dict[str, int] = {}
    measured: dict[str, list[list[float]]] = {name: [] for name in candidates}
    with torch.no_grad(), garbage_collection_paused(), random_state_kept():
        for name, call in candidates.items():
            seconds = min(sample_milliseconds(call, 1) for _ in range(warmup)) * 1e-3
            calls = max(1, math.ceil(SAMPLE_SECONDS / max(seconds, 1e-9)))
            affordable = int(budget_seconds / rounds / max(calls * seconds, 1e-9))
            calls_per_sample[name] = calls
            samples_per_round[name] = repeats or min(max(affordable, MIN_SAMPLES_PER_ROUND), MAX_SAMPLES_PER_ROUND)
        for _ in range(rounds):
            for name, call in candidates.items():
                # The candidate that ran before has displaced this one's data from the caches.
                sample_milliseconds(call, 1)
                samples = []
                for _ in range(samples_per_round[name]):
                    if before_sample is not None:
                        before_sample()
                    samples.append(sample_milliseconds(call, calls_per_sample[name]))
                measured[name].append(samples)
    return {name: timing_of(measured[name], warmup, calls_per_sample[name]) for name in candidates}


def timing_of(rounds: Sequence[Sequence[float]], warmup: int, calls_per_sample: int = 1) -> Timing:
    """The `Timing` of samples in milliseconds, round by round; a sample is the mean of `calls_per_sample` calls."""
    medians = tuple(statistics.median(samples) for samples in rounds)
    best = sorted(rounds[medians.index(min(medians))])
    return Timing(
        median=min(medians),
        p10=quantile(best, 0.1),
        p90=quantile(best, 0.9),
        rounds=medians,
        warmup=warmup,
        calls=sum(map(len, rounds)) * calls_per_sample,
    )


def quantile(ordered: list[float], fraction: float) -> float:
    """The `fraction` quantile of an ascending list, interpolated between neighbours."""
    position = fraction * (len(ordered) - 1)
    low = math.floor(position)
    high = math.ceil(position)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
