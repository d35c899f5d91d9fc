"""Ops as steps of a captured plan: what a kernel costs without the op around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from kernelpress.ops import registry
from kernelpress.runtime import native

__all__ = ["native_steps"]


def native_steps(calls: Sequence[tuple[str, Sequence[Any], Mapping[str, Any]]]) -> Callable[[], Tensor] | None:
    """A function that runs ops `(name, arguments, options)` in turn as steps of one plan and returns the last result.

    The first argument of each but the first is the result of the one before (pass None). Results lie in memory of their
    own, written anew at each run.

    None where one of them has nothing to do, or would need another backend or a copy.
    """
    if native.cpu() is None:
        return None
    plan = native.cpu().Plan()
    held: list[tuple[Tensor, ...]] = []
    result: Tensor | None = None
    for op, arguments, options in calls:
        given = list(arguments) if result is None else [result, *arguments[1:]]
        out = registry.allocate(op, given, options)
        if out.numel() == 0 or registry.native_reason(op, given, options, out) is not None:
            return None
        call = registry.native_call(op, given, options, out)
        getattr(plan, call.name)(*call.arguments)
        held.append(call.tensors)
        result = out
    assert result is not None
    last, steps = result, len(plan)

    def run(held: list[tuple[Tensor, ...]] = held) -> Tensor:
        plan.run(0, steps, [])
        return last

    return run
