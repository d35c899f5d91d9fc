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

__all__ = ["Before", "NativeCall", "Outputs", "native_call", "native_reason", "native_steps", "run_of"]


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


Outputs = Tensor | Sequence[Tensor]
"""What a call writes: one tensor, or several of an op that has several."""


def native_reason(op: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Outputs | None = None) -> str | None:
    """Why `native_call` would refuse these arguments, None where it takes them. A `backend` that is none of
    `registry.NATIVE_BACKENDS` stands for `cpu`."""
    problem, _, entry = _bound(op, args, kwargs)
    if entry is None or entry.kernel is None:
        return f"{op} has no native kernel"
    reason = entry.reason_against(problem)
    if reason is not None:
        return reason
    if entry.kernel.workspace is not None:
        return "a step has no workspace"
    for name, t in zip(problem.operator.tensors, problem.tensors, strict=True):
        layout = entry.kernel.layouts.get(name)
        if t is not None and layout is not None and layout.spacing(t.shape, t.stride) is None:
            return f"{name}: expected {layout.name} memory, got strides {describe(t.stride)} for {describe(t.shape)}"
    return None if out is None else _reason_against(problem, _tensors(out))


def _reason_against(problem: Problem, outputs: Sequence[Tensor]) -> str | None:
    """Why the results of a problem cannot be written into these tensors."""
    if len(outputs) != len(problem.outputs):
        return f"out: expected {len(problem.outputs)} tensors, got {len(outputs)}"
    for index, (out, (shape, stride, dtype)) in enumerate(zip(outputs, problem.outputs, strict=True)):
        if tuple(out.shape) != tuple(shape) or out.dtype != dtype:
            expected = f"{str(dtype).removeprefix('torch.')} {describe(shape)}"
            return f"out: expected {expected}, got {out.dtype} {describe(out.shape)}"
        if index == 0 and problem.layout.spacing(out.shape, out.stride()) is None:
            return f"out: expected {problem.layout.name} memory, got strides {describe(out.stride())}"
        if index > 0 and out.stride() != tuple(stride):
            return f"out: expected strides {describe(stride)} of output {index}, got {describe(out.stride())}"
    return None


def _tensors(out: Outputs) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)


def native_call(op: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Outputs) -> NativeCall:
    """Prepare one call of the native module that writes the op's result into `out`; nothing runs and nothing is copied
    but weights, which are packed (and read again only by another `native_call`).

    Args:
        op: the op's name, such as `"conv2d"`.
        args, kwargs: the op's arguments as its schema has them; `x`, `residual` and `input_scale` must lie as the
            kernel reads them (channels_last or a channel slice of it; rows; `conv2d` takes `x` in any format).
        out: of the op's output shape and dtype, channels_last or a channel slice of it: see `allocate`; of an op with
            several outputs all of them, the further ones contiguous.

    Raises: `ValueError` with the reason of `native_reason` where there is one; `ValueError` or `TypeError` for a bad
        argument, as the op does.
    """
    reason = native_reason(op, args, kwargs, out)
    if reason is not None:
        raise ValueError(f"{op}: no native call: {reason}")
    problem, tensors, entry = _bound(op, args, kwargs)
    assert entry is not None
    assert entry.kernel is not None
    outputs = _tensors(out)
    placed = replace(problem, outputs=(TensorSpec.of(outputs[0]), *problem.outputs[1:]))
    built = cpu.arguments(entry.kernel, placed, tensors)
    changing = [t for _, position in built.changing if (t := tensors[position]) is not None]
    return NativeCall(built.name, built.into(tensors, *outputs), (*built.held, *changing, *outputs))


@dataclass(frozen=True)
class Before:
    """In the place of an argument: output `index` of the call before."""

    index: int = 0


def native_steps(
    calls: Sequence[tuple[str, Sequence[Any], Mapping[str, Any]]], copies: int = 1
) -> Callable[[], Tensor] | None:
    """A function that runs ops `(name, arguments, options)` in turn as steps of one plan and returns the last one's
    first result; or of so many plans side by side, each on one thread.

    What calls hand on is `Before` among the arguments of the next. Results lie in memory of their own, written anew at
    each run.

    None where there are none, where one of them has nothing to do, or would need another backend or a copy.
    """
    if native.cpu() is None or not calls:
        return None
    plans = [native.cpu().Plan() for _ in range(copies)]
    held: list[tuple[Tensor, ...]] = []
    results: tuple[Tensor, ...] = ()
    for plan in plans:
        for op, arguments, options in calls:
            given = [results[a.index] if isinstance(a, Before) else a for a in arguments]
            results = registry.allocate_all(op, given, options)
            if results[0].numel() == 0 or native_reason(op, given, options, results) is not None:
                return None
            call = native_call(op, given, options, results)
            getattr(plan, call.name)(*call.arguments)
            held.append(call.tensors)
    return run_of(plans, results[0], held)


def run_of(plans: Sequence[Any], result: Tensor, held: object) -> Callable[[], Tensor]:
    """A function that runs native plans, several side by side, each on one thread, and returns `result`; `held` lives
    as long as it does."""
    plan, steps = plans[0], len(plans[0])
    nothing: list[list[list[int]]] = [[[]] for _ in plans]
    run_side_by_side = native.cpu().run_side_by_side

    def run(held: object = held) -> Tensor:
        plan.run(0, steps, [])
        return result

    def run_all(held: object = held) -> Tensor:
        run_side_by_side(plans, nothing)
        return result

    return run if len(plans) == 1 else run_all
