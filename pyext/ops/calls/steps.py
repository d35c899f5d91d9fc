"""Ops as steps of a captured plan: kernels of `_cpu` with all their arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from kernelpress.ops import registry
from kernelpress.ops.backends import cpu
from kernelpress.ops.checks import TensorSpec, describe
from kernelpress.ops.registry import Implementation, Problem
from kernelpress.runtime import native

__all__ = ["NativeCall", "native_call", "native_reason", "native_steps"]


@dataclass(frozen=True)
class NativeCall:
    """One prepared call of `_cpu`: run it by `getattr(_cpu, name)(*arguments)`, or append it to a plan by
    `getattr(plan, name)(*arguments)`. The addresses in `arguments` are valid as long as `tensors` are held.
    """

    name: str
    arguments: tuple[int | float, ...]
    tensors: tuple[Tensor, ...]


def _bound(
    op: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Problem, list[Tensor | None], Implementation | None]:
    operator = registry.operator(op)
    tensors, options, backend = operator.signature.bind(args, kwargs)
    native_backend = backend if backend in registry.NATIVE_BACKENDS else "cpu"
    problem = registry.problem_of(operator, tensors, options, native_backend)
    return problem, tensors, operator.on(native_backend)


def native_reason(op: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor | None = None) -> str | None:
    """Why `native_call` would refuse these arguments, None where it takes them. A `backend` that is none of
    `registry.NATIVE_BACKENDS` stands for `cpu`."""
    problem, _, entry = _bound(op, args, kwargs)
    if entry is None or entry.kernel is None:
        return f"{op} has no native kernel"
    reason = entry.reason_against(problem)
    if reason is not None:
        return reason
    if len(problem.outputs) > 1 or entry.kernel.workspace is not None:
        return "a step has one output and no workspace"
    for name, t in zip(problem.operator.tensors, problem.tensors, strict=True):
        layout = entry.kernel.layouts.get(name)
        if t is not None and layout is not None and layout.spacing(t.shape, t.stride) is None:
            return f"{name}: expected {layout.name} memory, got strides {describe(t.stride)} for {describe(t.shape)}"
    if out is not None:
        if tuple(out.shape) != tuple(problem.shape) or out.dtype != problem.dtype:
            expected = f"{str(problem.dtype).removeprefix('torch.')} {describe(problem.shape)}"
            return f"out: expected {expected}, got {out.dtype} {describe(out.shape)}"
        if problem.layout.spacing(out.shape, out.stride()) is None:
            return f"out: expected {problem.layout.name} memory, got strides {describe(out.stride())}"
    return None


def native_call(op: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> NativeCall:
    """Prepare one call of the native module that writes the op's result into `out`; nothing runs and nothing is copied
    but weights, which are packed (and read again only by another `native_call`).

    Args:
        op: the op's name, such as `"conv2d"`.
        args, kwargs: the op's arguments as its schema has them; `x`, `residual` and `input_scale` must lie as the
            kernel reads them (channels_last or a channel slice of it; rows; `conv2d` takes `x` in any format).
        out: of the op's output shape and dtype, channels_last or a channel slice of it: see `allocate`.

    Raises: `ValueError` with the reason of `native_reason` where there is one; `ValueError` or `TypeError` for a bad
        argument, as the op does.
    """
    reason = native_reason(op, args, kwargs, out)
    if reason is not None:
        raise ValueError(f"{op}: no native call: {reason}")
    problem, tensors, entry = _bound(op, args, kwargs)
    assert entry is not None
    assert entry.kernel is not None
    placed = replace(problem, outputs=(TensorSpec.of(out), *problem.outputs[1:]))
    built = cpu.arguments(entry.kernel, placed, tensors)
    changing = [t for _, position in built.changing if (t := tensors[position]) is not None]
    return NativeCall(built.name, built.into(tensors, out), (*built.held, *changing, out))


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
        if out.numel() == 0 or native_reason(op, given, options, out) is not None:
            return None
        call = native_call(op, given, options, out)
        getattr(plan, call.name)(*call.arguments)
        held.append(call.tensors)
        result = out
    assert result is not None
    last, steps = result, len(plan)

    def run(held: list[tuple[Tensor, ...]] = held) -> Tensor:
        plan.run(0, steps, [])
        return last

    return run
