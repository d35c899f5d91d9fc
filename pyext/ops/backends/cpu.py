"""The `cpu` backend: kernels of the native module `_cpu`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernelpress.ops.backends.kernel import (
    Arguments,
    Kernel,
    Target,
    activation_index,
    bits,
    build,
    implementation,
    laid_out,
    new_outputs,
    outputs_of,
)
from kernelpress.ops.registry import Implementation, Problem, Run, Tensors
from kernelpress.runtime import native

__all__ = ["arguments", "cpu_implementation"]


def _reason(index: int | None) -> str | None:
    loaded = native.load()
    return None if loaded.module is not None else f"the native module is absent: {loaded.absent_because}"


def _run(name: str, words: Sequence[int]) -> None:
    getattr(native.cpu(), name)(*words)


_TARGET = Target("cpu", _reason, lambda index: None, _run)


def arguments(kernel: Kernel, problem: Problem, tensors: Tensors) -> Arguments:
    """What a kernel of `_cpu` is called with: words of eight bytes, a float by its bits."""
    activation = getattr(problem.options, "activation", None)
    built = build(kernel, problem, tensors, () if activation is None else (activation_index(activation),))
    return built._replace(words=tuple([bits(word) if isinstance(word, float) else word for word in built.words]))


def _prepare(kernel: Kernel, problem: Problem, tensors: Tensors) -> Run:
    new = new_outputs(problem)
    if 0 in problem.shape:
        return lambda tensors: new()
    built = arguments(kernel, problem, tensors)
    if len(problem.outputs) > 1 or built.workspace_bytes:
        return laid_out(kernel, problem, _in_python(built, new))
    form: Tensor = new()
    form.untyped_storage().resize_(0)  # quicker to copy than to describe; it needs no memory for that
    compute: Run = native.cpu().KernelCall(
        built.name, built.words, built.outputs, built.changing, built.held, torch.empty_like, form
    )
    return laid_out(kernel, problem, compute)


def _in_python(built: Arguments, new: Any) -> Run:
    """A call with several outputs or a workspace, which `KernelCall` does not know."""

    def compute(tensors: Tensors) -> Any:
        made = new()
        outputs = outputs_of(made)
        if built.workspace_bytes:
            outputs = (*outputs, torch.empty(built.workspace_bytes, dtype=torch.uint8))
        _TARGET.launch(built.name, built.into(tensors, *outputs))
        return made

    return compute


def cpu_implementation(kernel: Kernel) -> Implementation:
    """The entry of an op's native kernel."""
    return implementation("cpu", kernel, _TARGET, _prepare)
