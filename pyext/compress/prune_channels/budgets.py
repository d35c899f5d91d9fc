"""What is left of a model's cost once sets of channels are gone: FLOPs, channels, parameters, or its layers' time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import nn

from kernelpress.compress.channels.dependency import Axis, Dependencies
from kernelpress.measure.cost import count_parameters

__all__ = ["Cost", "channels_left", "flops_left", "kept_on_axes", "parameters_left"]

Cost = Callable[[Sequence[int]], float]
"""How many sets of each pool are gone → the cost of what is left."""


def kept_on_axes(dependencies: Dependencies, gone: Sequence[int]) -> dict[Axis, int]:
    """How many positions are left on the axes of the pools."""
    lost: dict[Axis, int] = {}
    for pool, count in zip(dependencies.pools, gone, strict=True):
        for axis, positions in pool.occurrences:
            lost[axis] = lost.get(axis, 0) + positions * count
    return {axis: len(dependencies.axes[axis]) - count for axis, count in lost.items()}


def channels_left(dependencies: Dependencies) -> Cost:
    """Sets of channels that could leave."""
    total = sum(len(pool.roots) for pool in dependencies.pools)
    return lambda gone: total - sum(gone)


def flops_left(dependencies: Dependencies, flops: int) -> Cost:
    """FLOPs at the example inputs; `flops` are those of the whole model."""

    def left(gone: Sequence[int]) -> float:
        kept = kept_on_axes(dependencies, gone)

        def share(axis: Axis) -> float:
            return kept[axis] / len(dependencies.axes[axis]) if axis in kept else 1.0

        return flops - sum(call.flops * (1 - share(call.output) * share(call.input)) for call in dependencies.calls)

    return left


def parameters_left(dependencies: Dependencies, model: nn.Module) -> Cost:
    """Parameters, those with several names counted once."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    cut = {axis.parameter for axis in dependencies.axes if axis.parameter in shapes}
    others = count_parameters(model) - sum(math.prod(shapes[name]) for name in cut)

    def left(gone: Sequence[int]) -> float:
        kept = kept_on_axes(dependencies, gone)
        sizes = ([kept.get(Axis(name, dim), size) for dim, size in enumerate(shapes[name])] for name in cut)
        return others + sum(map(math.prod, sizes))

    return left
