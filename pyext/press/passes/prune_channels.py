"""The step `prune_channels`: whole channels leave."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from kernelpress import compress
from kernelpress.press.registry import Pass, PassContext, register
from kernelpress.press.sections import Section


class PruneChannels(Section):
    """`kernelpress.compress.prune_channels`."""

    ratio: Annotated[float, Field(gt=0, lt=1, description="share of the FLOPs to remove")]
    criterion: Annotated[Literal["l1", "l2"], Field(description="the norm that ranks channels")] = "l2"
    round_to: Annotated[int, Field(ge=1, description="layers keep a multiple of so many channels")] = 8


def _run(model: nn.Module, context: PassContext[PruneChannels]) -> nn.Module:
    return compress.prune_channels(model, context.example_inputs, **context.options.model_dump())


register(Pass("prune_channels", PruneChannels, _run))
