"""The benchmark cases on our kernels: the op of the case, and for a fused chain its stages one by one.

Native kernels are timed as steps of a captured plan, which is how they run in a model; other backends through the op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernelpress import ops
from kernelpress.bench.peers import LayerInputs
from kernelpress.bench.shapes import Case, Stage
from kernelpress.ops import registry
from kernelpress.ops.calls.steps import native_steps
from kernelpress.ops.registry import Tensors

__all__ = ["arguments", "backend_of", "fused", "on_backend", "unfused"]

_Call = tuple[str, Tensors, dict[str, Any]]


def fused(case: Case, inputs: LayerInputs) -> Callable[[], Tensor]:
    """The op of `case` as one step or call."""
    tensors, options = arguments(case, inputs)
    return _steps_or_calls([(case.op, tensors, options)], backend_of(case, inputs))


def on_backend(op: str, tensors: Tensors, options: dict[str, Any], backend: str) -> Callable[[], Tensor]:
    """An op on one backend: as a step of a plan on `cpu`, else as a call."""
    steps = native_steps([(op, tensors, options)]) if backend == "cpu" else None
    return steps or (lambda: getattr(ops, op)(*tensors, **options, backend=backend))


def backend_of(case: Case, inputs: LayerInputs) -> str:
    """The backend that `fused` runs on."""
    requested = registry.requested_backend("auto")
    if requested != "auto":
        return requested
    tensors, options = arguments(case, inputs)
    reasons = registry.why_not(case.op, *tensors, **options)
    return next(backend for backend, reason in reasons.items() if reason is None)


def unfused(case: Case, inputs: LayerInputs) -> Callable[[], Tensor]:
    """The stages of `case` one by one, intermediates in memory."""
    last = len(case.stages) - 1
    calls: list[_Call] = []
    for index, (stage, weight, bias) in enumerate(zip(case.stages, inputs.weights, inputs.biases, strict=True)):
        op = "depthwise_conv2d" if stage.is_depthwise else "pointwise_conv2d"
        options = {"activation": stage.activation} | (_geometry(stage) if stage.is_depthwise else {})
        residual = inputs.residual if index == last else None
        calls.append((op, [inputs.x if index == 0 else None, weight, bias, None, residual], options))
    return _steps_or_calls(calls, backend_of(case, inputs))


def _steps_or_calls(calls: list[_Call], backend: str) -> Callable[[], Tensor]:
    steps = native_steps(calls) if backend == "cpu" else None
    return steps or (lambda: _call_ops(calls))


def _call_ops(calls: list[_Call]) -> Tensor:
    y: Tensor | None = None
    for op, (x, *others), options in calls:
        y = getattr(torch.ops.kernelpress, op).default(x if y is None else y, *others, **options)
    assert y is not None
    return y


def _geometry(stage: Stage) -> dict[str, list[int]]:
    return {"stride": [stage.stride] * 2, "padding": [stage.padding] * 2}


def arguments(case: Case, inputs: LayerInputs) -> tuple[Tensors, dict[str, Any]]:
    """Positional and keyword arguments of the op of `case`: its tensors, its options."""
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
