"""The step `prune_channels`: whole channels leave."""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import Annotated, Literal

from pydantic import Field, model_validator
from torch import nn

from kernelpress import compress
from kernelpress.emit import layer_energies, layer_times
from kernelpress.press.registry import Pass, PassContext, register
from kernelpress.press.sections import Section, TrainSection

Criterion = Literal[
    "l1",
    "l2",
    "fpgm",
    "bn_scale",
    "random",
    "activation",
    "apoz",
    "pca",
    "reconstruction",
    "taylor",
    "gradient_activation",
]

_METERS = {"latency": layer_times, "energy": layer_energies}


class PruneChannels(Section):
    """`kernelpress.compress.prune_channels`."""

    ratio: Annotated[float, Field(gt=0, lt=1, description="share of the target to remove")]
    criterion: Annotated[Criterion, Field(description="what ranks channels")] = "l2"
    scope: Annotated[
        Literal["local", "global"], Field(description="every group loses the same share, or all channels are ranked")
    ] = "local"
    schedule: Annotated[Literal["one-shot", "greedy"], Field(description="ranked once, or anew after each step")] = (
        "one-shot"
    )
    iterations: Annotated[int, Field(ge=1, description="rounds of pruning")] = 1
    finetune: Annotated[TrainSection | None, Field(description="training between the rounds")] = None
    round_to: Annotated[int, Field(ge=1, description="layers keep a multiple of so many channels")] = 8
    target: Annotated[
        Literal["flops", "channels", "parameters", "latency", "energy"],
        Field(description="what there is to be less of"),
    ] = "flops"
    ignore: Annotated[tuple[str, ...], Field(description="layers and modules that keep their channels")] = ()
    batches: Annotated[int, Field(ge=1, description="of training data, for criteria that look at data")] = 8

    @property
    def chooses_by_time(self) -> bool:
        """Budgets of latency and energy measure layers."""
        return self.target in _METERS

    @model_validator(mode="after")
    def _is_possible(self) -> PruneChannels:
        if self.finetune is not None and self.iterations == 1:
            raise ValueError("finetune: expected iterations of at least 2 to train between, got 1")
        if self.target in _METERS and self.schedule != "one-shot":
            raise ValueError(f"schedule: expected one-shot for target: {self.target}, got {self.schedule}")
        return self


def _run(model: nn.Module, context: PassContext[PruneChannels]) -> nn.Module:
    section = context.options
    between = None
    if section.finetune is not None and section.finetune.epochs:
        training = section.finetune.model_dump()
        between = partial(
            compress.finetune, loader=context.train_loader, **training, seed=context.seed, progress=context.progress
        )
    return compress.prune_channels(
        model,
        context.example_inputs,
        **section.model_dump(exclude={"finetune", "batches"}),
        between=between,
        data=islice(context.train_loader, section.batches),
        layer_costs=_METERS.get(section.target),
    )


register(Pass("prune_channels", PruneChannels, _run))
