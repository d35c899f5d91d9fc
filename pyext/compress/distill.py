"""Distillation as a pass: a smaller network by name, or a copy of the model, learns from a teacher."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kernelpress.compress.changes import Change, Rebuilt, copied
from kernelpress.compress.finetune import finetune
from kernelpress.compress.losses import LayerLoss, ResponseLoss, TeacherLoss
from kernelpress.compress.losses.base import described
from kernelpress.compress.record import PassRecord, add_record, record_of
from kernelpress.measure.cost import count_flops, count_parameters
from kernelpress.preserve import evaluation, random_state_kept

__all__ = ["distill"]


def distill(
    model: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...],
    loader: DataLoader[Any],
    *,
    student: str | None = None,
    options: Mapping[str, Any] | None = None,
    teacher: nn.Module | str | os.PathLike[str] | None = None,
    losses: Sequence[TeacherLoss | LayerLoss] = (ResponseLoss(),),
    seed: int = 0,
    **training: Any,
) -> nn.Module:
    """A network that has learnt from `teacher`, `model` itself unless given, on the batches of `loader`.

    It is a copy of `model`, or a fresh `student`, one of `kernelpress.models.names()`, with `options`; classes and
    input channels are those of `model` unless given. `training` are keywords of `finetune`, `epochs` among them.

    Raises `ValueError` for an unknown student, `TypeError` for options that it does not have, and what `finetune` does.
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    changes: tuple[Change, ...] = ()
    if student is None:
        if options:
            raise ValueError(f"options: expected them with a student, got {dict(options)} without one")
        learner = copied(model)
    else:
        with evaluation(model, inputs), torch.no_grad():
            classes = model(*inputs).shape[1]
        own = {"num_classes": classes, "in_channels": inputs[0].shape[1], **(options or {})}
        change = Rebuilt(student, own)
        with random_state_kept():
            torch.manual_seed(seed)
            learner = change.build().to(inputs[0].device).train(model.training)
        changes = (change,)
        for record in record_of(model):
            add_record(learner, replace(record, promises=()))  # of layers that are gone
    finetune(learner, loader, teacher=model if teacher is None else teacher, losses=losses, seed=seed, **training)
    told = {name: value for name, value in training.items() if name not in ("val_loader", "checkpoint_dir", "progress")}
    add_record(
        learner,
        PassRecord(
            name="distill",
            arguments={"student": student, "losses": [described(loss) for loss in losses], "seed": seed, **told},
            flops_before=count_flops(model, *inputs),
            flops_after=count_flops(learner, *inputs),
            parameters_before=count_parameters(model),
            parameters_after=count_parameters(learner),
            changes=changes,
        ),
    )
    return learner
