"""Publishes ops as `torch.ops.kernelpress.*`: schema, kernels, fake kernel, autograd, FLOP formula; and calls them.

The dispatcher costs several times what a small kernel does. A call that nothing could intercept (plain tensors, no
gradient wanted, no mode, transform or trace active) therefore goes straight to the backend.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernelpress.ops import registry
from kernelpress.ops.backends.reference import reference_implementation
from kernelpress.ops.backends.triton_trace import see_through
from kernelpress.ops.calls import gradient, prepared
from kernelpress.ops.layout import Layout
from kernelpress.ops.registry import Implementation, Operator, Problem, Run, Tensors
from kernelpress.ops.signature import Signature
from kernelpress.runtime.interception import is_intercepted, is_plain
from kernelpress.runtime.torch_private import (
    AutoDispatchBelowAutograd,
    DispatchKey,
    DispatchKeySet,
    after_autograd_keyset,
    any_requires_grad,
)

__all__ = ["LIBRARY", "call", "declare", "op"]

LIBRARY = torch.library.Library("kernelpress", "DEF")

_is_grad_enabled = torch.is_grad_enabled
_ONE_BACKEND = frozenset(DispatchKeySet(key).raw_repr() for key in (DispatchKey.CPU, DispatchKey.CUDA))

P = ParamSpec("P")
R = TypeVar("R")
CheckValues = Callable[[Problem, Tensors], None]


def op(**declaration: Any) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes an op of a typed function whose body is its docstring: tensors by position, then options by name, `backend`
    last. Called, it runs the op. Arguments as of `declare`.
    """
    return lambda function: _typed(function, _publish(declare(function, **declaration)))


def declare(
    function: Callable[..., Any],
    out: Layout,
    shape: Callable[..., tuple[int, ...]],
    reference: Callable[..., Any],
    implementations: tuple[Implementation, ...] = (),
    check_values: CheckValues | None = None,
    **fields: Any,
) -> Operator:
    """The op of a typed function, not published.

    Args:
        implementations: those beside the reference.
        check_values: raises for values of parameters that no implementation must run on; asked when a call is prepared.
        fields: the others of `Operator`.
    """
    entries = (*implementations, reference_implementation(reference))
    if check_values is not None:
        entries = tuple(_checked(entry, check_values) for entry in entries)
    return Operator(Signature.of(function), out, shape, reference, entries, **fields)


def _checked(plain: Implementation, check_values: CheckValues) -> Implementation:
    def prepare(problem: Problem, tensors: Tensors) -> Run:
        check_values(problem, tensors)
        return plain.prepare(problem, tensors)

    return replace(plain, prepare=prepare)


def _typed(function: Callable[P, R], operator: Operator) -> Callable[P, R]:
    """The function with a body: arguments sorted by position, which costs least."""
    signature = operator.signature
    tensors, options = ", ".join(signature.tensors), ", ".join(signature.options._fields)
    source = f"def {function.__name__}({tensors}, *, {options + ', ' if options else ''}backend):\n"
    source += f"    return call(operator, ({tensors},), ({options + ',' if options else ''}), backend)\n"
    made: dict[str, Any] = {"call": call, "operator": operator}
    exec(compile(source, f"<kernelpress {operator.name}>", "exec"), made)
    typed = made[function.__name__]
    typed.__defaults__, typed.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return functools.update_wrapper(typed, function)


def _publish(operator: Operator) -> Operator:
    """Register an op with torch and with the registry."""
    LIBRARY.define(operator.name + operator.signature.schema, tags=(torch.Tag.pt2_compliant_tag,))
    _register_kernels(operator)
    _register_autograd(operator)
    _register_flops(operator)
    if operator.on("triton") is not None:
        see_through(operator, LIBRARY)
    return registry.register(operator)


def call(operator: Operator, tensors: tuple[Tensor | None, ...], options: tuple[Any, ...], backend: str) -> Any:
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
        options = operator.signature.options_of(options)
        found = prepared.recall(operator, tensors, options, backend)
    if found is not None:
        return found.run(tensors)
    if not all(t is None or is_plain(t) for t in tensors):
        return _dispatch(operator, tensors, options, backend)
    return prepared.prepare(operator, tensors, options, backend)(tensors)


def _dispatch(operator: Operator, tensors: Tensors, options: tuple[Any, ...], backend: str) -> Any:
    overload = getattr(torch.ops.kernelpress, operator.name).default
    return overload(*tensors, **operator.signature.options_of(options)._asdict(), backend=backend)


def _register_kernels(operator: Operator) -> None:
    def real(*args: Any, **kwargs: Any) -> Any:
        return prepared.run(operator, *operator.signature.bind(args, kwargs))

    def fake(*args: Any, **kwargs: Any) -> Any:
        tensors, options, backend = operator.signature.bind(args, kwargs)
        described = registry.problem_of(operator, tensors, options, registry.requested_backend(backend))
        x = tensors[0]
        made = [x.new_empty_strided(shape, stride, dtype=dtype) for shape, stride, dtype in described.outputs]
        return tuple(made) if len(made) > 1 else made[0]

    for key in ("CPU", "CUDA", "CompositeExplicitAutograd"):
        LIBRARY.impl(operator.name, real, key)
    torch.library.register_fake(f"kernelpress::{operator.name}", fake, lib=LIBRARY)


def _register_autograd(operator: Operator) -> None:
    """Where no gradient is wanted and a device's kernel would be next, the autograd kernel does its work at once."""
    overload = getattr(torch.ops.kernelpress, operator.name).default
    differentiable = gradient.differentiable(operator)

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        below = keyset & after_autograd_keyset
        wants_gradient = operator.has_gradient and _is_grad_enabled() and any_requires_grad(*args)
        if not wants_gradient and below.raw_repr() in _ONE_BACKEND:
            return prepared.run(operator, *operator.signature.bind(args, kwargs))

        def redispatch() -> Any:
            with AutoDispatchBelowAutograd():
                return overload.redispatch(below, *args, **kwargs)

        if not wants_gradient:
            return redispatch()
        tensors, options, _ = operator.signature.bind(args, kwargs)
        return differentiable(redispatch, tensors, options)

    LIBRARY.impl(operator.name, kernel, "Autograd", with_keyset=True)


def _register_flops(operator: Operator) -> None:
    """Two operations per multiply-accumulate, as `torch.utils.flop_counter` counts its own convolutions."""

    def flops(*args: Any, out_shape: Any, **kwargs: Any) -> int:
        shapes, options, _ = operator.signature.bind(args, kwargs)
        return 2 * int(operator.macs(options, out_shape, *shapes))

    register_flop_formula(getattr(torch.ops.kernelpress, operator.name))(flops)
