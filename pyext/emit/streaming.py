"""Which consecutive native steps of a plan run as one chain, streamed by rows, so that no map between them leaves the
cache."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from kernelpress.emit.cache import TimingCache
from kernelpress.emit.evaluate import empty_inner_caches
from kernelpress.emit.lower import NativeStep, Place, Program, View, views_of
from kernelpress.measure.latency import time_alternately

__all__ = ["LEAST_BYTES", "choose_chains", "private_bytes"]

LEAST_BYTES = 256 << 10
"""Smaller maps stay in the cache anyway."""

LEAST_GAIN = 0.03
"""Part of the steps' time that a chain must save: less is noise."""

SECONDS_PER_CHAIN = 30e-3
ROUNDS = 3

Range = tuple[int, int]
"""Steps first … last - 1."""


def private_bytes(program: Program, positions: Sequence[int]) -> list[int]:
    """Bytes of the tensor between each of the native steps at these positions and the next one.

    0 where anything else uses that tensor, or where a call of torch stands between the two.
    """
    users: dict[int, list[int]] = {}
    for position, step in enumerate(program.steps):
        for index in {view.buffer for view in views_of((step.args, step.kwargs, step.results))}:
            users.setdefault(index, []).append(position)
    found = []
    for position, following in itertools.pairwise(positions):
        (out,) = program.steps[position].results
        buffer = program.buffers[out.buffer]
        is_private = buffer.place is Place.ARENA and users[out.buffer] == [position, following]
        is_next = all(isinstance(step, NativeStep) for step in program.steps[position:following])
        found.append(buffer.nbytes if is_private and is_next else 0)
    return found


def choose_chains(
    plan: Any, addresses: Sequence[int], steps: Sequence[NativeStep], links: Sequence[int], cache: TimingCache
) -> list[Range]:
    """Ranges of the native plan's steps that take less time as a chain, in order.

    `addresses` are memory for the plan's external buffers, `steps` what its steps stand for, `links` their
    `private_bytes`. Every range that begins where a chain could is timed, from emptied caches as in a model, as a chain
    and step by step; the one that saves the most is taken.
    """
    chosen: list[Range] = []
    first = 0
    while first < len(steps) - 1:
        ranges = _candidates(plan, links, first)
        best = _best(plan, addresses, steps, ranges, cache)
        if best is not None:
            chosen.append(best)
        first = best[1] if best is not None else first + 1
    cache.save()
    return chosen


def _candidates(plan: Any, links: Sequence[int], first: int) -> list[Range]:
    ranges: list[Range] = []
    last = first + 1
    while last <= len(links) and links[last - 1] >= LEAST_BYTES:
        last += 1
        if not plan.copy().join(first, last):
            break
        ranges.append((first, last))
    return ranges


def _best(
    plan: Any, addresses: Sequence[int], steps: Sequence[NativeStep], ranges: Sequence[Range], cache: TimingCache
) -> Range | None:
    calls: dict[str, Callable[[], object]] = {}
    for first, last in ranges:
        chain = plan.copy()
        chain.join(first, last)
        name = _name(steps[first:last])
        calls[f"chain {name}"] = functools.partial(chain.run, first, first + 1, addresses)
        calls[f"steps {name}"] = functools.partial(plan.run, first, last, addresses)
    _time(calls, cache)
    gains = {}
    for first, last in ranges:
        name = _name(steps[first:last])
        chained, separate = cache.get(f"chain {name}"), cache.get(f"steps {name}")
        assert chained is not None
        assert separate is not None
        if separate - chained > LEAST_GAIN * separate:
            gains[first, last] = separate - chained
    return max(gains, key=gains.__getitem__) if gains else None


def _time(calls: Mapping[str, Callable[[], object]], cache: TimingCache) -> None:
    new = {name: call for name, call in calls.items() if cache.get(name) is None}
    if not new:
        return
    timings = time_alternately(new, budget_seconds=SECONDS_PER_CHAIN, rounds=ROUNDS, before_sample=empty_inner_caches)
    for name, timing in timings.items():
        cache.put(name, timing.p10)


def _name(steps: Sequence[NativeStep]) -> str:
    """What the time of these steps depends on: their ops, options and forms."""
    return "; ".join(f"{step.op}{_forms(step.args)}{step.kwargs} -> {_forms(step.out)}" for step in steps)


def _forms(nest: Any) -> list[str]:
    leaves = pytree.tree_leaves(nest, is_leaf=lambda leaf: leaf is None)
    return [f"{list(v.shape)}/{list(v.stride)}" if isinstance(v, View) else _plain(v) for v in leaves]


def _plain(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, torch.Tensor) else repr(value)
