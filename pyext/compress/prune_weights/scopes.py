"""How many weights leave, and from where: everywhere at once, each layer for itself, or shares given per layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernelpress.compress.prune_weights.targets import Target

__all__ = ["Pool", "check_share", "n_of_m", "pools_of", "pruned"]


@dataclass(frozen=True)
class Pool:
    """Targets, by number, whose groups are ranked against each other, and the share of their weights that leaves."""

    targets: tuple[int, ...]
    sparsity: float


def check_share(name: str, value: object) -> None:
    """Raises `TypeError` and `ValueError` for what is no fraction in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number in [0, 1), got {value!r}")
    if not 0 <= value < 1:
        raise ValueError(f"{name}: expected a fraction of zeros in [0, 1), got {value!r}")


def pools_of(
    scope: str | Mapping[str, float], sparsity: float, targets: Sequence[Target], alive: Sequence[Tensor]
) -> tuple[Pool, ...]:
    """The pools of a scope. Shares are of the weights that are alive.

    `"erk"`, Erdős–Rényi-Kernel (Evci et al., Rigging the Lottery, arXiv:1911.11134, section 3): a layer keeps a share
    in proportion to (C_in + C_out + K_h + K_w) / (C_in · C_out · K_h · K_w), at most all of it.
    """
    if isinstance(scope, Mapping):
        numbers = {path: i for i, target in enumerate(targets) for path, _, _ in target.owners}
        for layer, share in scope.items():
            if layer not in numbers:
                raise ValueError(f"scope: expected layers of {', '.join(numbers)}, got {layer!r}")
            check_share(f"scope[{layer!r}]", share)
        return tuple(Pool((numbers[layer],), share) for layer, share in scope.items())
    if scope == "global":
        return (Pool(tuple(range(len(targets))), sparsity),)
    if scope == "layer":
        return tuple(Pool((i,), sparsity) for i in range(len(targets)))
    if scope != "erk":
        raise ValueError(f"scope: expected 'global', 'layer', 'erk', 'sensitivity' or a mapping, got {scope!r}")
    counts = [int(mask.count_nonzero()) for mask in alive]
    demands = [float(sum(target.original.shape)) for target in targets]
    kept = _filled(demands, counts, (1 - sparsity) * sum(counts))
    return tuple(
        Pool((i,), 1 - keep / count) for i, (keep, count) in enumerate(zip(kept, counts, strict=True)) if count
    )


def _filled(demands: Sequence[float], limits: Sequence[int], total: float) -> list[float]:
    """Shares of `total` in proportion to `demands`, none above its limit."""
    full: set[int] = set()
    while True:
        rest = total - sum(limits[i] for i in full)
        scale = rest / max(sum(d for i, d in enumerate(demands) if i not in full), 1e-300)
        over = {i for i, demand in enumerate(demands) if i not in full and scale * demand > limits[i]}
        if not over:
            return [float(limits[i]) if i in full else scale * demand for i, demand in enumerate(demands)]
        full |= over


def pruned(
    pool: Pool,
    count: int,
    scores: Sequence[Tensor],
    alive: Sequence[Tensor] | Mapping[int, Tensor],
    groups: Sequence[Tensor],
) -> dict[int, Tensor]:
    """What stays alive of each target of the pool once about `count` more of its weights leave: whole groups in the
    order of the mean score of what is alive in them, as near to `count` as groups allow."""
    means, sizes = [], []
    for i in pool.targets:
        mask = alive[i].flatten().to("cpu")
        number = groups[i][mask]
        most = int(groups[i].max()) + 1 if len(groups[i]) else 0
        size = torch.bincount(number, minlength=most)
        total = torch.zeros(most, dtype=torch.float64).index_add_(0, number, scores[i].flatten().to("cpu")[mask])
        means.append((total / size.clamp_min(1)).masked_fill(size == 0, math.inf))
        sizes.append(size)
    order = torch.cat(means).argsort(stable=True)
    gone = torch.cat(sizes)[order].cumsum(0)
    leaving = int(torch.searchsorted(gone, count, right=True))
    before = int(gone[leaving - 1]) if leaving else 0
    if leaving < len(gone) and int(gone[leaving]) - count < count - before:
        leaving += 1
    stays = torch.ones(len(order), dtype=torch.bool)
    stays[order[:leaving]] = False
    return {
        i: alive[i] & part[groups[i]].view_as(alive[i]).to(alive[i].device)
        for i, part in zip(pool.targets, stays.split([len(size) for size in sizes]), strict=True)
    }


def n_of_m(kept: int, score: Tensor, alive: Tensor, groups: Tensor) -> Tensor:
    """What stays alive where of every group at most the `kept` of largest score do."""
    ranked = score.flatten().to("cpu").masked_fill(~alive.flatten().to("cpu"), -math.inf)
    order = ranked.argsort(descending=True, stable=True)
    order = order[groups[order].argsort(stable=True)]
    starts = torch.bincount(groups).cumsum(0) - torch.bincount(groups)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order)) - starts[groups[order]]
    return alive & (place < kept).view_as(alive).to(alive.device)
