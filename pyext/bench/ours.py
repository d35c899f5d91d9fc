"""Layers on our kernels, and the steps of a fused one each by itself.

Native kernels are timed as steps of a captured plan, which is how they run in a model; other backends through the op.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kernelpress import ops
from kernelpress.bench.calls import Call
from kernelpress.bench.peers import steps_of
from kernelpress.ops import registry
from kernelpress.ops.calls.steps import Before, native_steps
from kernelpress.ops.registry import Tensors

__all__ = ["backend_of", "on_backend", "unfused"]

CHAINS = frozenset({"separable_conv2d", "inverted_residual"})
"""Ops whose steps are ops themselves."""


def on_backend(op: str, tensors: Tensors, options: Mapping[str, Any], backend: str) -> Call:
    """An op on one backend: as a step of a plan on a native one, else as a call."""
    options = {**options, "backend": backend}
    steps = native_steps([(op, tensors, options)]) if backend in registry.NATIVE_BACKENDS else None
    return steps or (lambda: getattr(ops, op)(*tensors, **options))


def backend_of(op: str, tensors: Tensors, options: Mapping[str, Any]) -> str:
    """The backend that an op takes by itself."""
    requested = registry.requested_backend("auto")
    if requested != "auto":
        return requested
    reasons = registry.why_not(op, *tensors, **options)
    return next(backend for backend, reason in reasons.items() if reason is None)


def unfused(op: str, tensors: Tensors, options: Mapping[str, Any]) -> Call | None:
    """The steps of the op one by one, intermediates in memory; None where they are not ops."""
    if op not in CHAINS:
        return None
    x, steps, residual = steps_of(op, tensors, options)
    calls: list[tuple[str, list[Any], dict[str, Any]]] = []
    for index, (step, weight, bias) in enumerate(steps):
        given, added = Before() if index else x, residual if index == len(steps) - 1 else None
        window = {"stride": step.stride, "padding": step.padding} if step.groups > 1 else {}
        part = "depthwise_conv2d" if window else "pointwise_conv2d"
        calls.append((part, [given, weight, bias, None, added], {"activation": step.activation, **window}))
    found = native_steps(calls) if backend_of(op, tensors, options) == "cpu" else None
    return found or (lambda: _call_ops(calls))


def _call_ops(calls: Sequence[tuple[str, Sequence[Any], Mapping[str, Any]]]) -> Tensor:
    y: Tensor | None = None
    for op, (x, *others), options in calls:
        y = getattr(torch.ops.kernelpress, op).default(y if isinstance(x, Before) else x, *others, **options)
    assert y is not None
    return y
