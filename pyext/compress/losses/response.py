"""Losses that compare the logits [N, C, …] of a student with its teacher's: KL divergence, DKD, DIST.

Positions of dense logits [N, C, H, W] count as images: a loss is the mean over N·H·W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelpress.compress.losses.base import check_logits, positive

__all__ = ["DISTLoss", "DKDLoss", "ResponseLoss"]


@dataclass(frozen=True)
class ResponseLoss:
    """Hinton, Vinyals & Dean 2015 (arXiv:1503.02531), section 2: T² · KL(softmax(t ÷ T) ‖ softmax(s ÷ T)).

    The factor T² keeps the size of the gradients when the temperature changes. Mean over images and positions.
    """

    temperature: float = 4.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        positive("temperature", self.temperature)
        positive("weight", self.weight)

    def __call__(self, student_output: Tensor, teacher_output: Tensor, target: Tensor | None = None) -> Tensor:
        student, teacher = check_logits(student_output, teacher_output)
        log_s = F.log_softmax(student / self.temperature, dim=1)
        log_t = F.log_softmax(teacher / self.temperature, dim=1)
        return self.weight * self.temperature**2 * _mean(_divergence(log_t, log_s))


@dataclass(frozen=True)
class DKDLoss:
    """Zhao et al. 2022 (arXiv:2203.08679), eq. 7: α · TCKD + β · NCKD, times T² as in their code.

    TCKD is the divergence of the binary distributions (target class, all others), NCKD that of the distributions among
    the others. `target`: class indices [N, …].
    """

    temperature: float = 4.0
    alpha: float = 1.0
    beta: float = 8.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("temperature", "alpha", "beta", "weight"):
            positive(name, getattr(self, name))

    def __call__(self, student_output: Tensor, teacher_output: Tensor, target: Tensor) -> Tensor:
        student, teacher = check_logits(student_output, teacher_output)
        if target.is_floating_point() or target.shape != student[:, 0].shape:
            raise ValueError(
                f"target: expected class indices {list(student[:, 0].shape)}, got {target.dtype} {list(target.shape)}"
            )
        if target.numel() and not 0 <= target.min() <= target.max() < student.shape[1]:
            given = f"{int(target.min())} … {int(target.max())}"
            raise ValueError(f"target: expected classes 0 … {student.shape[1] - 1}, got {given}")
        is_target = F.one_hot(target.long(), student.shape[1]).movedim(-1, 1).bool()
        (binary_s, rest_s), (binary_t, rest_t) = (
            _decoupled(logits / self.temperature, is_target) for logits in (student, teacher)
        )
        tckd, nckd = _mean(_divergence(binary_t, binary_s)), _mean(_divergence(rest_t, rest_s))
        return self.weight * self.temperature**2 * (self.alpha * tckd + self.beta * nckd)


@dataclass(frozen=True)
class DISTLoss:
    """Huang et al. 2022 (arXiv:2205.10536), eqs. 8–10: β · L_inter + γ · L_intra on probabilities at temperature T.

    L_inter is 1 − Pearson's correlation between both models' probabilities of an image, mean over images; L_intra that
    between the probabilities of a class over the images of a batch, mean over classes.
    """

    temperature: float = 1.0
    beta: float = 1.0
    gamma: float = 1.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("temperature", "beta", "gamma", "weight"):
            positive(name, getattr(self, name))

    def __call__(self, student_output: Tensor, teacher_output: Tensor, target: Tensor | None = None) -> Tensor:
        logits = check_logits(student_output, teacher_output)
        student, teacher = ((x / self.temperature).softmax(dim=1).movedim(1, -1).flatten(0, -2) for x in logits)
        inter = _mean(1 - _correlation(student, teacher)[:, None])
        intra = (1 - _correlation(student.T, teacher.T)).mean()
        return self.weight * (self.beta * inter + self.gamma * intra)


def _divergence(log_t: Tensor, log_s: Tensor) -> Tensor:
    """p_t (log p_t − log p_s), element by element; 0 where p_t is 0."""
    p_t = log_t.exp()
    return torch.where(p_t > 0, p_t * (log_t - log_s), 0.0)


def _mean(terms: Tensor) -> Tensor:
    """The sum of terms [N, C, …] ÷ images and positions; 0 for a batch of none."""
    return terms.sum() / max(1, terms[:, 0].numel())


def _decoupled(logits: Tensor, is_target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (the target class, all others) and those among the others, where the target's is −∞."""
    rest = logits.masked_fill(~is_target, -torch.inf).logsumexp(dim=1)
    others = logits.masked_fill(is_target, -torch.inf)
    binary = torch.stack([rest, others.logsumexp(dim=1)], dim=1).log_softmax(dim=1)
    return binary, others.log_softmax(dim=1)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of each row of a and b; 0 where a row is constant."""
    return F.cosine_similarity(a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True), dim=1)
