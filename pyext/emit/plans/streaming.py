"""Which consecutive native steps of a plan run as one chain: layers streamed by rows, so that no map between them
leaves the cache, and shuffles that the layer before them makes as it stores."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kernelpress.emit.cache import TimingCache
from kernelpress.emit.lower import NativeStep, Place, Program, View, views_of
from kernelpress.measure.race import Heat, race
from kernelpress.runtime.torch_private import pytree

__all__ = ["LEAST_BYTES", "choose_chains", "interleaving", "name_of_plan", "private_bytes", "with_others"]

LEAST_BYTES = 1 << 20
"""Smaller maps mostly stay in the inner caches from layer to layer anyway."""

LEAST_GAIN = 0.01
"""Part of the whole plan's time that a chain must save: less is noise."""

MOST_RANGES = 12
"""Ranges that are timed, from the first that could be a chain on."""

HEATS = (Heat(20, 1.1), Heat(40, 1.02), Heat(90, 1.0))

Range = tuple[int, int]
"""Steps first … last - 1."""


def private_bytes(program: Program, positions: Sequence[int]) -> list[int]:
    """Bytes of the tensor between each of the native steps at these positions and the next one.

    0 where anything else uses that tensor, or the next step twice (as its residual too: a chain has no whole map of
    it), or where a call of torch stands between the two.
    """
    users: dict[int, list[int]] = {}
    for position, step in enumerate(program.steps):
        for index in {view.buffer for view in views_of((step.args, step.kwargs, step.results))}:
            users.setdefault(index, []).append(position)
    found = []
    for position, following in itertools.pairwise(positions):
        out, *further = program.steps[position].results
        buffer = program.buffers[out.buffer]
        reads = views_of((program.steps[following].args, program.steps[following].kwargs))
        is_read_once = users[out.buffer] == [position, following] and sum(v.buffer == out.buffer for v in reads) == 1
        is_private = not further and buffer.place is Place.ARENA and is_read_once
        is_next = all(isinstance(step, NativeStep) for step in program.steps[position:following])
        found.append(buffer.nbytes if is_private and is_next else 0)
    return found


def interleaving(plan: Any, steps: Sequence[NativeStep], links: Sequence[int]) -> list[Range]:
    """Every layer whose result alone a channel shuffle puts between other channels, with that shuffle: as one step the
    layer stores its channels where they belong, and the shuffle costs nothing but the copy of the others."""
    pairs = [(i, i + 2) for i, step in enumerate(steps[1:]) if step.op == "shuffle_concat" and links[i] > 0]
    return [pair for pair in pairs if plan.copy().join(*pair)]


def with_others(ranges: Sequence[Range], others: Sequence[Range]) -> list[Range]:
    """`ranges` and those of the others that have no step with them in common, in order."""
    apart = [o for o in others if all(last <= o[0] or o[1] <= first for first, last in ranges)]
    return sorted([*ranges, *apart])


def choose_chains(
    plan: Any, addresses: Sequence[int], steps: Sequence[NativeStep], links: Sequence[int], cache: TimingCache
) -> list[Range]:
    """Ranges of the native plan's steps that make the plan faster as chains, and those `interleaving`, in order.

    `addresses` are memory for the plan's external buffers, `steps` what its steps stand for, `links` their
    `private_bytes`. The plan is timed as a whole with one range joined, because what a chain saves is the caches for
    its neighbours; the best is kept, and what gains alone tried again beside it.
    """
    chosen: list[Range] = []
    pairs = interleaving(plan, steps, links)
    ranges = [one for one in _candidates(plan, links) if one not in pairs][:MOST_RANGES]
    while ranges:
        arrangements = [with_others(chosen, pairs), *(with_others([*chosen, one], pairs) for one in ranges)]
        times = _times(plan, addresses, steps, arrangements, cache)
        best = min(range(len(ranges)), key=lambda i: times[i + 1])
        if times[best + 1] > (1 - LEAST_GAIN) * times[0]:
            break
        first, last = ranges[best]
        chosen = [*chosen, ranges[best]]
        gaining = [one for one, time in zip(ranges, times[1:], strict=True) if time < times[0]]
        ranges = [one for one in gaining if one[1] <= first or last <= one[0]]
    cache.save()
    return with_others(chosen, pairs)


def _candidates(plan: Any, links: Sequence[int]) -> list[Range]:
    """Every range between whose steps lie maps worth keeping in the cache, and which can be joined."""
    ranges: list[Range] = []
    for first in range(len(links)):
        last = first + 1
        while last <= len(links) and links[last - 1] >= LEAST_BYTES and plan.copy().join(first, last + 1):
            last += 1
            ranges.append((first, last))
    return ranges


def _times(
    plan: Any,
    addresses: Sequence[int],
    steps: Sequence[NativeStep],
    arrangements: Sequence[Sequence[Range]],
    cache: TimingCache,
) -> list[float]:
    """Milliseconds of the plan with these ranges joined, all of them timed again where one is not known."""
    names = [f"{name_of_plan(steps)} with chains {list(ranges)}" for ranges in arrangements]
    calls: dict[str, Callable[[], object]] = {}
    if any(cache.get(name) is None for name in names):
        for name, ranges in zip(names, arrangements, strict=True):
            joined = plan.copy()
            for first, last in reversed(ranges):
                joined.join(first, last)
            calls[name] = functools.partial(joined.run, 0, len(joined), addresses)
        for name, milliseconds in race(calls, [[(name,) for name in names]], heats=HEATS).items():
            cache.put(name, milliseconds)
    times = [cache.get(name) for name in names]
    return [time for time in times if time is not None]


def name_of_plan(steps: Sequence[NativeStep]) -> str:
    """Tells plans apart by what the time of their steps depends on: ops, options and forms."""
    layers = "; ".join(f"{step.op}{_forms(step.args)}{step.kwargs} -> {_forms(step.out)}" for step in steps)
    return f"plan {hashlib.sha256(layers.encode()).hexdigest()[:16]}"


def _forms(nest: Any) -> list[str]:
    leaves = pytree.tree_leaves(nest, is_leaf=lambda leaf: leaf is None)
    return [f"{list(v.shape)}/{list(v.stride)}" if isinstance(v, View) else _plain(v) for v in leaves]


def _plain(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, torch.Tensor) else repr(value)
