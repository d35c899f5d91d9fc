"""Which sets of channels leave, for a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kernelpress.compress.channels.dependency import Dependencies
from kernelpress.compress.prune_channels.budgets import Cost
from kernelpress.compress.prune_channels.criteria import Criterion
from kernelpress.compress.prune_channels.evidence import Batches, Evidence
from kernelpress.compress.prune_channels.groups import Group, in_order, ranked, too_small
from kernelpress.compress.record import SkippedLayers

__all__ = ["Chosen", "Rank", "Ranking", "by_pool", "greedily", "in_one_shot", "rank", "roots_of"]


@dataclass(frozen=True)
class Ranking:
    """The groups of a model without the sets in `removed`, and the pools that are none, with reasons."""

    groups: tuple[Group, ...]
    skipped: tuple[SkippedLayers, ...]


@dataclass(frozen=True)
class Chosen:
    """The labels of the sets that leave, and the ranking that they were first chosen by."""

    removing: frozenset[int]
    ranking: Ranking


Rank = Callable[[frozenset[int]], Ranking]
"""The sets removed so far → the groups that are left."""


def rank(
    model: nn.Module,
    dependencies: Dependencies,
    criterion: Criterion,
    data: Batches | None,
    round_to: int,
    removed: frozenset[int],
) -> Ranking:
    """Scores all pools anew, as if the sets in `removed` had left."""
    pools = tuple(replace(p, roots=tuple(r for r in p.roots if r not in removed)) for p in dependencies.pools)
    scores = criterion.score(Evidence(dependencies, pools, removed, data), model)
    skipped = [
        SkippedLayers(p.layers, len(p.roots), s) for p, s in zip(pools, scores, strict=True) if isinstance(s, str)
    ]
    groups = tuple(
        ranked(
            pool,
            place,
            score,
            round_to,
            gone=len(whole.roots) - len(pool.roots),
            makers=1 if criterion.is_whole else len(pool.producers),
        )
        for place, (pool, whole, score) in enumerate(zip(pools, dependencies.pools, scores, strict=True))
        if isinstance(score, Tensor)
    )
    return Ranking(groups, (*skipped, *too_small(groups, round_to)))


def in_one_shot(rank: Rank, pools: int, cost: Cost, goal: float, scope: str) -> Chosen | float:
    """The first steps, in the order of `scope`, that bring the cost down to `goal`; or the least cost there is."""
    ranking = rank(frozenset())
    groups = ranking.groups
    steps = in_order(groups, scope)

    def taken(count: int) -> list[int]:
        per_group = torch.bincount(torch.tensor(steps[:count], dtype=torch.int64), minlength=len(groups)).tolist()
        return [group.removed(n) for group, n in zip(groups, per_group, strict=True)]

    def left(count: int) -> float:
        return cost(by_pool(groups, taken(count), pools))

    if left(len(steps)) > goal:
        return left(len(steps))
    low, high = 0, len(steps)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if left(middle) <= goal else (middle + 1, high)
    return Chosen(roots_of(groups, taken(low)), ranking)


def greedily(rank: Rank, pools: int, cost: Cost, goal: float, scope: str) -> Chosen | float:
    """One step of one group, the first in the order of `scope`, after the other; all are scored anew after each."""
    first = ranking = rank(frozenset())
    removing: frozenset[int] = frozenset()
    gone = [0] * pools
    while cost(gone) > goal:
        steps = in_order(ranking.groups, scope)
        if not steps:
            return cost(gone)
        group = ranking.groups[steps[0]]
        gone[group.place] += group.removed(1)
        removing |= frozenset(group.roots[: group.removed(1)])
        ranking = rank(removing)
    return Chosen(removing, first)


def by_pool(groups: Sequence[Group], removed: Sequence[int], pools: int) -> list[int]:
    """How many sets of each pool are gone, once so many more of each group are."""
    gone = [0] * pools
    for group, count in zip(groups, removed, strict=True):
        gone[group.place] = group.gone + count
    return gone


def roots_of(groups: Sequence[Group], removed: Sequence[int]) -> frozenset[int]:
    """The labels of that many sets, the least important ones, of each group."""
    return frozenset(root for group, count in zip(groups, removed, strict=True) for root in group.roots[:count])
