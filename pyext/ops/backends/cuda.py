"""The `cuda` backend: kernels of the native module `_cuda`, in the tile configuration that was measured fastest, else
the one that the launcher's heuristic chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelpress.ops.backends.kernel import (
    Kernel,
    Target,
    activation_index,
    build,
    implementation,
    index_of,
    laid_out,
    new_outputs,
)
from kernelpress.ops.registry import Candidates, Implementation, Problem, Run, Tensors
from kernelpress.ops.tuning import search
from kernelpress.runtime import native
from kernelpress.runtime.torch_private import current_raw_stream

__all__ = [
    "DATA_TYPES",
    "HEURISTIC",
    "TARGET",
    "CudaDevice",
    "cuda_implementation",
    "data_type",
    "device_of",
    "prepare_with",
]

DATA_TYPES: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int32)
"""The position of a dtype is the integer that the kernels take (`DataType` in `kernels/cuda/common/status.h`)."""

HEURISTIC = -1
"""In place of a tile configuration: the launcher chooses."""


class CudaDevice(NamedTuple):
    """A device as the kernels' heuristics see it (`Device` in `kernels/cuda/common/status.h`), and its name."""

    name: str
    capability: int
    multiprocessors: int
    shared_bytes: int
    l2_bytes: int


def _describe(index: int) -> CudaDevice:
    return CudaDevice(**native.cuda().device(index))


def _launch(name: str, tensors: Sequence[Tensor], fields: Sequence[int | float], index: int) -> None:
    getattr(native.cuda(), name)(*fields, current_raw_stream(index), index)


def _configurations(name: str) -> Sequence[str]:
    names: Sequence[str] = native.cuda().configurations(name)
    return names


TARGET = Target("cuda", native.cuda_reason, _describe, _launch, _configurations)
"""`launch(name, tensors, fields, index)` runs a launcher of `_cuda` on the fields of its argument struct; `tensors` are
all whose memory the kernel may touch, the outputs first."""


def data_type(dtype: torch.dtype) -> int:
    """The integer of a dtype. Raises `ValueError` for one that no kernel takes."""
    return DATA_TYPES.index(dtype)


def device_of(problem: Problem) -> Any:
    """The device that a problem is to run on."""
    return TARGET.describe(index_of(problem))


def _candidates(kernel: Kernel, problem: Problem, tensors: Tensors) -> Candidates:
    names = tuple(TARGET.configurations(kernel.name))
    return Candidates(
        kernel.name,
        device_of(problem).name,
        names,
        lambda name: prepare_with(kernel, problem, tensors, names.index(name)),
    )


def _prepare(kernel: Kernel, problem: Problem, tensors: Tensors) -> Run:
    candidates = _candidates(kernel, problem, tensors)
    name = search.chosen(candidates, problem, tensors)
    return prepare_with(kernel, problem, tensors, HEURISTIC) if name is None else candidates.prepare(name)


def prepare_with(kernel: Kernel, problem: Problem, tensors: Tensors, configuration: int) -> Run:
    """A prepared call in a given tile configuration: an index of the launcher's table, or `HEURISTIC`."""
    index, place, new = index_of(problem), torch.device(problem.device), new_outputs(problem)
    if 0 in problem.shape:
        return lambda tensors: new()
    x = problem.first
    activation = activation_index(getattr(problem.options, "activation", "identity"))
    built = build(kernel, problem, tensors, (data_type(x.dtype), activation, configuration), device_of(problem))
    launch, count = TARGET.launch, len(problem.outputs)
    name, words, changing, at, held, workspace_bytes = built

    def compute(tensors: Tensors) -> Any:
        made = new()
        outputs = made if count > 1 else (made,)
        fields, touched = list(words), [*outputs, *held]
        for word, y in enumerate(outputs, at):
            fields[word] = y.data_ptr()
        for word, source in changing:
            operand = tensors[source]
            assert operand is not None
            fields[word] = operand.data_ptr()
            touched.append(operand)
        if workspace_bytes:
            workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=place)
            fields[at + count] = workspace.data_ptr()
            touched.append(workspace)
        launch(name, touched, fields, index)
        return made

    return laid_out(kernel, problem, compute)


def cuda_implementation(kernel: Kernel) -> Implementation:
    """The entry of an op's CUDA kernel."""
    return implementation("cuda", kernel, TARGET, _prepare, _candidates)
