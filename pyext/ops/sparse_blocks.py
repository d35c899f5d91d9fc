"""Block-CSR: the non-zero blocks of a weight matrix, row by row, and how a dense weight becomes one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernelpress.kernels import reference
from kernelpress.ops.checks import describe
from kernelpress.ops.signature import pair

__all__ = ["BlockCsr", "block_grid", "check_structure", "conv_matrix", "conv_weight", "largest_blocks"]


@dataclass(frozen=True)
class BlockCsr:
    """A matrix of `shape` by its non-zero blocks; blocks at its right and lower edge may reach past it.

    row_offsets: `[rows + 1]`, int32; block row `i` has the blocks `row_offsets[i] … row_offsets[i + 1] - 1`.
    columns: `[nnz]`, int32, block columns, ascending within a row.
    blocks: `[nnz, r, c]`, any dtype.
    """

    row_offsets: Tensor
    columns: Tensor
    blocks: Tensor
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        if self.blocks.dim() != 3 or 0 in self.blocks.shape[1:]:
            raise ValueError(f"blocks: expected [nnz, r, c] with r, c ≥ 1, got {describe(self.blocks.shape)}")
        rows, block_columns = block_grid(self.shape, self.block)
        check_structure(self.row_offsets, self.columns, len(self.blocks), rows, block_columns)

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        block: Sequence[int] | int,
        *,
        mask: Tensor | None = None,
        density: float | None = None,
        norm: float = 2.0,
    ) -> BlockCsr:
        """The blocks of `weight: [C_out, C_in]` that `mask` names, or the fraction `density` of largest `norm`, or
        without either those that are not all zero.

        Args:
            block: (r, c), or one integer for both.
            mask: bool, one value per block: `[⌈C_out / r⌉, ⌈C_in / c⌉]`.
            density: 0 … 1, of all blocks.
            norm: the order of the blocks' vector norm, 1 or 2 for example.

        Raises: `ValueError` naming the bad argument.
        """
        if weight.dim() != 2 or 0 in weight.shape:
            raise ValueError(f"weight: expected [C_out, C_in], got {describe(weight.shape)}")
        shape = (weight.shape[0], weight.shape[1])
        rows, block_columns = block_grid(shape, pair(block))
        r, c = pair(block)
        padded = pad(weight.detach(), (0, block_columns * c - shape[1], 0, rows * r - shape[0]))
        tiled = padded.view(rows, r, block_columns, c).transpose(1, 2)
        if mask is not None and density is not None:
            raise ValueError("mask, density: expected at most one of them, got both")
        if mask is None:
            mask = (tiled != 0).flatten(2).any(2) if density is None else largest_blocks(tiled, density, norm)
        elif mask.dtype != torch.bool or tuple(mask.shape) != (rows, block_columns):
            expected = f"bool {describe((rows, block_columns))}, one value per {r}×{c} block"
            raise ValueError(f"mask: expected {expected}, got {mask.dtype} {describe(mask.shape)}")
        mask = mask.to(weight.device)
        counts = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
        columns = mask.nonzero()[:, 1]
        return cls(counts.to(torch.int32), columns.to(torch.int32), tiled[mask].contiguous(), shape)

    @property
    def block(self) -> tuple[int, int]:
        """(r, c): rows and columns of one block."""
        return self.blocks.shape[1], self.blocks.shape[2]

    @property
    def density(self) -> float:
        """Stored blocks ÷ all blocks."""
        rows, block_columns = block_grid(self.shape, self.block)
        return len(self.blocks) / (rows * block_columns)

    def to_dense(self) -> Tensor:
        """`[C_out, C_in]`, zero where no block stands."""
        return reference.block_csr_to_dense(self.row_offsets, self.columns, self.blocks, self.shape)


def block_grid(shape: Sequence[int], block: Sequence[int]) -> tuple[int, int]:
    """Block rows and block columns of a matrix, counting those that reach past its edge. Raises `ValueError`."""
    if len(block) != 2 or any(size < 1 for size in block):
        raise ValueError(f"block: expected two integers of at least 1, got {describe(block)}")
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def largest_blocks(tiled: Tensor, density: float, norm: float = 2.0) -> Tensor:
    """The mask `[rows, columns]` of the fraction `density` of `tiled: [rows, columns, r, c]` of largest norm, at least
    one block where `density` is above 0. Raises `ValueError`.
    """
    if not 0.0 <= density <= 1.0:
        raise ValueError(f"density: expected a fraction of blocks from 0 to 1, got {density}")
    if not norm > 0:
        raise ValueError(f"norm: expected a positive order, got {norm}")
    norms = torch.linalg.vector_norm(tiled.flatten(2).double(), norm, 2).flatten()
    keep = max(round(density * len(norms)), int(density > 0))
    mask = torch.zeros(len(norms), dtype=torch.bool, device=tiled.device)
    mask[norms.argsort(descending=True, stable=True)[:keep]] = True
    return mask.view(tiled.shape[:2])


def check_structure(row_offsets: Tensor, columns: Tensor, count: int, rows: int, block_columns: int) -> None:
    """That the indices describe `count` blocks in a grid of `rows` × `block_columns`.

    Reads their values: on a GPU it waits for them. Raises `ValueError` or `TypeError` naming the bad one.
    """
    for name, index, size in (("row_offsets", row_offsets, rows + 1), ("columns", columns, count)):
        if index.dtype != torch.int32:
            raise TypeError(f"{name}: expected int32, got {index.dtype}")
        if tuple(index.shape) != (size,):
            raise ValueError(
                f"{name}: expected [{size}] for {count} blocks in {rows} rows, got {describe(index.shape)}"
            )
    if row_offsets.is_meta:
        return
    steps = row_offsets.diff()
    if int(row_offsets[0]) != 0 or int(row_offsets[-1]) != count or bool((steps < 0).any()):
        ends = f"from {int(row_offsets[0])} to {int(row_offsets[-1])}"
        falling = ", falling in between" if bool((steps < 0).any()) else ""
        raise ValueError(f"row_offsets: expected to rise from 0 to {count}, the number of blocks, got {ends}{falling}")
    if count == 0:
        return
    low, high = int(columns.min()), int(columns.max())
    if low < 0 or high >= block_columns:
        raise ValueError(f"columns: expected block columns from 0 to {block_columns - 1}, got {low} to {high}")
    row = torch.repeat_interleave(torch.arange(rows, device=columns.device), steps.long(), output_size=count)
    if bool(((columns.diff() <= 0) & (row.diff() == 0)).any()):
        raise ValueError("columns: expected to ascend within every block row, each column once")


def conv_matrix(weight: Tensor, block_columns: int) -> Tensor:
    """`[C_out, C_in, KH, KW]` → `[C_out, KH · KW · C]`, C being C_in rounded up to a multiple of `block_columns`.

    Column `(kh · KW + kw) · C + i` is input channel `i` at kernel position `(kh, kw)`.
    """
    padded = pad(weight.permute(0, 2, 3, 1), (0, -weight.shape[1] % block_columns))
    return padded.reshape(weight.shape[0], -1)


def conv_weight(matrix: Tensor, in_channels: int, kernel_size: Sequence[int]) -> Tensor:
    """The convolution weight `[C_out, C_in, KH, KW]` of which `conv_matrix` made this one."""
    return matrix.view(matrix.shape[0], *kernel_size, -1)[..., :in_channels].permute(0, 3, 1, 2).contiguous()
