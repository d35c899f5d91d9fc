"""The step `quantize`: layers compute in int8."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from kernelpress import compress
from kernelpress.press.registry import Pass, PassContext, register
from kernelpress.press.sections import Section


class Quantize(Section):
    """`kernelpress.compress.quantize`, calibrated on the training images."""

    method: Annotated[
        Literal["static", "dynamic", "qat"],
        Field(description="static, dynamic: ready to emit, dynamic of linear layers; qat: a finetune trains in int8"),
    ] = "static"
    observer: Annotated[
        Literal["minmax", "percentile", "mse", "entropy"], Field(description="how ranges follow from what is seen")
    ] = "minmax"
    samples: Annotated[int, Field(ge=1, description="images to calibrate on")] = 512
    ignore: Annotated[tuple[str, ...], Field(description="layers, or modules with all in them, that stay float")] = ()
    equalize: Annotated[bool, Field(description="channels between layers get like ranges first")] = False
    correct_bias: Annotated[bool, Field(description="biases make up for what rounding shifts")] = False
    rounding: Annotated[
        Literal["nearest", "adaptive"], Field(description="adaptive: weights go where their layer's result is kept")
    ] = "nearest"
    budget: Annotated[
        float | None,
        Field(ge=0, description="accuracy on the training images that may be lost; layers stay float for it"),
    ] = None


def _run(model: nn.Module, context: PassContext[Quantize]) -> nn.Module:
    options = context.options.model_dump()
    if context.options.budget is not None:
        options["metric"] = lambda candidate: compress.evaluate(candidate, context.train_loader)
    return compress.quantize(
        model, context.example_inputs, data=context.train_loader, progress=context.progress, **options
    )


register(Pass("quantize", Quantize, _run))
