"""Weights in the form that a kernel reads, packed once per weight and kept for as long as the weight lives unchanged.

A packed weight is found by the identity of the weight and of its scale, and is packed anew when either was changed, as
far as `snapshot.Snapshot` tells; call `forget` after a write that it does not. Packed weights stand in no state dict
and are never written to again. Those for the CPU share no memory with the weight: whoever runs on one may hold it.
"""

from __future__ import annotations

import enum
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernelpress.runtime import native
from kernelpress.runtime.memory import long_lived_copy
from kernelpress.runtime.snapshot import Snapshot

__all__ = [
    "channels_last",
    "contiguous",
    "depthwise",
    "depthwise_copy",
    "filters",
    "forget",
    "int8_depthwise",
    "int8_panels",
    "narrow_groups",
    "packed",
    "packed_bytes",
    "panels",
    "renewed",
    "traced",
    "vector",
]

_LIMIT_PER_WEIGHT = 8


class _Mode(enum.Enum):
    CACHED = enum.auto()
    RENEWED = enum.auto()
    TRACED = enum.auto()


@dataclass(frozen=True)
class _Entry:
    snapshot: Any
    packed: Tensor


@dataclass(frozen=True)
class _Packed:
    """What was packed from a weight, by layout and identity of the scale."""

    weight: weakref.ref[Tensor]
    entries: dict[tuple[Hashable, int], _Entry] = field(default_factory=dict)


_mode: ContextVar[_Mode] = ContextVar("kernelpress_packing", default=_Mode.CACHED)
_lock = threading.Lock()
_by_weight: dict[int, _Packed] = {}


def _find(weight: Tensor, scale: Tensor | None, layout: Hashable) -> Tensor | None:
    known = _by_weight.get(id(weight))
    entry = None if known is None else known.entries.get((layout, id(scale)))
    return entry.packed if entry is not None and entry.snapshot((weight, scale)) else None


@contextmanager
def traced() -> Iterator[None]:
    """Packing inside belongs to what is traced: nothing is looked up, nothing is kept."""
    with _packing(_Mode.TRACED):
        yield


@contextmanager
def renewed() -> Iterator[None]:
    """Packing inside reads every value: what was packed before serves again only where it is equal, bit by bit."""
    with _packing(_Mode.RENEWED):
        yield


@contextmanager
def _packing(mode: _Mode) -> Iterator[None]:
    token = _mode.set(mode)
    try:
        yield
    finally:
        _mode.reset(token)


def packed(weight: Tensor, scale: Tensor | None, layout: Hashable, pack: Callable[[Tensor], Tensor]) -> Tensor:
    """`pack(weight · scale)`, or what an earlier call with the same weight, scale and layout packed. Thread-safe.

    `weight: [C_out, ...]`; `scale: [C_out]` or None; `layout` names what `pack` makes. A few per weight are kept.
    """
    mode = _Mode.TRACED if weight.is_meta else _mode.get()  # without values there is nothing to keep
    found = None if mode is _Mode.TRACED else _find(weight, scale, layout)
    if found is not None and mode is _Mode.CACHED:
        return found
    snapshot = None if mode is _Mode.TRACED else Snapshot((weight, scale))  # before the values are read
    with torch.no_grad():
        scaled = weight if scale is None else weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
        made = pack(scaled.detach())
    if snapshot is None:
        return made
    if found is not None and _are_same(found, made):
        return found
    key = id(weight)
    with _lock:
        known = _by_weight.get(key)
        if known is None or known.weight() is not weight:
            known = _by_weight[key] = _Packed(weakref.ref(weight))
            weakref.finalize(weight, _drop, key, known).atexit = False
        entries = known.entries
        entries.pop((layout, id(scale)), None)
        while len(entries) >= _LIMIT_PER_WEIGHT:
            entries.pop(next(iter(entries)))
        entries[layout, id(scale)] = _Entry(snapshot, made)
    return made


def _are_same(a: Tensor, b: Tensor) -> bool:
    a, b = (t.to_dense() if t.is_mkldnn else t for t in (a, b))
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b))


def _bytes(t: Tensor) -> Tensor:
    return t.contiguous().flatten().view(torch.uint8)


def _drop(key: int, known: _Packed) -> None:
    if _by_weight.get(key) is known:
        del _by_weight[key]


def forget(weight: Tensor) -> None:
    """Drop what was packed from a weight: for writes that its version counter does not tell.

    Calls that were prepared with it hold what they packed: see `prepared.clear`.
    """
    _by_weight.pop(id(weight), None)


def packed_bytes(weight: Tensor) -> int:
    """Bytes of what is packed from a weight at present."""
    known = _by_weight.get(id(weight))
    packs = [entry.packed for entry in known.entries.values()] if known is not None and known.weight() is weight else []
    return sum(pack.numel() * pack.element_size() for pack in packs)


def panels(
    weight: Tensor,
    scale: Tensor | None,
    groups: int = 1,
    *,
    name: str = "panels",
    transform: Callable[[Tensor], Tensor] = lambda w: w,
) -> Tensor:
    """`[C_out, C_in(, KH, KW)]` → `[groups · ceil(C_out / groups / P), KH, KW, C_in, P]`, zero-padded, with panels `P`
    wide; of what `transform`, known by its `name`, makes of the weight."""
    width = native.cpu().panel_width()
    return packed(weight, scale, (name, width, groups), lambda w: _to_panels(transform(w), width, groups))


def _to_panels(weight: Tensor, width: int, groups: int) -> Tensor:
    if weight.dim() == 2:
        weight = weight[:, :, None, None]
    c_out, c_in, kernel_h, kernel_w = weight.shape
    per_group = -(-(c_out // groups) // width)
    grouped = weight.reshape(groups, c_out // groups, c_in, kernel_h, kernel_w)
    padded = pad(grouped, (0, 0, 0, 0, 0, 0, 0, per_group * width - c_out // groups))
    in_panels = padded.reshape(groups * per_group, width, c_in, kernel_h, kernel_w).permute(0, 3, 4, 2, 1)
    return long_lived_copy(in_panels)


def narrow_groups(weight: Tensor, scale: Tensor | None, groups: int) -> Tensor:
    """`[C_out, C_out / groups, 3, 3]` → `[ceil(C_out / L), 3, 3, C_out / groups, L]`, zero-padded, with vectors of `L`
    channels, half a panel."""
    lanes = native.cpu().panel_width() // 2
    return packed(weight, scale, ("narrow groups", lanes), lambda w: _to_vectors(w, lanes))


def _to_vectors(weight: Tensor, lanes: int) -> Tensor:
    padded = pad(weight, (0, 0, 0, 0, 0, 0, 0, -len(weight) % lanes))
    return long_lived_copy(padded.reshape(-1, lanes, *weight.shape[1:]).permute(0, 3, 4, 2, 1))


def int8_panels(weight: Tensor, runs: int = 1, groups: int = 1) -> Tensor:
    """`[C_out, C_in / groups(, KH, KW)]` int8 → one dimension, group by group: the panels that `Int8Packing` in
    `args.h` describes, of the depth `[KH, KW, C_in / groups]` in so many `runs`, each padded by zeros to whole groups
    of inputs."""
    packing = native.cpu().int8_packing()
    layout = ("int8 panels", packing, runs, groups)
    return packed(weight, None, layout, lambda w: _to_int8_panels(w, runs, groups, *packing))


def _to_int8_panels(weight: Tensor, runs: int, groups: int, outputs: int, lanes: int, inputs: int) -> Tensor:
    rows = weight if weight.dim() == 2 else weight.permute(0, 2, 3, 1)
    rows = rows.reshape(groups, len(weight) // groups, runs, -1)
    rows = pad(rows, (0, -rows.shape[3] % inputs, 0, 0, 0, -rows.shape[1] % lanes)).flatten(2)
    whole = rows.shape[1] // outputs * outputs
    panels = []
    for part in (rows[:, :whole], rows[:, whole:]):
        if part.numel():
            width = min(outputs, part.shape[1])
            panels.append(part.reshape(groups, -1, width, rows.shape[2] // inputs, inputs).transpose(2, 3).flatten(1))
    return long_lived_copy(torch.cat(panels, 1).flatten())


def int8_depthwise(weight: Tensor) -> Tensor:
    """`[C, 1, KH, KW]` int8 → `[blocks, ceil(KH / inputs), KW, inputs, lanes, inputs]` in the order of
    `simd_interleave.h`, zero-padded; int16 where `dot` takes two inputs at once."""
    _, lanes, inputs = native.cpu().int8_packing()
    return packed(weight, None, ("int8 depthwise", lanes, inputs), lambda w: _to_interleaved(w, lanes, inputs))


def _to_interleaved(weight: Tensor, lanes: int, inputs: int) -> Tensor:
    channels, _, height, width = weight.shape
    block = lanes * inputs
    rest, half = channels % block, block // 2
    padded = pad(weight[:, 0], (0, 0, 0, -height % inputs, 0, -channels % block))
    if 0 < rest <= half:  # the last block's other half computes the next output row
        padded[-half:] = padded[-block:-half]
    parts = padded.reshape(-1, lanes // 4, inputs, 4, padded.shape[1] // inputs, inputs, width)
    values = parts.permute(0, 4, 6, 2, 1, 3, 5)
    return long_lived_copy(values if inputs == 4 else values.to(torch.int16))


def depthwise(weight: Tensor, scale: Tensor | None) -> Tensor:
    """`[C · multiplier, 1, KH, KW]` → `[KH, KW, C · multiplier]`."""
    return packed(weight, scale, "depthwise", depthwise_copy)


def depthwise_copy(weight: Tensor) -> Tensor:
    """`depthwise` of a weight, not kept."""
    return _copy(weight[:, 0].permute(1, 2, 0))


def filters(weight: Tensor, scale: Tensor | None) -> Tensor:
    """A weight that lies as it came, scaled: a contiguous copy."""
    return packed(weight, scale, "filters", _copy)


def vector(t: Tensor | None) -> Tensor | None:
    """A bias as the CPU's kernels read it: a contiguous copy."""
    return None if t is None else packed(t, None, "vector", _copy)


def contiguous(t: Tensor) -> Tensor:
    """A weight for kernels that read it where it is: itself, or a contiguous copy."""
    return t if t.is_contiguous() else packed(t, None, "contiguous", _copy)


def channels_last(weight: Tensor) -> Tensor:
    """`[C_out, C_in, KH, KW]` → `[C_out, KH, KW, C_in]`."""
    return packed(weight, None, "channels last", lambda w: w.permute(0, 2, 3, 1).contiguous())


def _copy(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)
