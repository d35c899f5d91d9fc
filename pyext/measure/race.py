"""Times of rivals, measured in turn; those that cannot win get few samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch

from kernelpress.preserve import random_state_kept
from kernelpress.runtime.clock import SAMPLE_SECONDS, garbage_collection_paused, quantile, sample_milliseconds

__all__ = ["Heat", "race"]

Alternative = tuple[str, ...]
"""What does the same work together, one after the other."""


@dataclass(frozen=True)
class Heat:
    """`samples` more of each call that is still in the race, fewer of one for which they take over `HEAT_SECONDS`; then
    it goes on only if it took at most `limit` times as long as the fastest of its rivals."""

    samples: int
    limit: float


HEAT_SECONDS = 0.05
"""Calls this long need no second sample in a heat: what disturbs them is short beside them."""

HEATS = (Heat(2, 2.0), Heat(4, 1.5), Heat(6, 1.2), Heat(8, math.inf))


def race(
    calls: Mapping[str, Callable[[], object]],
    rivals: Collection[Collection[Alternative]],
    *,
    known: Mapping[str, float] | None = None,
    before_sample: Callable[[], object] = lambda: None,
    heats: Collection[Heat] = HEATS,
    until_decided: bool = False,
) -> dict[str, float]:
    """Milliseconds of each call: the tenth percentile of its samples, as a busy machine only ever adds to them.

    Each collection in `rivals` holds alternatives for one piece of work; a call that loses against one wherever it
    competes leaves the race. `known`: milliseconds of rivals that were measured before. `before_sample` runs before
    each sample and is not timed: to empty caches, say. `until_decided` ends the race where all others have left,
    however little is known of the winner. Gradients are off meanwhile, and so is the garbage collector; random states
    are put back. What a call raises passes through.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    running = set(calls)
    with torch.no_grad(), garbage_collection_paused(), random_state_kept():
        for heat in heats:
            for name in (name for name in calls if name in running):
                samples[name] += _samples(calls[name], heat.samples, before_sample)
            best = {**(known or {}), **{name: min(taken) for name, taken in samples.items()}}
            running &= _ahead(rivals, best, heat.limit)
            if until_decided and len(running) < 2:
                break
    return {name: quantile(sorted(taken), 0.1) for name, taken in samples.items()}


def _samples(call: Callable[[], object], count: int, before_sample: Callable[[], object]) -> list[float]:
    """Milliseconds of `count` samples. The first call is not among them: another has displaced this one's data."""
    seconds = sample_milliseconds(call, 1) * 1e-3
    repeats = max(1, math.ceil(SAMPLE_SECONDS / max(seconds, 1e-9)))
    affordable = math.ceil(HEAT_SECONDS / max(seconds * repeats, 1e-9))
    taken = []
    for _ in range(min(count, affordable)):
        before_sample()
        taken.append(sample_milliseconds(call, repeats))
    return taken


def _ahead(rivals: Collection[Collection[Alternative]], best: Mapping[str, float], limit: float) -> set[str]:
    """The names that somewhere take at most `limit` times as long as the fastest alternative."""
    ahead: set[str] = set()
    for alternatives in rivals:
        times = {names: sum(best[name] for name in names) for names in alternatives if all(n in best for n in names)}
        fastest = min(times.values(), default=math.inf)
        ahead.update(name for names, time in times.items() if time <= limit * fastest for name in names)
    return ahead
