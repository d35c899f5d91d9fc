"""What a training minimises on a batch: cross-entropy with the targets, and losses that compare with a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernelpress.compress.features import NothingToCompareError, check_layers, forward_with_features
from kernelpress.compress.losses.base import LayerLoss, TeacherLoss, described, widened
from kernelpress.compress.teacher import EMATeacher, Teacher
from kernelpress.preserve import preserved

__all__ = ["Objective"]


class Objective(nn.Module):
    """(images, targets) → the loss of `model`, with all that is trained along and all that a training goes on from.

    The state dict has `model`, parameters of losses that are modules, and an `EMATeacher`; never another teacher, which
    is no part of this module.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        teacher: nn.Module | None = None,
        losses: Sequence[TeacherLoss | LayerLoss] = (),
        target_weight: float = 1.0,
        label_smoothing: float = 0.0,
        cache_mb: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.losses = nn.ModuleList(loss for loss in losses if isinstance(loss, nn.Module))
        self.average = teacher if isinstance(teacher, EMATeacher) else None
        self._terms = tuple(losses)
        self._target_weight = target_weight
        self._label_smoothing = label_smoothing
        pairs = [pair for loss in losses if isinstance(loss, LayerLoss) for pair in loss.layers.items()]
        self._paths = tuple(dict.fromkeys(mine for mine, _ in pairs))
        self._teacher: tuple[Teacher, ...] = ()  # in a tuple: as an attribute, its module would be a part of this one
        # Layers of an average are called as the student's are.
        module = teacher if self.average is None else self.average.model
        if module is not None:
            self._teacher = (Teacher(module, tuple(dict.fromkeys(theirs for _, theirs in pairs)), cache_mb),)

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """The loss, a scalar."""
        features = forward_with_features(self.model, images, self._paths, "model")
        loss = torch.zeros((), device=target.device)
        if self._target_weight:
            loss = loss + self._target_weight * F.cross_entropy(
                features[""], target, label_smoothing=self._label_smoothing
            )
        for teacher in self._teacher:
            loss = loss + self._compared(features, teacher(images), target)
        return loss

    def train(self, mode: bool = True) -> Objective:
        """As of every module, but that an average stays in evaluation mode."""
        super().train(mode)
        if self.average is not None:
            self.average.eval()
        return self

    def prepare(self, images: Tensor, target: Tensor) -> None:
        """Runs both models on a batch, makes what is trained along, and compares once, before a training begins.

        Raises `ValueError` for what cannot be compared: images that the teacher does not take, layers that are unknown
        or do not run, shapes that do not fit.
        """
        for teacher in self._teacher:
            check_layers(self.model, self._paths, "student")
            check_layers(teacher.module, teacher.paths, "teacher")
            with torch.no_grad(), preserved(self.model):
                self.model.train()
                mine = forward_with_features(self.model, images, self._paths, "student")
                try:
                    theirs = forward_with_features(teacher.module, images, teacher.paths, "teacher")
                except NothingToCompareError:
                    raise
                except (RuntimeError, ValueError) as error:
                    raise ValueError(f"teacher: it does not take the images {list(images.shape)}: {error}") from error
                if theirs[""].isnan().any():
                    raise ValueError("teacher: its output for the first batch is NaN")
                for loss in self._terms:
                    if isinstance(loss, LayerLoss):
                        loss.prepare(*_of_layers(loss, mine, theirs))
                self._compared(mine, theirs, target)

    def _compared(self, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], target: Tensor) -> Tensor:
        """The sum of all losses, outside of `torch.autocast`, in float32 at least."""
        total = torch.zeros((), device=target.device)
        with torch.autocast(target.device.type, enabled=False):
            for index, loss in enumerate(self._terms):
                if isinstance(loss, LayerLoss):
                    value = loss(*_of_layers(loss, mine, theirs))
                else:
                    value = loss(widened(mine[""]), widened(theirs[""]), target)
                if not isinstance(value, Tensor) or value.dim():
                    got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    raise ValueError(f"losses[{index}]: expected a scalar tensor from {described(loss)}, got {got}")
                total = total + value
        return total


def _of_layers(
    loss: LayerLoss, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    return [widened(mine[path]) for path in loss.layers], [widened(theirs[path]) for path in loss.layers.values()]
