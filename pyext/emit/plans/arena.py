"""Lays buffers out in one block of memory so that those alive at the same time never overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kernelpress.runtime.memory import ALIGNMENT

__all__ = ["ArenaLayout", "Lifetime", "lay_out"]


@dataclass(frozen=True)
class Lifetime:
    """A buffer of `nbytes` that is written at step `first` and read last at step `last`, both inclusive."""

    first: int
    last: int
    nbytes: int

    def meets(self, other: Lifetime) -> bool:
        """Whether both are alive at some step."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class ArenaLayout:
    """Byte offset of every buffer, multiples of `ALIGNMENT`, and the bytes of the whole arena."""

    offsets: tuple[int, ...]
    nbytes: int


def lay_out(lifetimes: Sequence[Lifetime]) -> ArenaLayout:
    """Offsets for these buffers: the largest first, each into the tightest gap that its contemporaries leave."""
    placed: list[tuple[int, int, Lifetime]] = []
    offsets = [0] * len(lifetimes)
    end = 0
    for index in sorted(range(len(lifetimes)), key=lambda i: (-lifetimes[i].nbytes, lifetimes[i].first)):
        lifetime = lifetimes[index]
        size = _aligned(lifetime.nbytes)
        occupied = sorted((start, stop) for start, stop, other in placed if other.meets(lifetime))
        offsets[index] = _tightest_gap(occupied, size)
        placed.append((offsets[index], offsets[index] + size, lifetime))
        end = max(end, offsets[index] + size)
    return ArenaLayout(tuple(offsets), end)


def _tightest_gap(occupied: Sequence[tuple[int, int]], size: int) -> int:
    """Start of the smallest gap of at least `size` between the occupied ranges, in ascending order, or behind them."""
    best_start, best_width = -1, -1
    free_from = 0
    for start, stop in occupied:
        width = start - free_from
        if width >= size and (best_start < 0 or width < best_width):
            best_start, best_width = free_from, width
        free_from = max(free_from, stop)
    return best_start if best_start >= 0 else free_from


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
