"""What is wrong with the emission of a program, if anything: each call is equal to float64 within rounding, or refused.

Right is what the original gives. A call that the original takes gives its result, or `ValueError`; a call that it
refuses raises. A call of the example's shapes and dtypes is never refused. Nothing else changes: not the model, not its
inputs, not the state of torch's random numbers.
"""

from __future__ import annotations

import copy
import logging
import math
import pickle
import re
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import kernelpress as kp
from kernelpress import native
from kernelpress.runtime.torch_private import DisableTorchFunction, pytree
from modelfuzz.calls import HARMLESS, draw_calls
from modelfuzz.program import COSTS, Call, Program, evaluate

__all__ = ["Fault", "Outcome", "examine"]

FACTOR = 4.0
"""How much further from float64 than the original an emitted model may be."""
FLOORS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Relative errors that are never too large."""
CHAOTIC = 0.1
"""An error of the original, relative to float64, above which that is no truth: random numbers are others there."""
ROUNDING = {torch.float64: 4e-16, torch.float32: 4e-7, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""By how much the result of each operation is changed to see how far rounding carries."""
GRADIENT_ERROR = 1e-3
SAVED = PLANNED = 4
"""One model in so many is saved and loaded, and captured."""


@dataclass(frozen=True)
class Fault:
    """`kind` is what went wrong, in the same words for the same fault; `call` when."""

    kind: str
    detail: str
    call: Call | None = None

    def __str__(self) -> str:
        when = f" [{self.call.what}: {self.call.code}]" if self.call else ""
        return f"{self.kind}: {self.detail}{when}"


@dataclass(frozen=True)
class Outcome:
    """Of one program: the fault, or why its emission was refused, or neither; how many calls were made and refused."""

    fault: Fault | None = None
    refusal: str | None = None
    calls: int = 0
    refused_calls: int = 0


class _FaultError(Exception):
    """Carries a fault out of the checks."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


def examine(
    program: Program,
    calls: Sequence[Call] | None = None,
    *,
    count: int = 7,
    thorough: bool | None = None,
    ignored: tuple[str, ...] = (),
) -> Outcome:
    """Emits the program and makes `calls` of it, by default `count` random ones. `thorough`: also saved and loaded, and
    captured; by default now and then. Faults whose kinds start with one of `ignored` are passed over."""
    calls = draw_calls(program, count) if calls is None else calls
    examiner = _Examiner(program, program.model(), calls, ignored)
    with (
        _machine(program.kernels, program.threads),
        warnings.catch_warnings(),
        _no_logging(),
        redirect_stdout(StringIO()),
        redirect_stderr(StringIO()),
    ):
        warnings.simplefilter("ignore")
        try:
            return examiner.outcome(thorough)
        except _FaultError as faulty:
            return Outcome(faulty.fault, None, examiner.made, examiner.refused)


@contextmanager
def _machine(kernels: str, threads: int) -> Iterator[None]:
    """Our kernels in one of their instruction sets, on so many threads."""
    module, threads_before = native.cpu(), torch.get_num_threads()
    before = module.variant() if module else ""
    torch.set_num_threads(threads)
    if module and kernels:
        module.select(kernels)
    try:
        yield
    finally:
        torch.set_num_threads(threads_before)
        if module and kernels:
            module.select(before)


@contextmanager
def _no_logging() -> Iterator[None]:
    """torch tells its log what it could not export, at length."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


class _Examiner:
    """One program's emission and its calls."""

    def __init__(self, program: Program, model: nn.Module, calls: Sequence[Call], ignored: tuple[str, ...]) -> None:
        self.program, self.model, self.calls, self.ignored = program, model, calls, ignored
        self.dtype = getattr(torch, program.dtype)
        self.made = self.refused = 0
        # Whatever the forward of these does to its own buffers is theirs.
        self.original = program.model()
        self.exact = program.model().double()
        self.is_random = self._is_random(program.model())

    def _report(self, fault: Fault) -> None:
        if not fault.kind.startswith(self.ignored):
            raise _FaultError(fault)

    def outcome(self, thorough: bool | None) -> Outcome:
        emitted = self._emit()
        if isinstance(emitted, str):
            return Outcome(refusal=emitted)
        fixed = _state(self.model)
        if self.is_random and not self._is_random(emitted):
            self._report(Fault("emitted: the same random numbers at each call", ""))
        for call in self.calls:
            self._compare("emitted", emitted, call)
        if thorough or (thorough is None and self.program.seed % SAVED == 0):
            self._check_loaded(emitted)
            self._check_copies(emitted)
            self._check_gradients(emitted)
        if thorough or (thorough is None and self.program.seed % PLANNED == 1):
            self._check_plan(emitted)
        if _state(self.model) != fixed:
            self._report(Fault("calls change the original model", ""))
        return Outcome(None, None, self.made, self.refused)

    def _is_random(self, run: Callable[..., Any]) -> bool:
        """Whether two calls that start from other random states differ. Elements get their random numbers in the order
        of memory, which is another one in another layout: of such models, only that is asked of an emitted one."""
        results = []
        for seed in range(2):
            positional, named = self.program.example.arguments()
            torch.manual_seed(seed)
            with torch.no_grad():
                results.append(pytree.tree_leaves(_result_of(run, positional, named)))
        return not all(a.equal(b) for a, b in zip(*results, strict=True) if isinstance(a, Tensor))

    def _emit(self) -> Any:
        """The emitted model, or the reason of its refusal."""
        (positional, _), before = self.program.example.arguments(), _state(self.model)
        marks = _marks(positional)
        torch.manual_seed(self.program.seed)
        random_state = torch.get_rng_state()
        try:
            cost = evaluate(COSTS[self.program.cost])
            emitted = kp.emit(self.model, positional, cost=cost, cache=False, progress=False)
        except ValueError as refusal:
            emitted = _first_line(refusal)
        except Exception as error:
            self._report(Fault(f"emit crashes: {_signature(error)}", _tail(error)))
            return f"crashes: {_first_line(error)}"
        if not torch.equal(random_state, torch.get_rng_state()):
            self._report(Fault("emit changes torch's random state", ""))
        if _marks(positional) != marks:
            self._report(Fault("emit changes the example tensors", f"{marks} became {_marks(positional)}"))
        if _state(self.model) != before:
            self._report(Fault("emit changes the model", ""))
        if not isinstance(emitted, str) and emitted.record.kept_original and not self.is_random:
            self._report(Fault("emission dropped", emitted.record.reason))
        return emitted

    def _compare(self, who: str, run: Callable[..., Any], call: Call) -> None:
        self.made += 1
        # Whatever either draws, both draw from the same state.
        given = call.arguments()
        with evaluate(call.context):
            wanted = _result_of(self.original, *given)
        positional, named = call.arguments()
        marks = _marks((positional, named))
        with evaluate(call.context):
            got = _result_of(run, positional, named)
        fault = self._difference(who, wanted, got, call)
        after = _marks((positional, named))
        # What the original itself writes to its inputs, an emitted model may, and need not.
        if fault is None and after != marks and after != _marks_after(self.program.model(), call):
            fault = Fault(f"{who}: writes to its inputs", "", call)
        if fault is not None:
            self._report(fault)

    def _difference(self, who: str, wanted: Any, got: Any, call: Call) -> Fault | None:
        if isinstance(got, Exception):
            if isinstance(wanted, Exception):
                return None
            if not isinstance(got, ValueError):
                return Fault(f"{who} crashes: {_signature(got)}", _tail(got), call)
            self.refused += 1
            return Fault(f"{who} refuses {call.what}", _first_line(got), call) if call.what in HARMLESS else None
        if isinstance(wanted, Exception):
            # An emitted model takes every memory layout: what `view` refuses for the layout alone, it may answer.
            if call.what in HARMLESS:
                return None
            return Fault(
                f"{who} answers where the original raises", f"{type(wanted).__name__}: {_first_line(wanted)}", call
            )
        return self._wrong(who, wanted, got, call)

    def _wrong(self, who: str, wanted: Any, got: Any, call: Call) -> Fault | None:
        (wanted, spec), (got, got_spec) = (pytree.tree_flatten(_plain_sizes(value)) for value in (wanted, got))
        if spec != got_spec:
            return Fault(f"{who}: another structure", f"{got_spec} for {spec}", call)
        for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
            if not isinstance(b, Tensor):
                if type(a) is not type(b) or a != b:
                    return Fault(f"{who}: another plain value", f"{a!r} for {b!r}", call)
            elif not isinstance(a, Tensor):
                return Fault(f"{who}: no tensor", f"{type(a).__name__} for a tensor", call)
            elif a.shape != b.shape or a.dtype != b.dtype:
                return Fault(f"{who}: another shape or dtype", f"{_form(a)} for {_form(b)}", call)
            else:
                error = self._error(i, a, b, call)
                if error is not None:
                    return Fault(f"{who}: wrong numbers", f"output {i}: {error}", call)
        return None

    def _error(self, i: int, got: Tensor, wanted: Tensor, call: Call) -> str | None:
        """What is wrong with output `i`; the truth is what the model gives in float64, where it can run in that."""
        if torch.equal(got, wanted) or self.is_random:
            return None
        truth = self._truth(call, i, wanted)
        if wanted.dtype.is_floating_point:
            if _relative(wanted, truth) > CHAOTIC:
                truth = wanted
            error, own = _relative(got, truth), _relative(wanted, truth)
            floor = FLOORS[min(wanted.dtype, self.dtype, key=lambda d: -FLOORS[d])]
            bound = max(FACTOR * own, floor)
            if error <= bound:
                return None
            others = [*self._perturbed(call, i, wanted), *self._in_channels_last(call, i)]
            bound = max([bound, *(FACTOR * _relative(other, truth) for other in others)])
            return None if error <= bound else f"relative error {error:.1e}, original's {own:.1e}, bound {bound:.1e}"
        differing = int((got != wanted).sum())
        near = [int((t != truth).sum()) for t in self._perturbed(call, i, wanted)]
        allowed = 3 * max([0, *near]) + (wanted.numel() >= 100)
        return (
            None
            if differing <= allowed
            else f"{differing} of {wanted.numel()} integers differ, {max([0, *near])} are near ties"
        )

    def _truth(self, call: Call, i: int, wanted: Tensor) -> Tensor:
        """Output `i` in float64, or the original's where it does not run in float64 alone."""
        result = self._in_float64(self.exact, call)
        leaf = None if result is None else pytree.tree_leaves(result)[i]
        if not isinstance(leaf, Tensor) or leaf.shape != wanted.shape:
            return wanted
        if wanted.dtype.is_floating_point and not torch.equal(leaf.isfinite(), wanted.isfinite()):
            return wanted
        return leaf

    def _perturbed(self, call: Call, i: int, wanted: Tensor) -> list[Tensor]:
        """Output `i` in float64 with a rounding after every operation, three times."""
        results = [self._in_float64(self.exact, call, ROUNDING[self.dtype]) for _ in range(3)]
        leaves = [pytree.tree_leaves(result)[i] for result in results if result is not None]
        return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.shape == wanted.shape]

    def _in_channels_last(self, call: Call, i: int) -> list[Tensor]:
        """Output `i` of the original with all images in channels_last memory, as they are between emitted layers. Some
        of torch's own operations are less exact there, GroupNorm for one."""
        positional, named = pytree.tree_map(_channels_last, call.arguments())
        with torch.no_grad(), _Changed(_channels_last):
            result = _result_of(self.original, positional, named)
        return [] if isinstance(result, Exception) else pytree.tree_leaves(result)[i : i + 1]

    def _in_float64(self, model: nn.Module, call: Call, noise: float = 0.0) -> Any:
        def exact(value: Any) -> Any:
            return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

        positional, named = pytree.tree_map(exact, call.arguments())

        def noisy(value: Tensor) -> Tensor:
            return value * (1 + noise * torch.randn_like(value))

        with torch.no_grad(), _Changed(noisy) if noise else nullcontext():
            result = _result_of(model, positional, named)
        return None if isinstance(result, Exception) else result

    def _check_loaded(self, emitted: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.pt2"
            try:
                emitted.save(path)
                loaded = kp.load(path)
            except Exception as error:
                self._report(Fault(f"save or load crashes: {_signature(error)}", _tail(error)))
                return
        for call in self.calls:
            self._compare("loaded", loaded, call)

    def _check_copies(self, emitted: Any) -> None:
        for name, again in (("deepcopy", copy.deepcopy), ("pickle", lambda model: pickle.loads(pickle.dumps(model)))):
            try:
                copied = again(emitted)
            except Exception as error:
                self._report(Fault(f"{name} crashes: {_signature(error)}", _tail(error)))
                continue
            for call in self.calls[:2]:
                self._compare(name, copied, call)

    def _check_gradients(self, emitted: Any) -> None:
        """Those of the inputs."""
        call = self.program.example
        if self.dtype not in (torch.float32, torch.float64):
            return
        wanted, truth, got = (_gradients(m, call, d) for m, d in (
            (self.original, self.dtype), (self.exact, torch.float64), (emitted, self.dtype)))  # fmt: skip
        if wanted is None or truth is None:
            return
        if got is None:
            self._report(Fault("emitted: no gradients", "", call))
            return
        for i, (a, b, t) in enumerate(zip(got, wanted, truth, strict=True)):
            error, own = _relative(a, t), _relative(b, t)
            if own < CHAOTIC and error > max(10 * own, GRADIENT_ERROR) and float(t.norm()) > 1e-6:
                self._report(Fault("emitted: wrong gradients", f"input {i}: relative error {error:.1e}", call))

    def _check_plan(self, emitted: Any) -> None:
        for call in self.calls[:2]:
            positional, named = call.arguments()
            with torch.no_grad():
                if named or isinstance(_result_of(emitted, positional, named), Exception):
                    continue
            try:
                plan = kp.capture(emitted, *positional, stream=False, cache=False)
            except ValueError:
                continue
            except Exception as error:
                self._report(Fault(f"capture crashes: {_signature(error)}", _tail(error), call))
                continue
            fresh = Call(call.what, call.positional, call.named, call.seed + 1000)
            self._compare("plan", plan, fresh)
            for other in self.calls:
                # A plan takes its inputs by position.
                if other.code != call.code and other.what not in HARMLESS and not other.named:
                    self._compare("plan", plan, other)


class _Changed(TorchFunctionMode):
    """Changes what every operation gives, where that is a float tensor in memory of its own."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}

        def changed(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            return value if value.untyped_storage().data_ptr() in given else self.change(value)

        with DisableTorchFunction():
            return pytree.tree_map(changed, result)


def _channels_last(value: Any) -> Any:
    is_image = isinstance(value, Tensor) and value.dim() == 4
    return value.contiguous(memory_format=torch.channels_last) if is_image else value


def _result_of(run: Callable[..., Any], positional: Any, named: Any) -> Any:
    """What a call gives, or raises."""
    try:
        return run(*positional, **named)
    except Exception as error:
        return error


def _gradients(run: Callable[..., Any], call: Call, dtype: torch.dtype) -> list[Tensor] | None:
    """Of the sum of all squared outputs, for each floating-point input; None where there are none."""
    positional, named = pytree.tree_map(lambda x: x.to(dtype) if _is_float(x) else x, call.arguments())
    inputs = [leaf.requires_grad_() for leaf in pytree.tree_leaves((positional, named)) if _is_float(leaf)]
    result = _result_of(run, positional, named)
    if isinstance(result, Exception):
        return None
    outputs = [leaf for leaf in pytree.tree_leaves(result) if _is_float(leaf) and leaf.requires_grad]
    if not outputs or not inputs:
        return None
    try:
        found = torch.autograd.grad(sum(o.double().square().sum() for o in outputs), inputs, allow_unused=True)
    except RuntimeError:
        return None
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _plain_sizes(value: Any) -> Any:
    """`value` with `torch.Size`s as the tuples that they are."""

    def is_size(leaf: Any) -> bool:
        return isinstance(leaf, torch.Size)

    return pytree.tree_map(lambda leaf: tuple(leaf) if is_size(leaf) else leaf, value, is_leaf=is_size)


def _marks_after(model: nn.Module, call: Call) -> Any:
    positional, named = call.arguments()
    with torch.no_grad():
        _result_of(model, positional, named)
    return _marks((positional, named))


def _marks(values: Any) -> list[Any]:
    """The tensors' values, forms and attributes."""
    return [
        (
            leaf.detach().double().flatten().tolist(),
            _form(leaf),
            leaf.stride(),
            leaf.requires_grad,
            sorted(leaf.__dict__),
        )
        for leaf in pytree.tree_leaves(values)
        if isinstance(leaf, Tensor)
    ]


def _state(model: nn.Module) -> dict[str, Any]:
    """All that a model consists of."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state: dict[str, Any] = {
        name: (t.detach().double().nan_to_num().flatten().tolist(), _form(t), t.stride(), t.requires_grad, t.data_ptr())
        for name, t in tensors.items()
    }
    return state | {f"{name}.training": module.training for name, module in model.named_modules()}


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _relative(result: Tensor, truth: Tensor) -> float:
    """‖result − truth‖ / ‖truth‖; infinite where other places are not finite."""
    a, b = result.detach().double(), truth.detach().double()
    finite = b.isfinite()
    if not torch.equal(a.isfinite(), finite) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return math.inf
    a, b = a[finite], b[finite]
    norm = float(b.norm())
    return float((a - b).norm()) / norm if norm > 0 else float((a - b).norm())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _signature(error: Exception) -> str:
    """The error's type and message without numbers and names that differ from model to model."""
    text = re.sub(r"[0-9]+", "#", re.sub(r"/\S+/", "", _first_line(error)))
    return f"{type(error).__name__} {text[:60]}"


def _tail(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "kernelpress" in frame.filename or "/pyext/" in frame.filename]
    where = f" at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
    return f"{_first_line(error)}{where}"
