"""What losses of distillation share: checks of what they are given, sums in float32, the layers that they compare."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "LayerLoss",
    "TeacherLoss",
    "check_logits",
    "checked_features",
    "described",
    "positive",
    "same_size",
    "widened",
]


class TeacherLoss(Protocol):
    """A loss, a scalar to minimise, that compares a student with its teacher on one batch."""

    def __call__(self, student_output: Tensor, teacher_output: Tensor, target: Tensor, /) -> Tensor: ...


class LayerLoss(nn.Module):
    """A loss that compares outputs of layers: the sum over all pairs of `compare`, times `weight`.

    `layers`: path of the student's layer → path of the teacher's, or a sequence of paths that both have; `""` is the
    output of the whole model. Raises `ValueError` for no layers or a weight that is no finite number above zero.
    """

    def __init__(self, layers: Mapping[str, str] | Sequence[str], *, weight: float = 1.0) -> None:
        super().__init__()
        if isinstance(layers, str):
            raise TypeError(f"layers: expected a mapping or a sequence of paths, got the string {layers!r}")
        self.layers = dict(layers) if isinstance(layers, Mapping) else {path: path for path in layers}
        if not self.layers or not all(isinstance(path, str) for pair in self.layers.items() for path in pair):
            raise ValueError(f"layers: expected at least one path of a layer, got {layers!r}")
        self.weight = positive("weight", weight)

    def prepare(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
        """Makes what is trained along, from one batch of both models' features."""

    def compare(self, index: int, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of pair `index`."""
        raise NotImplementedError

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """The loss of these features, one for each pair of `layers`; no gradient reaches the teacher's.

        Raises `ValueError` where shapes do not fit.
        """
        total = torch.zeros((), device=student[0].device)
        index = 0
        try:
            for index, pair in enumerate(zip(student, teacher, strict=True)):
                total = total + self.compare(index, *checked_features(*pair))
        except ValueError as error:
            mine, theirs = list(self.layers.items())[index]
            raise ValueError(f"layers: {mine!r} of the student, {theirs!r} of the teacher: {error}") from error
        return self.weight * total

    def extra_repr(self) -> str:
        """The layers and the weight."""
        return f"layers={self.layers}, weight={self.weight}"


def described(loss: Any) -> str:
    """A loss by its name and options, without what it has learnt."""
    if isinstance(loss, LayerLoss):
        return f"{type(loss).__name__}({loss.extra_repr()})"
    return repr(loss) if is_dataclass(loss) else getattr(loss, "__qualname__", type(loss).__qualname__)


def positive(name: str, value: float) -> float:
    """`value` as a float; raises `ValueError` unless it is finite and above zero."""
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")
    return float(value)


def widened(tensor: Tensor) -> Tensor:
    """Half precision as float32, in which sums are taken; other types as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def check_logits(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [N, C, …] of both, at least in float32, the teacher's without its graph.

    Raises `ValueError` for other shapes, another number of classes and less than two classes.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"teacher_output: expected logits of the student's shape {list(student.shape)}, got {list(teacher.shape)}: "
            "responses are compared class by class, layers (`LayerLoss`) may differ"
        )
    if student.dim() < 2 or student.shape[1] < 2:
        raise ValueError(
            f"student_output: expected logits [N, classes, …] of 2 classes or more, got {list(student.shape)}"
        )
    return widened(student), widened(teacher.detach())


def checked_features(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Features [N, …] of the same N, at least in float32, the teacher's without its graph."""
    if student.dim() < 2 or teacher.dim() < 2 or len(student) != len(teacher):
        raise ValueError(
            f"expected features [N, C, …] of the same images, got {list(student.shape)} and {list(teacher.shape)}"
        )
    return widened(student), widened(teacher.detach())


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Maps [N, C, H, W] of the same H and W: what is larger is pooled by averages; vectors [N, C] stay.

    Raises `ValueError` for a map beside a vector.
    """
    if student.dim() != teacher.dim() or student.dim() not in (2, 4):
        raise ValueError(
            f"expected maps [N, C, H, W] or vectors [N, C] of both, got {list(student.shape)} and {list(teacher.shape)}"
        )
    if student.dim() == 2 or student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    return F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)
