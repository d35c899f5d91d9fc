"""Gradients and curvature of a loss with respect to masked weights, over batches of (inputs, targets)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kernelpress.compress.prune_weights.targets import Target
from kernelpress.preserve import preserved
from kernelpress.runtime.torch_private import pytree

__all__ = ["Loss", "Problem", "hessian_diagonal", "mean_gradients", "sample_gradients"]

Loss = Callable[[Any, Any], Tensor]
"""(output of the model, target) → scalar, the mean over the batch."""
PROBES = 8


@dataclass(frozen=True)
class Problem:
    """What a criterion may look at."""

    model: nn.Module
    targets: Sequence[Target]
    data: Iterable[Any] | None
    loss: Loss
    generator: torch.Generator
    criterion: str

    def batches(self) -> Iterator[tuple[tuple[Any, ...], Any, int]]:
        """Inputs, target and size of every batch, on the device of the weights."""
        if self.data is None:
            raise ValueError(f"data: the criterion {self.criterion!r} needs batches (inputs, targets), got None")
        device, count = self.targets[0].original.device, 0
        for batch in self.data:
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise TypeError(f"data: expected batches (inputs, targets), got {type(batch).__name__}")
            inputs, target = pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, tuple(batch))
            inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
            size = next((len(x) for x in inputs if isinstance(x, Tensor)), 0)
            count += size
            if size:
                yield inputs, target, size
        if not count:
            raise ValueError(f"data: the criterion {self.criterion!r} needs at least one batch, got none")


def mean_gradients(problem: Problem, *, training: bool = False) -> list[Tensor]:
    """∂L/∂w, averaged over all samples, float64; with `training`, BatchNorm normalises by the batch."""
    sums = [torch.zeros_like(target.original, dtype=torch.float64) for target in problem.targets]
    samples = 0
    with _differentiable(problem, training) as weights:
        for inputs, target, size in problem.batches():
            loss = problem.loss(problem.model(*inputs), target)
            for total, gradient in zip(sums, _gradients(problem, loss, weights), strict=True):
                total += gradient.detach().double() * size
            samples += size
    return [total / samples for total in sums]


def sample_gradients(problem: Problem) -> Iterator[list[Tensor]]:
    """∂L/∂w of one sample after the other."""
    with _differentiable(problem) as weights:
        for inputs, target, size in problem.batches():
            samples = [pytree.tree_map(partial(_sample, k, size), (inputs, target)) for k in range(size)]
            for one, its_target in samples:
                loss = problem.loss(problem.model(*one), its_target)
                yield [gradient.detach() for gradient in _gradients(problem, loss, weights)]


def hessian_diagonal(problem: Problem) -> list[Tensor]:
    """diag(∂²L/∂w²) = E[z ⊙ H z] with z = ±1 (Bekas, Kokiopoulou & Saad 2007, eq. 1.1), exact where H is diagonal."""
    sums = [torch.zeros_like(target.original, dtype=torch.float64) for target in problem.targets]
    samples = 0
    with _differentiable(problem) as weights:
        for inputs, target, size in problem.batches():
            loss = problem.loss(problem.model(*inputs), target)
            gradients = _gradients(problem, loss, weights, create_graph=True)
            for _ in range(PROBES):
                signs = [_signs(weight, problem.generator) for weight in weights]
                product = torch.stack([(g * z).sum() for g, z in zip(gradients, signs, strict=True)]).sum()
                if not product.requires_grad:
                    break  # A loss that is linear in the weights has no curvature.
                curved = torch.autograd.grad(product, weights, retain_graph=True, allow_unused=True)
                for total, h, z in zip(sums, curved, signs, strict=True):
                    if h is not None:
                        total += (h * z).detach().double() * (size / PROBES)
            samples += size
    return _finite(problem, [total / samples for total in sums])


@contextmanager
def _differentiable(problem: Problem, training: bool = False) -> Iterator[list[nn.Parameter]]:
    """The parameters below the masks, with gradients, frozen or not, in a model that is as it was afterwards."""
    weights = [target.original for target in problem.targets]
    trained = [weight.requires_grad for weight in weights]
    with torch.enable_grad(), preserved(problem.model):
        for part in problem.model.modules():
            part.training = training
        try:
            for weight in weights:
                weight.requires_grad_(True)
            yield weights
        finally:
            for weight, required in zip(weights, trained, strict=True):
                weight.requires_grad_(required)


def _gradients(
    problem: Problem, loss: Tensor, weights: Sequence[Tensor], *, create_graph: bool = False
) -> list[Tensor]:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(f"loss: expected a scalar, got {list(loss.shape) if isinstance(loss, Tensor) else loss!r}")
    gradients = torch.autograd.grad(loss.sum(), weights, create_graph=create_graph, allow_unused=True)
    for target, gradient in zip(problem.targets, gradients, strict=True):
        if gradient is None:
            raise ValueError(f"data: the loss does not depend on {target.name}; name its layer in `ignore`")
    return _finite(problem, [gradient for gradient in gradients if gradient is not None])


def _finite(problem: Problem, values: list[Tensor]) -> list[Tensor]:
    for target, value in zip(problem.targets, values, strict=True):
        if not bool(value.isfinite().all()):
            raise ValueError(f"data: the derivatives of the loss by {target.name} hold NaN or Inf")
    return values


def _sample(index: int, size: int, x: Any) -> Any:
    """One sample of what is a batch; other values go to all."""
    return x[index : index + 1] if isinstance(x, Tensor) and x.dim() and len(x) == size else x


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, like.shape, generator=generator).mul_(2).sub_(1)
    return signs.to(like.device, like.dtype)
