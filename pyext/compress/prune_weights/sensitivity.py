"""How the accuracy falls as one layer alone is pruned: what each layer can do without."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kernelpress.compress.changes import copied
from kernelpress.compress.prune_weights.cutting import Cutter, checked_settings
from kernelpress.compress.prune_weights.derivatives import Loss
from kernelpress.compress.prune_weights.scopes import check_share

__all__ = ["SPARSITIES", "Sensitivity", "sensitivity"]

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Sensitivity:
    """`accuracies` of the model with one layer, by name, pruned to each of `sparsities`; `base` is that of the model as
    it came."""

    base: float
    sparsities: tuple[float, ...]
    accuracies: dict[str, tuple[float, ...]]

    def within(self, max_drop: float) -> dict[str, float]:
        """For each layer the largest of `sparsities` up to which the accuracy falls by no more than `max_drop`, 0 where
        there is none: a `scope` of `prune_weights`. Each layer has the budget for itself; together they may lose more,
        which fine-tuning is to win back."""
        if not 0 <= max_drop < 1:
            raise ValueError(f"max_drop: expected a fraction in [0, 1), got {max_drop!r}")
        found = {}
        for layer, accuracies in self.accuracies.items():
            found[layer] = 0.0
            for sparsity, accuracy in zip(self.sparsities, accuracies, strict=True):
                # Accuracies are counts over counts: leave room for their rounding.
                if self.base - accuracy > max_drop + 1e-9:
                    break
                found[layer] = sparsity
        return found


def sensitivity(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    *,
    sparsities: Sequence[float] = SPARSITIES,
    criterion: str = "magnitude",
    granularity: str = "element",
    block: tuple[int, int] | None = None,
    ignore: Iterable[str] = (),
    data: Iterable[Any] | None = None,
    loss: Loss = F.cross_entropy,
    seed: int = 0,
) -> Sensitivity:
    """Prunes each layer alone to each of `sparsities`, without training, and asks `evaluate` what the model is worth.

    `evaluate` takes a model and returns its accuracy, such as `lambda model: compress.evaluate(model, loader)`; `model`
    stays as it is. The other arguments are those of `prune_weights`.
    """
    steps = tuple(sorted(set(sparsities)))
    for value in steps:
        check_share("sparsities", value)
    if not steps:
        raise ValueError("sparsities: expected at least one, got none")
    if isinstance(granularity, str) and ":" in granularity:
        raise ValueError(f"granularity: expected one that leaves the sparsity open, got {granularity!r}")
    settings = checked_settings(None, criterion, {}, granularity, block, seed)
    if isinstance(data, Iterator):
        data = list(data)
    with torch.inference_mode(False), torch.no_grad():
        small = copied(model)
        cutter = Cutter.of(small, settings, (ignore,) if isinstance(ignore, str) else tuple(ignore), data, loss)
        base, scores = evaluate(small), cutter.scores()
        found = {}
        for i, target in enumerate(cutter.targets):
            accuracies = []
            for sparsity in steps:
                with cutter.trying(i, sparsity, scores):
                    accuracies.append(evaluate(small))
            found[target.layer] = tuple(accuracies)
    return Sensitivity(base, steps, found)
