"""Who a student learns from: any module, a `.pt2` file, or the moving average of the student itself."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kernelpress.compress.changes import copied
from kernelpress.compress.features import forward_with_features

__all__ = ["EMATeacher", "Teacher", "teacher_of"]


class EMATeacher(nn.Module):
    """A teacher that is the moving average of the student: θ' ← α θ' + (1 − α) θ after each step of the training.

    Mean Teacher, Tarvainen & Valpola 2017 (arXiv:1703.01780), eq. 1, with α = min(1 − 1 ÷ (step + 1), `decay`), so
    that the first weights are soon forgotten. Buffers of floating point are averaged too. `model` is the average, None
    before a training. Raises `ValueError` for a `decay` outside [0, 1).
    """

    model: nn.Module | None
    updates: Tensor

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected at least 0 and below 1, got {decay}")
        self.decay = decay
        self.model = None
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def begin(self, student: nn.Module) -> None:
        """Starts at the present weights of `student`."""
        self.model = copied(student).requires_grad_(False).eval()
        self.updates.zero_()

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Takes the present weights of `student` into the average."""
        assert self.model is not None
        self.updates += 1
        share = max(1 / (int(self.updates) + 1), 1 - self.decay)
        tables = ((self.model.parameters(), student.parameters()), (self.model.buffers(), student.buffers()))
        for average, present in (pair for table in tables for pair in zip(*table, strict=True)):
            if average.is_floating_point():
                average.lerp_(present, share)
            else:
                average.copy_(present)

    def forward(self, x: Tensor) -> Tensor:
        """What the average makes of `x`. Raises `RuntimeError` before a training."""
        if self.model is None:
            raise RuntimeError("EMATeacher: there is no average before a training")
        output: Tensor = self.model(x)
        return output


def teacher_of(teacher: nn.Module | str | os.PathLike[str], student: nn.Module) -> nn.Module:
    """`teacher` as a module: a `.pt2` file that `EmittedModel.save` wrote is read; what shares modules or tensors
    with the student, above all the student itself, is copied, so that it stays as it is now.

    Raises `TypeError` for what is neither, and what `kernelpress.load` does.
    """
    if isinstance(teacher, (str, os.PathLike)):
        from kernelpress.emit import load

        return load(teacher)
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"teacher: expected a module or the path of a .pt2 file, got {type(teacher).__name__}")
    own = {id(part) for part in _parts(student)}
    return copied(teacher) if any(id(part) in own for part in _parts(teacher)) else teacher


def _parts(model: nn.Module) -> list[nn.Module | Tensor]:
    return [*model.modules(), *model.parameters(), *model.buffers()]


class Teacher:
    """A module that is asked and never trained: no gradients, and what it said of an image may be kept.

    `paths`: the layers whose outputs are wanted beside its own. `cache_mb`: megabytes of main memory for what it puts
    out; an image that comes again, known by its content, is not shown to it again.
    """

    def __init__(self, module: nn.Module, paths: Sequence[str], cache_mb: float) -> None:
        self.module = module
        self.paths = tuple(paths)
        self._is_caching = cache_mb > 0
        self._room = int(cache_mb * 2**20)
        self._known: dict[bytes, dict[str, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """What the layers at `paths` put out for `images`, and under `""` the output."""
        if not self._is_caching:
            return forward_with_features(self.module, images, self.paths, "teacher")
        keys = [hashlib.blake2b(_bytes_of(image), digest_size=16).digest() for image in images.cpu()]
        answers = {key: self._known[key] for key in keys if key in self._known}
        unknown = {key: i for i, key in enumerate(keys) if key not in answers}
        if unknown:
            new = forward_with_features(self.module, images[list(unknown.values())], self.paths, "teacher")
            for row, key in enumerate(unknown):
                answers[key] = {path: values[row].cpu().clone() for path, values in new.items()}
                self._keep(key, answers[key])
        return {path: torch.stack([answers[key][path] for key in keys]).to(images.device) for path in ("", *self.paths)}

    def _keep(self, key: bytes, answer: dict[str, Tensor]) -> None:
        size = sum(values.nbytes for values in answer.values())
        if size <= self._room:
            self._room -= size
            self._known[key] = answer


def _bytes_of(image: Tensor) -> Any:
    """The memory of an image, whatever its dtype."""
    return image.contiguous().view(-1).view(torch.uint8).numpy().data
