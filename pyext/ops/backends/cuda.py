"""The `cuda` backend: runs an op's kernel of `_cuda` on the current stream, copying only inputs that lie otherwise.

Every launch goes through one `Target`: the devices of this machine, or what a test puts in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelpress.kernels.reference import ACTIVATIONS
from kernelpress.ops.calls import packing, prepared
from kernelpress.ops.layout import Layout
from kernelpress.ops.registry import Candidates, Implementation, Problem, Run, Tensors, native_spacings, operator
from kernelpress.ops.tuning import search
from kernelpress.runtime import native
from kernelpress.runtime.torch_private import current_raw_stream

__all__ = [
    "DATA_TYPES",
    "FLOATING",
    "HEURISTIC",
    "CudaDevice",
    "CudaKernel",
    "Target",
    "cuda_implementation",
    "data_type",
    "device_of",
    "float_vector",
    "kernel_of",
    "launching_on",
    "prepare_with",
    "target",
    "tf32_reason",
]

DATA_TYPES: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int32)
"""The position of a dtype is the integer that the kernels take (`DataType` in `kernels/cuda/common/status.h`)."""

FLOATING: tuple[torch.dtype, ...] = DATA_TYPES[:3]

HEURISTIC = -1
"""In place of a tile configuration: the launcher chooses."""


class CudaDevice(NamedTuple):
    """A device as the kernels' heuristics see it (`Device` in `kernels/cuda/common/status.h`), and its name."""

    name: str
    capability: int
    multiprocessors: int
    shared_bytes: int
    l2_bytes: int


Field = int | float
Launch = Callable[[str, Sequence[Tensor], Sequence[Field], int], None]


@dataclass(frozen=True)
class Target:
    """Where launches go.

    `device_type` is the type of the tensors it takes. `reason(index)` tells why nothing runs on the device of that
    index (None: on any). `describe(index)` is the device. `launch(name, tensors, fields, index)` runs a launcher of
    `_cuda` on the fields of its argument struct; `tensors` are all whose memory the kernel may touch, the output first.
    `configurations(name)` names the tile configurations of a launcher's table.
    """

    device_type: str
    reason: Callable[[int | None], str | None]
    describe: Callable[[int], CudaDevice]
    launch: Launch
    configurations: Callable[[str], Sequence[str]]


def _describe(index: int) -> CudaDevice:
    return CudaDevice(**native.cuda().device(index))


def _launch(name: str, tensors: Sequence[Tensor], fields: Sequence[Field], index: int) -> None:
    getattr(native.cuda(), name)(*fields, current_raw_stream(index), index)


def _configurations(name: str) -> Sequence[str]:
    return native.cuda().configurations(name)


_target = Target("cuda", native.cuda_reason, _describe, _launch, _configurations)


def target() -> Target:
    """Where launches go now."""
    return _target


@contextmanager
def launching_on(target: Target) -> Iterator[None]:
    """Send the launches of all threads to `target`; what was prepared before is prepared anew, inside and after."""
    global _target
    before = _target
    _target = target
    prepared.clear()
    try:
        yield
    finally:
        _target = before
        prepared.clear()


def _no_scalars(problem: Problem) -> tuple[float, ...]:
    return ()


def _no_workspace(problem: Problem, device: CudaDevice) -> int:
    return 0


@dataclass(frozen=True)
class CudaKernel:
    """How an op becomes a launch of `_cuda`: the fields of the launcher's argument struct are

        addresses of operands, of y, of the workspace if there is one; sizes; dtype, activation, configuration; scalars

    `layouts` says how each tensor argument must lie (None: anyhow, or a parameter that is packed). `supports(problem)`
    tells why the kernel cannot run a problem whose x has one of `dtypes`. `operands(tensors, options)` packs the
    weights; an activation passes through as it came. `sizes(problem, spacings, y_spacing)` gives integers, a spacing
    being the distance in elements between neighbouring pixels or rows, 0 for an absent tensor. `dtype` is x's,
    `activation` the option of that name, identity where there is none. `scalars(problem)` gives the floats.
    `workspace(problem, device)` is the size in bytes of memory that the kernel may write while it runs, enough for
    every configuration; where `has_workspace`, its address follows y's, 0 for no bytes. Where a launch depends on the
    values of parameters, `specialise(kernel, problem, tensors, device)` gives the kernel for these.
    """

    name: str
    layouts: tuple[Layout | None, ...]
    supports: Callable[[Problem], str | None]
    operands: Callable[[Tensors, Any], tuple[Tensor | None, ...]]
    sizes: Callable[[Problem, tuple[int, ...], int], tuple[int, ...]]
    scalars: Callable[[Problem], tuple[float, ...]] = _no_scalars
    dtypes: tuple[torch.dtype, ...] = FLOATING
    workspace: Callable[[Problem, CudaDevice], int] = _no_workspace
    has_workspace: bool = False
    specialise: Callable[[CudaKernel, Problem, Tensors, CudaDevice], CudaKernel] | None = None


def data_type(dtype: torch.dtype) -> int:
    """The integer of a dtype. Raises `ValueError` for one that no kernel takes."""
    return DATA_TYPES.index(dtype)


def float_vector(t: Tensor | None) -> Tensor | None:
    """A bias or scale as the kernels read it: contiguous float32; converted once while it stays unchanged."""
    if t is None or (t.dtype == torch.float32 and t.is_contiguous()):
        return t
    return packing.packed(t, None, "float32", lambda values: values.float().contiguous())


def device_of(problem: Problem) -> CudaDevice:
    """The device that a problem is to run on."""
    return _target.describe(_index(problem))


def tf32_reason(problem: Problem) -> str | None:
    """Why a kernel that multiplies float32 on tensor cores must not run, else None: TF32 is not allowed."""
    x = problem.tensors[0]
    assert x is not None
    if x.dtype != torch.float32 or problem.allow_tf32:
        return None
    return "it multiplies float32 in TF32, which torch.backends.cudnn.allow_tf32 forbids"


def _index(problem: Problem) -> int:
    return torch.device(problem.device).index or 0


def _supports(kernel: CudaKernel, problem: Problem) -> str | None:
    if torch.device(problem.device).type != _target.device_type:
        return f"x is on {problem.device}"
    reason = _target.reason(_index(problem))
    if reason is not None:
        return reason
    x = problem.tensors[0]
    assert x is not None
    if x.dtype not in kernel.dtypes:
        return f"the kernel takes {' or '.join(map(str, kernel.dtypes))}, got {x.dtype}"
    return kernel.supports(problem)


def _fields(kernel: CudaKernel, problem: Problem, configuration: int) -> tuple[Field, ...]:
    """The argument struct after its addresses."""
    x = problem.tensors[0]
    assert x is not None
    y_spacing = problem.layout.spacing(problem.shape, problem.stride)
    assert y_spacing is not None
    activation = ACTIVATIONS.index(getattr(problem.options, "activation", "identity"))
    return (
        *kernel.sizes(problem, native_spacings(kernel.layouts, problem), y_spacing),
        *(data_type(x.dtype), activation, configuration),
        *kernel.scalars(problem),
    )


def _candidates(kernel: CudaKernel, problem: Problem, tensors: Tensors) -> Candidates:
    names = tuple(_target.configurations(kernel.name))
    return Candidates(
        kernel.name,
        device_of(problem).name,
        names,
        lambda name: prepare_with(kernel, problem, tensors, names.index(name)),
    )


def _prepare(kernel: CudaKernel, problem: Problem, tensors: Tensors) -> Run:
    candidates = _candidates(kernel, problem, tensors)
    name = search.chosen(candidates, problem, tensors)
    if name is None:
        return prepare_with(kernel, problem, tensors, HEURISTIC)
    return candidates.prepare(name)


def prepare_with(kernel: CudaKernel, problem: Problem, tensors: Tensors, configuration: int) -> Run:
    """A prepared call in a given tile configuration: an index of the launcher's table, or `HEURISTIC`."""
    if kernel.specialise is not None:
        kernel = kernel.specialise(kernel, problem, tensors, device_of(problem))
    shape, stride, dtype, device = problem.shape, problem.stride, problem.dtype, torch.device(problem.device)
    if 0 in shape:
        return lambda tensors: torch.empty_strided(shape, stride, dtype=dtype, device=device)
    name, launch, index = kernel.name, _target.launch, _index(problem)
    activations = operator(problem.op).activations
    marked: list[Any] = [at if at in activations and t is not None else t for at, t in enumerate(tensors)]
    operands: tuple[Any, ...] = kernel.operands(marked, problem.options)
    changing: list[tuple[int, int]] = [(at, operand) for at, operand in enumerate(operands) if isinstance(operand, int)]
    constant = [operand for operand in operands if isinstance(operand, Tensor)]
    at_y = len(operands)
    template: list[Field] = [
        *[operand.data_ptr() if isinstance(operand, Tensor) else 0 for operand in operands],
        *[0] * (2 if kernel.has_workspace else 1),
        *_fields(kernel, problem, configuration),
    ]
    workspace_bytes = kernel.workspace(problem, device_of(problem)) if kernel.has_workspace else 0
    copies = [
        (at, layout.copy)
        for at, (layout, t) in enumerate(zip(kernel.layouts, problem.tensors, strict=True))
        if t is not None and layout is not None and layout.spacing(t.shape, t.stride) is None
    ]

    def compute(tensors: Tensors) -> Tensor:
        if copies:
            tensors = list(tensors)
            for at, copy in copies:
                t = tensors[at]
                assert t is not None
                tensors[at] = copy(t)
        y = torch.empty_strided(shape, stride, dtype=dtype, device=device)
        touched = [y, *constant]
        fields = template.copy()
        fields[at_y] = y.data_ptr()
        for at, source in changing:
            operand = tensors[source]
            assert operand is not None
            fields[at] = operand.data_ptr()
            touched.append(operand)
        if workspace_bytes:
            workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=device)
            fields[at_y + 1] = workspace.data_ptr()
            touched.append(workspace)
        launch(name, touched, fields, index)
        return y

    return compute


_kernels: dict[str, CudaKernel] = {}


def kernel_of(op: str) -> CudaKernel:
    """The CUDA kernel of an op. Raises `ValueError` where it has none."""
    try:
        return _kernels[op]
    except KeyError:
        raise ValueError(f"op: expected one with a CUDA kernel ({', '.join(_kernels) or 'none'}), got {op!r}") from None


def cuda_implementation(op: str, kernel: CudaKernel) -> Implementation:
    """The entry of an op's CUDA kernel."""
    _kernels[op] = kernel
    return Implementation(
        op,
        "cuda",
        lambda: _target.reason(None),
        lambda problem: _supports(kernel, problem),
        lambda problem, tensors: _prepare(kernel, problem, tensors),
        lambda problem, tensors: _candidates(kernel, problem, tensors),
    )
