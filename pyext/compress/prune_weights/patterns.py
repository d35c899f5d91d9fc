"""Which weights stand or fall together: single ones, vectors, kernels, filters, blocks; n of every m.

A weight is looked at as the sparse kernels do: a matrix [C_out, C_in] at every position of the convolution's kernel.

    element    vector 4×1    block 2×2     kernel: all positions of an   filter: a whole row,     2:4: of four inputs
    ■ · ■ ·    ■ · · ·       ■ ■ · ·       (output, input) pair          all positions            in a row at most two
    · ■ · ·    ■ · · ·       ■ ■ · ·                                                              ■ · ■ ·  · ■ ■ ·
    · · · ■    ■ · · ·       · · ■ ■
    ■ · · ·    ■ · · ·       · · ■ ■
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["DEFAULT_BLOCKS", "Pattern", "pattern_of"]

DEFAULT_BLOCKS = {"vector": (4, 1), "block": (16, 16)}
"""Block sizes (outputs, inputs) where none is given: 16×16 is the smallest block that every device's kernels take."""
_NAMES = ("element", "vector", "kernel", "filter", "block")
_LARGEST = 1 << 20


@dataclass(frozen=True)
class Pattern:
    """Groups of `rows` outputs × `columns` inputs (0: all of them), at each position of a kernel or over all of it;
    with `kept`, so many of every group stay, else groups stay or leave as a whole."""

    rows: int = 1
    columns: int = 1
    whole_kernels: bool = False
    kept: int | None = None

    def groups(self, module: nn.Module, shape: tuple[int, ...]) -> Tensor:
        """The number of the group that each element of the weight belongs to, int64 [elements]; blocks that do not
        divide the sizes are smaller at the edges."""
        first, second, positions = shape[0], shape[1], math.prod(shape[2:])
        rows, columns, inputs = torch.arange(first)[:, None], torch.arange(second)[None], second
        if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            rows, columns, inputs = rows // (first // module.groups) * second + columns, rows, first
        across = self.columns or inputs
        matrix = rows // self.rows * math.ceil(inputs / across) + columns // across
        if self.whole_kernels:
            return matrix[..., None].expand(first, second, positions).flatten()
        return (matrix[..., None] * positions + torch.arange(positions)).flatten()


def pattern_of(granularity: str, block: tuple[int, int] | None) -> Pattern:
    """The pattern of this name. Raises `ValueError` for another name or a block that does not belong to it."""
    n_of_m = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", granularity) if isinstance(granularity, str) else None
    if n_of_m is None and granularity not in _NAMES:
        known = ", ".join(map(repr, _NAMES))
        raise ValueError(f"granularity: expected one of {known}, or n:m such as '2:4', got {granularity!r}")
    if granularity not in DEFAULT_BLOCKS and block is not None:
        raise ValueError(f"block: expected None for granularity={granularity!r}, got {block!r}")
    if n_of_m is not None:
        kept, of = map(int, n_of_m.groups())
        if not 0 < kept < of:
            raise ValueError(f"granularity: expected n:m with 0 < n < m, got {granularity!r}")
        return Pattern(1, of, kept=kept)
    if granularity == "kernel":
        return Pattern(whole_kernels=True)
    if granularity == "filter":
        return Pattern(1, 0, whole_kernels=True)
    if granularity == "element":
        return Pattern()
    rows, columns = _checked(DEFAULT_BLOCKS[granularity] if block is None else block)
    if granularity == "vector" and 1 not in (rows, columns):
        raise ValueError(f"block: expected (k, 1) or (1, k) for granularity='vector', got {block!r}")
    return Pattern(rows, columns)


def _checked(block: object) -> tuple[int, int]:
    if isinstance(block, (tuple, list)) and len(block) == 2:
        rows, columns = block
        if all(type(size) is int and 0 < size < _LARGEST for size in block):
            return rows, columns
    raise ValueError(f"block: expected (outputs, inputs), two positive integers, got {block!r}")
