"""Latency on a CUDA device, by its own clock: events around each sample, taken in turn, from an emptied cache."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping

import torch

from kernelpress.runtime.clock import Timing, garbage_collection_paused, timing_of
from kernelpress.runtime.cuda_graph import record
from kernelpress.runtime.torch_private import sleep

__all__ = ["time_graphs", "time_on_device"]

MIN_SAMPLES_PER_ROUND = 5
MAX_SAMPLES_PER_ROUND = 100

HEAD_START_CYCLES = 400_000
"""Some 200 µs in which the device waits, for the host to have launched a sample before it begins."""

Call = Callable[[], object]


def time_graphs(
    candidates: Mapping[str, Call],
    device: torch.device,
    *,
    budget_seconds: float = 20e-3,
    rounds: int = 3,
    flush_cache: bool = True,
) -> dict[str, Timing]:
    """Time every candidate as a CUDA graph, which is how plans run it: its kernels without the host's part.

    A candidate that cannot be recorded is timed as it is called. Recordings share their memory; what the candidates
    return is not kept. Arguments and errors as of `time_on_device`.
    """
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
    return time_on_device(
        {name: _replayed(call, device, pool, stream) for name, call in candidates.items()},
        device,
        budget_seconds=budget_seconds,
        rounds=rounds,
        flush_cache=flush_cache,
    )


def _replayed(call: Call, device: torch.device, pool: object, stream: torch.cuda.Stream) -> Call:
    def discarding() -> None:
        call()

    with contextlib.suppress(RuntimeError):
        return record(discarding, device, pool=pool, stream=stream).replay
    return call


def time_on_device(
    candidates: Mapping[str, Call],
    device: torch.device,
    *,
    budget_seconds: float = 20e-3,
    rounds: int = 3,
    warmup: int = 3,
    flush_cache: bool = True,
) -> dict[str, Timing]:
    """Time every candidate by CUDA events on the current stream of `device`, in turn within each of `rounds` rounds.

    A sample is one call. `budget_seconds` is the measuring time of one candidate over all rounds; however slow it is,
    it gets five samples a round. `flush_cache`: overwrite the second-level cache before each sample, as a layer finds
    it within a model; a whole model finds there what it left. Either keeps the device busy while the host launches the
    sample.

    Raises `ValueError` for no candidates and for a budget or counts that are not positive; what a candidate raises
    passes through.
    """
    if not candidates:
        raise ValueError("candidates: expected at least one callable, got none")
    for name, value in (("budget_seconds", budget_seconds), ("rounds", rounds), ("warmup", warmup)):
        if not value > 0:
            raise ValueError(f"{name}: expected a positive number, got {value!r}")
    samples: dict[str, list[list[float]]] = {name: [] for name in candidates}
    counts: dict[str, int] = {}
    with torch.cuda.device(device), torch.no_grad(), garbage_collection_paused():
        before = _cache_flush(device) if flush_cache else _head_start
        for name, call in candidates.items():
            milliseconds = min(_samples(call, warmup, before, device))
            affordable = budget_seconds * 1e3 / rounds / max(milliseconds, 1e-3)
            counts[name] = min(max(math.floor(affordable), MIN_SAMPLES_PER_ROUND), MAX_SAMPLES_PER_ROUND)
        for _ in range(rounds):
            for name, call in candidates.items():
                # The one that ran before has displaced this one's data.
                call()
                samples[name].append(_samples(call, counts[name], before, device))
    return {name: timing_of(samples[name], warmup) for name in candidates}


def _samples(call: Call, count: int, before: Callable[[], None], device: torch.device) -> list[float]:
    """Milliseconds of `count` calls, each between two events."""
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, end in marks:
        before()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in marks]


def _cache_flush(device: torch.device) -> Callable[[], None]:
    """A function that overwrites the second-level cache, twice its size."""
    nbytes = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    memory = torch.empty(max(nbytes, 1 << 20), dtype=torch.uint8, device=device)

    def flush() -> None:
        memory.zero_()

    return flush


def _head_start() -> None:
    sleep(HEAD_START_CYCLES)
