"""Ranks for a whole model: which layers give how much, within a budget of FLOPs or of accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from kernelpress.compress.changes import put
from kernelpress.compress.decompose.candidates import Candidate, Chain, Job
from kernelpress.preserve import evaluation

__all__ = ["LEVELS", "Metric", "Option", "measure_sensitivities", "most_within", "steps", "within_flops"]

LEVELS = (0.2, 0.4, 0.6, 0.75, 0.85, 0.92, 0.97)
"""Shares of the squared singular values at which layers are tried."""
TIE = 1e-6
"""What the whole of a layer's outputs weighs against the metric, where that tells nothing."""

Metric = Callable[[nn.Module], float]
"""A model in eval mode → a number, higher for what is better, such as an accuracy in 0…1."""


@dataclass(eq=False)
class Option:
    """A chain that a layer could become, and what that loses."""

    job: Job
    candidate: Candidate
    loss: float

    @cached_property
    def chain(self) -> Chain:
        """Its layers."""
        return self.job.made(self.candidate)

    @property
    def saved(self) -> int:
        """FLOPs."""
        return self.job.flops - self.candidate.flops


def steps(options: Sequence[Option]) -> list[Option]:
    """Options in the order in which to take them, each in the place of an earlier one for the same layer: always the
    one that loses least for every FLOP that it saves further."""
    order: list[Option] = []
    at: dict[str, Option] = {}

    def slope(option: Option) -> float:
        now = at.get(option.job.layer.path)
        loss, saved = (now.loss, now.saved) if now else (0.0, 0)
        return (option.loss - loss) / (option.saved - saved) if option.saved > saved else math.inf

    while options and (best := min(options, key=slope)) and math.isfinite(slope(best)):
        at[best.job.layer.path] = best
        order.append(best)
    return order


def latest(order: Sequence[Option]) -> list[Option]:
    """The last option of each layer."""
    return list({option.job.layer.path: option for option in order}.values())


def within_flops(options: Sequence[Option], flops: int, ratio: float) -> list[Option]:
    """What saves this share of the model's FLOPs. Raises `ValueError` where no options save as much."""
    order = steps(options)
    for count in range(len(order) + 1):
        if sum(option.saved for option in latest(order[:count])) >= ratio * flops:
            return latest(order[:count])
    most = sum(option.saved for option in latest(order)) / max(1, flops)
    raise ValueError(f"ratio: expected at most {most:.3f}, which is what the chains of these layers save, got {ratio}")


def most_within(
    options: Sequence[Option], model: nn.Module, metric: Metric, max_drop: float, advance: Callable[[str], None]
) -> list[Option]:
    """As many steps as keep `metric` within `max_drop` of the model's own."""
    order, least = steps(options), measured(metric, model) - max_drop
    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        advance(f"{middle} of {len(order)} steps")
        with trial(model, latest(order[:middle])):
            is_within = measured(metric, model) >= least
        low, high = (middle, high) if is_within else (low, middle - 1)
    return latest(order[:low])


def measure_sensitivities(
    options: Sequence[Option], model: nn.Module, metric: Metric, advance: Callable[[str], None]
) -> None:
    """Makes the loss of each option what `metric` loses where this chain alone is in the model."""
    whole = measured(metric, model)
    for option in options:
        advance(option.job.layer.path)
        with trial(model, [option]):
            drop = max(0.0, whole - measured(metric, model))
        option.loss = drop + TIE * option.loss


def measured(metric: Metric, model: nn.Module) -> float:
    """What `metric` says. Raises `ValueError` where that is no finite number."""
    with evaluation(model):
        value = float(metric(model))
    if not math.isfinite(value):
        raise ValueError(f"metric: expected a finite number, got {value}")
    return value


@contextmanager
def trial(model: nn.Module, options: Sequence[Option]) -> Iterator[None]:
    """Runs the block with these chains in the model."""
    for option in options:
        put(model, option.job.layer.path, nn.Sequential(*option.chain.modules))
    try:
        yield
    finally:
        for option in options:
            put(model, option.job.layer.path, option.job.layer.module)
