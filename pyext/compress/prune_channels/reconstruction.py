"""ThiNet: the channels that the layers behind them miss least, and least squares for what remains.

Luo et al., ThiNet: A Filter Level Pruning Method for Deep Neural Network Compression, ICCV 2017 (arXiv:1707.06342). An
output of a layer is Σ_c x_c, x_c what channel c adds to it. With G_cd = Σ x_c x_d over sampled outputs,

    without the channels T an output lacks Σ_{c∈T} x_c, squared  1_Tᵀ G 1_T           (equation 6, T grown greedily)
    scales w of the rest R that restore it best:                  G_RR w = G_R· 1      (equation 7)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from kernelpress.compress.channels.dependency import LayerCall
from kernelpress.compress.prune_channels.evidence import Evidence

__all__ = ["restoring_scales", "thinet"]

ROWS = 1024
"""Positions that are sampled of each batch."""


def thinet(evidence: Evidence, _: nn.Module) -> list[Tensor | str]:
    """The share of what is read of the pool that is lost once a set has left, in the greedy order of leaving, averaged
    over the layers that read it."""
    grams = _grams(evidence)
    scores: list[Tensor | str] = []
    for reads in evidence.reads:
        if not reads:
            scores.append("no layer reads them")
        elif missing := [read.call.output.layer for read in reads if read.call.node not in grams]:
            scores.append(f"what {', '.join(missing)} adds up cannot be told by channels")
        else:
            shares = [_share(_of_sets(grams[read.call.node], read.columns)) for read in reads]
            scores.append(_lost_in_order(torch.stack(shares).mean(0)))
    return scores


def restoring_scales(evidence: Evidence, removing: frozenset[int]) -> list[tuple[LayerCall, Tensor]]:
    """Factors of the input channels of each layer that loses some: equation 7, [channels]."""
    scales = []
    grams = _grams(evidence)
    for call in evidence.dependencies.calls:
        gone = torch.isin(call.entering, torch.tensor(sorted(removing)))
        if call.node not in grams or not bool(gone.any()):
            continue
        gram, labels = grams[call.node], call.entering
        # Positions of one set, and channels that stay for good, have one weight, so one factor, each.
        roots, columns = labels.unique(return_inverse=True)
        place = torch.zeros(len(labels), len(roots), dtype=torch.float64)
        place[torch.arange(len(labels)), columns] = 1
        gram = place.T @ gram @ place
        rest = ~torch.isin(roots, torch.tensor(sorted(removing)))
        block = gram[rest][:, rest]
        # What never varies, or only with others, keeps as it is.
        ridge = torch.eye(len(block), dtype=torch.float64) * (1e-6 * block.diagonal().mean())
        missing = gram[rest][:, ~rest].sum(1)
        factors = torch.ones(len(roots), dtype=torch.float64)
        if block.diagonal().sum() > 0:
            factors[rest] += torch.linalg.solve(block + ridge, missing)
        scales.append((call, factors[columns]))
    return scales


def _grams(evidence: Evidence) -> dict[str, Tensor]:
    """G of each layer over all channels that it reads, by its node: [channels, channels]; of groups, the sum."""
    read = {read.call.node for reads in evidence.reads for read in reads}
    weights, grams = evidence.dependencies.weights, dict[str, Tensor]()

    def visit(call: LayerCall, x: Tensor, again: Callable[..., Tensor]) -> None:
        weight = weights.get(call.output.parameter)
        if call.node not in read or weight is None or call.output.dim != 0:
            return
        taps, channels = math.prod(weight.shape[2:]), x.size(call.dim)
        if weight.dim() > 2:
            # One output for each channel and tap, by the layer's own stride, padding and dilation.
            picks = torch.eye(taps, dtype=x.dtype, device=x.device).view(taps, 1, *weight.shape[2:])
            patches = again(x, picks.repeat(channels, *[1] * (weight.dim() - 1)), channels).movedim(call.dim, -1)
        else:
            patches = x
        rows = patches.reshape(-1, channels * taps)
        if len(rows) > ROWS:
            rows = rows[torch.randperm(len(rows))[:ROWS].to(rows.device)]
        rows, filters = rows.double(), weight.detach().double()
        groups = channels // weight.size(1)
        total = torch.zeros(channels, channels, dtype=torch.float64)
        width = weight.size(1)
        for group in range(groups):
            a = rows[:, group * width * taps : (group + 1) * width * taps]
            w = filters[len(filters) // groups * group : len(filters) // groups * (group + 1)].flatten(1)
            both = ((a.T @ a) * (w.T @ w)).view(width, taps, width, taps).sum((1, 3)).cpu()
            total[group * width : (group + 1) * width, group * width : (group + 1) * width] = both
        grams[call.node] = grams.get(call.node, 0) + total

    evidence.visit(visit)
    return grams


def _of_sets(gram: Tensor, columns: Tensor) -> Tensor:
    """[channels, channels] → [sets, sets], summed over the positions of each."""
    return gram[columns][:, :, columns].sum((1, 3))


def _share(gram: Tensor) -> Tensor:
    return gram / gram.sum().clamp_min(torch.finfo(torch.float64).tiny)


def _lost_in_order(gram: Tensor) -> Tensor:
    """The greedy order of leaving as a rising score: [sets]."""
    score, lost, largest = torch.zeros(len(gram), dtype=torch.float64), 0.0, 0.0
    crossing, left = torch.zeros_like(score), torch.ones(len(gram), dtype=torch.bool)
    for _ in range(len(gram)):
        after = lost + 2 * crossing + gram.diagonal()
        chosen = int(after.masked_fill(~left, math.inf).argmin())
        lost, left[chosen] = float(after[chosen]), False
        crossing += gram[:, chosen]
        # What cancels may make the loss fall again; the order stays.
        largest = max(math.nextafter(largest, math.inf), lost)
        score[chosen] = largest
    return score
