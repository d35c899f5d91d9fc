"""Losses that compare feature maps of a student's layers with its teacher's: hints, attention, similarity, VID."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernelpress.compress.losses.base import LayerLoss, same_size

__all__ = ["AttentionLoss", "HintLoss", "SimilarityLoss", "VIDLoss"]


class HintLoss(LayerLoss):
    """FitNets, Romero et al. 2015 (arXiv:1412.6550), eq. 3: ½ ‖t − r(s)‖², here the mean over all elements.

    The regressor r, trained along, is a 1×1 convolution (a linear layer for vectors) from the student's channels to the
    teacher's.
    """

    def prepare(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
        """Makes a regressor for each pair."""
        self.regressors = _regressors(student, teacher)

    def compare(self, index: int, student: Tensor, teacher: Tensor) -> Tensor:
        """½ of the mean squared error of the regression."""
        student, teacher = same_size(student, teacher)
        return 0.5 * F.mse_loss(self.regressors[index](student), teacher)


class VIDLoss(LayerLoss):
    """Variational information distillation, Ahn et al. 2019 (arXiv:1904.05835), eqs. 4–6.

    −log q(t | s) without its constant, Σ_c log σ_c + (t − μ(s))² ÷ 2σ_c², here the mean over all elements, with
    σ_c² = softplus(α_c) + ε of each of the teacher's channels. μ, 1×1 convolutions with ReLU between, and α are trained
    along.
    """

    EPSILON = 1e-5
    FIRST_VARIANCE = 5.0

    def prepare(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
        """Makes μ and α for each pair."""
        self.regressors = _regressors(student, teacher, hidden=True)
        start = torch.tensor(self.FIRST_VARIANCE - self.EPSILON).expm1().log().item()
        self.alphas = nn.ParameterList(
            nn.Parameter(torch.full((theirs.shape[1],), start, device=theirs.device)) for theirs in teacher
        )

    def compare(self, index: int, student: Tensor, teacher: Tensor) -> Tensor:
        """The mean negative log-likelihood of the teacher's features."""
        student, teacher = same_size(student, teacher)
        variance = F.softplus(self.alphas[index]) + self.EPSILON
        variance = variance.view(1, -1, *[1] * (teacher.dim() - 2))
        error = teacher - self.regressors[index](student)
        return 0.5 * (variance.log() + error.square() / variance).mean()


class AttentionLoss(LayerLoss):
    """Attention transfer, Zagoruyko & Komodakis 2017 (arXiv:1612.03928), eq. 2 with p = 2.

    ½ ‖Q_s ÷ ‖Q_s‖ − Q_t ÷ ‖Q_t‖‖ of Q = Σ_c A_c², a map's channels summed up, as a vector; mean over images. `weight`
    is their β.
    """

    def compare(self, index: int, student: Tensor, teacher: Tensor) -> Tensor:
        """Half of the mean distance between both models' attention."""
        if student.dim() != 4:
            raise ValueError(f"expected maps [N, C, H, W], got {list(student.shape)}")
        student, teacher = same_size(student, teacher)
        mine, theirs = (F.normalize(maps.square().sum(dim=1).flatten(1), dim=1) for maps in (student, teacher))
        return 0.5 * torch.linalg.vector_norm(mine - theirs, dim=1).mean()


class SimilarityLoss(LayerLoss):
    """Similarity-preserving distillation, Tung & Mori 2019 (arXiv:1907.09682), eqs. 1–4: ‖G_t − G_s‖²_F ÷ b².

    G [b, b] are the products of all images' features A Aᵀ, each row divided by its norm. `weight` is their γ.
    """

    def compare(self, index: int, student: Tensor, teacher: Tensor) -> Tensor:
        """The mean squared difference between both models' similarities of images."""
        flat = [features.flatten(1) for features in (student, teacher)]
        mine, theirs = (F.normalize(features @ features.T, dim=1) for features in flat)
        return (theirs - mine).square().mean()


def _regressors(student: Sequence[Tensor], teacher: Sequence[Tensor], *, hidden: bool = False) -> nn.ModuleList:
    """What leads from the student's channels to the teacher's, for each pair; with `hidden`, in two layers."""
    made = nn.ModuleList()
    for mine, theirs in zip(student, teacher, strict=True):
        is_map, width = mine.dim() == 4, theirs.shape[1]
        sizes = [mine.shape[1], *([width] if hidden else []), width]
        layers: list[nn.Module] = []
        for i in range(len(sizes) - 1):
            layers += [nn.ReLU()] if i else []
            layers += [nn.Conv2d(sizes[i], sizes[i + 1], 1) if is_map else nn.Linear(sizes[i], sizes[i + 1])]
        made.append(nn.Sequential(*layers))
    return made.to(student[0].device)
