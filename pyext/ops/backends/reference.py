"""The `reference` backend: every op in plain PyTorch, on any device and in any dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kernelpress.ops.registry import Implementation, Problem, Run, Tensors

__all__ = ["reference_implementation"]


def reference_implementation(reference: Callable[..., Any]) -> Implementation:
    """The entry of an op's plain PyTorch form; it runs everything."""

    def prepare(problem: Problem, tensors: Tensors) -> Run:
        keywords, copy = problem.options._asdict(), problem.layout.copy
        if len(problem.outputs) > 1:
            return lambda tensors: tuple(map(copy, reference(*tensors, **keywords)))
        return lambda tensors: copy(reference(*tensors, **keywords))

    return Implementation("reference", lambda: None, lambda problem: None, prepare)
