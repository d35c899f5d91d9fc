"""Prepared calls: an op on given parameters and activations of a given form, checked and packed once, run often."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from kernelpress import native
from kernelpress.ops.checks import TensorSpec
from kernelpress.ops.registry import (
    Operator,
    Run,
    Tensors,
    allows_tf32,
    common_device,
    options_of,
    requested_backend,
    resolve,
)
from kernelpress.ops.snapshot import Snapshot

__all__ = ["Prepared", "attempt", "clear", "generation", "panel_width", "prepare", "recall", "run"]

_LIMIT = 8192
_NO_GPU = -1
_CACHED_DEVICES = frozenset({"cpu", "cuda"})


class Prepared(NamedTuple):
    """What runs, and the parameters that it was prepared for, by position."""

    parameters: tuple[tuple[int, Snapshot], ...]
    run: Run


_Key = tuple[Any, ...]
_calls: dict[_Key, Prepared] = {}
_lock = threading.Lock()
_generation = 0
_cpu, _reads_tensors = native.cpu(), native.load().reads_tensors
panel_width: Callable[[], int] = _cpu.panel_width if _cpu else int
"""What weights are packed for: it follows the instruction set in use."""


def generation() -> int:
    """Changes whenever `clear` is called: what was prepared before is then no longer to be used."""
    return _generation


def _key(operator: Operator, tensors: Tensors, options: tuple[Any, ...], requested: str) -> _Key:
    """Parameters by identity, activations by form and device, packing by panel width: all small, quick to compare."""
    key = [operator, requested, options, panel_width(), *map(id, tensors)]
    device = _NO_GPU
    for index in operator.activations:
        t = tensors[index]
        if t is not None:
            device = t.get_device()
            key[4 + index] = t.shape
            key += (t.stride(), t.dtype, device)
    if device != _NO_GPU:
        key.append(allows_tf32())
    return tuple(key)


@functools.cache
def _table(operator: Operator) -> Any:
    """What is prepared of an op on the CPU, as the native module recalls it."""
    return _cpu.CallTable(operator.activations)


def _attempt(operator: Operator, tensors: tuple[Tensor | None, ...], options: Any, backend: str) -> Tensor | None:
    """Run a call on the CPU natively, if it was prepared, holds still, and wants no gradient; else None.

    It may be called only while nothing is intercepted (`interception.is_intercepted`).
    """
    return _table(operator)(tensors, options, requested_backend(backend))


def _attempt_nothing(operator: Operator, tensors: tuple[Tensor | None, ...], options: Any, backend: str) -> None:
    """The native module cannot look at torch's tensors."""


def _remember_natively(
    operator: Operator, tensors: Tensors, options: Any, requested: str, run: Run
) -> Callable[[], None] | None:
    """Let `attempt` find a call; returns what makes it forget the call once a parameter is dead, None if it cannot."""
    word = _table(operator).remember(tuple(tensors), options, requested, run) if _reads_tensors else None
    return None if word is None else functools.partial(_table(operator).forget, word)


attempt = _attempt if _reads_tensors else _attempt_nothing


def recall(operator: Operator, tensors: Tensors, options: tuple[Any, ...], backend: str) -> Prepared | None:
    """What was prepared for this call, if its parameters are still what they were; else None."""
    found = _calls.get(_key(operator, tensors, options, requested_backend(backend)))
    if found is None:
        return None
    for index, snapshot in found.parameters:
        if not snapshot.is_still(tensors[index]):
            return None
    return found


def prepare(operator: Operator, tensors: Tensors, options: tuple[Any, ...], backend: str) -> Run:
    """Check a call and prepare it; on tensors of the CPU or a CUDA device `recall` finds it afterwards.

    Raises: `ValueError` or `TypeError` naming a bad argument; `RuntimeError` where the backend asked for cannot run.
    """
    device = common_device(operator, tensors)
    specs = tuple([None if t is None else TensorSpec.of(t) for t in tensors])
    requested = requested_backend(backend)
    checked = options_of(operator, options)
    problem, implementation = resolve(operator, specs, checked, device, allows_tf32(), requested)
    run = implementation.prepare(problem, tensors)
    if device.partition(":")[0] not in _CACHED_DEVICES:
        return run
    key = _key(operator, tensors, options, requested)
    forget = _remember_natively(operator, tensors, options, requested, run) if device == "cpu" else None

    def on_death(_: Any) -> None:
        _calls.pop(key, None)
        if forget is not None:
            forget()

    parameters = tuple(
        [
            (index, Snapshot.of(t, on_death))
            for index, t in enumerate(tensors)
            if t is not None and index not in operator.activations
        ]
    )
    with _lock:
        if len(_calls) >= _LIMIT:
            _calls.clear()
        _calls[key] = Prepared(parameters, run)
    return run


def run(operator: Operator, tensors: Tensors, options: tuple[Any, ...], backend: str) -> Tensor:
    """Run an op on real tensors, without the dispatcher."""
    y = attempt(operator, tuple(tensors), options, backend)
    if y is not None:
        return y
    found = recall(operator, tensors, options, backend)
    return (prepare(operator, tensors, options, backend) if found is None else found.run)(tensors)


def clear() -> None:
    """Forget every prepared call, so that the next one asks again which backend can run it."""
    global _generation
    _generation += 1
    _calls.clear()
    if _cpu:
        _cpu.forget_calls()
    resolve.cache_clear()
