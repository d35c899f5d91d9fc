"""Pools with their sets of channels ranked, and the steps in which they may leave."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kernelpress.compress.channels.dependency import Pool
from kernelpress.compress.record import SkippedLayers

__all__ = ["Group", "in_order", "ranked", "too_small"]


@dataclass(frozen=True)
class Group:
    """What is left of a pool, from the least to the most important set, and how many sets leave in one step.

    `place`: which pool it is. `gone`: how many of its sets have left before. `makers`: in how many layers each counts.
    """

    pool: Pool
    place: int
    roots: tuple[int, ...]
    importance: tuple[float, ...]
    unit: int
    gone: int
    makers: int

    @property
    def steps(self) -> int:
        """How often channels can be removed, down to one unit."""
        return math.ceil(len(self.roots) / self.unit) - 1

    def removed(self, steps: int) -> int:
        """How many of the sets left are gone after `steps`; what stays is a multiple of the unit."""
        return 0 if steps == 0 else len(self.roots) - (math.ceil(len(self.roots) / self.unit) - steps) * self.unit


def ranked(pool: Pool, place: int, importance: Tensor, round_to: int, gone: int, makers: int) -> Group:
    """The sets of a pool in the order of `importance` [sets]."""
    order = importance.argsort(stable=True).tolist()
    positions = math.gcd(*(count for _, count in pool.producers))
    # A set of that many channels is as coarse as rounding would be.
    unit = 1 if positions >= round_to else round_to // math.gcd(round_to, positions)
    values = importance.tolist()
    return Group(pool, place, tuple(pool.roots[i] for i in order), tuple(values[i] for i in order), unit, gone, makers)


def in_order(groups: Sequence[Group], scope: str) -> list[int]:
    """The group of every step, first step first. Within a group, later steps never come before earlier ones."""
    steps = []
    for index, group in enumerate(groups):
        for step in range(1, group.steps + 1):
            before, after = group.removed(step - 1), group.removed(step)
            importance = sum(group.importance[before:after]) / (after - before)
            fraction = (group.gone + (before + after) / 2) / (group.gone + len(group.roots))
            steps.append(((fraction, importance) if scope == "local" else (importance, fraction), index))
    return [index for _, index in sorted(steps)]


def too_small(groups: Sequence[Group], round_to: int) -> tuple[SkippedLayers, ...]:
    """The pools of which nothing could ever leave."""
    return tuple(
        SkippedLayers(
            group.pool.layers,
            len(group.roots),
            f"too few channels to keep a multiple of {round_to}" if len(group.roots) > 1 else "all leave together",
        )
        for group in groups
        if group.steps == 0 and not group.gone
    )
