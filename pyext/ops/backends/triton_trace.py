"""Lets Inductor and AOTInductor see through ops on the `triton` backend: a traced op becomes its kernel's launches.

`torch.library.triton_op` does the same for an op of its own; here the rule stands with the ops that there are, and
holds only where the registry chooses "triton". `torch.export` keeps the ops whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_torch_dispatch, wrap_triton

from kernelpress.ops import registry
from kernelpress.ops.backends import triton
from kernelpress.ops.backends.kernel import laid_out, new_outputs
from kernelpress.ops.calls import packing
from kernelpress.ops.checks import TensorSpec
from kernelpress.ops.registry import Operator, Problem, Tensors
from kernelpress.runtime.torch_private import (
    FakeTensor,
    FunctionalTensor,
    FunctionalTensorMode,
    disable_current_modes,
    optimization_hint,
)

__all__ = ["see_through"]

_TRACED_TYPES = (Tensor, FunctionalTensor, FakeTensor)


def see_through(operator: Operator, library: Library) -> None:
    """Registers the rule of an op that has a Triton kernel."""

    def decompose(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
        from kernelpress.runtime.torch_private import custom_triton_ops_decomposition_disabled

        if custom_triton_ops_decomposition_disabled() or not all(issubclass(t, _TRACED_TYPES) for t in types):
            return mode.__torch_dispatch__(op, types, args, kwargs)
        tensors, options, backend = operator.signature.bind(args, kwargs)
        requested = registry.requested_backend(backend)
        device, specs = registry.common_device(operator, tensors), registry.specs_of(tensors)
        hinted = tuple(None if spec is None else _hinted(spec) for spec in specs)
        problem = registry.problem(operator, hinted, options, device, requested=requested)
        chosen = registry.implementation(problem, requested)
        if chosen.backend != "triton":
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode:
            return _launched(registry.problem(operator, specs, options, device), problem, tensors)

    register_torch_dispatch(f"kernelpress::{operator.name}", FunctionalTensorMode, decompose, lib=library)


def _hinted(spec: TensorSpec) -> TensorSpec:
    """Sizes as they were in the example: configurations are chosen by them, and hold for every other size."""
    return TensorSpec(_numbers(spec.shape), _numbers(spec.stride), spec.dtype)


def _numbers(sizes: Any) -> tuple[int, ...]:
    return tuple(optimization_hint(size) for size in sizes)


def _launched(symbolic: Problem, problem: Problem, tensors: list[Tensor | None]) -> Any:
    """The op's launches on tensors that may have symbolic sizes; `problem` is the same call with numbers for them."""
    from kernelpress.kernels.triton.launch import launching_with

    kernel = problem.operator.kernel("triton")
    with packing.traced(), disable_current_modes():
        without_values = [None if spec is None else _meta(spec) for spec in problem.tensors]
        configuration = triton.configuration_of(kernel, problem, without_values)

    def launch(tensors: Tensors) -> Any:
        made = new_outputs(symbolic)()
        with packing.traced(), launching_with(_wrapped):
            triton.launch_into(kernel, problem, tensors, made, configuration)
        return made

    return laid_out(kernel, problem, launch)(tensors)


def _meta(spec: TensorSpec) -> Tensor:
    return torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device="meta")


def _wrapped(kernel: Any, grid: tuple[int], arguments: Any, constants: dict[str, Any], configuration: Any) -> None:
    wrap_triton(kernel)[grid](*arguments, **constants, num_warps=configuration.warps, num_stages=configuration.stages)
