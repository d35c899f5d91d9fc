"""Memory for what is read at every inference: in huge pages where the system grants them, so that address translation
costs little."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from kernelpress.runtime import native

__all__ = ["advise_huge_pages", "long_lived_copy"]

ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector."""

_CHUNK_BYTES = 16 << 20
_SMALLEST = 64 << 10
"""Smaller copies gain nothing."""

_lock = threading.Lock()
_free = torch.empty(0, dtype=torch.uint8)


def advise_huge_pages(memory: Tensor) -> Tensor:
    """Asks the system to back `memory` with huge pages before it is first written; returns it."""
    module = native.cpu()
    if module is not None and memory.is_cpu and memory.numel():
        module.advise_huge_pages(memory.data_ptr(), memory.nbytes)
    return memory


def long_lived_copy(t: Tensor) -> Tensor:
    """A contiguous copy of `t`; larger ones lie side by side in chunks that live as long as any of them."""
    global _free
    if t.nbytes < _SMALLEST or t.nbytes > _CHUNK_BYTES // 2:
        copy = torch.empty(t.nbytes, dtype=torch.uint8).view(t.dtype).view(t.shape)
        return (advise_huge_pages(copy) if t.nbytes > _SMALLEST else copy).copy_(t)
    with _lock:
        start = -_free.data_ptr() % ALIGNMENT if _free.numel() else 0
        if _free.numel() < start + t.nbytes:
            _free = advise_huge_pages(torch.empty(_CHUNK_BYTES, dtype=torch.uint8))
            start = -_free.data_ptr() % ALIGNMENT
        taken, _free = _free[start : start + t.nbytes], _free[start + t.nbytes :]
    return taken.view(t.dtype).view(t.shape).copy_(t)
