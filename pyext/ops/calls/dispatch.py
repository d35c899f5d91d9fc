"""Publishes ops as `torch.ops.kernelpress.*`: schema, kernels, fake kernel, autograd, FLOP formula; and calls them.

The dispatcher costs several times what a small kernel does. A call that nothing could intercept (plain tensors, no
gradient wanted, no mode, transform or trace active) therefore goes straight to the backend.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernelpress.ops import registry
from kernelpress.ops.backends.triton_trace import see_through
from kernelpress.ops.calls import gradient, prepared
from kernelpress.ops.checks import TensorSpec
from kernelpress.ops.registry import Operator, Tensors
from kernelpress.runtime.interception import is_intercepted, is_plain
from kernelpress.runtime.torch_private import (
    AutoDispatchBelowAutograd,
    DispatchKey,
    DispatchKeySet,
    after_autograd_keyset,
    any_requires_grad,
)

__all__ = ["LIBRARY", "call", "publish"]

LIBRARY = torch.library.Library("kernelpress", "DEF")

_is_grad_enabled = torch.is_grad_enabled
_ONE_BACKEND = frozenset(DispatchKeySet(key).raw_repr() for key in (DispatchKey.CPU, DispatchKey.CUDA))


def publish(operator: Operator) -> Operator:
    """Register an op with torch and with the registry."""
    LIBRARY.define(operator.name + operator.schema, tags=(torch.Tag.pt2_compliant_tag,))
    _register_kernels(operator)
    _register_autograd(operator)
    _register_flops(operator)
    if any(entry.backend == "triton" for entry in operator.implementations):
        see_through(operator, LIBRARY)
    return registry.register(operator)


def call(operator: Operator, tensors: tuple[Tensor | None, ...], options: tuple[Any, ...], backend: str) -> Tensor:
    """Call an op: through the dispatcher where something could intercept it, straight to the backend otherwise.

    `options` are the values of the op's options in order; one integer may stand for a pair.
    """
    if is_intercepted():
        return _dispatch(operator, tensors, options, backend)
    y = prepared.attempt(operator, tensors, options, backend)
    if y is not None:
        return y
    if _is_grad_enabled() and any_requires_grad(*tensors):
        return _dispatch(operator, tensors, options, backend)
    for index in operator.activations:
        t = tensors[index]
        if t is not None and not is_plain(t):
            return _dispatch(operator, tensors, options, backend)
    try:
        found = prepared.recall(operator, tensors, options, backend)
    except TypeError:  # a list among the options
        options = registry.options_of(operator, options)
        found = prepared.recall(operator, tensors, options, backend)
    if found is not None:
        return found.run(tensors)
    if not all(t is None or is_plain(t) for t in tensors):
        return _dispatch(operator, tensors, options, backend)
    return prepared.prepare(operator, tensors, options, backend)(tensors)


def _dispatch(operator: Operator, tensors: Tensors, options: tuple[Any, ...], backend: str) -> Tensor:
    overload = getattr(torch.ops.kernelpress, operator.name).default
    return overload(*tensors, **registry.options_of(operator, options)._asdict(), backend=backend)


def _register_kernels(operator: Operator) -> None:
    def real(*args: Any, **kwargs: Any) -> Tensor:
        return prepared.run(operator, *registry.bind(operator, args, kwargs))

    def fake(*args: Any, **kwargs: Any) -> Tensor:
        tensors, options, _ = registry.bind(operator, args, kwargs)
        specs = tuple(None if t is None else TensorSpec.of(t) for t in tensors)
        described = registry.problem(operator, specs, options, registry.common_device(operator, tensors))
        x = tensors[0]
        assert x is not None
        return x.new_empty_strided(described.shape, described.stride, dtype=described.dtype)

    for key in ("CPU", "CUDA", "CompositeExplicitAutograd"):
        LIBRARY.impl(operator.name, real, key)
    torch.library.register_fake(f"kernelpress::{operator.name}", fake, lib=LIBRARY)


def _register_autograd(operator: Operator) -> None:
    """Where no gradient is wanted and a device's kernel would be next, the autograd kernel does its work at once."""
    overload = getattr(torch.ops.kernelpress, operator.name).default
    differentiable = gradient.differentiable(operator)

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Tensor:
        below = keyset & after_autograd_keyset
        wants_gradient = _is_grad_enabled() and any_requires_grad(*args)
        if not wants_gradient and below.raw_repr() in _ONE_BACKEND:
            return prepared.run(operator, *registry.bind(operator, args, kwargs))

        def redispatch() -> Tensor:
            with AutoDispatchBelowAutograd():
                result: Tensor = overload.redispatch(below, *args, **kwargs)
            return result

        if not wants_gradient:
            return redispatch()
        tensors, options, _ = registry.bind(operator, args, kwargs)
        return differentiable(redispatch, tensors, options)

    LIBRARY.impl(operator.name, kernel, "Autograd", with_keyset=True)


def _register_flops(operator: Operator) -> None:
    """Two operations per multiply-accumulate, as `torch.utils.flop_counter` counts its own convolutions."""

    def flops(*args: Any, out_shape: Any, **kwargs: Any) -> int:
        shapes, options, _ = registry.bind(operator, args, kwargs)
        return 2 * operator.macs(shapes, options, out_shape)

    register_flop_formula(getattr(torch.ops.kernelpress, operator.name))(flops)
