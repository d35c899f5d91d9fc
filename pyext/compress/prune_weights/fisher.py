"""The empirical Fisher matrix of a weight by diagonal blocks, and what Optimal Brain Surgeon computes with it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["BLOCK", "FisherBlocks"]

BLOCK = 32
"""Consecutive weights in a block; memory and time grow with it."""
DAMPING = 1e-6
"""λ over the mean of the diagonal: F + λI has an inverse also where samples are fewer than weights."""
_AT_ONCE = 2048


class FisherBlocks:
    """F = λI + 1/N Σ g gᵀ over the gradients of N samples, in blocks [count, B, B]."""

    def __init__(self, weight: Tensor) -> None:
        self._sums = weight.new_zeros(-(-weight.numel() // BLOCK), BLOCK, BLOCK)
        self._samples = 0

    def add(self, gradient: Tensor) -> None:
        """One sample more."""
        rows = self._cut(gradient)
        self._sums += rows[:, :, None] * rows[:, None, :]
        self._samples += 1

    def scores(self, weight: Tensor, alive: Tensor) -> Tensor:
        """w² / (2 [F⁻¹]) over what is alive: what leaving alone costs, if all others make up for it."""
        return self._by_blocks(self._scores, weight, alive).view(weight.shape)

    def repaired(self, weight: Tensor, alive: Tensor, stays: Tensor) -> Tensor:
        """The weights that stay, K, once those of Q have left together: w_K + F_KK⁻¹ F_KQ w_Q, which minimises
        (v − w)ᵀ F (v − w) over all v that are zero outside K (WoodFisher, eq. 14, for many at once)."""
        solved = self._by_blocks(self._solved, weight, alive & stays).view(weight.shape)
        return solved.to(weight.dtype)

    def _scores(self, f: Tensor, weight: Tensor, alive: Tensor) -> Tensor:
        inverse = torch.linalg.inv(_restricted(f, alive))
        return weight.square() / (2 * inverse.diagonal(dim1=1, dim2=2))

    def _solved(self, f: Tensor, weight: Tensor, stays: Tensor) -> Tensor:
        right = (f @ weight[..., None]).squeeze(-1) * stays
        return torch.linalg.solve(_restricted(f, stays), right)

    def _by_blocks(self, compute: object, weight: Tensor, mask: Tensor) -> Tensor:
        assert callable(compute)
        mean = self._sums.diagonal(dim1=1, dim2=2).double().mean() / max(1, self._samples)
        damping = (DAMPING * mean).clamp_min(1e-30) * torch.eye(BLOCK, dtype=torch.float64, device=weight.device)
        values, kept, parts = self._cut(weight.double()), self._cut(mask.double()), []
        for i in range(0, len(values), _AT_ONCE):
            some = slice(i, i + _AT_ONCE)
            f = self._sums[some].double() / max(1, self._samples) + damping
            parts.append(compute(f, values[some], kept[some]))
        return torch.cat(parts).flatten()[: weight.numel()]

    def _cut(self, x: Tensor) -> Tensor:
        return F.pad(x.reshape(-1), (0, -x.numel() % BLOCK)).view(-1, BLOCK)


def _restricted(f: Tensor, kept: Tensor) -> Tensor:
    """`f` [count, B, B] on the rows and columns that are `kept`, the identity elsewhere."""
    return f * kept[:, :, None] * kept[:, None, :] + torch.diag_embed(1 - kept)
