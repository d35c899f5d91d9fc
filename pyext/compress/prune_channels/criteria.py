"""How important a channel is. A new criterion is one function and one line in `CRITERIA`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from kernelpress.compress.channels.dependency import Axis, Pool
from kernelpress.compress.prune_channels.activations import (
    gradient_times_activation,
    mean_activation,
    nonzeros,
    principal_components,
    taylor,
)
from kernelpress.compress.prune_channels.evidence import Evidence
from kernelpress.compress.prune_channels.reconstruction import thinet
from kernelpress.runtime.torch_private import BatchNorm

__all__ = ["CRITERIA", "Criterion", "Importance"]

Importance = Tensor | str
"""Of each set of a pool, larger for what should stay: [sets], float64. Or why it has none, and the pool stays."""


@dataclass(frozen=True)
class Criterion:
    """`score(evidence, model)` gives the importance of the sets of each pool; it looks at weights alone, or also at
    activations or gradients on data. `is_whole`: it is that of all layers that make a channel together, not of each."""

    score: Callable[[Evidence, nn.Module], list[Importance]]
    needs: Literal["weights", "activations", "gradients"] = "weights"
    is_whole: bool = False


def _by_filters(score: Callable[[Tensor, Tensor], Tensor]) -> Criterion:
    """`score(filters [filters, elements], which of them are left)`, summed over the filters of a set, divided by its
    mean over the pool and averaged over the layers that make the channels."""

    def of_all(evidence: Evidence, _: nn.Module) -> list[Importance]:
        scores: dict[Axis, Tensor] = {}

        def of(pool: Pool) -> Tensor:
            parts = []
            for axis, _ in pool.producers:
                if axis not in scores:
                    scores[axis] = score(evidence.filters(axis), evidence.left(axis))
                sums = evidence.sums(pool, axis, scores[axis])
                parts.append(sums / sums.mean().clamp_min(torch.finfo(torch.float64).tiny))
            return torch.stack(parts).mean(0)

        return [of(pool) for pool in evidence.pools]

    return Criterion(of_all)


def _distances(filters: Tensor, left: Tensor) -> Tensor:
    """FPGM: Σ_j ‖F_i − F_j‖₂ over all filters of the layer. He et al., Filter Pruning via Geometric Median, CVPR 2019,
    equation 4: the filter nearest to the geometric median is the one that the others can stand for."""
    return torch.cdist(filters, filters[left], compute_mode="donot_use_mm_for_euclid_dist").sum(1)


def _batch_norm_scales(evidence: Evidence, model: nn.Module) -> list[Importance]:
    """|γ| of the BatchNorm behind a channel, averaged over those it passes. Liu et al., Learning Efficient
    Convolutional Networks through Network Slimming, ICCV 2017 (arXiv:1708.06519), section 3; meant for networks that
    were trained with `finetune(bn_l1=…)`."""
    norms = {name: part for name, part in model.named_modules() if isinstance(part, BatchNorm)}

    def of(pool: Pool) -> Importance:
        axes = [axis for axis, _ in pool.occurrences if axis.layer in norms and axis.parameter.endswith("weight")]
        if not axes:
            return "no BatchNorm with a scale follows them"
        weights = [norms[axis.layer].weight.detach().to("cpu", torch.float64).abs() for axis in axes]
        return torch.stack([evidence.sums(pool, axis, w) for axis, w in zip(axes, weights, strict=True)]).mean(0)

    return [of(pool) for pool in evidence.pools]


def _random(evidence: Evidence, _: nn.Module) -> list[Importance]:
    """Uniform random numbers of torch's generator, whose state is put back: the baseline of every comparison."""
    return [torch.rand(len(pool.roots), dtype=torch.float64) for pool in evidence.pools]


CRITERIA: Mapping[str, Criterion] = {
    # Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, section 3.1 and 4.4 (the norm's order).
    "l1": _by_filters(lambda filters, _: filters.norm(p=1, dim=1)),
    "l2": _by_filters(lambda filters, _: filters.norm(p=2, dim=1)),
    "fpgm": _by_filters(_distances),
    "bn_scale": Criterion(_batch_norm_scales),
    "random": Criterion(_random),
    "activation": Criterion(mean_activation, "activations"),
    "apoz": Criterion(nonzeros, "activations"),
    "pca": Criterion(principal_components, "activations"),
    "reconstruction": Criterion(thinet, "activations"),
    "taylor": Criterion(taylor, "gradients", is_whole=True),
    "gradient_activation": Criterion(gradient_times_activation, "gradients"),
}
