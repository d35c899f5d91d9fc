"""The benchmark cases as calls of kernelpress ops: the op of the case, and for a fused chain its stages one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernelpress.bench.peers import LayerInputs
from kernelpress.bench.shapes import Case, Stage
from kernelpress.ops import registry

__all__ = ["backend_of", "fused", "unfused"]


def fused(case: Case, inputs: LayerInputs) -> Callable[[], Tensor]:
    """The op of `case` as one call."""
    op = getattr(torch.ops.kernelpress, case.op).default
    arguments, options = _arguments(case, inputs)
    return lambda: op(*arguments, **options)


def backend_of(case: Case, inputs: LayerInputs) -> str:
    """The backend that `fused` runs on."""
    requested = registry.requested_backend("auto")
    if requested != "auto":
        return requested
    arguments, options = _arguments(case, inputs)
    reasons = registry.why_not(case.op, *arguments, **options)
    return next(backend for backend, reason in reasons.items() if reason is None)


def unfused(case: Case, inputs: LayerInputs) -> Callable[[], Tensor]:
    """The stages of `case` as one op each, intermediates in memory."""
    last = len(case.stages) - 1
    steps = []
    for index, (stage, weight, bias) in enumerate(zip(case.stages, inputs.weights, inputs.biases, strict=True)):
        options: dict[str, Any] = {"activation": stage.activation}
        if stage.is_depthwise:
            op = torch.ops.kernelpress.depthwise_conv2d.default
            options |= _geometry(stage)
        else:
            op = torch.ops.kernelpress.pointwise_conv2d.default
        steps.append((op, weight, bias, inputs.residual if index == last else None, options))

    def call() -> Tensor:
        y = inputs.x
        for op, weight, bias, residual, options in steps:
            y = op(y, weight, bias, None, residual, **options)
        return y

    return call


def _geometry(stage: Stage) -> dict[str, list[int]]:
    return {"stride": [stage.stride] * 2, "padding": [stage.padding] * 2}


def _arguments(case: Case, inputs: LayerInputs) -> tuple[list[Tensor | None], dict[str, Any]]:
    """Positional and keyword arguments of the op of `case`."""
    last = case.stages[-1]
    if len(case.stages) == 1:
        options: dict[str, Any] = {"activation": last.activation}
        if case.op in ("conv2d", "depthwise_conv2d"):
            options |= _geometry(last)
        return [inputs.x, inputs.weights[0], inputs.biases[0], None, inputs.residual], options
    depthwise = next(stage for stage in case.stages if stage.is_depthwise)
    options = _geometry(depthwise) | {"depthwise_activation": depthwise.activation, "activation": last.activation}
    if case.op == "inverted_residual":
        options["expand_activation"] = case.stages[0].activation
    pairs = [t for pair in zip(inputs.weights, inputs.biases, strict=True) for t in pair]
    return [inputs.x, *pairs, inputs.residual], options
