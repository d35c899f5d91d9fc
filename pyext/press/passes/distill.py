"""The step `distill`: a smaller network, or the model as it is by now, learns from a teacher."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator
from torch import nn

from kernelpress import compress
from kernelpress.press.registry import Pass, PassContext, register
from kernelpress.press.sections import TrainSection


class Distill(TrainSection):
    """`kernelpress.compress.distill`."""

    student: Annotated[str | None, Field(description="a network by name, to train from scratch; else the model")] = None
    options: Annotated[dict[str, Any], Field(default_factory=dict, description="of the student, such as its width")]
    teacher: Annotated[
        str | None,
        Field(description="the step whose model is asked; else the one that a student replaces, or the dense one"),
    ] = None
    losses: Annotated[
        tuple[dict[str, dict[str, Any]], ...], Field(description="each a loss by name with its options")
    ] = ({"response": {}},)
    target_weight: Annotated[float, Field(ge=0, description="of cross-entropy with the targets")] = 1.0
    cache_mb: Annotated[float, Field(ge=0, description="megabytes for what the teacher says of images")] = 0.0

    @field_validator("losses", mode="before")
    @classmethod
    def _short_forms(cls, raw: Any) -> Any:
        """`response`, or `response:` without options, stands for a loss of defaults."""
        if not isinstance(raw, list | tuple):
            return raw
        items = [{item: {}} if isinstance(item, str) else item for item in raw]
        return [
            {name: options or {} for name, options in item.items()} if isinstance(item, dict) else item
            for item in items
        ]

    @field_validator("losses")
    @classmethod
    def _are_losses(cls, losses: tuple[dict[str, dict[str, Any]], ...]) -> tuple[dict[str, dict[str, Any]], ...]:
        if not losses or any(len(loss) != 1 for loss in losses):
            raise ValueError("expected at least one loss, one for each item of the list")
        try:
            _made(losses)
        except TypeError as error:
            raise ValueError(str(error)) from error
        return losses


def _made(losses: tuple[dict[str, dict[str, Any]], ...]) -> list[compress.TeacherLoss | compress.LayerLoss]:
    return [compress.create_loss(name, **options) for loss in losses for name, options in loss.items()]


def _run(model: nn.Module, context: PassContext[Distill]) -> nn.Module:
    section = context.options
    if section.teacher is not None:
        teacher = context.load_step(section.teacher)
    else:
        teacher = model if section.student is not None else context.teacher
    return compress.distill(
        model,
        context.example_inputs,
        context.train_loader,
        **section.model_dump(exclude={"teacher", "losses"}),
        teacher=teacher,
        losses=_made(section.losses),
        val_loader=context.test_loader,
        checkpoint_dir=context.checkpoint_dir,
        seed=context.seed,
        progress=context.progress,
    )


register(Pass("distill", Distill, _run))
