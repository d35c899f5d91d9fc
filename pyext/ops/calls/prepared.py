"""Prepared calls: an op on given parameters and activations of a given form, checked and packed once, run often."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from kernelpress.ops.registry import (
    Operator,
    Run,
    Tensors,
    allows_tf32,
    common_device,
    requested_backend,
    resolve,
    specs_of,
)
from kernelpress.runtime import native
from kernelpress.runtime.snapshot import Snapshot, is_in_memory

__all__ = ["Prepared", "attempt", "clear", "prepare", "recall", "run", "variant"]

_LIMIT = 8192
_NO_GPU = -1
_CACHED_DEVICES = frozenset({"cpu", "cuda"})


class Prepared(NamedTuple):
    """What runs, the `Snapshot` of the parameters that it was prepared for, and what forgets it once one dies."""

    snapshot: Any
    references: tuple[weakref.ref[Tensor], ...]
    run: Run


_Key = tuple[Any, ...]
_calls: dict[_Key, Prepared] = {}
_lock = threading.Lock()
_cpu, _reads_tensors = native.cpu(), native.load().reads_tensors
variant: Callable[[], str] = _cpu.variant if _cpu else str
"""The instruction set in use, which weights are packed for."""


def _key(operator: Operator, tensors: Tensors, options: tuple[Any, ...], requested: str) -> _Key:
    """Parameters by identity, activations by form and device, packing by instruction set: small, quick to compare."""
    key = [operator, requested, options, variant(), *map(id, tensors)]
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


def _attempt(operator: Operator, tensors: tuple[Tensor | None, ...], options: Any, backend: str) -> Any:
    """Run a call on the CPU natively, if it was prepared, holds still, and wants no gradient; else None.

    It may be called only while nothing is intercepted (`interception.is_intercepted`).
    """
    return _table(operator)(tensors, options, requested_backend(backend))


def _attempt_nothing(operator: Operator, tensors: tuple[Tensor | None, ...], options: Any, backend: str) -> None:
    """The native module cannot look at torch's tensors."""


def _remember_natively(
    operator: Operator, tensors: Tensors, options: Any, requested: str, run: Run, snapshot: Any
) -> Callable[[], None] | None:
    """Let `attempt` find a call; returns what makes it forget the call once a parameter is dead, None if it cannot."""
    word = _table(operator).remember(tuple(tensors), options, requested, run, snapshot) if _reads_tensors else None
    return None if word is None else functools.partial(_table(operator).forget, word)


attempt = _attempt if _reads_tensors else _attempt_nothing


def recall(operator: Operator, tensors: Tensors, options: tuple[Any, ...], backend: str) -> Prepared | None:
    """What was prepared for this call, if its parameters are still what they were; else None."""
    found = _calls.get(_key(operator, tensors, options, requested_backend(backend)))
    return found if found is not None and found.snapshot(_parameters(operator, tensors)) else None


def _parameters(operator: Operator, tensors: Tensors) -> tuple[Tensor | None, ...]:
    """The tensors without the activations."""
    return tuple([None if index in operator.activations else t for index, t in enumerate(tensors)])


def prepare(operator: Operator, tensors: Tensors, options: tuple[Any, ...], backend: str) -> Run:
    """Check a call and prepare it; on tensors of the CPU or a CUDA device `recall` finds it afterwards.

    Raises: `ValueError` or `TypeError` naming a bad argument, such as a parameter whose memory was freed;
        `RuntimeError` where the backend asked for cannot run.
    """
    device = common_device(operator, tensors)
    requested, checked = requested_backend(backend), operator.signature.options_of(options)
    problem, implementation = resolve(operator, specs_of(tensors), checked, device, allows_tf32(), requested)
    if device.partition(":")[0] not in _CACHED_DEVICES:
        return implementation.prepare(problem, tensors)
    parameters = _parameters(operator, tensors)
    for name, t in zip(operator.tensors, parameters, strict=True):
        if t is not None and not is_in_memory(t):
            size = t.untyped_storage().nbytes()
            raise ValueError(f"{name}: expected {t.nbytes} bytes of values, got a storage that was resized to {size}")
    snapshot = Snapshot(parameters)  # before the values are read: they may be written to meanwhile
    run = implementation.prepare(problem, tensors)
    key = _key(operator, tensors, options, requested)
    forget = _remember_natively(operator, tensors, options, requested, run, snapshot) if device == "cpu" else None

    def on_death(_: Any) -> None:
        _calls.pop(key, None)
        if forget is not None:
            forget()

    references = tuple([weakref.ref(t, on_death) for t in parameters if t is not None])
    with _lock:
        if len(_calls) >= _LIMIT:
            _calls.clear()
        _calls[key] = Prepared(snapshot, references, run)
    return run


def run(operator: Operator, tensors: Tensors, options: tuple[Any, ...], backend: str) -> Any:
    """Run an op on real tensors, without the dispatcher."""
    y = attempt(operator, tuple(tensors), options, backend)
    if y is not None:
        return y
    found = recall(operator, tensors, options, backend)
    return (prepare(operator, tensors, options, backend) if found is None else found.run)(tensors)


def clear() -> None:
    """Forget every prepared call, so that the next one asks again which backend can run it."""
    _calls.clear()
    if _cpu:
        _cpu.forget_calls()
    resolve.cache_clear()
