"""How the CUDA kernel's blocks share a block-sparse weight: rows of blocks, long ones in segments, longest first."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["Schedule", "longest_segment", "make_schedule"]

_LEAST_STEPS = 16
"""Steps of a segment: a split costs a launch and partial sums, which fewer steps do not make up for."""

_STEP_BYTES = 128
_PIXELS = 128
_BLOCKS_PER_MULTIPROCESSOR = 3


@dataclass(frozen=True)
class Schedule:
    """The kernel's work on one weight, as `kernels/cuda/sparse.h` describes it.

    items: `[segments, 4]`, int32: block row, its first block, number of blocks, slot of the partial sums or -1.
    splits: `[split rows, 4]`, int32: block row, its first slot, number of slots, 0.
    slots: segments that leave partial sums.
    """

    items: Tensor
    splits: Tensor
    slots: int


def longest_segment(count: int, block_bytes: int, pixels: int, multiprocessors: int) -> int:
    """Blocks beyond which a row is split: half of what a kernel's block has to do if all have the same.

    Args:
        count: blocks of the weight.
        block_bytes: of one row of a block.
        pixels: rows of the product.
    """
    tiles = -(-pixels // _PIXELS)
    share = count * tiles / (_BLOCKS_PER_MULTIPROCESSOR * multiprocessors)
    return max(math.ceil(share / 2), _LEAST_STEPS * _STEP_BYTES // block_bytes, 1)


def make_schedule(row_offsets: Tensor, longest: int) -> Schedule:
    """The schedule of a weight with segments of at most `longest` blocks, as equal as they can be; on the CPU."""
    offsets = row_offsets.tolist()
    items, splits, slots = [], [], 0
    for row, (first, end) in enumerate(pairwise(offsets)):
        parts = max(-(-(end - first) // longest), 1)
        bounds = [first + (end - first) * part // parts for part in range(parts + 1)]
        for part, (low, high) in enumerate(pairwise(bounds)):
            items.append((row, low, high - low, slots + part if parts > 1 else -1))
        if parts > 1:
            splits.append((row, slots, parts, 0))
            slots += parts
    items.sort(key=lambda item: -item[2])
    return Schedule(_rows_of_four(items), _rows_of_four(splits), slots)


def _rows_of_four(entries: list[tuple[int, int, int, int]]) -> Tensor:
    return torch.tensor(entries, dtype=torch.int32).view(-1, 4)
