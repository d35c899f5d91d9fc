"""Weights in the form that a kernel reads, packed once per weight and kept for as long as the weight lives unchanged.

A packed weight is found by the identity of the weight and of its scale, and is packed anew when either was changed, as
far as `Snapshot` tells; call `forget` after a write that it does not. Packed weights stand in no state dict.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernelpress import native
from kernelpress.ops.memory import long_lived_copy
from kernelpress.ops.snapshot import Snapshot

__all__ = ["depthwise", "forget", "packed", "panels", "traced", "vector"]

_LIMIT_PER_WEIGHT = 8


@dataclass(frozen=True)
class _Entry:
    weight: Snapshot
    scale: Snapshot | None
    packed: Tensor


_Entries = dict[tuple[Hashable, int], _Entry]
_is_traced: ContextVar[bool] = ContextVar("kernelpress_packing_is_traced", default=False)
_lock = threading.Lock()
_by_weight: dict[int, _Entries] = {}


def _find(weight: Tensor, scale: Tensor | None, layout: Hashable) -> Tensor | None:
    entries = _by_weight.get(id(weight))
    entry = None if entries is None else entries.get((layout, id(scale)))
    if entry is None or not entry.weight.is_still(weight):
        return None
    if scale is None:
        return entry.packed if entry.scale is None else None
    return entry.packed if entry.scale is not None and entry.scale.is_still(scale) else None


@contextmanager
def traced() -> Iterator[None]:
    """Packing inside belongs to what is traced: nothing is looked up, nothing is kept."""
    token = _is_traced.set(True)
    try:
        yield
    finally:
        _is_traced.reset(token)


def packed(weight: Tensor, scale: Tensor | None, layout: Hashable, pack: Callable[[Tensor], Tensor]) -> Tensor:
    """`pack(weight · scale)`, or what an earlier call with the same weight, scale and layout packed. Thread-safe.

    `weight: [C_out, ...]`; `scale: [C_out]` or None; `layout` names what `pack` makes. A few per weight are kept.
    """
    is_traced = _is_traced.get()
    found = None if is_traced else _find(weight, scale, layout)
    if found is not None:
        return found
    with torch.no_grad():
        scaled = weight if scale is None else weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
        made = pack(scaled.detach())
    if is_traced:
        return made
    key = id(weight)
    entry = _Entry(Snapshot.of(weight), None if scale is None else Snapshot.of(scale), made)
    with _lock:
        entries = _by_weight.get(key)
        if entries is None or not _alive(entries, weight):
            entries = _by_weight[key] = {}
            weakref.finalize(weight, _drop, key, entries).atexit = False
        entries.pop((layout, id(scale)), None)
        while len(entries) >= _LIMIT_PER_WEIGHT:
            entries.pop(next(iter(entries)))
        entries[layout, id(scale)] = entry
    return made


def _alive(entries: _Entries, weight: Tensor) -> bool:
    return all(entry.weight.reference() is weight for entry in entries.values())


def _drop(key: int, entries: _Entries) -> None:
    if _by_weight.get(key) is entries:
        del _by_weight[key]


def forget(weight: Tensor) -> None:
    """Drop what was packed from a weight: for writes that its version counter does not tell.

    Calls that were prepared with it hold what they packed: see `prepared.clear`.
    """
    _by_weight.pop(id(weight), None)


def panels(weight: Tensor, scale: Tensor | None) -> Tensor:
    """`[C_out, C_in(, KH, KW)]` → `[ceil(C_out / P), KH, KW, C_in, P]`, zero-padded, with panels `P` wide."""
    width = native.cpu().panel_width()
    return packed(weight, scale, width, lambda w: _to_panels(w, width))


def _to_panels(weight: Tensor, width: int) -> Tensor:
    if weight.dim() == 2:
        weight = weight[:, :, None, None]
    c_out, c_in, kernel_h, kernel_w = weight.shape
    count = -(-c_out // width)
    padded = pad(weight, (0, 0, 0, 0, 0, 0, 0, count * width - c_out))
    in_panels = padded.reshape(count, width, c_in, kernel_h, kernel_w).permute(0, 3, 4, 2, 1)
    return long_lived_copy(in_panels)


def depthwise(weight: Tensor, scale: Tensor | None) -> Tensor:
    """`[C · multiplier, 1, KH, KW]` → `[KH, KW, C · multiplier]`."""
    return packed(weight, scale, "depthwise", _to_depthwise)


def _to_depthwise(weight: Tensor) -> Tensor:
    return weight[:, 0].permute(1, 2, 0).clone(memory_format=torch.contiguous_format)


def vector(t: Tensor | None) -> Tensor | None:
    """A bias as the kernels read it: contiguous."""
    return t if t is None or t.is_contiguous() else t.contiguous()
