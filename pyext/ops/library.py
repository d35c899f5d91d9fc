"""Publishes ops as `torch.ops.kernelpress.*`: schema, kernels, fake kernel, autograd, FLOP formula; and calls them.

The dispatcher and its autograd key cost several times what a small kernel does. A call that nothing could intercept
(plain CPU tensors, no gradient wanted, no mode, transform or trace active) therefore goes straight to the backend.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernelpress.ops import registry
from kernelpress.ops.checks import TensorSpec
from kernelpress.ops.registry import Operator, Tensors

__all__ = ["LIBRARY", "call", "publish"]

LIBRARY = torch.library.Library("kernelpress", "DEF")

_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})


def publish(operator: Operator) -> Operator:
    """Register an op with torch and with the registry."""
    LIBRARY.define(operator.name + operator.schema, tags=(torch.Tag.pt2_compliant_tag,))
    _register_kernels(operator)
    _register_autograd(operator)
    _register_flops(operator)
    return registry.register(operator)


def call(operator: Operator, tensors: tuple[Tensor | None, ...], options: Any, backend: str) -> Tensor:
    """Call an op: through the dispatcher where something could intercept it, straight to the backend otherwise."""
    if torch.compiler.is_compiling() or not _nothing_intercepts(tensors):
        overload = getattr(torch.ops.kernelpress, operator.name).default
        return overload(*tensors, **options._asdict(), backend=backend)
    return registry.run(operator, tensors, options, backend)


def _nothing_intercepts(tensors: Tensors) -> bool:
    grad = torch.is_grad_enabled()
    for t in tensors:
        if t is not None and (type(t) not in _PLAIN_TYPES or not t.is_cpu or t.is_neg() or (grad and t.requires_grad)):
            return False
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
        and torch._C._get_tracing_state() is None
        and not torch.autograd.profiler._is_profiler_enabled
    )


def _one_device(operator: Operator, tensors: Tensors) -> str:
    first = next(t for t in tensors if t is not None).device
    for name, t in zip(operator.tensors, tensors, strict=True):
        if t is not None and t.device != first:
            raise ValueError(f"{name}: expected the device of {operator.tensors[0]}, {first}, got {t.device}")
    return first.type


def _register_kernels(operator: Operator) -> None:
    def on_cpu(*args: Any, **kwargs: Any) -> Tensor:
        return registry.run(operator, *registry.bind(operator, args, kwargs))

    def elsewhere(*args: Any, **kwargs: Any) -> Tensor:
        tensors, options, backend = registry.bind(operator, args, kwargs)
        return registry.run(operator, tensors, options, backend, _one_device(operator, tensors))

    def fake(*args: Any, **kwargs: Any) -> Tensor:
        tensors, options, _ = registry.bind(operator, args, kwargs)
        specs = tuple(None if t is None else TensorSpec.of(t) for t in tensors)
        described = registry.problem(operator, specs, options, _one_device(operator, tensors))
        x = tensors[0]
        assert x is not None
        return x.new_empty_strided(described.shape, described.stride)

    LIBRARY.impl(operator.name, on_cpu, "CPU")
    LIBRARY.impl(operator.name, elsewhere, "CompositeExplicitAutograd")
    torch.library.register_fake(f"kernelpress::{operator.name}", fake, lib=LIBRARY)


def _register_autograd(operator: Operator) -> None:
    """The gradient of every op is that of its reference, computed anew from the saved inputs."""

    def save(ctx: Any, inputs: tuple[Tensor | None, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        _, ctx.options, _ = registry.bind(operator, inputs, keyword_only_inputs)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        twice = torch.is_grad_enabled()
        saved = ctx.saved_tensors
        needed = (*ctx.needs_input_grad, *[False] * (len(saved) - len(ctx.needs_input_grad)))
        with torch.enable_grad():
            tensors = [
                t if twice or t is None else t.detach().requires_grad_(need)
                for t, need in zip(saved, needed, strict=True)
            ]
            y = operator.call_reference(tensors, ctx.options)
            wanted = [t for t, need in zip(tensors, needed, strict=True) if need]
            gradients = iter(torch.autograd.grad(y, wanted, grad, create_graph=twice))
        return tuple(next(gradients) if need else None for need in needed)

    torch.library.register_autograd(f"kernelpress::{operator.name}", backward, setup_context=save, lib=LIBRARY)


def _register_flops(operator: Operator) -> None:
    """Two operations per multiply-accumulate, as `torch.utils.flop_counter` counts its own convolutions."""

    def flops(*args: Any, out_shape: Any, **kwargs: Any) -> int:
        shapes, options, _ = registry.bind(operator, args, kwargs)
        return 2 * operator.macs(shapes, options, out_shape)

    register_flop_formula(getattr(torch.ops.kernelpress, operator.name))(flops)
