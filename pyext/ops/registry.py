"""Ops and the backends that can run them: one frozen entry per op × backend, and the choice between them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernelpress.ops.checks import TensorSpec, one_floating_dtype
from kernelpress.ops.layout import Layout
from kernelpress.ops.signature import Signature
from kernelpress.runtime.torch_private import fp32_precision

if TYPE_CHECKING:
    from kernelpress.ops.backends.kernel import Kernel

__all__ = [
    "BACKENDS",
    "NATIVE_BACKENDS",
    "Candidates",
    "Implementation",
    "Operator",
    "Problem",
    "allocate",
    "allocate_all",
    "allows_tf32",
    "availability",
    "common_device",
    "implementation",
    "layout_on",
    "operator",
    "operators",
    "problem",
    "problem_of",
    "register",
    "requested_backend",
    "resolve",
    "specs_of",
    "use_backend",
    "why_not",
]

NATIVE_BACKENDS = ("cpu", "winograd4", "winograd2", "planes", "sparse")
"""Those that run kernels of the native module `_cpu`, which plans have as steps."""

BACKENDS: tuple[str, ...] = (
    "cuda",
    "cudnn",
    "triton",
    "cpu",
    "onednn",
    "winograd4",
    "winograd2",
    "planes",
    "sparse",
    "reference",
)
"""Every backend, best first: the order in which an automatic choice tries them."""

ACTIVATION_NAMES = frozenset({"x", "residual", "input_scale", "a", "b", "other", "gate", "row_scale", "row_zero_point"})
"""Names of the tensors that change from call to call; the others are parameters."""

Tensors = Sequence[Tensor | None]
Specs = tuple[TensorSpec | None, ...]
Run = Callable[[Tensors], Any]


@dataclass(frozen=True)
class Problem:
    """What an op is asked to do, without the values: checked arguments, and what the outputs are.

    `device` is `"cpu"`, `"cuda:0"`, …; `allow_tf32` tells whether tensor cores may round float32 operands to TF32.
    """

    operator: Operator
    tensors: Specs
    options: Any
    device: str
    allow_tf32: bool
    layout: Layout
    """Of the outputs."""
    outputs: tuple[TensorSpec, ...]

    def __getitem__(self, name: str) -> TensorSpec:
        """The tensor of that name, which is present."""
        spec = self.tensors[self.operator.tensors.index(name)]
        assert spec is not None
        return spec

    @property
    def first(self) -> TensorSpec:
        """The first tensor, which no op goes without."""
        spec = self.tensors[0]
        assert spec is not None
        return spec

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first output."""
        return self.outputs[0].shape

    @property
    def stride(self) -> tuple[int, ...]:
        """Of the first output."""
        return self.outputs[0].stride

    @property
    def dtype(self) -> torch.dtype:
        """Of the first output."""
        return self.outputs[0].dtype


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
    """An op on one backend.

    `available()` tells why nothing of it runs on this machine, `supports(problem)` why it cannot run this problem;
    None means that it can. `prepare(problem, tensors)` gives the function from the op's tensors to its output, for
    these parameters and activations like these; `candidates(problem, tensors)` what it chose from, for a backend that
    can be tuned. `kernel` is ours, where one of ours runs.
    """

    backend: str
    available: Callable[[], str | None]
    supports: Callable[[Problem], str | None]
    prepare: Callable[[Problem, Tensors], Run]
    candidates: Callable[[Problem, Tensors], Candidates] | None = None
    kernel: Kernel | None = None

    def reason_against(self, problem: Problem) -> str | None:
        """Why this implementation cannot run the problem, or None."""
        return self.available() or self.supports(problem)


def _no_macs(options: Any, shape: Sequence[int], *shapes: Any) -> int:
    return 0


@dataclass(frozen=True, eq=False)
class Operator:
    """One op: what its typed function says of it, what it checks, what it means, and who can run it.

    Tensors of `ACTIVATION_NAMES` change from call to call, the others are parameters. `out` is the layout of the
    outputs. `shape(options, *tensors)` raises for a bad argument and returns the first output's shape; it runs on
    symbolic sizes as well. `macs(options, shape, *shapes of tensors)` counts multiply-accumulates. `dtypes(names,
    tensors, options)` raises `TypeError` for a tensor of a bad dtype and returns the output's dtype; by default all are
    of one floating dtype. `further(shape)` gives shapes and dtypes of outputs after the first.
    """

    signature: Signature
    out: Layout
    shape: Callable[..., tuple[int, ...]]
    reference: Callable[..., Any]
    implementations: tuple[Implementation, ...]
    macs: Callable[..., int] = _no_macs
    dtypes: Callable[[Sequence[str], Sequence[TensorSpec | None], Any], torch.dtype] = one_floating_dtype
    further: Callable[[tuple[int, ...]], Sequence[tuple[tuple[int, ...], torch.dtype]]] = lambda shape: ()
    has_gradient: bool = True

    @property
    def name(self) -> str:
        """As in `torch.ops.kernelpress`."""
        return self.signature.name

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the positional arguments."""
        return self.signature.tensors

    @functools.cached_property
    def activations(self) -> tuple[int, ...]:
        """Positions of the tensors that change from call to call."""
        return tuple(index for index, name in enumerate(self.tensors) if name in ACTIVATION_NAMES)

    def on(self, backend: str) -> Implementation | None:
        """The op on that backend, where it is implemented."""
        return next((entry for entry in self.implementations if entry.backend == backend), None)

    def kernel(self, backend: str) -> Kernel:
        """Our kernel on that backend. Raises `ValueError` where there is none."""
        entry = self.on(backend)
        if entry is None or entry.kernel is None:
            raise ValueError(f"{self.name}: expected an op with a kernel on {backend!r}")
        return entry.kernel

    def kernels(self) -> tuple[Kernel, ...]:
        """Ours, on every backend."""
        return tuple(entry.kernel for entry in self.implementations if entry.kernel is not None)

    def call_reference(self, tensors: Tensors, options: Any) -> Any:
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


def specs_of(tensors: Tensors) -> Specs:
    """The tensors of a call without their values."""
    return tuple([None if t is None else TensorSpec.of(t) for t in tensors])


def layout_on(operator: Operator, backend: str) -> Layout:
    """How the outputs of an op lie where that backend is asked for."""
    entry = operator.on(backend)
    kernel = None if entry is None else entry.kernel
    return operator.out if kernel is None or kernel.out is None else kernel.out


def problem(
    operator: Operator,
    tensors: Specs,
    options: Any,
    device: str,
    allow_tf32: bool | None = None,
    requested: str = "auto",
) -> Problem:
    """Check the arguments of a call that asks for a backend; `allow_tf32` is by default what torch allows its
    convolutions.

    Raises: `ValueError` or `TypeError` naming the bad argument.
    """
    if allow_tf32 is None:
        allow_tf32 = allows_tf32()
    dtype = operator.dtypes(operator.tensors, tensors, options)
    shape, layout = operator.shape(options, *tensors), layout_on(operator, requested)
    outputs = [TensorSpec(size, layout.stride(size), of) for size, of in ((shape, dtype), *operator.further(shape))]
    return Problem(operator, tensors, options, device, allow_tf32, layout, tuple(outputs))


def problem_of(operator: Operator, tensors: Tensors, options: Any, requested: str = "auto") -> Problem:
    """`problem` of a call on these tensors. Raises as that does, and as `common_device`."""
    return problem(operator, specs_of(tensors), options, common_device(operator, tensors), requested=requested)


def implementation(problem: Problem, requested: str) -> Implementation:
    """The implementation that runs a problem: the requested one, or with `"auto"` the first that can.

    Raises `ValueError` for an unknown backend and `RuntimeError` with the reason where the requested one cannot run.
    """
    operator = problem.operator
    if _check_backend(requested, "backend") == "auto":
        return next(entry for entry in operator.implementations if entry.reason_against(problem) is None)
    entry = operator.on(requested)
    if entry is None:
        have = ", ".join(entry.backend for entry in operator.implementations)
        raise RuntimeError(f"{operator.name}: backend {requested!r} has no implementation of it (there is: {have})")
    reason = entry.reason_against(problem)
    if reason is not None:
        raise RuntimeError(f"{operator.name}: backend {requested!r} cannot run this call: {reason}")
    return entry


@functools.lru_cache(maxsize=4096)
def resolve(
    operator: Operator, tensors: Specs, options: Any, device: str, allow_tf32: bool, requested: str
) -> tuple[Problem, Implementation]:
    """Check the arguments of a call and choose who runs it. Raises as `problem` and `implementation` do."""
    checked = problem(operator, tensors, options, device, allow_tf32, requested)
    return checked, implementation(checked, requested)


def allocate(op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """An empty first output for a call of that op with these arguments: channels_last where it is `[N, C, H, W]` and
    the backend gives no other form.

    Raises `ValueError` or `TypeError` for a bad argument, as the op does.
    """
    return allocate_all(op, args, kwargs)[0]


def allocate_all(op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """All outputs, as `allocate` makes the first."""
    entry = operator(op)
    tensors, options, backend = entry.signature.bind(args, kwargs)
    problem = problem_of(entry, tensors, options, requested_backend(backend))
    device = problem.device
    return tuple(torch.empty_strided(shape, of, dtype=dtype, device=device) for shape, of, dtype in problem.outputs)


def why_not(op: str, *args: Any, **kwargs: Any) -> dict[str, str | None]:
    """Backend → why it cannot run this call, None where it can; in the order in which they are tried."""
    entry = operator(op)
    tensors, options, _ = entry.signature.bind(args, kwargs)
    backends = [candidate.backend for candidate in entry.implementations]
    described = {name: problem_of(entry, tensors, options, name) for name in backends}
    return {
        candidate.backend: candidate.reason_against(described[candidate.backend]) for candidate in entry.implementations
    }


def availability() -> dict[str, dict[str, str | None]]:
    """Op → backend → why it runs nothing of that op on this machine, None where it runs."""
    return {
        entry.name: {candidate.backend: candidate.available() for candidate in entry.implementations}
        for entry in operators()
    }
