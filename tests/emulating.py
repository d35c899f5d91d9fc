"""Helpers of the CUDA kernels' tests: an op in a tile configuration chosen by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kernelpress.ops import registry
from kernelpress.ops.backends import cuda

__all__ = ["run_configured"]


def run_configured(op: str, tensors: Sequence[Tensor | None], options: dict[str, Any], configuration: str) -> Tensor:
    """The op on the backend "cuda", in the first tile configuration whose name begins so."""
    entry = registry.operator(op)
    kernel = entry.kernel("cuda")
    problem = registry.problem(entry, registry.specs_of(tensors), entry.signature.options(**options), "cpu", True)
    names = cuda.TARGET.configurations(kernel.name)
    index = next(i for i, name in enumerate(names) if name.startswith(configuration))
    return cuda.prepare_with(kernel, problem, tensors, index)(tensors)
