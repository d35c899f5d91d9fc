"""How important a filter is. A new criterion is one function and one line in `CRITERIA`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kernelpress.compress.channel_walk import Axis

__all__ = ["CRITERIA", "Criterion"]

Criterion = Callable[[nn.Module, Sequence[Axis], Mapping[str, Tensor], "Iterable[Any] | None"], Mapping[Axis, Tensor]]
"""(model, output axes of weights, their values by name, data) → importance of every position on each axis, larger for
what should stay."""


def _norm(order: int) -> Criterion:
    def score(
        model: nn.Module, axes: Sequence[Axis], weights: Mapping[str, Tensor], data: Iterable[Any] | None
    ) -> Mapping[Axis, Tensor]:
        return {axis: _filters(weights[axis.parameter], axis.dim).norm(p=order, dim=1) for axis in axes}

    return score


def _filters(weight: Tensor, dim: int) -> Tensor:
    """The weight as [filters, elements], float64 on the CPU."""
    return weight.movedim(dim, 0).flatten(1).to("cpu", torch.float64)


CRITERIA: Mapping[str, Criterion] = {
    # Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, section 3.1 and 4.4 (the norm's order).
    "l1": _norm(1),
    "l2": _norm(2),
}
