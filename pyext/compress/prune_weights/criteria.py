"""How much a network needs a weight: larger for what should stay. A criterion is one function and one line in
`WEIGHT_CRITERIA`; w is the weight, g = ∂L/∂w the mean gradient over the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernelpress.compress.prune_weights.derivatives import Problem, hessian_diagonal, mean_gradients, sample_gradients
from kernelpress.compress.prune_weights.fisher import FisherBlocks

__all__ = ["WEIGHT_CRITERIA", "Criterion", "Scores"]


@dataclass(frozen=True)
class Scores:
    """A score for each element of every target, float64; `repaired` gives the values that a target's weights take once
    only those of a mask stay, unchanged where it is None."""

    values: list[Tensor]
    repaired: Callable[[int, Tensor], Tensor] | None = field(default=None, repr=False)


Criterion = Callable[[Problem], Scores]


def _weights(problem: Problem) -> list[Tensor]:
    return [target.weight.double() for target in problem.targets]


def l1(problem: Problem) -> Scores:
    """|w| (Han et al., arXiv:1506.02626)."""
    return Scores([weight.abs() for weight in _weights(problem)])


def l2(problem: Problem) -> Scores:
    """w², which differs from |w| where groups are averaged."""
    return Scores([weight.square() for weight in _weights(problem)])


def _products(problem: Problem, training: bool = False) -> list[Tensor]:
    """g · w."""
    pairs = zip(mean_gradients(problem, training=training), _weights(problem), strict=True)
    return [gradient * weight for gradient, weight in pairs]


def first_order(problem: Problem) -> Scores:
    """|g · w|: how much the loss changes, to first order, if w becomes 0 (Mozer & Smolensky 1988)."""
    return Scores([product.abs() for product in _products(problem)])


def taylor(problem: Problem) -> Scores:
    """(g · w)² (Molchanov et al., arXiv:1906.10771, eq. 8)."""
    return Scores([product.square() for product in _products(problem)])


def movement(problem: Problem) -> Scores:
    """−g · w: positive where a step of training moves w away from 0 (Sanh et al., arXiv:2005.07683, eq. 4, at the
    present weights; under a gradual schedule anew at each pruning)."""
    return Scores([-product for product in _products(problem)])


def snip(problem: Problem) -> Scores:
    """|g · w| / Σ|g · w| of a network before training, BatchNorm normalising by the batch (Lee et al.,
    arXiv:1810.02340, eq. 5)."""
    products = [product.abs() for product in _products(problem, training=True)]
    total = torch.stack([product.sum() for product in products]).sum().clamp_min(torch.finfo(torch.float64).tiny)
    return Scores([product / total for product in products])


def obd(problem: Problem) -> Scores:
    """½ h w² with the diagonal h of the Hessian (LeCun, Denker & Solla, Optimal Brain Damage, 1989, eq. 5)."""
    pairs = zip(hessian_diagonal(problem), _weights(problem), strict=True)
    return Scores([0.5 * h * weight.square() for h, weight in pairs])


def fisher(problem: Problem) -> Scores:
    """½ f w² with the diagonal of the empirical Fisher matrix, f = mean of g² over samples, in place of OBD's h (Theis
    et al., arXiv:1801.05787, eq. 6)."""
    sums, samples = [torch.zeros_like(weight) for weight in _weights(problem)], 0
    for gradients in sample_gradients(problem):
        samples += 1
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient.double().square()
    return Scores([0.5 / samples * f * w.square() for f, w in zip(sums, _weights(problem), strict=True)])


def obs(problem: Problem) -> Scores:
    """w² / (2 [F⁻¹]) with the inverse of the empirical Fisher matrix by blocks of consecutive weights (Hassibi & Stork,
    Optimal Brain Surgeon, 1993, eq. 5; Singh & Alistarh, WoodFisher, arXiv:2004.14340, eq. 13); the weights that stay
    make up for those that leave."""
    weights = [target.weight for target in problem.targets]
    blocks = [FisherBlocks(weight) for weight in weights]
    for gradients in sample_gradients(problem):
        for block, gradient in zip(blocks, gradients, strict=True):
            block.add(gradient)
    values = [block.scores(w, t.alive()) for block, w, t in zip(blocks, weights, problem.targets, strict=True)]
    return Scores(values, lambda i, alive: blocks[i].repaired(weights[i], problem.targets[i].alive(), alive))


def random(problem: Problem) -> Scores:
    """Drawn evenly, as a baseline."""
    return Scores(
        [torch.rand(t.original.shape, generator=problem.generator, dtype=torch.float64) for t in problem.targets]
    )


WEIGHT_CRITERIA: Mapping[str, Criterion] = {
    "magnitude": l1,
    "l1": l1,
    "l2": l2,
    "first_order": first_order,
    "taylor": taylor,
    "movement": movement,
    "snip": snip,
    "obd": obd,
    "fisher": fisher,
    "obs": obs,
    "random": random,
}
"""Criteria by name; all from `first_order` to `obs` look at `data`."""
