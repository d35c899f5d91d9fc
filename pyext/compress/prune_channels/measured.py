"""What layers cost by measurement, in time or energy, over their channel counts, and which channels are worth it.

A table for each layer: its cost at a few counts of channels in and out, between which it is interpolated. Costs rise
in steps (a kernel works on so many channels at once) and the meter is noisy, so the table is made monotone first:

    T'(i, o) = (max_{i'≤i, o'≤o} T(i', o') + min_{i'≥i, o'≥o} T(i', o')) / 2

Which channels leave is a knapsack (Shen et al., HALP: Hardware-Aware Latency Pruning, 2021, arXiv:2110.10811, section
3): least importance lost, enough saved. With `scope="local"` what a group loses is minus the logarithm of the share of
its importance that stays: narrow groups are spared, and none is drained. What a step of one group saves depends on how
many channels the layers beside it have; so it is solved in rounds, each for a part of what is to be saved, from where
the last one ended.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from kernelpress.compress.channels.dependency import Dependencies, LayerCall
from kernelpress.compress.channels.sets import FIXED
from kernelpress.compress.channels.walk import arguments
from kernelpress.compress.prune_channels.budgets import Cost
from kernelpress.compress.prune_channels.choice import Chosen, Rank, by_pool, roots_of
from kernelpress.compress.prune_channels.groups import Group

__all__ = ["LayerCosts", "by_knapsack", "measured_left", "smoothed"]

LayerCosts = Callable[[Sequence[tuple[nn.Module, Tensor]]], Sequence[float]]
"""(layers, each with what it reads) → the milliseconds, or joules, of each."""

COUNTS = 8
"""At how many counts of channels a layer is measured, in and out each; all others lie between two of them."""
ROUNDS = 6
BINS = 1000
"""Into how many parts what is to be saved is divided."""


@dataclass(frozen=True)
class _Table:
    """The cost [counts in, counts out] of a layer; a depthwise one has as many in as out, and one column."""

    call: LayerCall
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    costs: Tensor

    def at(self, inputs: int, outputs: int) -> float:
        """Between the nearest counts, linearly."""
        rows = _between(self.inputs, inputs)
        columns = _between(self.outputs, outputs)
        return sum(a * b * float(self.costs[i, j]) for i, a in rows for j, b in columns)


def measured_left(graph: GraphModule, dependencies: Dependencies, round_to: int, layer_costs: LayerCosts) -> Cost:
    """The cost of all convolutions and linear layers, each by itself, by tables that `layer_costs` measures."""
    tables = _tables(graph, dependencies, round_to, layer_costs)
    at = [(_sizes(dependencies, table.call.entering), _sizes(dependencies, table.call.leaving)) for table in tables]

    def left(gone: Sequence[int]) -> float:
        return sum(
            table.at(entering(gone), leaving(gone)) for table, (entering, leaving) in zip(tables, at, strict=True)
        )

    return left


def by_knapsack(rank: Rank, pools: int, cost: Cost, goal: float, scope: str) -> Chosen | float:
    """The sets of least importance together that bring the cost down to `goal`; or the least there is."""
    ranking = rank(frozenset())
    groups = ranking.groups
    all_gone = [group.removed(group.steps) for group in groups]
    if cost(by_pool(groups, all_gone, pools)) > goal:
        return cost(by_pool(groups, all_gone, pools))
    steps = [0] * len(groups)

    def time(steps: Sequence[int]) -> float:
        return cost(by_pool(groups, [group.removed(n) for group, n in zip(groups, steps, strict=True)], pools))

    rounds = ROUNDS
    while (now := time(steps)) > goal:
        savings = []
        for index, group in enumerate(groups):
            others = [[*steps[:index], n, *steps[index + 1 :]] for n in range(steps[index], group.steps + 1)]
            savings.append([max(0.0, now - time(other)) for other in others])
        losses = [_losses(group, first, scope) for group, first in zip(groups, steps, strict=True)]
        taken = _knapsack(savings, losses, (now - goal) / max(1, rounds))
        if not any(taken):
            # Only together do the next steps save anything.
            nearest = min((g for g in range(len(groups)) if len(losses[g]) > 1), key=lambda g: losses[g][1])
            taken[nearest] = 1
        steps = [n + more for n, more in zip(steps, taken, strict=True)]
        rounds -= 1
    removed = [group.removed(n) for group, n in zip(groups, steps, strict=True)]
    return Chosen(roots_of(groups, removed), ranking)


def smoothed(costs: Tensor) -> Tensor:
    """A table [counts in, counts out] made monotone along both."""
    rising = costs.cummax(0).values.cummax(1).values
    falling = costs.flip(0, 1).cummin(0).values.cummin(1).values.flip(0, 1)
    return (rising + falling) / 2


def _losses(group: Group, first: int, scope: str) -> list[float]:
    """What is lost after further steps, in all layers that make the channels: their importance; with `scope="local"`
    minus the logarithm of the share of the group's that stays."""
    gone = [0.0, *itertools.accumulate(group.importance)]
    lost = [gone[group.removed(n)] for n in range(first, group.steps + 1)]
    if scope == "local" and gone[-1] > 0:
        lost = [-math.log1p(-part / gone[-1]) for part in lost]
    return [group.makers * (loss - lost[0]) for loss in lost]


def _knapsack(savings: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], wanted: float) -> list[int]:
    """How many steps of each group to take: least loss for `wanted` saved, or for all that can be saved."""
    wanted = min(wanted, sum(max(saving) for saving in savings))
    if wanted <= 0:
        return [0] * len(savings)
    # best[b]: the least loss that saves b parts of what is wanted or more.
    best = torch.full((BINS + 1,), math.inf, dtype=torch.float64)
    best[0] = 0
    chosen, parts = [], [[int(saved / wanted * BINS) for saved in saving] for saving in savings]
    for saved, loss in zip(parts, losses, strict=True):
        before = [(torch.arange(BINS + 1) - part).clamp_min(0) for part in saved]
        best, step = torch.stack([best[at] + lost for at, lost in zip(before, loss, strict=True)]).min(0)
        chosen.append(step)
    part = int(best.isfinite().nonzero().max())
    taken = []
    for step, saved in zip(reversed(chosen), reversed(parts), strict=True):
        taken.append(int(step[part]))
        part = max(0, part - saved[taken[-1]])
    return taken[::-1]


def _tables(graph: GraphModule, dependencies: Dependencies, round_to: int, layer_costs: LayerCosts) -> list[_Table]:
    """One for each layer; those of equal layers are measured once."""
    nodes = {node.name: node for node in graph.graph.nodes}
    known: dict[str, Tensor] = {}
    tables = []
    for call in dependencies.calls:
        layer = _Layer.of(call, nodes[call.node])
        inputs = _counts(call.entering, round_to, layer.groups)
        outputs = (len(call.leaving),) if call.is_depthwise else _counts(call.leaving, round_to, layer.groups)
        key = f"{layer} {inputs} {outputs}"
        if key not in known:
            points = [layer.made(i, o) for i in inputs for o in outputs]
            known[key] = smoothed(_measured(points, layer_costs, call).view(len(inputs), len(outputs)))
        tables.append(_Table(call, inputs, outputs, known[key]))
    return tables


def _measured(points: Sequence[tuple[nn.Module, Tensor]], layer_costs: LayerCosts, call: LayerCall) -> Tensor:
    costs = [float(cost) for cost in layer_costs(points)]
    if len(costs) != len(points) or not all(0 < cost < math.inf for cost in costs):
        raise ValueError(f"layer_costs: expected {len(points)} numbers above zero for {call.output.layer}, got {costs}")
    return torch.tensor(costs, dtype=torch.float64)


def _counts(labels: Tensor, round_to: int, groups: int) -> tuple[int, ...]:
    """The counts at which a layer is measured: multiples of `round_to`, from what must stay to all."""
    step, total = math.lcm(round_to, groups), len(labels)
    stays = int((labels == FIXED).sum())
    steps = list(range(max(step, math.ceil(stays / step) * step), total, step)) if stays < total else []
    if len(steps) >= COUNTS:
        steps = [steps[round(i * (len(steps) - 1) / (COUNTS - 2))] for i in range(COUNTS - 1)]
    return (*steps, total)


def _sizes(dependencies: Dependencies, labels: Tensor) -> Callable[[Sequence[int]], int]:
    """How many of `labels` are left once so many sets of each pool are gone."""
    positions = [
        (place, int(torch.isin(labels, torch.tensor(pool.roots)).sum()) // len(pool.roots))
        for place, pool in enumerate(dependencies.pools)
    ]
    positions = [(place, count) for place, count in positions if count]
    return lambda gone: len(labels) - sum(gone[place] * count for place, count in positions)


def _between(counts: tuple[int, ...], count: int) -> list[tuple[int, float]]:
    """Positions of the counts around one, with their weights."""
    above = next((i for i, known in enumerate(counts) if known >= count), len(counts) - 1)
    if above == 0 or counts[above] <= count:
        return [(above, 1.0)]
    low, high = counts[above - 1], counts[above]
    share = (count - low) / (high - low)
    return [(above - 1, 1 - share), (above, share)]


@dataclass(frozen=True)
class _Layer:
    """A convolution or linear layer of which the channels may be counted otherwise."""

    node: Node
    options: str
    weight: tuple[int, ...]
    x: tuple[int, ...]
    dim: int
    groups: int
    is_depthwise: bool
    is_transposed: bool

    @classmethod
    def of(cls, call: LayerCall, node: Node) -> _Layer:
        x, weight = (tuple(source.meta["val"].shape) for source in node.args[:2])  # type: ignore[union-attr]
        stated = arguments(node)
        options = {name: value for name, value in stated.items() if name not in ("input", "weight", "bias")}
        return cls(
            node=node,
            options=f"{node.target} {options}",
            weight=weight,
            x=x,
            dim=call.dim,
            groups=1 if call.is_depthwise else stated.get("groups", 1),
            is_depthwise=call.is_depthwise,
            is_transposed="transpose" in str(node.target),
        )

    def __str__(self) -> str:
        return f"{self.options} {self.weight} {self.x} {self.node.meta['val'].dtype}"

    def made(self, inputs: int, outputs: int) -> tuple[nn.Module, Tensor]:
        """The layer with random weights, and a random input."""
        like = self.node.meta["val"]
        groups = inputs if self.is_depthwise else self.groups
        if self.is_depthwise:
            channels = (inputs * self.weight[0] // self.x[self.dim], self.weight[1])
        elif self.is_transposed:
            channels = (inputs, outputs // groups)
        else:
            channels = (outputs, inputs // groups)
        x = torch.randn(*self.x[: self.dim], inputs, *self.x[self.dim + 1 :], dtype=like.dtype, device=like.device)
        made = channels[1] * groups if self.is_transposed else channels[0]
        weight = torch.randn(*channels, *self.weight[2:]).to(x) / math.sqrt(math.prod(self.weight[1:]))
        # The BatchNorm behind a layer becomes its bias.
        return _Call(self.node, weight, torch.randn(made).to(x), groups), x


class _Call(nn.Module):
    """A call of an operation with weights and groups of its own."""

    def __init__(self, node: Node, weight: Tensor, bias: Tensor, groups: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        stated = arguments(node)
        self._target: Any = node.target
        self._options = {name: value for name, value in stated.items() if name not in ("input", "weight", "bias")}
        if "groups" in self._options:
            self._options["groups"] = groups

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self._target(x, self.weight, self.bias, **self._options)
        return result
