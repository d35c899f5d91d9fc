"""Publishes ops as `torch.ops.kernelpress.*`: schema, kernels, fake kernel, autograd, FLOP formula; and calls them.

The dispatcher and its autograd key cost several times what a small kernel does. A call that nothing could intercept
(plain CPU tensors, no gradient wanted, no mode, transform or trace active) therefore goes straight to the backend.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernelpress.ops import prepared, registry
from kernelpress.ops.checks import TensorSpec
from kernelpress.ops.registry import Operator, Tensors

__all__ = ["LIBRARY", "call", "publish"]

LIBRARY = torch.library.Library("kernelpress", "DEF")

_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transform_level = torch._C._functorch.maybe_current_level
_tracing_state = torch._C._get_tracing_state
_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})


def publish(operator: Operator) -> Operator:
    """Register an op with torch and with the registry."""
    LIBRARY.define(operator.name + operator.schema, tags=(torch.Tag.pt2_compliant_tag,))
    _register_kernels(operator)
    _register_autograd(operator)
    _register_flops(operator)
    return registry.register(operator)


def call(operator: Operator, tensors: tuple[Tensor | None, ...], options: tuple[Any, ...], backend: str) -> Tensor:
    """Call an op: through the dispatcher where something could intercept it, straight to the backend otherwise.

    `options` are the values of the op's options in order; one integer may stand for a pair.
    """
    if torch.compiler.is_compiling() or _is_intercepted(operator, tensors):
        return _dispatch(operator, tensors, options, backend)
    try:
        found = prepared.recall(operator, tensors, options, backend)
    except TypeError:  # a list among the options
        options = registry.options_of(operator, options)
        found = prepared.recall(operator, tensors, options, backend)
    if found is None:
        if not all(t is None or _is_plain(t) for t in tensors):
            return _dispatch(operator, tensors, options, backend)
        found = prepared.prepare(operator, tensors, options, backend)
    return found(tensors)


def _dispatch(operator: Operator, tensors: Tensors, options: tuple[Any, ...], backend: str) -> Tensor:
    overload = getattr(torch.ops.kernelpress, operator.name).default
    return overload(*tensors, **registry.options_of(operator, options)._asdict(), backend=backend)


def _is_plain(t: Tensor) -> bool:
    return type(t) in _PLAIN_TYPES and t.is_cpu and not t.is_neg()


def _is_intercepted(operator: Operator, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether a mode, transform, trace or gradient may concern the call. `call` looks at new parameters itself."""
    for index in operator.activations:
        t = tensors[index]
        if t is not None and not _is_plain(t):
            return True
    return (
        (torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors))
        or _dispatch_modes() > 0
        or _function_modes() > 0
        or _transform_level() is not None
        or _tracing_state() is not None
        or torch.autograd.profiler._is_profiler_enabled
    )


def _one_device(operator: Operator, tensors: Tensors) -> str:
    first = next(t for t in tensors if t is not None).device
    for name, t in zip(operator.tensors, tensors, strict=True):
        if t is not None and t.device != first:
            raise ValueError(f"{name}: expected the device of {operator.tensors[0]}, {first}, got {t.device}")
    return first.type


def _register_kernels(operator: Operator) -> None:
    def on_cpu(*args: Any, **kwargs: Any) -> Tensor:
        return prepared.run(operator, *registry.bind(operator, args, kwargs))

    def elsewhere(*args: Any, **kwargs: Any) -> Tensor:
        tensors, options, backend = registry.bind(operator, args, kwargs)
        return prepared.prepare(operator, tensors, options, backend, _one_device(operator, tensors))(tensors)

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
