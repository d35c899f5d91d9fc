"""The `cpu` backend: runs an op's native kernel on channels_last memory, copying only inputs that lie otherwise."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelpress import native
from kernelpress.ops.registry import Implementation, NativeKernel, Problem, Run, Tensors, native_spacings

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


def _prepare(kernel: NativeKernel, problem: Problem) -> Run:
    shape, stride, options = problem.shape, problem.stride, problem.options
    if 0 in shape:
        return lambda tensors: torch.empty_strided(shape, stride, dtype=torch.float32)
    function = getattr(native.cpu(), kernel.name)
    operands = kernel.operands
    y_spacing = kernel.out.spacing(shape, stride)
    assert y_spacing is not None
    sizes = kernel.sizes(problem, native_spacings(kernel, problem), y_spacing)
    copies = [
        (index, layout.copy)
        for index, (layout, t) in enumerate(zip(kernel.layouts, problem.tensors, strict=True))
        if t is not None and layout is not None and layout.spacing(t.shape, t.stride) is None
    ]

    def compute(tensors: Tensors) -> Tensor:
        y = torch.empty_strided(shape, stride, dtype=torch.float32)
        held = operands(tensors, options)
        function(*[0 if t is None else t.data_ptr() for t in held], y.data_ptr(), *sizes)
        return y

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
        lambda problem: _prepare(kernel, problem),
    )
