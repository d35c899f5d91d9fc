"""The `reference` backend: an op in plain PyTorch, on any device and in any float dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernelpress.ops.registry import Implementation, Problem, Run, Tensors

__all__ = ["reference_implementation"]


def reference_implementation(op: str, reference: Callable[..., Tensor]) -> Implementation:
    """The entry of an op's plain PyTorch form; it runs everything."""

    def prepare(problem: Problem, tensors: Tensors) -> Run:
        keywords = problem.options._asdict()
        if len(problem.shape) == 4:
            return lambda tensors: reference(*tensors, **keywords).contiguous(memory_format=torch.channels_last)
        return lambda tensors: reference(*tensors, **keywords).contiguous()

    return Implementation(op, "reference", lambda: None, lambda problem: None, prepare)
