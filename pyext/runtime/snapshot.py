"""Remembers parameters without keeping them alive, to tell later whether they are still the same, unchanged."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from kernelpress.runtime import native

__all__ = ["PythonSnapshot", "Snapshot", "is_in_memory"]

_SAMPLES = 64


def is_in_memory(t: Tensor) -> bool:
    """Whether a tensor lies within its storage, which frameworks that shard weights free for a while."""
    if t.numel() == 0:
        return True
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return (t.storage_offset() + last + 1) * t.element_size() <= t.untyped_storage().nbytes()


class PythonSnapshot:
    """What `kernelpress._cpu.Snapshots` is, for where the native module cannot look at torch's tensors."""

    def __init__(self, tensors: tuple[Tensor | None, ...], sampled: bool = True) -> None:
        self._known = [None if t is None else _Known(t, sampled and t.is_cpu) for t in tensors]

    def __call__(self, tensors: tuple[Tensor | None, ...]) -> bool:
        return len(tensors) == len(self._known) and all(
            known is None or (t is not None and known.is_still(t))
            for known, t in zip(self._known, tensors, strict=True)
        )


class _Known:
    def __init__(self, t: Tensor, is_sampled: bool) -> None:
        self._reference = weakref.ref(t)
        self._state = _state(t)
        self._version = None if t.is_inference() else t._version
        self._is_lost = not is_in_memory(t)
        self._storage = None if is_sampled or self._is_lost else weakref.ref(t.untyped_storage())
        self._positions = _positions(t) if is_sampled and not self._is_lost else None
        self._values = None if self._positions is None else _values(t, self._positions)

    def is_still(self, t: Tensor) -> bool:
        if self._is_lost or self._reference() is not t or _state(t) != self._state:
            return False
        if self._version is not None and t._version != self._version:
            return False
        if self._positions is None or self._values is None:
            return self._storage is not None and self._storage() is t.untyped_storage()
        return torch.equal(_values(t, self._positions), self._values)


def _state(t: Tensor) -> tuple[Any, ...]:
    return t.data_ptr(), t.dtype, t.shape, t.stride()


def _positions(t: Tensor) -> Tensor:
    """Elements all over a tensor, as many among all as among those that are not zero: a factor changes no zero."""
    nonzero = t.detach().flatten().nonzero()[:, 0]
    return torch.cat([_spread(t.numel()), nonzero[_spread(len(nonzero))]])


def _spread(count: int) -> Tensor:
    return torch.linspace(0, max(count - 1, 0), min(count, _SAMPLES), dtype=torch.float64, device="cpu").long()


def _values(t: Tensor, positions: Tensor) -> Tensor:
    """The bytes of these elements: two that are not a number are the same."""
    return t.detach().take(positions).view(torch.uint8)


Snapshot: Any = native.cpu().Snapshots if native.load().reads_tensors else PythonSnapshot
"""`Snapshot(tensors)` remembers some tensors (None: not looked at); `snapshot(tensors)` says whether these are the same
tensors and were not written to.

It compares identity, address, shape, strides and version counter. On the CPU it also compares values, since nothing
counts writes through `.data`, by numpy, DLPack or another process on shared memory, or to a tensor made under
`torch.inference_mode`: small tensors whole (1024 bytes), of others sixteen lines of 64 bytes, the first, the last and
some between, chosen among those that are not all zero. Every step of an optimizer or an average changes them. What it
does not see is a write that leaves all of these as they were, such as one element or one channel set by hand through
`.data`; write to the tensor itself under `torch.no_grad` instead. On other devices, where a look at values would wait
for the device, it compares the identity of the storage: another `.data` is seen there, in-place writes through `.data`
or DLPack are not.
"""
