"""Finds a kernel's fastest tile configuration for a problem by running all of them, and keeps it on disk.

`KERNELPRESS_AUTOTUNE` says what calls run in: unset, the fastest that was measured, else what the heuristic chooses; 0,
what the heuristic chooses, and nothing is read; 1, as unset, but the first call of a shape class measures.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernelpress.ops import registry
from kernelpress.ops.calls import prepared
from kernelpress.ops.checks import describe
from kernelpress.ops.registry import Candidates, Problem, Tensors
from kernelpress.ops.tuning import stored
from kernelpress.runtime.clock import time_alternately
from kernelpress.runtime.device_clock import time_graphs
from kernelpress.runtime.interception import is_intercepted, is_plain

__all__ = ["Tuning", "autotune", "best_known", "chosen", "milliseconds", "tune"]


@dataclass(frozen=True)
class Tuning:
    """What was measured: `milliseconds` of every configuration that can run the problem, and the fastest of them."""

    kernel: str
    device: str
    milliseconds: dict[str, float]
    best: str


def autotune() -> str:
    """`KERNELPRESS_AUTOTUNE`: `""`, `"0"` or `"1"`. Raises `ValueError` for any other value."""
    value = os.environ.get("KERNELPRESS_AUTOTUNE", "")
    if value not in ("", "0", "1"):
        raise ValueError(
            "KERNELPRESS_AUTOTUNE: expected 0 (heuristics), 1 (the first call of a shape class measures) or nothing "
            f"(what was measured before, else heuristics), got {value!r}"
        )
    return value


def tune(
    op: str,
    *args: Any,
    backend: str = "cuda",
    measure: Callable[[Callable[[], Tensor]], float] | None = None,
    seconds: float | None = None,
    **kwargs: Any,
) -> Tuning:
    """Time an op's kernel in every tile configuration; calls like this one take the fastest from now on, in other
    processes on devices of that name too.

    Calls are alike that are of one shape class: the batch, the first dimension of every activation, counts as the next
    power of two; all other sizes, strides, dtypes and options count as they are.

    Args:
        op: the op's name, such as `"depthwise_conv2d"`.
        args, kwargs: its arguments, on a CUDA device; values do not matter.
        backend: whose kernel, `"cuda"` or `"triton"`.
        measure: milliseconds of a function; by default all are timed in turn by the device's clock, as CUDA graphs.
        seconds: after so long no further configuration is tried; the heuristic's own come first, and compiling takes
            most of the time.

    Raises: `ValueError` or `TypeError` for a bad argument or an op without configurations; `RuntimeError` with the
        reason where the kernel cannot run the call; `OSError` where the result cannot be written.
    """
    problem, tensors, candidates = _candidates(op, args, kwargs, backend)
    found = _measured(candidates, problem, tensors, measure, seconds)
    stored.remember(candidates.kernel, problem, candidates.device, found.best)
    prepared.clear()
    return found


def best_known(op: str, *args: Any, backend: str, **kwargs: Any) -> str | None:
    """The configuration that calls like this one run in, tuned now if none like it ever was; None for the heuristic's.

    `KERNELPRESS_AUTOTUNE=0` forbids both. None too where there is nothing to choose from, or the kernel cannot run the
    call.
    """
    if autotune() == "0":
        return None
    try:
        problem, tensors, candidates = _candidates(op, args, kwargs, backend)
        known = stored.recall(candidates.kernel, problem, candidates.device)
        if known in candidates.names or len(candidates.names) < 2:
            return known
        found = _measured(candidates, problem, tensors).best
    except (RuntimeError, ValueError, TypeError):
        return None
    with contextlib.suppress(OSError):
        stored.remember(candidates.kernel, problem, candidates.device, found)
    prepared.clear()
    return found


def chosen(candidates: Candidates, problem: Problem, tensors: Tensors) -> str | None:
    """The configuration to prepare a call in, as `KERNELPRESS_AUTOTUNE` says; None for the heuristic's.

    It never measures where the call is being traced or captured into a CUDA graph: what is prepared there keeps what
    was known.
    """
    mode = autotune()
    if mode == "0" or 0 in problem.shape:
        return None
    known = stored.recall(candidates.kernel, problem, candidates.device)
    if known in candidates.names:
        return known
    if mode != "1" or len(candidates.names) < 2 or _is_watched(tensors):
        return None
    x = problem.first
    print(
        f"kernelpress: tuning {candidates.kernel} for x {describe(x.shape)} of {x.dtype} on {candidates.device}: "
        f"{len(candidates.names)} configurations (KERNELPRESS_AUTOTUNE=1)",
        file=sys.stderr,
        flush=True,
    )
    best = _measured(candidates, problem, tensors).best
    with contextlib.suppress(OSError):
        stored.remember(candidates.kernel, problem, candidates.device, best)
    return best


def _is_watched(tensors: Tensors) -> bool:
    """Whether something would see what a measurement runs, or there is nothing to run it on."""
    is_capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    return is_capturing or is_intercepted() or not all(t is None or is_plain(t) for t in tensors)


def _candidates(
    op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], backend: str
) -> tuple[Problem, Tensors, Candidates]:
    operator = registry.operator(op)
    entry = operator.on(backend)
    if entry is None or entry.candidates is None:
        raise ValueError(f"op: expected one that can be tuned on {backend} ({_tunable(backend)}), got {op!r}")
    tensors, options, _ = operator.signature.bind(args, kwargs)
    problem = registry.problem_of(operator, tensors, options)
    registry.implementation(problem, backend)
    if 0 in problem.shape:
        raise ValueError(f"{op}: expected a call with something to compute, its output is {describe(problem.shape)}")
    candidates = entry.candidates(problem, tensors)
    if not candidates.names:
        raise ValueError(f"op: expected one whose {backend} kernel has tile configurations, got {op!r}")
    return problem, tensors, candidates


def _tunable(backend: str) -> str:
    names = [
        operator.name
        for operator in registry.operators()
        if (entry := operator.on(backend)) is not None and entry.candidates is not None
    ]
    return ", ".join(names) or "none"


def _measured(
    candidates: Candidates,
    problem: Problem,
    tensors: Tensors,
    measure: Callable[[Callable[[], Tensor]], float] | None = None,
    seconds: float | None = None,
) -> Tuning:
    begin = time.monotonic()
    calls: dict[str, Callable[[], Tensor]] = {}
    refusal: Exception | None = None
    with torch.no_grad():
        for name in candidates.names:
            if calls and seconds is not None and time.monotonic() - begin > seconds:
                break
            try:
                run = candidates.prepare(name)
                run(tensors)
            except candidates.refusals as error:
                refusal = error
                continue
            calls[name] = functools.partial(run, tensors)
        if not calls:
            raise RuntimeError(
                f"{problem.operator.name}: no configuration of {candidates.kernel} runs this call: {refusal}"
            )
        device = torch.device(problem.device)
        times = milliseconds(calls, device) if measure is None else {name: measure(run) for name, run in calls.items()}
    return Tuning(candidates.kernel, candidates.device, times, min(times, key=times.__getitem__))


def milliseconds(calls: Mapping[str, Callable[[], Tensor]], device: torch.device) -> dict[str, float]:
    """Median times, in turn: as CUDA graphs by the device's clock, the second-level cache flushed before each sample;
    on what stands in for a device by the host's clock."""
    if device.type == "cuda":
        timings = time_graphs(calls, device)
    else:
        timings = time_alternately(calls, budget_seconds=1e-3, rounds=1, warmup=1)
    return {name: timing.median for name, timing in timings.items()}
