"""The step `decompose`: layers become chains of smaller ones."""

from __future__ import annotations

import functools
import itertools
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator
from torch import nn

from kernelpress import compress
from kernelpress.compress.decompose.ranks import check_rank
from kernelpress.emit import plan_latencies
from kernelpress.press.registry import Pass, PassContext, register
from kernelpress.press.sections import Section

Rank = int | float | tuple[int, ...] | Literal["energy", "vbmf"]
Budget = Literal["flops", "sensitivity"]


class Decompose(Section):
    """`kernelpress.compress.decompose`."""

    method: Annotated[
        Literal["auto", "svd", "spatial_svd", "tucker2", "cp", "tt"], Field(description="what a chain is made of")
    ] = "auto"
    rank: Annotated[
        Rank | Budget | dict[str, Rank],
        Field(description="channels between the layers: a rule, a share (1.0 is exact), integers, or these by layer"),
    ] = "energy"
    ratio: Annotated[float, Field(gt=0, lt=1, description="for rank: flops, the share of them to save")] = 0.5
    max_drop: Annotated[
        float, Field(ge=0, lt=1, description="for rank: sensitivity, the accuracy on training images to lose at most")
    ] = 0.01
    energy: Annotated[float, Field(gt=0, le=1, description="share of the squared singular values to keep")] = 0.9
    round_to: Annotated[int, Field(ge=1, description="ranks are multiples of it")] = 8
    ignore: Annotated[tuple[str, ...], Field(description="layers, or modules with all in them, that stay")] = ()
    whiten: Annotated[
        int, Field(ge=0, description="training batches on which outputs shall change least; 0: the weights do")
    ] = 0
    latency: Annotated[bool, Field(description="keep layers whose chains are not faster as plans on this machine")] = (
        False
    )

    @model_validator(mode="after")
    def _has_ranks(self) -> Decompose:
        if self.rank not in get_args(Budget):
            check_rank(self.rank)
        return self


def _run(model: nn.Module, context: PassContext[Decompose]) -> nn.Module:
    by_accuracy = context.options.rank == "sensitivity"
    options = context.options.model_dump(exclude={"whiten", "latency"})
    return compress.decompose(
        model,
        context.example_inputs,
        **options,
        data=itertools.islice(context.train_loader, context.options.whiten) if context.options.whiten else None,
        metric=functools.partial(compress.evaluate, loader=context.train_loader) if by_accuracy else None,
        latency=plan_latencies if context.options.latency else None,
        seed=context.seed,
        progress=context.progress,
    )


register(Pass("decompose", Decompose, _run))
