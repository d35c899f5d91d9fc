"""The `reference` backend: every op in plain PyTorch, on any device and in any dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from kernelpress.ops.registry import Implementation, Problem, Run, Tensors

__all__ = ["reference_implementation"]


def reference_implementation(reference: Callable[..., Any]) -> Implementation:
    """The entry of an op's plain PyTorch form; it runs everything."""

    def prepare(problem: Problem, tensors: Tensors) -> Run:
        keywords, layout = problem.options._asdict(), problem.layout

        def laid_out(y: Tensor) -> Tensor:
            y, stride = layout.copy(y), layout.stride(y.shape)
            return y if y.stride() == stride else y.as_strided(y.shape, stride)  # of dimensions of one element

        if len(problem.outputs) > 1:
            return lambda tensors: tuple(map(laid_out, reference(*tensors, **keywords)))
        return lambda tensors: laid_out(reference(*tensors, **keywords))

    return Implementation("reference", lambda: None, lambda problem: None, prepare)
