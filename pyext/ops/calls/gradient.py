"""Gradients of the ops: that of an op's reference, computed anew from the saved inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernelpress.ops.registry import Operator, Tensors

__all__ = ["differentiable"]


def differentiable(operator: Operator) -> Callable[[Callable[[], Tensor], Tensors, Any], Tensor]:
    """`(compute, tensors, options) → compute()`, with the op's gradient, any number of times differentiable."""

    def forward(ctx: Any, compute: Callable[[], Tensor], options: Any, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.options = options
        return compute()

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        twice = torch.is_grad_enabled()
        _, _, *needed = ctx.needs_input_grad
        with torch.enable_grad():
            tensors = [
                t if twice or t is None else t.detach().requires_grad_(need)
                for t, need in zip(ctx.saved_tensors, needed, strict=True)
            ]
            y = operator.call_reference(tensors, ctx.options)
            wanted = [t for t, need in zip(tensors, needed, strict=True) if need]
            gradients = iter(torch.autograd.grad(y, wanted, grad, create_graph=twice))
        return (None, None, *[next(gradients) if need else None for need in needed])

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(f"Differentiable_{operator.name}", (torch.autograd.Function,), methods)

    def apply(compute: Callable[[], Tensor], tensors: Tensors, options: Any) -> Tensor:
        result: Tensor = function.apply(compute, options, *tensors)
        return result

    return apply
