"""The `triton` backend: runs an op's kernel of `kernels/triton` on the current stream, copying only inputs that lie
otherwise.

Configurations come from the kernel's heuristic, or from the disk where `search.tune` measured some, unless
`KERNELPRESS_AUTOTUNE=0`; with `KERNELPRESS_AUTOTUNE=1` the first call of a shape class measures (`tuning`).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernelpress.ops.backends.cuda import FLOATING
from kernelpress.ops.calls import prepared
from kernelpress.ops.checks import TensorSpec
from kernelpress.ops.layout import Layout
from kernelpress.ops.registry import Candidates, Implementation, Problem, Run, Tensors, operator
from kernelpress.ops.tuning import search, stored

if TYPE_CHECKING:
    from kernelpress.kernels.triton.launch import Configuration, Device

__all__ = [
    "Target",
    "TritonKernel",
    "configuration_of",
    "configurations",
    "device_of",
    "kernel_of",
    "launch_into",
    "prepare_with",
    "running_on",
    "target",
    "triton_implementation",
]


@dataclass(frozen=True)
class Target:
    """Where Triton kernels run: the type of the tensors it takes, why nothing runs on the device of an index (None: on
    any), what the device of an index is, and what a launch on it is surrounded by.
    """

    device_type: str
    reason: Callable[[int | None], str | None]
    describe: Callable[[int], Device]
    guard: Callable[[int], Any]


def _reason(index: int | None) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False"
    return None


@functools.cache
def _describe(index: int) -> Device:
    from kernelpress.kernels.triton.launch import Device

    properties = torch.cuda.get_device_properties(index)
    shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    capability = 0 if torch.version.hip else 10 * properties.major + properties.minor
    return Device(properties.name, capability, properties.multi_processor_count, shared)


def _guard(index: int) -> Any:
    return nullcontext() if index == torch.cuda.current_device() else torch.cuda.device(index)


_target = Target("cuda", _reason, _describe, _guard)


def target() -> Target:
    """Where Triton kernels run now."""
    return _target


@contextmanager
def running_on(target: Target) -> Iterator[None]:
    """Run the kernels of all threads on `target`; what was prepared before is prepared anew, inside and after."""
    global _target
    before = _target
    _target = target
    prepared.clear()
    try:
        yield
    finally:
        _target = before
        prepared.clear()


def _supports_all(problem: Problem) -> str | None:
    return None


@dataclass(frozen=True)
class TritonKernel:
    """How an op becomes a launch: `kernels/triton/<family>.py` has a function `name`, and `<name>_configurations`.

    `layouts` says how each tensor argument must lie (None: anyhow, or a parameter that is packed). `operands(tensors,
    options)` packs the weights; an activation passes through as it came, or is left out. `supports(problem)` tells why
    the kernel cannot run a problem whose x has one of `dtypes`. `options` are the op's options, by name, and what else
    the kernel asks of the problem.
    """

    family: str
    name: str
    layouts: tuple[Layout | None, ...]
    operands: Callable[[Tensors, Any], tuple[Tensor | None, ...]]
    supports: Callable[[Problem], str | None] = _supports_all
    dtypes: tuple[torch.dtype, ...] = FLOATING
    options: Callable[[Problem], dict[str, Any]] = lambda problem: problem.options._asdict()

    @property
    def module(self) -> ModuleType:
        """The family's file."""
        return import_module(f"kernelpress.kernels.triton.{self.family}")


def _index(problem: Problem) -> int:
    return torch.device(problem.device).index or 0


def device_of(problem: Problem) -> Device:
    """The device that a problem is to run on."""
    return _target.describe(_index(problem))


def _supports(kernel: TritonKernel, problem: Problem) -> str | None:
    if torch.device(problem.device).type != _target.device_type:
        return f"x is on {problem.device}"
    x = problem.tensors[0]
    assert x is not None
    if x.dtype not in kernel.dtypes:
        return f"the kernel takes {' or '.join(map(str, kernel.dtypes))}, got {x.dtype}"
    return kernel.supports(problem)


def _keywords(kernel: TritonKernel, problem: Problem) -> dict[str, Any]:
    return {**kernel.options(problem), "allow_tf32": problem.allow_tf32}


def configurations(kernel: TritonKernel, problem: Problem, operands: Sequence[Any]) -> tuple[Configuration, ...]:
    """The tile configurations worth trying for a problem, the heuristic's choice first."""
    y = TensorSpec(problem.shape, problem.stride, problem.dtype)
    choose = getattr(kernel.module, f"{kernel.name}_configurations")
    found: tuple[Configuration, ...] = choose(device_of(problem), y, *operands, **_keywords(kernel, problem))
    return found


def _class_configurations(kernel: TritonKernel, problem: Problem, tensors: Tensors) -> dict[str, Configuration]:
    """Those of the largest problem of the shape class, by name: what one problem of it measures, all others know."""
    largest = stored.shape_class(problem)
    activations = operator(problem.op).activations
    marked: list[Any] = [
        spec if at in activations else t for at, (spec, t) in enumerate(zip(largest.tensors, tensors, strict=True))
    ]
    found = configurations(kernel, largest, kernel.operands(marked, problem.options))
    return {str(configuration): configuration for configuration in found}


def _refusals() -> tuple[type[Exception], ...]:
    from triton import TritonError  # a configuration that cannot be compiled, or takes more than the device has

    return RuntimeError, TritonError


def _candidates(kernel: TritonKernel, problem: Problem, tensors: Tensors) -> Candidates:
    known = _class_configurations(kernel, problem, tensors)
    return Candidates(
        f"triton {kernel.name}",
        device_of(problem).name,
        tuple(known),
        lambda name: prepare_with(kernel, problem, tensors, known[name]),
        _refusals(),
    )


def configuration_of(kernel: TritonKernel, problem: Problem, tensors: Tensors) -> Configuration:
    """The tile configuration of a call: the measured one where there is one, else the heuristic's."""
    name = search.chosen(_candidates(kernel, problem, tensors), problem, tensors)
    if name is not None:
        return _class_configurations(kernel, problem, tensors)[name]
    return configurations(kernel, problem, kernel.operands(tensors, problem.options))[0]


def prepare_with(kernel: TritonKernel, problem: Problem, tensors: Tensors, configuration: Configuration) -> Run:
    """A prepared call in a given tile configuration."""
    shape, stride, dtype, device = problem.shape, problem.stride, problem.dtype, torch.device(problem.device)
    if 0 in shape:
        return lambda tensors: torch.empty_strided(shape, stride, dtype=dtype, device=device)
    run, guard, index = getattr(kernel.module, kernel.name), _target.guard, _index(problem)
    keywords = {**_keywords(kernel, problem), "configuration": configuration}
    activations = operator(problem.op).activations
    marked: list[Any] = [at if at in activations and t is not None else t for at, t in enumerate(tensors)]
    operands: tuple[Any, ...] = kernel.operands(marked, problem.options)
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
        given = [tensors[operand] if isinstance(operand, int) else operand for operand in operands]
        with guard(index):
            run(y, *given, **keywords)
        return y

    return compute


def launch_into(
    kernel: TritonKernel, problem: Problem, tensors: Tensors, y: Tensor, configuration: Configuration
) -> None:
    """Runs a kernel into `y` at once; tensors lie as it reads them."""
    run = getattr(kernel.module, kernel.name)
    run(y, *kernel.operands(tensors, problem.options), **_keywords(kernel, problem), configuration=configuration)


def _prepare(kernel: TritonKernel, problem: Problem, tensors: Tensors) -> Run:
    if 0 in problem.shape:
        return prepare_with(kernel, problem, tensors, None)  # type: ignore[arg-type]
    return prepare_with(kernel, problem, tensors, configuration_of(kernel, problem, tensors))


_kernels: dict[str, TritonKernel] = {}


def kernel_of(op: str) -> TritonKernel:
    """The Triton kernel of an op. Raises `ValueError` where it has none."""
    try:
        return _kernels[op]
    except KeyError:
        raise ValueError(
            f"op: expected one with a Triton kernel ({', '.join(_kernels) or 'none'}), got {op!r}"
        ) from None


def triton_implementation(op: str, kernel: TritonKernel) -> Implementation:
    """The entry of an op's Triton kernel."""
    _kernels[op] = kernel
    return Implementation(
        op,
        "triton",
        lambda: _target.reason(None),
        lambda problem: _supports(kernel, problem),
        lambda problem, tensors: _prepare(kernel, problem, tensors),
        lambda problem, tensors: _candidates(kernel, problem, tensors),
    )
