"""What is wrong with the emission of a program, if anything: each call is equal to float64 within rounding, or refused.

Right is what the original gives. A call that the original takes gives its result, or `ValueError`; a call that it
refuses raises. A call of the example's shapes and dtypes is never refused. Nothing else changes: not the model, not its
inputs, not the state of torch's random numbers.
"""

from __future__ import annotations

import copy
import pickle
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kernelpress as kp
from kernelpress.emit.plans import native_steps, streaming
from kernelpress.emit.plans.plan import plan_of
from kernelpress.emit.tolerance import TURNED_SHARE, tolerance_of
from kernelpress.preserve import own_tensors
from kernelpress.runtime.torch_private import pytree
from modelfuzz.calls import HARMLESS, draw_calls
from modelfuzz.observing import (
    Changed,
    channels_last,
    first_line,
    form_of,
    gradients_of,
    is_float,
    machine,
    marks_of,
    no_logging,
    place,
    plain_sizes,
    relative_error,
    result_of,
    sharing,
    signature,
    slope_of,
    state_of,
)
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
QUANTIZED = 4.0
"""Times that, where results are quantized: emission decides at ties as rounding does, once for each value."""
TRIALS = 8
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
        machine(program.kernels, program.threads),
        warnings.catch_warnings(),
        no_logging(),
        redirect_stdout(StringIO()),
        redirect_stderr(StringIO()),
    ):
        warnings.simplefilter("ignore")
        try:
            return examiner.outcome(thorough)
        except _FaultError as faulty:
            return Outcome(faulty.fault, None, examiner.made, examiner.refused)


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
        # Of its own, as a call's arguments are drawn anew from the call's seed.
        self.rounding = torch.Generator().manual_seed(program.seed)

    def _report(self, fault: Fault) -> None:
        if not fault.kind.startswith(self.ignored):
            raise _FaultError(fault)

    def outcome(self, thorough: bool | None) -> Outcome:
        emitted = self._emit()
        if isinstance(emitted, str):
            return Outcome(refusal=emitted)
        fixed = state_of(self.model)
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
        self._check_memory("emitted", emitted)
        if state_of(self.model) != fixed:
            self._report(Fault("calls change the original model", ""))
        return Outcome(None, None, self.made, self.refused)

    def _is_random(self, run: Callable[..., Any]) -> bool:
        """Whether calls that start from other random states differ. Elements get their random numbers in the order
        of memory, which is another one in another layout: of such models, only that is asked of an emitted one."""

        def results(seed: int) -> list[Any]:
            positional, named = self.program.example.arguments()
            torch.manual_seed(seed)
            with torch.no_grad():
                return pytree.tree_leaves(result_of(run, positional, named))

        first = results(0)
        pairs = (pair for seed in range(1, TRIALS) for pair in zip(first, results(seed), strict=True))
        return not all(a.equal(b) for a, b in pairs if isinstance(a, Tensor))

    def _emit(self) -> Any:
        """The emitted model, or the reason of its refusal."""
        (positional, _), before = self.program.example.arguments(), state_of(self.model)
        marks = marks_of(positional)
        torch.manual_seed(self.program.seed)
        random_state = torch.get_rng_state()
        try:
            cost = evaluate(COSTS[self.program.cost])
            emitted = kp.emit(self.model, positional, cost=cost, cache=False, progress=False)
        except ValueError as refusal:
            emitted = first_line(refusal)
        except Exception as error:
            self._report(Fault(f"emit crashes: {signature(error)}", place(error)))
            return f"crashes: {first_line(error)}"
        if not torch.equal(random_state, torch.get_rng_state()):
            self._report(Fault("emit changes torch's random state", ""))
        if marks_of(positional) != marks:
            self._report(Fault("emit changes the example tensors", f"{marks} became {marks_of(positional)}"))
        if state_of(self.model) != before:
            self._report(Fault("emit changes the model", ""))
        if not isinstance(emitted, str) and emitted.record.kept_original and not self._is_unsteady():
            self._report(Fault("emission dropped", emitted.record.reason))
        return emitted

    def _is_unsteady(self) -> bool:
        """Whether rounding alone moves the example's results by as much as an emission may, or turns as many of its
        integers over."""
        if self.is_random:
            return True
        call = self.program.example
        with torch.no_grad():
            results = pytree.tree_leaves(result_of(self.program.model(), *call.arguments()))
        bound = 10 * tolerance_of(self.dtype)

        def moved(again: Tensor, result: Tensor) -> bool:
            if is_float(result):
                return FACTOR * relative_error(again.to(result.dtype), result) > bound
            return int((again != result).sum()) > TURNED_SHARE * result.numel()

        return any(
            moved(again, result)
            for i, result in enumerate(results)
            if isinstance(result, Tensor)
            for again in [*self._perturbed(call, i, result), *self._in_channels_last(call, i)]
        )

    def _compare(self, who: str, run: Callable[..., Any], call: Call) -> None:
        self.made += 1
        # Whatever either draws, both draw from the same state.
        given = call.arguments()
        with evaluate(call.context):
            wanted = result_of(self.original, *given)
        positional, named = call.arguments()
        marks = marks_of((positional, named))
        with evaluate(call.context):
            got = result_of(run, positional, named)
        fault = self._difference(who, wanted, got, call)
        after = marks_of((positional, named))
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
                return Fault(f"{who} crashes: {signature(got)}", place(got), call)
            self.refused += 1
            return Fault(f"{who} refuses {call.what}", first_line(got), call) if call.what in HARMLESS else None
        if isinstance(wanted, Exception):
            # An emitted model takes every memory layout: what `view` refuses for the layout alone, it may answer.
            if call.what in HARMLESS:
                return None
            return Fault(
                f"{who} answers where the original raises", f"{type(wanted).__name__}: {first_line(wanted)}", call
            )
        return self._wrong(who, wanted, got, call)

    def _wrong(self, who: str, wanted: Any, got: Any, call: Call) -> Fault | None:
        (wanted, spec), (got, got_spec) = (pytree.tree_flatten(plain_sizes(value)) for value in (wanted, got))
        if spec != got_spec:
            return Fault(f"{who}: another structure", f"{got_spec} for {spec}", call)
        for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
            if not isinstance(b, Tensor):
                if type(a) is not type(b) or a != b:
                    return Fault(f"{who}: another plain value", f"{a!r} for {b!r}", call)
            elif not isinstance(a, Tensor):
                return Fault(f"{who}: no tensor", f"{type(a).__name__} for a tensor", call)
            elif a.shape != b.shape or a.dtype != b.dtype:
                return Fault(f"{who}: another shape or dtype", f"{form_of(a)} for {form_of(b)}", call)
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
            if relative_error(wanted, truth) > CHAOTIC:
                truth = wanted
            error, own = relative_error(got, truth), relative_error(wanted, truth)
            floor = FLOORS[min(wanted.dtype, self.dtype, key=lambda d: -FLOORS[d])]
            bound = max(FACTOR * own, floor)
            if error <= bound:
                return None
            others = [*self._perturbed(call, i, wanted), *self._in_channels_last(call, i)]
            bound = max([bound, *(FACTOR * relative_error(other, truth) for other in others)])
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
        """Output `i` with other roundings after every operation, several times: in float64, if the model runs in it."""
        noise = ROUNDING[self.dtype] * (QUANTIZED if "quantize" in self.program.source else 1.0)
        results = [self._in_float64(self.exact, call, noise) for _ in range(TRIALS)]
        if all(result is None for result in results):
            results = [self._run(self.original, call.arguments(), noise) for _ in range(TRIALS)]
        leaves = [pytree.tree_leaves(result)[i] for result in results if result is not None]
        return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.shape == wanted.shape]

    def _in_channels_last(self, call: Call, i: int) -> list[Tensor]:
        """Output `i` of the original with all images in channels_last memory, as they are between emitted layers, and
        other roundings: some of torch's own operations are less exact there, GroupNorm for one."""
        results = [
            self._run(
                self.original, pytree.tree_map(channels_last, call.arguments()), ROUNDING[self.dtype], channels_last
            )
            for _ in range(TRIALS)
        ]
        return [pytree.tree_leaves(result)[i] for result in results if result is not None]

    def _in_float64(self, model: nn.Module, call: Call, noise: float = 0.0) -> Any:
        def exact(value: Any) -> Any:
            return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

        return self._run(model, pytree.tree_map(exact, call.arguments()), noise)

    def _run(
        self, model: nn.Module, arguments: Any, noise: float, laid: Callable[[Any], Any] = lambda value: value
    ) -> Any:
        def noisy(value: Tensor) -> Tensor:
            # Sums that cancel are as far off as their neighbours.
            drawn = torch.randn(value.shape, generator=self.rounding, dtype=torch.float64).to(value.dtype)
            return laid(value + noise * value.square().mean().sqrt() * drawn)

        with torch.no_grad(), Changed(noisy) if noise else nullcontext():
            result = result_of(model, *arguments)
        return None if isinstance(result, Exception) else result

    def _check_memory(self, who: str, run: Callable[..., Any]) -> None:
        """Where the original hands out memory of its own, so does `run`: who writes into a result changes nothing
        else."""
        call, found = self.program.example, []
        for model in (self.program.model(), run):
            given = call.arguments()
            with torch.no_grad():
                found.append(sharing(given, result_of(model, *given), result_of(model, *given)))
        if not found[1] <= found[0]:
            self._report(Fault(f"{who}: results share memory", f"{sorted(found[1] - found[0])}", call))

    def _check_loaded(self, emitted: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.pt2"
            try:
                emitted.save(path)
                loaded = kp.load(path)
            except Exception as error:
                self._report(Fault(f"save or load crashes: {signature(error)}", place(error)))
                return
        for call in self.calls:
            self._compare("loaded", loaded, call)

    def _check_copies(self, emitted: Any) -> None:
        for name, again in (("deepcopy", copy.deepcopy), ("pickle", lambda model: pickle.loads(pickle.dumps(model)))):
            try:
                copied = again(emitted)
            except Exception as error:
                self._report(Fault(f"{name} crashes: {signature(error)}", place(error)))
                continue
            for call in self.calls[:2]:
                self._compare(name, copied, call)

    def _check_gradients(self, emitted: Any) -> None:
        """Those of the inputs."""
        call = self.program.example
        # They run through what a model computes under `no_grad` (docs/architecture.md).
        if self.dtype not in (torch.float32, torch.float64) or re.search("no_grad|inference_mode", self.program.source):
            return
        # Emitted weights want no gradients, and PyTorch computes those of inputs otherwise then.
        frozen = self.program.model().requires_grad_(False)
        wanted, truth, got = (gradients_of(m, call, d) for m, d in (
            (frozen, self.dtype), (self.exact, torch.float64), (emitted, self.dtype)))  # fmt: skip
        if wanted is None or truth is None:
            return
        if got is None:
            # Those of the original's weights are no emitted model's.
            if any(gradient.any() for gradient in wanted):
                self._report(Fault("emitted: no gradients", "", call))
            return
        for i, (a, b, t) in enumerate(zip(got, wanted, truth, strict=True)):
            error, own = relative_error(a, t), relative_error(b, t)
            is_off = own < CHAOTIC and error > max(10 * own, GRADIENT_ERROR) and float(t.norm()) > 1e-6
            # PyTorch's own may be wrong: those of batch_norm in eval and instance_norm for a transposed gradient of one
            # image are.
            if is_off and self._is_off_the_slope(i, a, call):
                self._report(Fault("emitted: wrong gradients", f"input {i}: relative error {error:.1e}", call))

    def _is_off_the_slope(self, i: int, gradient: Tensor, call: Call) -> bool:
        direction = torch.randn(gradient.shape, dtype=torch.float64)
        slope, told = slope_of(self.exact, call, i, direction), float((gradient * direction).sum())
        return abs(told - slope) > GRADIENT_ERROR * float(gradient.norm())

    def _check_plan(self, emitted: Any) -> None:
        for call in self.calls[:2]:
            positional, named = call.arguments()
            with torch.no_grad():
                if named or isinstance(result_of(emitted, positional, named), Exception):
                    continue
            try:
                with _every_chain():
                    plan = kp.capture(emitted, *positional, cache=False)
            except ValueError:
                continue
            except Exception as error:
                self._report(Fault(f"capture crashes: {signature(error)}", place(error), call))
                continue
            fresh = Call(call.what, call.positional, call.named, call.seed + 1000)
            self._compare("plan", plan, fresh)
            for other in self.calls:
                # A plan takes its inputs by position.
                if other.code != call.code and other.what not in HARMLESS and not other.named:
                    self._compare("plan", plan, other)
            self._check_memory("plan", plan)
            shares = plan_of(emitted, own_tensors(emitted.contract.require(positional)), shared=True)
            if getattr(shares, "images_at_once", None) is not None:
                self._compare("plan in shares", shares, fresh)


@contextmanager
def _every_chain() -> Iterator[None]:
    """Plans stream whatever layers can be streamed, however small the maps between them, gain or not."""

    def choose(plan: Any, addresses: Any, steps: Any, links: Sequence[int], cache: Any) -> list[streaming.Range]:
        longest_first = sorted(streaming._candidates(plan, links), key=lambda one: one[0] - one[1])
        found: list[streaming.Range] = []
        for one in longest_first:
            found = streaming.with_others(found, [one])
        return streaming.with_others(found, streaming.interleaving(plan, steps, links))

    before = native_steps.choose_chains, streaming.LEAST_BYTES
    native_steps.choose_chains, streaming.LEAST_BYTES = choose, 1
    try:
        yield
    finally:
        native_steps.choose_chains, streaming.LEAST_BYTES = before


def _marks_after(model: nn.Module, call: Call) -> Any:
    positional, named = call.arguments()
    with torch.no_grad():
        result_of(model, positional, named)
    return marks_of((positional, named))
