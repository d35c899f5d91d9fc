"""What prunes a model in place: checked settings, scores by a criterion, masks for as many weights as are to leave."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernelpress.compress.prune_weights.criteria import WEIGHT_CRITERIA, Scores
from kernelpress.compress.prune_weights.derivatives import Loss, Problem
from kernelpress.compress.prune_weights.patterns import Pattern, pattern_of
from kernelpress.compress.prune_weights.scopes import Pool, check_share, n_of_m, pools_of, pruned
from kernelpress.compress.prune_weights.targets import Target, check_finite, find_targets
from kernelpress.compress.record import SkippedLayers

__all__ = ["Cutter", "Settings", "checked_settings"]

DEFAULT_SPARSITY = 0.9


@dataclass(frozen=True)
class Settings:
    """The checked arguments; `sparsity` is None where scope or pattern say how many leave."""

    sparsity: float | None
    criterion: str
    scope: str | Mapping[str, float]
    granularity: str
    pattern: Pattern
    seed: int

    def plain(self) -> dict[str, Any]:
        """As a record states them."""
        pattern = self.pattern
        has_block = self.granularity in ("vector", "block")
        return {
            "sparsity": self.sparsity,
            "criterion": self.criterion,
            "scope": dict(self.scope) if isinstance(self.scope, Mapping) else self.scope,
            "granularity": self.granularity,
            "block": [pattern.rows, pattern.columns] if has_block else None,
            "seed": self.seed,
        }


def checked_settings(
    sparsity: float | None,
    criterion: str,
    scope: str | Mapping[str, float],
    granularity: str,
    block: tuple[int, int] | None,
    seed: int,
) -> Settings:
    """The arguments of `prune_weights`. Raises `ValueError` for those out of bounds or that do not belong together."""
    if criterion not in WEIGHT_CRITERIA:
        raise ValueError(f"criterion: expected one of {', '.join(map(repr, WEIGHT_CRITERIA))}, got {criterion!r}")
    pattern = pattern_of(granularity, block)
    if sparsity is not None:
        check_share("sparsity", sparsity)
    if pattern.kept is not None:
        fixed = 1 - pattern.kept / pattern.columns
        if sparsity is not None and abs(sparsity - fixed) > 1e-9:
            raise ValueError(f"sparsity: expected None or {fixed:g}, which {granularity!r} means, got {sparsity}")
        if scope not in ("global", "layer"):
            raise ValueError(f"scope: expected 'global' or 'layer' with granularity={granularity!r}, got {scope!r}")
        sparsity = fixed
    elif isinstance(scope, Mapping):
        if sparsity is not None:
            raise ValueError(f"sparsity: expected None where scope names that of each layer, got {sparsity}")
    elif sparsity is None:
        sparsity = DEFAULT_SPARSITY
    return Settings(sparsity, criterion, scope, granularity, pattern, seed)


@dataclass
class Cutter:
    """Prunes a model in place, as often as it is asked to, always to shares of what was alive at the start."""

    model: nn.Module
    settings: Settings
    targets: tuple[Target, ...]
    skipped: tuple[SkippedLayers, ...]
    data: Iterable[Any] | None
    loss: Loss
    start: list[Tensor]
    pools: tuple[Pool, ...]
    groups: list[Tensor]

    @classmethod
    def of(
        cls, model: nn.Module, settings: Settings, ignore: Sequence[str], data: Iterable[Any] | None, loss: Loss
    ) -> Cutter:
        """For `model`, over whose weights masks are laid."""
        targets, skipped = find_targets(model, ignore)
        check_finite(targets)
        start = [target.alive() for target in targets]
        shares = settings.sparsity or 0.0
        pools = () if settings.pattern.kept else pools_of(settings.scope, shares, targets, start)
        groups = [settings.pattern.groups(target.module, tuple(target.original.shape)) for target in targets]
        return cls(model, settings, targets, skipped, data, loss, start, pools, groups)

    def scores(self) -> Scores:
        """What the criterion says of the present weights; its random numbers are the same each time, so that a training
        that was interrupted goes on as if it had not been."""
        check_finite(self.targets)
        generator = torch.Generator().manual_seed(self.settings.seed)
        name = self.settings.criterion
        return WEIGHT_CRITERIA[name](Problem(self.model, self.targets, self.data, self.loss, generator, name))

    @torch.no_grad()
    def cut(self, share_of: Callable[[float], float]) -> None:
        """Prunes each pool to `share_of` its sparsity; what is gone stays so."""
        alive, kept = [target.alive() for target in self.targets], self.settings.pattern.kept
        counts = {pool: self._count(pool, share_of, alive) for pool in self.pools}
        if kept is None and not any(counts.values()):
            return
        scores, stays = self.scores(), dict[int, Tensor]()
        for pool, count in counts.items():
            stays |= pruned(pool, count, scores.values, alive, self.groups)
        if kept is not None:
            stays = {i: n_of_m(kept, scores.values[i], mask, self.groups[i]) for i, mask in enumerate(alive)}
        for i, mask in stays.items():
            if scores.repaired is not None:
                self.targets[i].original.copy_(scores.repaired(i, mask))
            self.targets[i].keep(mask)

    @contextmanager
    def trying(self, index: int, sparsity: float, scores: Scores) -> Iterator[None]:
        """The model with one target alone pruned, meanwhile."""
        target, alive = self.targets[index], {index: self.start[index]}
        pool = Pool((index,), sparsity)
        stays = pruned(pool, self._count(pool, float, alive), scores.values, alive, self.groups)[index]
        with target.restored():
            if scores.repaired is not None:
                target.original.copy_(scores.repaired(index, stays))
            target.keep(stays)
            yield

    def _count(
        self, pool: Pool, share_of: Callable[[float], float], alive: Sequence[Tensor] | Mapping[int, Tensor]
    ) -> int:
        """How many weights of a pool have to leave now."""
        total = sum(int(self.start[i].count_nonzero()) for i in pool.targets)
        left = sum(int(alive[i].count_nonzero()) for i in pool.targets)
        return max(0, round(share_of(pool.sparsity) * total) - (total - left))
