"""The `cpu` backend: runs an op's native kernel on channels_last memory, copying only inputs that lie otherwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernelpress.ops.registry import Implementation, NativeKernel, Problem, Run, Tensors, native_spacings, operator
from kernelpress.runtime import native

__all__ = ["cpu_implementation"]


def _available() -> str | None:
    loaded = native.load()
    return None if loaded.module is not None else f"the native module is absent: {loaded.absent_because}"


def _supports(kernel: NativeKernel, problem: Problem) -> str | None:
    if problem.device != "cpu":
        return f"x is on {problem.device}"
    x = problem.tensors[0]
    assert x is not None
    if x.dtype != torch.float32:
        return f"the native kernels compute in float32, got {x.dtype}"
    return kernel.supports(problem)


def _prepare(kernel: NativeKernel, problem: Problem, tensors: Tensors) -> Run:
    shape, stride = problem.shape, problem.stride
    if 0 in shape:
        return lambda tensors: torch.empty_strided(shape, stride, dtype=torch.float32)
    y_spacing = problem.layout.spacing(shape, stride)
    assert y_spacing is not None
    sizes = kernel.sizes(problem, native_spacings(kernel.layouts, problem), y_spacing)
    activations = operator(problem.op).activations
    marked: list[Any] = [index if index in activations and t is not None else t for index, t in enumerate(tensors)]
    operands: tuple[Any, ...] = kernel.operands(marked, problem.options)
    changing = tuple((at, operand) for at, operand in enumerate(operands) if isinstance(operand, int))
    held = tuple(operand for operand in operands if isinstance(operand, Tensor))
    addresses = [operand.data_ptr() if isinstance(operand, Tensor) else 0 for operand in operands]
    form = torch.empty_strided(shape, stride, dtype=torch.float32)
    form.untyped_storage().resize_(0)  # quicker to copy than to describe; it needs no memory for that
    compute: Run = native.cpu().KernelCall(
        kernel.name, (*addresses, 0, *sizes), len(operands), changing, held, torch.empty_like, form
    )
    copies = [
        (index, layout.copy)
        for index, (layout, t) in enumerate(zip(kernel.layouts, problem.tensors, strict=True))
        if t is not None and layout is not None and layout.spacing(t.shape, t.stride) is None
    ]

    def compute_from_copies(tensors: Tensors) -> Tensor:
        laid_out = list(tensors)
        for index, copy in copies:
            t = laid_out[index]
            assert t is not None
            laid_out[index] = copy(t)
        return compute(laid_out)

    return compute_from_copies if copies else compute


def cpu_implementation(op: str, kernel: NativeKernel) -> Implementation:
    """The entry of an op's native kernel."""
    return Implementation(
        op,
        "cpu",
        _available,
        lambda problem: _supports(kernel, problem),
        lambda problem, tensors: _prepare(kernel, problem, tensors),
    )
