"""Finds a CUDA kernel's fastest tile configuration for a problem by running all of them, and keeps it on disk."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernelpress.ops import cuda, prepared, registry, tuned
from kernelpress.ops.checks import TensorSpec

__all__ = ["Tuning", "milliseconds_on_device", "tune"]

_WARM_UPS = 3
_SAMPLES = 15


@dataclass(frozen=True)
class Tuning:
    """What was measured: `milliseconds` of every configuration that can run the problem, and the fastest of them."""

    kernel: str
    device: str
    milliseconds: dict[str, float]
    best: str


def tune(op: str, *args: Any, measure: Callable[[Callable[[], Tensor]], float] | None = None, **kwargs: Any) -> Tuning:
    """Time an op's CUDA kernel in every tile configuration of its table; calls like this one take the fastest from now
    on, in other processes on devices of that name too.

    Args:
        op: the op's name, such as `"depthwise_conv2d"`.
        args, kwargs: its arguments, on a CUDA device; values do not matter.
        measure: milliseconds of a function; by default `milliseconds_on_device`.

    Raises: `ValueError` or `TypeError` for a bad argument or an op without configurations; `RuntimeError` with the
        reason where the CUDA kernel cannot run the call; `OSError` where the result cannot be written.
    """
    operator, kernel = registry.operator(op), cuda.kernel_of(op)
    tensors, options, _ = registry.bind(operator, args, kwargs)
    specs = tuple(None if t is None else TensorSpec.of(t) for t in tensors)
    problem = registry.problem(operator, specs, options, registry.common_device(operator, tensors))
    registry.implementation(operator, problem, "cuda")
    names = cuda.target().configurations(kernel.name)
    if not names:
        raise ValueError(f"op: expected one whose CUDA kernel has tile configurations, got {op!r}")
    device = cuda.device_of(problem).name
    times: dict[str, float] = {}
    refusal: RuntimeError | None = None
    for index, name in enumerate(names):
        run = cuda.prepare_with(kernel, problem, tensors, index)
        try:
            run(tensors)
        except RuntimeError as error:
            refusal = error
            continue
        times[name] = (measure or milliseconds_on_device)(functools.partial(run, tensors))
    if not times:
        raise RuntimeError(f"{op}: no configuration of {kernel.name} runs this call: {refusal}") from refusal
    best = min(times, key=times.__getitem__)
    tuned.remember(kernel.name, problem, device, best)
    prepared.clear()
    return Tuning(kernel.name, device, times, best)


def milliseconds_on_device(run: Callable[[], Tensor]) -> float:
    """Median time of `run` on the current CUDA device, by events, its second-level cache flushed before each sample."""
    for _ in range(_WARM_UPS):
        device = run().device
    flush = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(_SAMPLES)]
    for start, end in marks:
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) for start, end in marks)
