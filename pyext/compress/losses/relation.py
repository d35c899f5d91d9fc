"""Losses that compare relations: between the images of a batch (RKD), or between a model's layers (FSP)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelpress.compress.losses.base import LayerLoss, checked_features

__all__ = ["FSPLoss", "RKDAngleLoss", "RKDDistanceLoss"]

OUTPUT = {"": ""}
"""The output of the whole model, which RKD compares unless told otherwise."""


class RKDDistanceLoss(LayerLoss):
    """Relational distillation by distances, Park et al. 2019 (arXiv:1904.05068), eqs. 4–6.

    Huber's loss between ψ = ‖f_i − f_j‖ ÷ μ of both models, μ the mean distance of the batch; here the mean over all
    pairs i ≠ j, so that `weight` does not depend on the batch.
    """

    def __init__(self, layers: Mapping[str, str] | Sequence[str] = OUTPUT, *, weight: float = 1.0) -> None:
        super().__init__(layers, weight=weight)

    def compare(self, index: int, student: Tensor, teacher: Tensor) -> Tensor:
        """The mean Huber loss between both models' distances."""
        mine, theirs = (_distances(features.flatten(1)) for features in (student, teacher))
        count = len(student)
        # The diagonal is 0 in both.
        return F.huber_loss(mine, theirs, reduction="sum") / max(1, count * (count - 1))


class RKDAngleLoss(LayerLoss):
    """Relational distillation by angles, Park et al. 2019 (arXiv:1904.05068), eqs. 7–8.

    Huber's loss between ψ = cos ∠ f_i f_j f_k of both models, here the mean over all triplets of different images.
    It takes 3·N³ numbers for a batch of N.
    """

    def __init__(self, layers: Mapping[str, str] | Sequence[str] = OUTPUT, *, weight: float = 1.0) -> None:
        super().__init__(layers, weight=weight)

    def compare(self, index: int, student: Tensor, teacher: Tensor) -> Tensor:
        """The mean Huber loss between both models' cosines."""
        mine, theirs = (_cosines(features.flatten(1)) for features in (student, teacher))
        count = len(student)
        # Where two of three are the same image, both have 0 or 1.
        return F.huber_loss(mine, theirs, reduction="sum") / max(1, count * (count - 1) * (count - 2))


class FSPLoss(LayerLoss):
    """Flow of solution procedure, Yim et al. 2017 (CVPR, "A Gift from Knowledge Distillation"), eqs. 1–2.

    G = Σ_hw F1[h, w, i] · F2[h, w, j] ÷ (H·W) from each of `layers` to the next, ‖G_t − G_s‖² summed over flows, mean
    over images. Two layers at least; both models have the same channels there. The larger of two maps is max-pooled.
    """

    def __init__(self, layers: Mapping[str, str] | Sequence[str], *, weight: float = 1.0) -> None:
        super().__init__(layers, weight=weight)
        if len(self.layers) < 2:
            raise ValueError(f"layers: expected two or more, from the first of which the next follows, got {layers!r}")

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """The loss of these features, one for each of `layers`; no gradient reaches the teacher's."""
        pairs = [checked_features(mine, theirs) for mine, theirs in zip(student, teacher, strict=True)]
        for (mine_at, theirs_at), (mine, theirs) in zip(self.layers.items(), pairs, strict=True):
            if mine.dim() != 4 or theirs.dim() != 4 or mine.shape[1] != theirs.shape[1]:
                raise ValueError(
                    f"layers: expected maps [N, C, H, W] of the same C, got {list(mine.shape)} of the student's "
                    f"{mine_at!r} and {list(theirs.shape)} of the teacher's {theirs_at!r}"
                )
        total = torch.zeros((), device=student[0].device)
        for i in range(len(pairs) - 1):
            mine, theirs = (_flow(pairs[i][side], pairs[i + 1][side]) for side in (0, 1))
            total = total + (theirs - mine).square().sum() / max(1, len(mine))
        return self.weight * total


def _distances(features: Tensor) -> Tensor:
    """‖f_i − f_j‖ ÷ their mean over i ≠ j: [N, N]; 0 where all are equal."""
    # Not by products of features, which lose what is close; the gradient at equal features is 0, not NaN.
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    pairs = max(1, len(features) * (len(features) - 1))
    return distances / (distances.sum() / pairs).clamp_min(torch.finfo(distances.dtype).tiny)


def _cosines(features: Tensor) -> Tensor:
    """cos ∠ f_i f_j f_k, the angle at j: [j, i, k]."""
    directions = F.normalize(features[None] - features[:, None], dim=2)
    return directions @ directions.transpose(1, 2)


def _flow(first: Tensor, second: Tensor) -> Tensor:
    """The FSP matrices [N, C1, C2] from a layer's maps to a later one's."""
    size = (min(first.shape[2], second.shape[2]), min(first.shape[3], second.shape[3]))
    first, second = (F.adaptive_max_pool2d(maps, size).flatten(2) for maps in (first, second))
    return first @ second.transpose(1, 2) / first.shape[2]
