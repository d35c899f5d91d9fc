"""Ops and the backends that can run them: one frozen entry per op × backend, and the choice between them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernelpress.ops.checks import TensorSpec, describe, one_floating_dtype
from kernelpress.ops.layout import Layout
from kernelpress.ops.signature import pair
from kernelpress.runtime.torch_private import fp32_precision

__all__ = [
    "BACKENDS",
    "Candidates",
    "Implementation",
    "NativeCall",
    "NativeKernel",
    "Operator",
    "Problem",
    "allocate",
    "allows_tf32",
    "availability",
    "bind",
    "common_device",
    "implementation",
    "native_call",
    "native_reason",
    "native_spacings",
    "operator",
    "operators",
    "options_of",
    "problem",
    "register",
    "requested_backend",
    "resolve",
    "use_backend",
    "why_not",
]

BACKENDS: tuple[str, ...] = ("cuda", "cudnn", "triton", "cpu", "onednn", "reference")
"""Every backend, best first: the order in which an automatic choice tries them."""

ACTIVATION_NAMES = frozenset({"x", "residual", "input_scale", "a", "b", "other", "row_scale", "row_zero_point"})
"""Names of the tensors that change from call to call; the others are parameters."""

_PAIRS = frozenset({"kernel_size", "stride", "padding", "dilation", "stem_stride", "stem_padding"})

Tensors = Sequence[Tensor | None]
Run = Callable[[Tensors], Tensor]


@dataclass(frozen=True)
class Problem:
    """What an op is asked to do, without the values: checked arguments and the output's shape, dtype and layout.

    `device` is `"cpu"`, `"cuda:0"`, …; `allow_tf32` tells whether tensor cores may round float32 operands to TF32.
    """

    op: str
    tensors: tuple[TensorSpec | None, ...]
    options: Any
    device: str
    allow_tf32: bool
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: Layout

    @functools.cached_property
    def stride(self) -> tuple[int, ...]:
        """Strides of a new output."""
        return self.layout.stride(self.shape)


@dataclass(frozen=True)
class Candidates:
    """The tile configurations that a kernel may run a problem in, by name.

    `kernel` is what measurements of them are filed under, `device` the name of the devices that they hold for.
    `prepare(name)` is `Implementation.prepare` in one of them; where that cannot run, it or its call raises one of
    `refusals`.
    """

    kernel: str
    device: str
    names: tuple[str, ...]
    prepare: Callable[[str], Run]
    refusals: tuple[type[Exception], ...] = (RuntimeError,)


@dataclass(frozen=True)
class Implementation:
    """One op on one backend.

    `available()` tells why nothing of it runs on this machine, `supports(problem)` why it cannot run this problem;
    None means that it can. `prepare(problem, tensors)` gives the function from the op's tensors to its output, for
    these parameters and activations like these; `candidates(problem, tensors)` what it chose from, for a backend that
    can be tuned.
    """

    op: str
    backend: str
    available: Callable[[], str | None]
    supports: Callable[[Problem], str | None]
    prepare: Callable[[Problem, Tensors], Run]
    candidates: Callable[[Problem, Tensors], Candidates] | None = None

    def reason_against(self, problem: Problem) -> str | None:
        """Why this implementation cannot run the problem, or None."""
        return self.available() or self.supports(problem)


@dataclass(frozen=True)
class NativeKernel:
    """How an op becomes a call of the native module `_cpu`: `name(*addresses of operands, address of y, *sizes)`.

    `layouts` says how each tensor argument must lie (None: anyhow, or a parameter that is packed).
    `supports(problem)` tells why the kernel cannot run a float32 problem. `operands(tensors, options)` packs the
    weights. `sizes(problem, spacings, y_spacing)` gives the integers; a spacing is the distance in elements between
    neighbouring pixels or rows, 0 for an absent tensor.
    """

    name: str
    layouts: tuple[Layout | None, ...]
    supports: Callable[[Problem], str | None]
    operands: Callable[[Tensors, Any], tuple[Tensor | None, ...]]
    sizes: Callable[[Problem, tuple[int, ...], int], tuple[int, ...]]


@dataclass(frozen=True)
class NativeCall:
    """One prepared call of `_cpu`: run it by `getattr(_cpu, name)(*arguments)`, or append it to a plan by
    `getattr(plan, name)(*arguments)`. The addresses in `arguments` are valid as long as `tensors` are held.
    """

    name: str
    arguments: tuple[int, ...]
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Operator:
    """One op: its schema, what it checks, what it means, and who can run it.

    `tensors` names the positional arguments, all of them tensors; those of `ACTIVATION_NAMES` change from call to call,
    the others are parameters. `options` is the named tuple of the keyword arguments but `backend`; `out` is the layout
    of the output. `shape(tensors, options)` raises for a bad argument and returns the output's shape; it runs on
    symbolic sizes as well. `macs(tensors, options, shape)` counts multiply-accumulates. `dtypes(names, tensors,
    options)` raises `TypeError` for a tensor of a bad dtype and returns the output's dtype; by default all are of one
    floating dtype.
    """

    name: str
    schema: str
    tensors: tuple[str, ...]
    options: Any
    out: Layout
    shape: Callable[[tuple[TensorSpec | None, ...], Any], tuple[int, ...]]
    reference: Callable[..., Any]
    macs: Callable[[Sequence[Any], Any, Sequence[int]], int]
    implementations: tuple[Implementation, ...]
    native: NativeKernel | None
    dtypes: Callable[[Sequence[str], Sequence[TensorSpec | None], Any], torch.dtype] = one_floating_dtype

    @functools.cached_property
    def activations(self) -> tuple[int, ...]:
        """Positions of the tensors that change from call to call."""
        return tuple(index for index, name in enumerate(self.tensors) if name in ACTIVATION_NAMES)

    def call_reference(self, tensors: Tensors, options: Any) -> Tensor:
        """The op in plain PyTorch."""
        return self.reference(*tensors, **options._asdict())


_OPERATORS: dict[str, Operator] = {}
_FORCED: ContextVar[str] = ContextVar("kernelpress_backend", default="auto")


def register(operator: Operator) -> Operator:
    """Add an op to the registry. Its implementations stand in the order of `BACKENDS`."""
    order = [BACKENDS.index(implementation.backend) for implementation in operator.implementations]
    if order != sorted(set(order)):
        raise ValueError(f"{operator.name}: implementations must follow the order of BACKENDS, each once")
    _OPERATORS[operator.name] = operator
    return operator


def operators() -> tuple[Operator, ...]:
    """Every registered op."""
    return tuple(_OPERATORS.values())


def operator(name: str) -> Operator:
    """The op of that name. Raises `ValueError` for an unknown one."""
    try:
        return _OPERATORS[name]
    except KeyError:
        raise ValueError(f"op: expected one of {', '.join(_OPERATORS)}, got {name!r}") from None


def _check_backend(name: str, argument: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{argument}: expected one of auto, {', '.join(BACKENDS)}, got {name!r}")
    return name


_ENVIRONMENT = _check_backend(os.environ.get("KERNELPRESS_BACKEND") or "auto", "KERNELPRESS_BACKEND")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every op called inside with `backend="auto"` onto one backend (`"auto"` lifts an outer force).

    An op that the backend cannot run raises `RuntimeError` with the reason. The variable `KERNELPRESS_BACKEND`, read
    at import, does the same for a whole process. Raises `ValueError` for an unknown name.
    """
    token = _FORCED.set(_check_backend(name, "backend"))
    try:
        yield
    finally:
        _FORCED.reset(token)


def requested_backend(argument: str) -> str:
    """The backend that a call asks for: its own argument, else `use_backend`, else the environment, else `"auto"`."""
    if argument != "auto":
        return argument
    forced = _FORCED.get()
    return forced if forced != "auto" else _ENVIRONMENT


def allows_tf32() -> bool:
    """Whether torch lets convolutions on CUDA round float32 operands to TF32: `torch.backends.cudnn.allow_tf32`, or the
    setting that took its place, beside which the old one cannot be read.
    """
    return fp32_precision("cuda", "conv") == "tf32"


def common_device(operator: Operator, tensors: Tensors) -> str:
    """The device that all tensors of a call are on. Raises `ValueError` naming the first that is on another one."""
    first = next(t for t in tensors if t is not None).device
    for name, t in zip(operator.tensors, tensors, strict=True):
        if t is not None and t.device != first:
            raise ValueError(f"{name}: expected the device of {operator.tensors[0]}, {first}, got {t.device}")
    return str(first)


def problem(
    operator: Operator,
    tensors: tuple[TensorSpec | None, ...],
    options: Any,
    device: str,
    allow_tf32: bool | None = None,
) -> Problem:
    """Check the arguments of a call; `allow_tf32` is by default what torch allows its convolutions.

    Raises: `ValueError` or `TypeError` naming the bad argument.
    """
    if allow_tf32 is None:
        allow_tf32 = allows_tf32()
    dtype = operator.dtypes(operator.tensors, tensors, options)
    shape = operator.shape(tensors, options)
    return Problem(operator.name, tensors, options, device, allow_tf32, shape, dtype, operator.out)


def implementation(operator: Operator, problem: Problem, requested: str) -> Implementation:
    """The implementation that runs a problem: the requested one, or with `"auto"` the first that can.

    Raises `ValueError` for an unknown backend and `RuntimeError` with the reason where the requested one cannot run.
    """
    _check_backend(requested, "backend")
    if requested == "auto":
        return next(entry for entry in operator.implementations if entry.reason_against(problem) is None)
    for entry in operator.implementations:
        if entry.backend == requested:
            reason = entry.reason_against(problem)
            if reason is None:
                return entry
            raise RuntimeError(f"{operator.name}: backend {requested!r} cannot run this call: {reason}")
    have = ", ".join(entry.backend for entry in operator.implementations)
    raise RuntimeError(f"{operator.name}: backend {requested!r} has no implementation of it (there is: {have})")


@functools.lru_cache(maxsize=4096)
def resolve(
    operator: Operator,
    tensors: tuple[TensorSpec | None, ...],
    options: Any,
    device: str,
    allow_tf32: bool,
    requested: str,
) -> tuple[Problem, Implementation]:
    """Check the arguments of a call and choose who runs it. Raises as `problem` and `implementation` do."""
    checked = problem(operator, tensors, options, device, allow_tf32)
    return checked, implementation(operator, checked, requested)


def bind(operator: Operator, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Tensor | None], Any, str]:
    """Sort a call's arguments as the schema does: its tensors (None where absent), its options, its backend.

    Raises `TypeError` for an argument too many, unknown or missing.
    """
    if len(args) > len(operator.tensors):
        raise TypeError(f"{operator.name}: expected at most {len(operator.tensors)} tensors, got {len(args)}")
    options: dict[str, Any] = {name: pair(value) if name in _PAIRS else value for name, value in kwargs.items()}
    backend = options.pop("backend", "auto")
    tensors = [*args, *[options.pop(name, None) for name in operator.tensors[len(args) :]]]
    return tensors, operator.options(**options), backend


def options_of(operator: Operator, values: Sequence[Any]) -> Any:
    """The op's options from their values in order, with one integer for both dimensions of a pair."""
    return operator.options(*map(_canonical, operator.options._fields, values))


def _canonical(name: str, value: Any) -> Any:
    return pair(value) if name in _PAIRS else value


def _described(operator: Operator, tensors: Tensors, options: Any) -> Problem:
    specs = tuple(None if t is None else TensorSpec.of(t) for t in tensors)
    return problem(operator, specs, options, common_device(operator, tensors))


def allocate(op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """An empty output for a call of that op with these arguments: channels_last where it is `[N, C, H, W]`.

    Raises `ValueError` or `TypeError` for a bad argument, as the op does.
    """
    entry = operator(op)
    tensors, options, _ = bind(entry, args, kwargs)
    described = _described(entry, tensors, options)
    x = next(t for t in tensors if t is not None)
    return x.new_empty_strided(described.shape, described.stride, dtype=described.dtype)


def native_reason(op: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor | None = None) -> str | None:
    """Why `native_call` would refuse these arguments, None where it takes them. It looks at no `backend`."""
    entry = operator(op)
    tensors, options, _ = bind(entry, args, kwargs)
    described = _described(entry, tensors, options)
    kernel = entry.native
    if kernel is None:
        return f"{op} has no native kernel"
    for candidate in entry.implementations:
        if candidate.backend == "cpu" and (reason := candidate.reason_against(described)) is not None:
            return reason
    for name, layout, t in zip(entry.tensors, kernel.layouts, described.tensors, strict=True):
        if t is not None and layout is not None and layout.spacing(t.shape, t.stride) is None:
            return f"{name}: expected {layout.name} memory, got strides {describe(t.stride)} for {describe(t.shape)}"
    if out is not None:
        if tuple(out.shape) != tuple(described.shape) or out.dtype != torch.float32:
            return f"out: expected float32 {describe(described.shape)}, got {out.dtype} {describe(out.shape)}"
        if entry.out.spacing(out.shape, out.stride()) is None:
            return f"out: expected {entry.out.name} memory, got strides {describe(out.stride())}"
    return None


def native_call(op: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> NativeCall:
    """Prepare one call of the native module that writes the op's result into `out`; nothing runs and nothing is copied
    but weights, which are packed (and read again only by another `native_call`).

    Args:
        op: the op's name, such as `"conv2d"`.
        args, kwargs: the op's arguments as its schema has them; `x`, `residual` and `input_scale` must lie as the
            kernel reads them (channels_last or a channel slice of it; rows; `conv2d` takes `x` in any format).
        out: float32 of the op's output shape, channels_last or a channel slice of it: see `allocate`.

    Raises: `ValueError` with the reason of `native_reason` where there is one; `ValueError` or `TypeError` for a bad
        argument, as the op does.
    """
    reason = native_reason(op, args, kwargs, out)
    if reason is not None:
        raise ValueError(f"{op}: no native call: {reason}")
    entry = operator(op)
    tensors, options, _ = bind(entry, args, kwargs)
    described = _described(entry, tensors, options)
    kernel = entry.native
    assert kernel is not None
    spacing = entry.out.spacing(out.shape, out.stride())
    assert spacing is not None
    operands = (*kernel.operands(tensors, options), out)
    arguments = (
        *[0 if t is None else t.data_ptr() for t in operands],
        *kernel.sizes(described, native_spacings(kernel.layouts, described), spacing),
    )
    return NativeCall(kernel.name, arguments, tuple(t for t in operands if t is not None))


def native_spacings(layouts: Sequence[Layout | None], problem: Problem) -> tuple[int, ...]:
    """Spacing of every tensor argument once it lies as the kernel reads it; 0 for an absent one and a parameter."""
    spacings = []
    for layout, t in zip(layouts, problem.tensors, strict=True):
        if layout is None or t is None:
            spacings.append(0)
        else:
            spacing = layout.spacing(t.shape, t.stride)
            if spacing is None:
                spacing = layout.spacing(t.shape, layout.stride(t.shape))
                assert spacing is not None
            spacings.append(spacing)
    return tuple(spacings)


def why_not(op: str, *args: Any, **kwargs: Any) -> dict[str, str | None]:
    """Backend → why it cannot run this call, None where it can; in the order in which they are tried."""
    entry = operator(op)
    tensors, options, _ = bind(entry, args, kwargs)
    described = _described(entry, tensors, options)
    return {candidate.backend: candidate.reason_against(described) for candidate in entry.implementations}


def availability() -> dict[str, dict[str, str | None]]:
    """Op → backend → why it runs nothing of that op on this machine, None where it runs."""
    return {
        entry.name: {candidate.backend: candidate.available() for candidate in entry.implementations}
        for entry in operators()
    }
