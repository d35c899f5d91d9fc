"""Criteria that look at what layers read of data: activations, and the loss's derivative by them.

A channel is seen where convolutions and linear layers read it, behind its normalisation, activation and residual sum:
there it is silent if it can leave for nothing. a: what a layer reads of a channel, n: images, m: positions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kernelpress.compress.prune_channels.evidence import Evidence

__all__ = ["gradient_times_activation", "mean_activation", "nonzeros", "principal_components", "taylor"]

UNREAD = "no layer reads them"

EXPLAINED = 0.95
"""The share of the variance that the leading components hold."""


def mean_activation(evidence: Evidence, _: nn.Module) -> list[Tensor | str]:
    """mean |a|, divided by its mean over the pool. Molchanov et al., Pruning Convolutional Neural Networks for Resource
    Efficient Inference, ICLR 2017 (arXiv:1611.06440), section 2.2, "activation"."""
    return _averages(evidence, lambda a: a.abs().sum(0), lambda total, count: _relative(total / count))


def nonzeros(evidence: Evidence, _: nn.Module) -> list[Tensor | str]:
    """1 − APoZ, the share of activations that are not zero. Hu et al., Network Trimming, 2016 (arXiv:1607.03250),
    equation 1."""
    return _averages(evidence, lambda a: (a != 0).sum(0).double(), lambda total, count: total / count)


def principal_components(evidence: Evidence, _: nn.Module) -> list[Tensor | str]:
    """Σ_k λ_k v_kc² ÷ Σ_k λ_k over the leading components of the covariance of a over images and positions, the
    fewest that hold 95 % of the variance: the share of channel c in them."""

    def moments(a: Tensor) -> Tensor:
        with_one = torch.cat([a, torch.ones_like(a[:, :1])], 1)
        return with_one.T @ with_one

    def shares(total: Tensor, count: int) -> Tensor:
        average = total[-1, :-1] / count
        values, vectors = torch.linalg.eigh(total[:-1, :-1] / count - average.outer(average))
        values = values.clamp_min(0).flip(0)
        if not values.sum() > 0:
            return torch.zeros_like(values)
        before = values.cumsum(0) - values
        leading = values * (before < EXPLAINED * values.sum())
        return vectors.flip(1).square() @ leading / leading.sum()

    return _averages(evidence, moments, shares)


def taylor(evidence: Evidence, _: nn.Module) -> list[Tensor | str]:
    """(∂E/∂z)² of a gate z = 1 on the channel, averaged over batches: the change of the loss to first order, squared,
    if the channel leaves. Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019
    (arXiv:1906.10771), section 3.1, with gates.

    The gate is one for all layers that read the channel: ∂E/∂z = Σ over them of Σ_nm a · ∂E/∂a.
    """
    totals = [torch.zeros(len(pool.roots), dtype=torch.float64) for pool in evidence.pools]
    for gates in evidence.gate_gradients():
        for total, reads in zip(totals, evidence.reads, strict=True):
            slopes = [read.of(gates[read.call.node][0]).sum((0, 2)) for read in reads]
            if slopes:
                total += torch.stack(slopes).sum(0).square()
    return [total if reads else UNREAD for total, reads in zip(totals, evidence.reads, strict=True)]


def gradient_times_activation(evidence: Evidence, _: nn.Module) -> list[Tensor | str]:
    """mean_n |1/M Σ_m a · ∂E/∂a|, averaged over the layers that read the channel and divided by the norm of its pool.
    Molchanov et al., ICLR 2017 (arXiv:1611.06440), section 2.2, "Taylor expansion" and "normalization"."""
    totals = [torch.zeros(len(pool.roots), dtype=torch.float64) for pool in evidence.pools]
    rows = 0
    for gates in evidence.gate_gradients():
        for total, reads in zip(totals, evidence.reads, strict=True):
            for read in reads:
                slopes, positions = gates[read.call.node]
                # The loss is a mean over the batch; of an image alone it would have as many times the slope.
                per_image = read.of(slopes) * len(slopes) / positions
                total += per_image.abs().mean(2).sum(0) / len(reads)
        rows += max((len(slopes) for slopes, _ in gates.values()), default=0)
    means = [total / max(1, rows) for total in totals]
    return [
        mean / mean.norm().clamp_min(torch.finfo(torch.float64).tiny) if reads else UNREAD
        for mean, reads in zip(means, evidence.reads, strict=True)
    ]


def _averages(
    evidence: Evidence, statistic: Callable[[Tensor], Tensor], finish: Callable[[Tensor, int], Tensor]
) -> list[Tensor | str]:
    """`statistic` of what a layer reads of a pool, [samples, sets], is summed over the data; what `finish` makes of the
    sum and the number of samples is averaged over the layers that read the pool."""
    sums: dict[tuple[int, str], tuple[Tensor, int]] = {}

    def visit(call: object, x: Tensor, _: object) -> None:
        for index, reads in enumerate(evidence.reads):
            for read in (read for read in reads if read.call is call):
                # Positions of one set are further samples of it.
                samples = read.of(x.movedim(read.call.dim, -1)).movedim(-1, 0).flatten(0, -2).double()
                total, count = sums.get((index, read.call.node), (0, 0))
                sums[index, read.call.node] = total + statistic(samples), count + len(samples)

    evidence.visit(visit)
    return [
        torch.stack(
            [finish(total.cpu(), count) for total, count in (sums[index, read.call.node] for read in reads)]
        ).mean(0)
        if reads
        else UNREAD
        for index, reads in enumerate(evidence.reads)
    ]


def _relative(score: Tensor) -> Tensor:
    return score / score.mean().clamp_min(torch.finfo(torch.float64).tiny)
