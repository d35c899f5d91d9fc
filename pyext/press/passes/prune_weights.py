"""The step `prune_weights`: single weights, vectors, blocks become zero, at once or while the network trains."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kernelpress import compress
from kernelpress.press.registry import Pass, PassContext, read_record, register
from kernelpress.press.sections import Section, TrainSection
from kernelpress.report import Curve, Curves, Reading

Criterion = Literal[
    "magnitude", "l1", "l2", "first_order", "taylor", "movement", "snip", "obd", "fisher", "obs", "random"
]
Scope = Literal["global", "layer", "erk", "sensitivity"]
Share = Annotated[float, Field(ge=0, lt=1)]


class PruneWeights(Section):
    """`kernelpress.compress.prune_weights`."""

    sparsity: Annotated[Share | None, Field(description="share of the weights that are left to remove")] = None
    criterion: Annotated[Criterion, Field(description="what ranks weights")] = "magnitude"
    scope: Annotated[
        Scope | dict[str, Share], Field(description="from where weights leave, or the sparsity of each layer by name")
    ] = "global"
    max_drop: Annotated[Share, Field(description="what one layer may cost in accuracy, for scope: sensitivity")] = 0.01
    granularity: Annotated[str, Field(description="element, vector, kernel, filter, block, or n:m such as 2:4")] = (
        "element"
    )
    block: Annotated[tuple[int, int] | None, Field(description="outputs and inputs of a vector or block")] = None
    ignore: Annotated[tuple[str, ...], Field(description="layers that stay as they are")] = ()
    batches: Annotated[int, Field(ge=1, description="training batches that criteria and sensitivity look at")] = 8
    schedule: Annotated[Literal["one-shot", "gradual", "iterative"], Field(description="when weights leave")] = (
        "one-shot"
    )
    begin: Annotated[float, Field(ge=0, le=1, description="share of the steps after which gradual pruning begins")] = 0
    end: Annotated[float, Field(ge=0, le=1, description="share of the steps after which gradual pruning ends")] = 0.75
    every: Annotated[int, Field(ge=1, description="steps between two gradual prunings")] = 10
    rounds: Annotated[int, Field(ge=1, description="iterative prunings, each with a training after it")] = 5
    finetune: Annotated[
        TrainSection | None, Field(description="the training of a gradual schedule, or of each iterative round")
    ] = None

    @model_validator(mode="after")
    def _trains_by_schedule(self) -> PruneWeights:
        trains = self.finetune is not None and self.finetune.epochs > 0
        if trains != (self.schedule != "one-shot"):
            wanted = "a training for this schedule" if not trains else "none with schedule one-shot"
            raise ValueError(f"finetune: expected {wanted}, got {self.finetune}")
        return self


def _run(model: nn.Module, context: PassContext[PruneWeights]) -> nn.Module:
    options = context.options
    batches = [batch for batch, _ in zip(context.train_loader, range(options.batches), strict=False)]
    images = TensorDataset(*(torch.cat(parts) for parts in zip(*batches, strict=True)))

    def accuracy(small: nn.Module) -> float:
        return compress.evaluate(small, DataLoader(images, batch_size=len(batches[0][0])))

    def train(small: nn.Module, folder: str, **settings: Any) -> None:
        assert options.finetune is not None
        compress.finetune(
            small,
            context.train_loader,
            **options.finetune.model_dump(),
            checkpoint_dir=context.checkpoint_dir / folder,
            seed=context.seed,
            progress=context.progress,
            **settings,
        )

    schedules: dict[str, Any] = {
        "one-shot": None,
        "gradual": compress.Gradual(
            lambda small, before_step: train(small, "gradual", before_step=before_step),
            *(options.begin, options.end, options.every),
        ),
        "iterative": compress.Iterative(lambda small, done: train(small, f"round-{done}"), options.rounds),
    }
    plain = options.model_dump(exclude={"batches", "schedule", "begin", "end", "every", "rounds", "finetune"})
    return compress.prune_weights(
        model,
        context.example_inputs,
        **plain,
        data=batches,
        evaluate=accuracy,
        schedule=schedules[options.schedule],
        seed=context.seed,
    )


def _read(record: compress.PassRecord) -> Reading:
    """With a figure of accuracy against sparsity for each layer, where layers were tried."""
    reading, scan = read_record(record), record.arguments.get("sensitivity")
    if scan is None:
        return reading
    x = [0.0, *(100 * share for share in scan["sparsities"])]
    curves = tuple(
        Curve(layer, tuple((s, 100 * a, 100 * a, 100 * a) for s, a in zip(x, (scan["base"], *found), strict=True)))
        for layer, found in scan["accuracies"].items()
    )
    figure = Curves("One layer alone pruned, without training", "sparsity [%]", "training accuracy [%]", curves)
    return Reading(reading.headline, reading.header, reading.rows, reading.remarks, (figure,))


register(Pass("prune_weights", PruneWeights, _run, _read))
