"""The canonical polyadic decomposition: a tensor as the least sum of outer products that comes near it.

    T[o, c, h, w] ≈ Σ_r  A[o, r] · B[c, r] · C[h, r] · D[w, r]

Alternating least squares from several starts; the best is then corrected (Phan et al. 2020, arXiv:2008.05441): products
that nearly cancel each other are huge, break when rounded and do not train. Among factors of the same error those are
sought whose products are smallest, and with them the sensitivity to changes of the factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["corrected", "decomposition", "sensitivity"]

STARTS = 3
STEPS, CORRECTIONS = 60, 30
STALLED = 1e-5
"""The gain, relative to the tensor, below which an iteration has ended."""
SLACK = 1e-3
"""By how much, relatively, the correction may let the error grow."""
TINY = 1e-300

Update = Callable[[Tensor, Tensor], Tensor]
"""T · K for one axis and the overlap Kᵀ K, K the products of the other factors → the new factor."""


def decomposition(tensor: Tensor, rank: int, *, seed: int = 0, correct: bool = True) -> list[Tensor]:
    """A factor [size, rank] for each of the four axes; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    whole = float(tensor.norm())
    best: list[Tensor] = []
    least = float("inf")
    for start in range(STARTS):
        factors = [torch.randn(size, rank, generator=generator, dtype=tensor.dtype) for size in tensor.shape]
        factors, error = _alternated(tensor, factors if start else _leading_products(tensor, rank))
        if error < least:
            best, least = factors, error
        # No start can do better.
        if least <= 1e-7 * whole:
            break
    return corrected(tensor, best, least) if correct else _evened(best)


def sensitivity(factors: Sequence[Tensor]) -> float:
    """The squared change of the tensor that noise of variance 1 on each entry of the factors is expected to make:
    Σ_n size_n · Σ_r Π_{m≠n} ‖factor_m[:, r]‖²."""
    squares = torch.stack([(factor**2).sum(0) for factor in factors])
    others = [squares[[m for m in range(len(factors)) if m != n]].prod(0).sum() for n in range(len(factors))]
    return float(sum(len(factor) * other for factor, other in zip(factors, others, strict=True)))


def _leading_products(tensor: Tensor, rank: int) -> list[Tensor]:
    """Products of singular vectors of the three shortest axes, the `rank` combinations that hold most of the tensor:
    with all of them, it is exact."""
    long = max(range(4), key=lambda axis: tensor.shape[axis])
    bases = []
    for axis, size in enumerate(tensor.shape):
        unfolded = tensor.movedim(axis, 0).flatten(1)
        own = torch.linalg.eigh(unfolded @ unfolded.T).eigenvectors
        bases.append(torch.eye(size, dtype=tensor.dtype) if axis == long else own)
    core = torch.einsum("abcd,ai,bj,ck,dl->ijkl", tensor, *bases)
    energy = (core**2).sum(long)
    chosen = energy.flatten().sort(descending=True, stable=True).indices[:rank]
    others = iter(torch.unravel_index(chosen, energy.shape))
    factors = [basis if axis == long else basis[:, next(others)] for axis, basis in enumerate(bases)]
    factors[long] = core.movedim(long, 0).flatten(1)[:, chosen]
    return factors


def _sweep(tensor: Tensor, factors: Sequence[Tensor], update: Update) -> tuple[list[Tensor], float]:
    """Each factor anew by `update`, the others' columns having length one; and the error, to 1e-8 of the tensor."""
    a, b, c, d = map(_normalised, factors)
    rows, columns = len(c), len(d)
    # What is read of the tensor: once for the two long axes, once for the two short ones.
    by_channels = tensor.flatten(2) @ (c[:, None] * d[None]).flatten(0, 1)
    a = _normalised(update(torch.einsum("ocr,cr->or", by_channels, b), _overlap(b, c, d)))
    b = _normalised(update(torch.einsum("ocr,or->cr", by_channels, a), _overlap(a, c, d)))
    over_inputs = tensor.flatten(2).movedim(1, 2) @ b
    by_taps = torch.einsum("otr,or->tr", over_inputs, a).unflatten(0, (rows, columns))
    c = _normalised(update(torch.einsum("hwr,wr->hr", by_taps, d), _overlap(a, b, d)))
    wanted, overlap = torch.einsum("hwr,hr->wr", by_taps, c), _overlap(a, b, c)
    d = update(wanted, overlap)
    squared = (tensor**2).sum() - 2 * (wanted * d).sum() + ((d.T @ d) * overlap).sum()
    return [a, b, c, d], float(squared.clamp_min(0).sqrt())


def _alternated(tensor: Tensor, factors: list[Tensor]) -> tuple[list[Tensor], float]:
    """Least squares for one factor after the other, until that gains nothing; and the error."""
    error, whole = float("inf"), float(tensor.norm())
    for _ in range(STEPS):
        before = error
        factors, error = _sweep(tensor, factors, _least_squares)
        if before - error <= STALLED * whole:
            break
    return factors, error


def _least_squares(wanted: Tensor, overlap: Tensor) -> Tensor:
    # A little damping, where products are parallel.
    damping = 1e-12 * float(overlap.trace()) / len(overlap) + TINY
    return torch.linalg.solve(overlap + damping * torch.eye(len(overlap), dtype=overlap.dtype), wanted.T).T


def corrected(tensor: Tensor, factors: list[Tensor], error: float) -> list[Tensor]:
    """Factors of the smallest products within this error: over each in turn, the others of length one,

        min ‖A‖²  where  ‖T − A Kᵀ‖ ≤ bound,   A = T K (Kᵀ K + λ)⁻¹,

    which is one number λ, found by bisection.
    """
    whole = float((tensor**2).sum())
    bound = max(error * (1 + SLACK), 1e-7 * whole**0.5)

    def update(wanted: Tensor, overlap: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(overlap)
        values, turned = values.clamp_min(0), wanted @ vectors
        damping = _largest_damping((turned**2).sum(0), values, whole - bound**2)
        return turned / (values + damping) @ vectors.T

    size = float("inf")
    for _ in range(CORRECTIONS):
        before = size
        factors, _ = _sweep(tensor, factors, update)
        size = float((factors[-1] ** 2).sum())
        if before - size <= 1e-3 * size:
            break
    return _evened(factors)


def _largest_damping(squares: Tensor, values: Tensor, explained: float) -> float:
    """The largest λ with which so much of the tensor is explained, or nearly none where not even λ = 0 does it."""
    largest = float(values.max())
    low, high = largest * 1e-14 + TINY, largest * 1e6 + TINY
    for _ in range(60):
        middle = (low * high) ** 0.5
        is_enough = float((squares * ((values + 2 * middle) / (values + middle) ** 2)).sum()) >= explained
        low, high = (middle, high) if is_enough else (low, middle)
    return low


def _overlap(*factors: Tensor) -> Tensor:
    """Kᵀ K of the products K of all these, from the factors alone."""
    return torch.stack([factor.T @ factor for factor in factors]).prod(0)


def _normalised(factor: Tensor) -> Tensor:
    return factor / factor.norm(dim=0).clamp_min(TINY)


def _evened(factors: Sequence[Tensor]) -> list[Tensor]:
    """The same products of factors whose columns have the same length."""
    lengths = torch.stack([factor.norm(dim=0) for factor in factors]).prod(0)
    return [_normalised(factor) * lengths ** (1 / len(factors)) for factor in factors]
