"""The range of an activation from what calibration shows of it, and the scale and zero point that stand for a range.

Histograms reach over [−2ᵏ, 2ᵏ] and double when a value lies beyond, so that they never depend on the order of batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["LIMITS", "OBSERVERS", "Histogram", "affine", "weight_scale"]

LIMITS = (-128, 127)
WEIGHT_LIMIT = 127
LEVELS = LIMITS[1] - LIMITS[0]
BINS = 8192
"""Of a histogram; after it has just doubled, half of them are in use."""
SMALLEST = torch.finfo(torch.float32).tiny
"""Scales are not subnormal: what divides by them would overflow."""
CANDIDATES = 80
"""Ranges that are tried, from the whole one downwards."""
PERCENTILE = 99.99


@dataclass
class Histogram:
    """What was seen of an activation: its extremes, and how often each value but 0, which no range rounds."""

    low: float = math.inf
    high: float = -math.inf
    reach: float = 0.0
    zeros: int = 0
    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))

    def update(self, x: Tensor, *, is_counted: bool = True) -> None:
        """Adds the values of `x`, which are finite."""
        if x.numel() == 0:
            return
        low, high = (float(end) for end in torch.aminmax(x.detach()))
        self.low, self.high = min(self.low, low), max(self.high, high)
        largest = max(-low, high)
        if not is_counted:
            return
        if self.reach == 0:
            self.reach = 2.0 ** math.ceil(math.log2(largest)) if largest else SMALLEST
        while self.reach < largest:
            self.counts, self.reach = _halved(self.counts), 2 * self.reach
        values = x.detach().double().flatten().cpu()
        others = values[values != 0]
        self.zeros += len(values) - len(others)
        self.counts += torch.histc(others, BINS, -self.reach, self.reach)

    @property
    def centers(self) -> Tensor:
        """The middle of each bin."""
        return (torch.arange(BINS, dtype=torch.float64) + 0.5) * (2 * self.reach / BINS) - self.reach

    @property
    def constant(self) -> float | None:
        """The one value that the activation has, None where it has several or was never seen."""
        return self.low if self.low == self.high else None


def _halved(counts: Tensor) -> Tensor:
    pairs = counts.reshape(-1, 2).sum(1)
    quarter = torch.zeros(BINS // 4, dtype=counts.dtype)
    return torch.cat([quarter, pairs, quarter])


def affine(low: float, high: float) -> tuple[float, int]:
    """The scale and zero point whose int8 values reach over [low, high], widened to hold 0, which is exact.

    A range of nothing, or one that int8 steps cannot divide, has the scale 1 or the smallest one.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    scale = high / LEVELS - low / LEVELS
    if scale == 0:
        return 1.0, 0
    scale = max(scale, SMALLEST)
    zero_point = round(LIMITS[0] - low / scale)
    return scale, min(max(zero_point, LIMITS[0]), LIMITS[1])


def weight_scale(weight: Tensor, axis: int) -> Tensor:
    """The scale of each channel [C] of a weight that is symmetric in int8: above zero and finite, 1 for zeros."""
    largest = weight.detach().transpose(0, axis).flatten(1).abs().amax(1)
    scale = (largest.double() / WEIGHT_LIMIT).clamp_min(SMALLEST).float()
    return torch.where(largest == 0, torch.ones_like(scale), scale)


def min_max(seen: Histogram) -> tuple[float, float]:
    """Everything that was seen."""
    return seen.low, seen.high


def percentile(seen: Histogram) -> tuple[float, float]:
    """All but the outermost `100 − PERCENTILE` percent of the values on either side."""
    counts = seen.counts.clone()
    counts[BINS // 2] += seen.zeros
    share = counts.cumsum(0) / counts.sum()
    cut, width = 1 - PERCENTILE / 100, 2 * seen.reach / BINS
    first, last = int((share <= cut).sum()), int((share < 1 - cut).sum())
    edges = first * width - seen.reach, (last + 1) * width - seen.reach
    return max(seen.low, edges[0]), min(seen.high, edges[1])


def mse(seen: Histogram) -> tuple[float, float]:
    """The range whose rounding and clipping make the least mean square error."""
    return _best(
        seen, lambda low, high: float((seen.counts * (_rounded(seen.centers, low, high) - seen.centers) ** 2).sum())
    )


def entropy(seen: Histogram) -> tuple[float, float]:
    """The range whose int8 values lose the least information: by the Kullback-Leibler divergence of the clipped
    distribution from the one that 256 levels make of it (Migacz, 8-bit Inference with TensorRT, GTC 2017), less what
    the number of values alone makes of it (Miller 1955)."""
    return _best(seen, lambda low, high: _divergence(seen, low, high))


def _best(seen: Histogram, loss: Callable[[float, float], float]) -> tuple[float, float]:
    shares = [1 - i / CANDIDATES for i in range(CANDIDATES)]
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    ranges = [(max(low, -share * max(-low, high)), min(high, share * max(-low, high))) for share in shares]
    return min(dict.fromkeys(ranges), key=lambda ends: loss(*ends))


def _rounded(values: Tensor, low: float, high: float) -> Tensor:
    scale, zero_point = affine(low, high)
    return ((values / scale).round() + zero_point).clamp(*LIMITS).sub(zero_point) * scale


def _divergence(seen: Histogram, low: float, high: float) -> float:
    centers, counts = seen.centers, seen.counts
    inside = (centers >= low) & (centers <= high)
    if not bool(inside.any()):
        return math.inf
    clipped = counts[inside].clone()
    clipped[0] += counts[centers < low].sum()
    clipped[-1] += counts[centers > high].sum()
    scale, zero_point = affine(low, high)
    level = ((centers[inside] / scale).round() + zero_point).clamp(*LIMITS).long() - LIMITS[0]
    is_used = (counts[inside] > 0).double()
    sums = torch.zeros(LEVELS + 1, dtype=torch.float64).index_add_(0, level, counts[inside])
    used = torch.zeros(LEVELS + 1, dtype=torch.float64).index_add_(0, level, is_used)
    spread = (sums / used.clamp_min(1))[level] * is_used
    p, q = clipped / clipped.sum(), spread / spread.sum().clamp_min(SMALLEST)
    by_chance = float(is_used.sum() - (used > 0).sum()) / (2 * float(counts.sum()))
    return float((p[p > 0] * (p[p > 0] / q[p > 0].clamp_min(1e-12)).log()).sum()) - by_chance


OBSERVERS: Mapping[str, Callable[[Histogram], tuple[float, float]]] = {
    "minmax": min_max,
    "percentile": percentile,
    "mse": mse,
    "entropy": entropy,
}
"""How a range follows from what was seen."""
