"""The weight of one group of a convolution as a chain of smaller ones, in float64.

    weight [O, C, kh, kw]        ŷ = W₂ · (W₁ · x)

Each method finds the first layers of its chain as the best subspace of inputs that they can pass on, then the last by
least squares. `gram`, the second moments [C·kh·kw, C·kh·kw] of a layer's input patches, makes it the least error of
the *outputs*; without it, of the weight. No inverse of it is taken but over what passed the first layers: where W S = U
Σ Vᵀ with S = gram^½, the best of rank r is U Uᵀ W (the principal components of the outputs).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernelpress.compress.decompose import cp
from kernelpress.compress.decompose.chains import Ranks

__all__ = ["composed", "factorize", "relative_error", "spectra"]

HOOI_STEPS = 20
CONVERGED = 1e-7


def factorize(weight: Tensor, method: str, ranks: Ranks, gram: Tensor | None = None, *, seed: int = 0) -> list[Tensor]:
    """The weights [outputs, inputs, kh, kw] of the layers that `chains.chain` lists."""
    if method == "cp":
        return _cp(weight, ranks, gram, seed)
    return {"svd": _svd, "spatial_svd": _spatial_svd, "tucker2": _tucker2, "tt": _tt}[method](weight, ranks, gram)


def composed(factors: Sequence[Tensor]) -> Tensor:
    """The weight of the one layer that computes what these do, one after the other."""
    weight = factors[0]
    for factor in factors[1:]:
        if factor.shape[1] == 1 and len(factor) == len(weight):
            weight = weight * factor
        else:
            # Of two layers, one has a single tap along each axis.
            weight = torch.einsum("rchw,orij->ochiwj", weight, factor).flatten(2, 3).flatten(3)
    return weight


def spectra(weight: Tensor, method: str, gram: Tensor | None = None) -> list[Tensor]:
    """The singular values that each rank of `method` cuts; CP's rank has two, of inputs and of outputs."""
    inner, middle, outer = _by_inputs(weight), _by_rows(weight), weight.flatten(1)
    listed = {"svd": "o", "spatial_svd": "m", "tucker2": "io", "cp": "io", "tt": "imo"}[method]
    found = []
    for which in listed:
        matrix = {"i": inner, "m": middle, "o": outer}[which]
        if gram is not None:
            matrix = matrix @ _root(_moments(gram, matrix.shape[1]))
        found.append(torch.linalg.svdvals(matrix))
    return found


def relative_error(found: Sequence[Tensor], weights: Sequence[Tensor], grams: Sequence[Tensor | None]) -> float:
    """‖(found − weight) · x‖ ÷ ‖weight · x‖ over all groups, for inputs of these second moments; of the weights alone
    without."""

    def size(weight: Tensor, gram: Tensor | None) -> float:
        matrix = weight.flatten(1)
        return max(float((matrix * (matrix if gram is None else matrix @ gram)).sum()), 0.0)

    lost = sum(
        size(approximation - weight, gram) for approximation, weight, gram in zip(found, weights, grams, strict=True)
    )
    whole = sum(map(size, weights, grams))
    return (lost / whole) ** 0.5 if whole > 0 else 0.0


def _svd(weight: Tensor, ranks: Ranks, gram: Tensor | None) -> list[Tensor]:
    """Eckart & Young 1936; on channels of outputs, Zhang et al. 2016 (arXiv:1505.06798), section 3.1."""
    columns = _output_columns(weight.flatten(1), ranks[0], gram)
    first = (columns.T @ weight.flatten(1)).unflatten(1, weight.shape[1:])
    return _balanced(first, columns[..., None, None])


def _spatial_svd(weight: Tensor, ranks: Ranks, gram: Tensor | None) -> list[Tensor]:
    """Jaderberg et al. 2014 (arXiv:1405.3866), scheme 2."""
    outputs, inputs, rows, columns = weight.shape
    passed = _input_rows(_by_rows(weight), ranks[0], _moments(gram, inputs * rows))
    last, _ = _fitted(weight, passed, gram)
    return _balanced(passed.reshape(-1, inputs, rows, 1), last.reshape(outputs, -1, 1, columns))


def _tucker2(weight: Tensor, ranks: Ranks, gram: Tensor | None) -> list[Tensor]:
    """Kim et al. 2016 (arXiv:1511.06530): higher-order SVD, then orthogonal iteration (De Lathauwer et al. 2000)."""
    inner, outer = ranks
    inputs, taps = weight.shape[1], weight.shape[2:]
    moments = _moments(gram, inputs)
    passed, kept = _input_rows(_by_inputs(weight), inner, moments), -1.0
    for _ in range(HOOI_STEPS):
        core, core_gram = _fitted(weight, passed, gram)
        columns = _output_columns(core, outer, core_gram)
        before, kept = kept, float((columns.T @ core).norm())
        if kept - before <= CONVERGED * kept:
            break
        projected = (columns.T @ weight.flatten(1)).unflatten(1, weight.shape[1:])
        passed = _input_rows(_by_inputs(projected), inner, moments)
    middle = (columns.T @ core).reshape(outer, inner, *taps)
    return [passed[..., None, None], middle, columns[..., None, None]]


def _tt(weight: Tensor, ranks: Ranks, gram: Tensor | None) -> list[Tensor]:
    """The tensor train (Oseledets 2011, algorithm 1) of the axes inputs, rows, columns, outputs."""
    inner, middle, outer = ranks
    outputs, inputs, rows, columns = weight.shape
    passed = _input_rows(_by_inputs(weight), inner, _moments(gram, inputs))
    core, core_gram = _fitted(weight, passed, gram)
    core = core.reshape(outputs, inner, rows, columns)
    over_rows = _input_rows(_by_rows(core), middle, _moments(core_gram, inner * rows))
    last, last_gram = _fitted(core, over_rows, core_gram)
    final = _output_columns(last, outer, last_gram)
    return [
        passed[..., None, None],
        over_rows.reshape(middle, inner, rows, 1),
        (final.T @ last).reshape(outer, middle, 1, columns),
        final[..., None, None],
    ]


def _cp(weight: Tensor, ranks: Ranks, gram: Tensor | None, seed: int) -> list[Tensor]:
    """Lebedev et al. 2015 (arXiv:1412.6553); how it is found says `cp`."""
    outputs, inputs, rows, columns = cp.decomposition(weight, ranks[0], seed=seed)
    if gram is not None:
        patches = torch.einsum("cr,hr,wr->rchw", inputs, rows, columns).flatten(1)
        moments = patches @ gram @ patches.T
        # Components that are nearly parallel would cancel each other in huge numbers.
        moments.diagonal().add_(float(moments.trace()) / len(moments) * 1e-9)
        outputs = torch.linalg.solve(moments, patches @ gram @ weight.flatten(1).T).T
    taps = [rows.T[:, None, :, None], columns.T[:, None, None, :]]
    if 1 in weight.shape[2:]:
        taps = [taps[0] * taps[1]]
    return [inputs.T[..., None, None], *taps, outputs[..., None, None]]


def _by_inputs(weight: Tensor) -> Tensor:
    """[O·kh·kw, C]"""
    return weight.movedim(1, -1).flatten(0, -2)


def _by_rows(weight: Tensor) -> Tensor:
    """[O·kw, C·kh]"""
    return weight.movedim(3, 1).flatten(2).flatten(0, 1)


def _moments(gram: Tensor | None, size: int) -> Tensor | None:
    """Second moments of the first axes of a patch, of `size` positions, averaged over the axes behind them."""
    if gram is None:
        return None
    blocks = gram.reshape(size, len(gram) // size, size, -1)
    return torch.einsum("ikjk->ij", blocks) / blocks.shape[1]


def _root(moments: Tensor | None) -> Tensor:
    assert moments is not None
    values, vectors = torch.linalg.eigh(moments)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def _leading(symmetric: Tensor, count: int) -> Tensor:
    """The eigenvectors of the `count` largest eigenvalues, as columns, largest first."""
    return torch.linalg.eigh(symmetric).eigenvectors.flip(1)[:, :count]


def _input_rows(matrix: Tensor, rank: int, moments: Tensor | None) -> Tensor:
    """An orthonormal basis [rank, inputs] of what the best approximation of `matrix` at this rank reads."""
    own = matrix.T @ matrix
    if moments is None:
        return _leading(own, rank).T
    root = _root(moments)
    # U Uᵀ M reads the rows Uᵀ M = Σ⁻¹ Vᵀ S Mᵀ M.
    rows = _leading(root @ own @ root, rank).T @ root @ own
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-300)
    return torch.linalg.qr(rows.T).Q.T


def _fitted(weight: Tensor, rows: Tensor, gram: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The best [O, rank·K] on top of `rows`, orthonormal over the first axes of `weight`'s patches (K positions lie
    behind them), and the second moments of what it reads."""
    size = rows.shape[1]
    patches = weight.flatten(1).unflatten(1, (size, -1))
    if gram is None:
        return torch.einsum("oik,ai->oak", patches, rows).flatten(1), None
    blocks = gram.reshape(size, patches.shape[2], size, patches.shape[2])
    half = torch.einsum("ai,ikjl->akjl", rows, blocks)
    moments = torch.einsum("akjl,bj->akbl", half, rows).flatten(2).flatten(0, 1)
    cross = torch.einsum("ojl,akjl->oak", patches, half).flatten(1)
    return torch.linalg.solve(moments, cross.T).T, moments


def _output_columns(matrix: Tensor, rank: int, gram: Tensor | None) -> Tensor:
    """The principal components [O, rank] of the outputs."""
    return _leading(matrix @ matrix.T if gram is None else matrix @ gram @ matrix.T, rank)


def _balanced(first: Tensor, second: Tensor) -> list[Tensor]:
    """The same product, each channel between the two equally large on both sides, which trains best."""
    made, read = first.flatten(1).norm(dim=1), second.movedim(1, 0).flatten(1).norm(dim=1)
    is_used = (made > 0) & (read > 0)
    share = torch.where(is_used, (read / made.where(is_used, torch.ones_like(made))).sqrt(), torch.ones_like(made))
    return [first * share[:, None, None, None], second / share[None, :, None, None]]
