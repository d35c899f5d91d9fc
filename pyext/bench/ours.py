"""Layers on our kernels, and the stages of a fused one each by itself.

Native kernels are timed as steps of a captured plan, which is how they run in a model; other backends through the op.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kernelpress import ops
from kernelpress.bench.shapes import Call, Case
from kernelpress.ops import registry
from kernelpress.ops.calls.steps import native_steps
from kernelpress.ops.registry import Tensors

__all__ = ["backend_of", "fused", "on_backend", "unfused"]


def fused(op: str, tensors: Tensors, options: dict[str, Any]) -> Call:
    """The op as one step or call, on the backend that it takes by itself."""
    return _steps_or_calls([(op, tensors, options)], backend_of(op, tensors, options))


def on_backend(op: str, tensors: Tensors, options: dict[str, Any], backend: str) -> Call:
    """An op on one backend: as a step of a plan on a native one, else as a call."""
    options = {**options, "backend": backend}
    steps = native_steps([(op, tensors, options)]) if backend in registry.NATIVE_BACKENDS else None
    return steps or (lambda: getattr(ops, op)(*tensors, **options))


def backend_of(op: str, tensors: Sequence[Tensor | None], options: Mapping[str, Any]) -> str:
    """The backend that an op takes by itself."""
    requested = registry.requested_backend("auto")
    if requested != "auto":
        return requested
    reasons = registry.why_not(op, *tensors, **options)
    return next(backend for backend, reason in reasons.items() if reason is None)


def unfused(case: Case, tensors: Tensors) -> Call:
    """The stages of `case` one by one, intermediates in memory."""
    x, stages, residual = case.split(tensors)
    calls: list[tuple[str, Tensors, dict[str, Any]]] = []
    for index, (stage, weight, bias) in enumerate(stages):
        op = "depthwise_conv2d" if stage.is_depthwise else "pointwise_conv2d"
        options = {"activation": stage.activation, **(stage.window if stage.is_depthwise else {})}
        added = residual if index == len(stages) - 1 else None
        calls.append((op, [None if index else x, weight, bias, None, added], options))
    return _steps_or_calls(calls, backend_of(case.op, tensors, case.options))


def _steps_or_calls(calls: Sequence[tuple[str, Tensors, dict[str, Any]]], backend: str) -> Call:
    steps = native_steps(calls) if backend == "cpu" else None
    return steps or (lambda: _call_ops(calls))


def _call_ops(calls: Sequence[tuple[str, Tensors, dict[str, Any]]]) -> Tensor:
    y: Tensor | None = None
    for op, (x, *others), options in calls:
        y = getattr(torch.ops.kernelpress, op).default(x if y is None else y, *others, **options)
    assert y is not None
    return y
