"""The `triton` backend: runs an op's kernel of `kernels/triton` on the current stream, copying only inputs that lie
otherwise.

Configurations come from the kernel's heuristic, or from the disk where `ops.tune` measured some, unless
`KERNELPRESS_AUTOTUNE=0`; with `KERNELPRESS_AUTOTUNE=1` the first call of a shape class measures (`tuning`).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from kernelpress.ops.backends.kernel import (
    Kernel,
    Target,
    implementation,
    index_of,
    laid_out,
    new_outputs,
    operands_of,
    outputs_of,
    supports_all,
)
from kernelpress.ops.registry import Candidates, Implementation, Problem, Run, Tensors
from kernelpress.ops.tuning import search, stored

if TYPE_CHECKING:
    from kernelpress.kernels.triton.launch import Configuration, Device

__all__ = [
    "TARGET",
    "configuration_of",
    "configurations",
    "device_of",
    "launch_into",
    "prepare_with",
    "triton_implementation",
]


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


def _launch(run: Callable[[], None], index: int) -> None:
    if index == torch.cuda.current_device():
        run()
    else:
        with torch.cuda.device(index):
            run()


TARGET = Target("cuda", _reason, _describe, _launch)
"""`launch(run, index)` calls `run`, which launches on the current device, for the device of that index."""


def device_of(problem: Problem) -> Any:
    """The device that a problem is to run on."""
    return TARGET.describe(index_of(problem))


def _module(kernel: Kernel) -> ModuleType:
    return import_module(f"kernelpress.kernels.triton.{kernel.family}")


def _keywords(kernel: Kernel, problem: Problem) -> dict[str, Any]:
    return {**kernel.options(problem), "allow_tf32": problem.allow_tf32}


def configurations(kernel: Kernel, problem: Problem, tensors: Sequence[Any]) -> tuple[Configuration, ...]:
    """The tile configurations worth trying for a problem, the heuristic's choice first. Activations may be specs."""
    operands = kernel.operands(problem.options, *tensors)
    choose = getattr(_module(kernel), f"{kernel.name}_configurations")
    found: tuple[Configuration, ...] = choose(
        device_of(problem), problem.outputs[0], *operands, **_keywords(kernel, problem)
    )
    return found


def _class_configurations(kernel: Kernel, problem: Problem, tensors: Tensors) -> dict[str, Configuration]:
    """Those of the largest problem of the shape class, by name: what one problem of it measures, all others know."""
    largest, activations = stored.shape_class(problem), problem.operator.activations
    given = [spec if i in activations else t for i, (spec, t) in enumerate(zip(largest.tensors, tensors, strict=True))]
    return {str(configuration): configuration for configuration in configurations(kernel, largest, given)}


def _refusals() -> tuple[type[Exception], ...]:
    from triton import TritonError  # a configuration that cannot be compiled, or takes more than the device has

    return RuntimeError, TritonError


def _candidates(kernel: Kernel, problem: Problem, tensors: Tensors) -> Candidates:
    known = _class_configurations(kernel, problem, tensors)
    return Candidates(
        f"triton {kernel.name}",
        device_of(problem).name,
        tuple(known),
        lambda name: prepare_with(kernel, problem, tensors, known[name]),
        _refusals(),
    )


def configuration_of(kernel: Kernel, problem: Problem, tensors: Tensors) -> Configuration:
    """The tile configuration of a call: the measured one where there is one, else the heuristic's."""
    name = search.chosen(_candidates(kernel, problem, tensors), problem, tensors)
    if name is not None:
        return _class_configurations(kernel, problem, tensors)[name]
    return configurations(kernel, problem, tensors)[0]


def prepare_with(kernel: Kernel, problem: Problem, tensors: Tensors, configuration: Configuration | None) -> Run:
    """A prepared call in a given tile configuration; None where there is nothing to compute."""
    new = new_outputs(problem)
    if 0 in problem.shape:
        return lambda tensors: new()
    run, launch, index = getattr(_module(kernel), kernel.name), TARGET.launch, index_of(problem)
    keywords = {**_keywords(kernel, problem), "configuration": configuration}
    operands = operands_of(kernel, problem, tensors)

    def compute(tensors: Tensors) -> Any:
        made = new()
        given = [tensors[operand] if isinstance(operand, int) else operand for operand in operands]
        launch(functools.partial(run, *outputs_of(made), *given, **keywords), index)
        return made

    return laid_out(kernel, problem, compute)


def launch_into(kernel: Kernel, problem: Problem, tensors: Tensors, made: Any, configuration: Configuration) -> None:
    """Runs a kernel into the outputs `made` at once; tensors lie as it reads them."""
    run, operands = getattr(_module(kernel), kernel.name), kernel.operands(problem.options, *tensors)
    run(*outputs_of(made), *operands, **_keywords(kernel, problem), configuration=configuration)


def _prepare(kernel: Kernel, problem: Problem, tensors: Tensors) -> Run:
    configuration = None if 0 in problem.shape else configuration_of(kernel, problem, tensors)
    return prepare_with(kernel, problem, tensors, configuration)


def triton_implementation(family: str, like: Kernel, **changes: Any) -> Implementation:
    """The entry of an op's Triton kernel in that family's file: like another kernel of the op, but for the limits of
    that one and for `changes`."""
    kernel = replace(like, **{"supports": supports_all, "family": family, **changes})
    return implementation("triton", kernel, TARGET, _prepare, _candidates)
