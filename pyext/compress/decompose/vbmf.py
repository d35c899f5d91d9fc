"""The rank of a matrix under noise, by empirical variational Bayesian matrix factorization, in closed form.

Nakajima, Sugiyama, Babacan, Tomioka: Global Analytic Solution of Fully-observed Variational Bayesian Matrix
Factorization, JMLR 14, 2013. For a matrix L × M, L ≤ M, α = L ÷ M, with singular values γ and noise of variance σ²:

    a component stays where γ² > M σ² x̲,   x̲ = (1 + τ̲)(1 + α ÷ τ̲),   Φ(τ̲) + Φ(τ̲ ÷ α) = 0,   Φ(z) = log(1 + z) ÷ z − ½

σ² is where the free energy Ω is least (their theorem on the noise variance).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["free_energy", "noise_variance", "rank", "threshold"]

STARTS = 64
STEPS = 80
"""Of golden sections, which end below any float's distance."""


def rank(values: Tensor, rows: int, columns: int, variance: float | None = None) -> int:
    """How many of the singular values `values` of a matrix [rows, columns] are no noise; 0 where all are.

    `variance`: of the noise, found from the values unless given.
    """
    if not bool((values > 0).any()):
        return 0
    short, long = sorted((rows, columns))
    variance = noise_variance(values, rows, columns) if variance is None else variance
    return int((values.double() ** 2 > long * variance * threshold(short / long)).sum())


def threshold(ratio: float) -> float:
    """x̲ of α = `ratio`: τ̲ ≈ 2.5129 √α, here to the last bit by bisection."""

    def excess(tau: float) -> float:
        return sum(math.log1p(z) / z - 0.5 for z in (tau, tau / ratio))

    low, high = math.sqrt(ratio), 4 * math.sqrt(ratio)
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return (1 + low) * (1 + ratio / low)


def noise_variance(values: Tensor, rows: int, columns: int) -> float:
    """The σ² of least free energy, for a matrix that is not zero."""
    short, long = sorted((rows, columns))
    squares = values.double() ** 2
    squares = torch.cat([squares, squares.new_zeros(short - len(squares))]).sort(descending=True).values
    largest = math.ceil(short / (1 + short / long)) - 1
    high = float(squares.sum()) / (short * long)
    tail = squares[largest:]
    low = max(float(tail[0]) / (long * threshold(short / long)), float(tail.mean()) / long, high * 1e-18)
    # Ω has several minima: the best point of a grid, then golden sections around it.
    grid = torch.logspace(math.log10(low), math.log10(high), STARTS, dtype=torch.float64) if low < high else [high]
    points = [float(point) for point in grid]
    best = min(range(len(points)), key=lambda i: free_energy(squares, points[i], short, long))
    left, right = points[max(best - 1, 0)], points[min(best + 1, len(points) - 1)]
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(STEPS):
        first, second = right - golden * (right - left), left + golden * (right - left)
        if free_energy(squares, first, short, long) < free_energy(squares, second, short, long):
            right = second
        else:
            left = first
    return (left + right) / 2


def free_energy(squares: Tensor, variance: float, short: int, long: int) -> float:
    """Ω, without its constants, of all squared singular values; values of zero count only by the noise around them."""
    ratio = short / long
    scaled = squares / (long * variance)
    is_signal = scaled > threshold(ratio)
    signal = scaled[is_signal]
    tau = 0.5 * (signal - (1 + ratio) + ((signal - (1 + ratio)) ** 2 - 4 * ratio).clamp_min(0).sqrt())
    kept = torch.log(tau + 1) + ratio * torch.log(tau / ratio + 1) - tau
    # log x = log γ² − log(M σ²): only the second part moves with σ².
    return float(scaled.sum() + kept.sum()) + short * math.log(variance)
