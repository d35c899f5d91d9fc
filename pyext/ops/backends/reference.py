"""The `reference` backend: an op in plain PyTorch, on any device and in any float dtype."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kernelpress.ops.registry import Implementation, Problem, Run, Tensors

__all__ = ["reference_implementation"]


def reference_implementation(op: str, reference: Callable[..., Tensor]) -> Implementation:
    """The entry of an op's plain PyTorch form; it runs everything."""

    def prepare(problem: Problem, tensors: Tensors) -> Run:
        keywords = problem.options._asdict()
        return lambda tensors: problem.layout.copy(reference(*tensors, **keywords))

    return Implementation(op, "reference", lambda: None, lambda problem: None, prepare)
