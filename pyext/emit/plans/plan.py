"""Plans: an emitted model at fixed shapes, run without Python per layer."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kernelpress.emit.cache import TimingCache
from kernelpress.emit.emitted import EmittedModel
from kernelpress.emit.examples import Example
from kernelpress.emit.lower import NativeStep, Place, Program, TorchStep, View, lower, views_of
from kernelpress.emit.plans.arena import ArenaLayout, Lifetime, lay_out
from kernelpress.emit.plans.cuda_plan import CudaPlan
from kernelpress.emit.plans.in_place import without_copies
from kernelpress.emit.plans.native_steps import Bases, Chain, NativeSteps, tensor_at
from kernelpress.emit.plans.recapture import fingerprint, reduced
from kernelpress.emit.plans.shares import Share, share_of
from kernelpress.measure.race import Heat, race
from kernelpress.ops.calls import packing
from kernelpress.preserve import own_tensors
from kernelpress.runtime.memory import ALIGNMENT, advise_huge_pages
from kernelpress.runtime.torch_private import pytree
from kernelpress.trace.contract import Contract

__all__ = ["Plan", "capture", "plan_of"]

CPU = torch.device("cpu")

HEATS = (Heat(3, 1.5), Heat(10, 1.1), Heat(30, 1.0))
"""Of a plan in shares of the batch against the whole."""


def capture(model: EmittedModel, *example_inputs: Any, stream: bool = True, cache: bool = True) -> Plan | CudaPlan:
    """Prepares `model` for inputs of exactly the shapes, dtypes and structure of `example_inputs`; their values do not
    matter. On a CUDA device the plan is a CUDA graph.

    Layers with large maps between them are timed as a chain that streams them by rows, and run so where that is faster;
    a batch is timed as shares of a few images, which the threads run side by side, and run so where that is faster.
    `stream=False` runs every layer by itself on the whole batch, but for a channel shuffle, which the layer before it
    makes as it stores. `cache`: reuse and remember those times on disk.

    The plan computes with the model's weights as they are now and owns all that it reads: whatever happens to the
    model's parameters later (in-place writes, `load_state_dict`, `.data`, `.to`, `share_memory`) does not reach it.
    Capture again for the present ones. Raises `TypeError` for a model that was not emitted,
    `ValueError` for one that is neither on the CPU nor, with its inputs, on one CUDA device, `RuntimeError` for one
    that cannot be a CUDA graph.
    """
    if not isinstance(model, EmittedModel):
        kind = type(model).__name__
        hint = (
            "; emit it first: kernelpress.capture(kernelpress.emit(model, x), x)"
            if isinstance(model, nn.Module)
            else ""
        )
        raise TypeError(f"model: expected an EmittedModel, got {kind}{hint}")
    inputs = own_tensors(model.contract.require(example_inputs))
    model.body.graph.eliminate_dead_code()
    return plan_of(model, inputs, TimingCache(CPU, enabled=cache) if stream else None)


def plan_of(
    model: EmittedModel,
    inputs: Sequence[Any],
    times: TimingCache | None = None,
    chains: Sequence[Chain] = (),
    shared: bool = False,
) -> Plan | CudaPlan:
    """The plan of a model for flat inputs like these; `times` and `chains` as `Plan` takes them. `shared`: in shares of
    the batch, where that can be; with `times`, where it is faster."""
    contract = model.contract.captured_for(inputs)
    device = _cuda_device(model, inputs)
    if device is not None:
        return CudaPlan(model, inputs, contract, device)
    with packing.renewed():
        program = without_copies(lower(model.body, inputs))
        share = share_of(model.body, model.contract, inputs, program) if shared or times is not None else None
        if share is not None:
            plan = Plan(model, program, contract, share=share)
            if times is None or _is_faster(plan, Plan(model, program, contract), inputs, times):
                return plan
        return Plan(model, program, contract, times, chains)


def _is_faster(shared: Plan, whole: Plan, inputs: Sequence[Any], times: TimingCache) -> bool:
    """Whether a plan takes less time in shares of the batch; both are timed in turn, unless they were before."""
    plans = {f"{whole._native.name} as a whole": whole, f"{whole._native.name} by {shared.images_at_once}": shared}
    if any(times.get(name) is None for name in plans):
        arguments = pytree.tree_unflatten(inputs, whole._contract.structure)[0]
        calls = {name: functools.partial(plan, *arguments) for name, plan in plans.items()}
        for name, milliseconds in race(calls, [[(name,) for name in calls]], heats=HEATS).items():
            times.put(name, milliseconds)
        times.save()
    of_whole, of_shares = (times.get(name) or 0.0 for name in plans)
    return of_shares < of_whole


def _cuda_device(model: EmittedModel, inputs: Sequence[Any]) -> torch.device | None:
    """The CUDA device of the model and all its inputs, None if everything is elsewhere. Raises `ValueError` if they are
    on several devices."""
    named = {f"example_inputs[{i}]": x.device for i, x in enumerate(inputs) if isinstance(x, Tensor)}
    named |= {f"model.{name}": t.device for name, t in model.body.named_parameters()}
    device = next((device for device in named.values() if device.type == "cuda"), None)
    for name, other in named.items():
        if device is not None and other != device:
            raise ValueError(f"{name}: expected the device {device}, as of the others, got {other}")
    return device


class Plan:
    """A captured model: call it with inputs of the captured shapes and dtypes, in any memory format.

    Consecutive native steps run in one call, without the GIL. Intermediate tensors lie in one arena that belongs to
    this plan, so calls from several threads run one after the other; plans of their own run at the same time. Results
    are new tensors at each call and do not require grad. Raises `ValueError` for inputs of another shape, dtype, device
    or structure.

    The weights are those of the moment of capture, held by the plan itself. Copies and pickles are equal plans, made
    anew from a copy of `model`; `TypeError` where that has other weights by now.
    """

    def __init__(
        self,
        model: EmittedModel,
        program: Program,
        contract: Contract,
        times: TimingCache | None = None,
        chains: Sequence[Chain] = (),
        share: Share | None = None,
    ) -> None:
        """`contract`: the inputs of the program; `times`: what chains were timed to cost; None to run `chains`, as far
        as this machine can; `share`: what the threads run side by side, instead of the whole program together."""
        self.model = model
        self._weights = fingerprint(model.body)
        self._program, self._share = program, share
        self._arenas = share.division.threads if share else 1
        self._contract = contract
        self._out_spec: Any = model.body._out_spec
        self._lock = threading.Lock()
        self._outputs = [i for i, buffer in enumerate(program.buffers) if buffer.place is Place.OUTPUT]
        self._inputs = [(i, view) for i, view in enumerate(program.inputs) if isinstance(view, View)]
        self._native_steps = sum(isinstance(step, NativeStep) for step in program.steps)
        self._arrange([])
        chains = self._native.faster_chains(times) if times is not None else self._native.joinable(chains)
        if chains:
            self._arrange(chains)
        self._run_shares = self._side_by_side(share) if share else None
        self._run = self._compile()
        self._direct = self._compile_direct()

    def _arrange(self, chains: list[Chain]) -> None:
        """Lays out the arena for steps of which some are joined, and appends them to a native plan."""
        self._chains = chains
        executed = self._share.program if self._share else self._program
        self._lifetimes = _lifetimes(executed, chains)
        self._layout = lay_out(list(self._lifetimes.values()))
        self._memory, self._static = _allocate(executed, self._lifetimes, self._layout, self._arenas)
        arena = (_aligned(self._memory), self._layout.nbytes) if self._share else None
        self._native = NativeSteps(executed, self._static, chains, arena)
        leaves = pytree.tree_leaves(self._program.output)
        self._result = [_result_getter(leaf, self._static, self._program) for leaf in leaves]

    @property
    def arena_bytes(self) -> int:
        """Bytes of the arena, of all threads where each has its own."""
        return self._layout.nbytes * self._arenas

    @property
    def intermediate_bytes(self) -> int:
        """Bytes that the tensors in the arena would occupy side by side."""
        return sum(lifetime.nbytes for lifetime in self._lifetimes.values()) * self._arenas

    @property
    def arena(self) -> list[tuple[Lifetime, int]]:
        """Lifetime (in steps) and byte offset of every tensor in the arena."""
        return list(zip(self._lifetimes.values(), self._layout.offsets, strict=True))

    @property
    def steps(self) -> list[str]:
        """What runs, in order: `native conv2d`, `torch aten.cat.default`."""
        return [
            f"native {step.op}" if isinstance(step, NativeStep) else f"torch {step.name}"
            for step in self._program.steps
        ]

    @property
    def images_at_once(self) -> int | None:
        """How many images a thread takes through all steps at a time, where threads share the batch; else None."""
        return self._share.division.images if self._share else None

    @property
    def chains(self) -> list[list[str]]:
        """The native steps that run as one, streamed by rows."""
        return [self.steps[first : last + 1] for first, last in self._chains]

    @property
    def native_steps(self) -> int:
        """How many of the steps are native."""
        return self._native_steps

    def __len__(self) -> int:
        return len(self._program.steps)

    def __repr__(self) -> str:
        native_count, torch_count = self.native_steps, len(self) - self.native_steps
        return f"Plan({native_count} native steps, {torch_count} torch steps, arena of {self.arena_bytes} bytes)"

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        examples = [
            Example(x.shape, x.stride, x.dtype, CPU) if isinstance(x, View) else Example(plain=x)
            for x in self._program.inputs
        ]
        return reduced(self.model, self._weights, examples, self._chains, self._share is not None)

    def __call__(self, *inputs: Any) -> Any:
        """The model's outputs for `inputs`, in the structure that the model returns."""
        if self._direct is not None:
            result = self._direct(inputs)
            if result is not None:
                return result
        flat = self._contract.require(inputs)
        with torch.no_grad(), self._lock:
            bases: Bases = self._static.copy()
            for position, view in self._inputs:
                bases[view.buffer] = _in_layout(flat[position].detach(), view)
            for index in self._outputs:
                base = self._program.buffers[index].base
                bases[index] = torch.empty_strided(base.shape, base.stride, dtype=base.dtype)
            self._run(bases)
            leaves = [get(bases) for get in self._result]
        return pytree.tree_unflatten(leaves, self._out_spec)

    def _compile(self) -> Callable[[Bases], None]:
        """One function that runs all steps: native stretches and torch calls in turn, or shares of the batch."""
        native_steps, steps = self._native, self._program.steps
        if self._run_shares is not None:
            run_shares, external = self._run_shares, native_steps.external
            return lambda bases: run_shares([0 if (base := bases[i]) is None else base.data_ptr() for i in external])
        stretches: list[Callable[[Bases], None]] = []
        torch_steps = [i for i, step in enumerate(steps) if isinstance(step, TorchStep)]
        ends = _last_uses(self._program)
        for after, before in zip([-1, *torch_steps], [*torch_steps, len(steps)], strict=True):
            first, last = native_steps.between(after, before)
            if last > first:
                stretches.append(native_steps.stretch(first, last))
            if before < len(steps):
                step = steps[before]
                assert isinstance(step, TorchStep)
                stretches.append(_torch_call(step, self._static, self._program))
            if done := [index for index, last in ends.items() if after < last <= before]:
                stretches.append(_release(done))

        def run(bases: Bases) -> None:
            for stretch in stretches:
                stretch(bases)

        return run

    def _side_by_side(self, share: Share) -> Callable[[list[int]], None]:
        """Runs all shares of the batch with the external buffers at the addresses given."""
        bases = [self._program.buffers[index].base for index in self._native.external]
        run = self._native.side_by_side(share.division.offsets(bases, self._layout.nbytes))
        arena = _aligned(self._memory)
        return lambda addresses: run([*addresses, arena])

    def _compile_direct(self) -> Callable[[tuple[Any, ...]], Tensor | None] | None:
        """A call with hardly any Python, for plans of native steps alone from tensors to one tensor.

        After a few milliseconds of kernels the interpreter's own code and data have left the caches, and each line of
        the general way costs microseconds. Gives None for inputs that need the general way.
        """
        views, outputs = [view for _, view in self._inputs], views_of(self._program.output)
        by_position = pytree.tree_structure((tuple(views), {}), is_leaf=lambda leaf: isinstance(leaf, View))
        if by_position != self._contract.structure or self._native_steps < len(self._program.steps):
            return None
        if not self._out_spec.is_leaf() or len(outputs) != 1:
            return None
        made = self._program.buffers[outputs[0].buffer].base
        moving = [view.buffer for view in (*views, made)]
        if outputs[0] != made or moving != self._native.external:
            return None
        forms = [(view.shape, view.stride, view.dtype) for view in views]
        shape, stride, dtype, count = made.shape, made.stride, made.dtype, len(forms)
        run = self._run_shares or functools.partial(self._native.run, 0, len(self._native))
        lock, empty = self._lock, torch.empty_strided
        is_autocast_enabled = torch.is_autocast_enabled

        def direct(inputs: tuple[Any, ...]) -> Tensor | None:
            if len(inputs) != count or is_autocast_enabled("cpu"):
                return None
            addresses = []
            for given, form in zip(inputs, forms, strict=True):
                if type(given) is not Tensor or not given.is_cpu:
                    return None
                if (given.shape, given.stride(), given.dtype) != form:
                    return None
                addresses.append(given.data_ptr())
            result = empty(shape, stride, dtype=dtype)
            addresses.append(result.data_ptr())
            with lock:
                run(addresses)
            return result

        return direct


def _last_uses(program: Program) -> dict[int, int]:
    """The last step that reads or writes each buffer that torch made, the results' aside."""
    results = {view.buffer for view in views_of(program.output)}
    uses: dict[int, int] = {}
    for i, step in enumerate(program.steps):
        for view in views_of((step.args, step.kwargs, step.results)):
            if program.buffers[view.buffer].place is Place.TORCH and view.buffer not in results:
                uses[view.buffer] = i
    return uses


def _release(buffers: Sequence[int]) -> Callable[[Bases], None]:
    def run(bases: Bases) -> None:
        for index in buffers:
            bases[index] = None

    return run


def _lifetimes(program: Program, chains: Sequence[Chain]) -> dict[int, Lifetime]:
    """Lifetime of every buffer in the arena, by buffer.

    What a chain reads and writes is alive all through it; what lies between its steps is never whole and needs no room.
    """
    spans: dict[int, tuple[int, int]] = {}
    for i, step in enumerate(program.steps):
        begin, end = next((chain for chain in chains if chain[0] <= i <= chain[1]), (i, i))
        passed_on = {view.buffer for view in step.results} if i < end else set()
        received = {view.buffer for s in program.steps[begin:i] for view in s.results}
        for view in views_of((step.args, step.kwargs, step.results)):
            if program.buffers[view.buffer].place is Place.ARENA and view.buffer not in passed_on | received:
                first, last = spans.get(view.buffer, (begin, end))
                spans[view.buffer] = (min(first, begin), max(last, end))
    return {index: Lifetime(first, last, program.buffers[index].nbytes) for index, (first, last) in spans.items()}


def _aligned(memory: Tensor) -> int:
    """The first aligned address in it."""
    return -(-memory.data_ptr() // ALIGNMENT) * ALIGNMENT


def _allocate(
    program: Program, lifetimes: dict[int, Lifetime], layout: ArenaLayout, count: int
) -> tuple[Tensor, Bases]:
    """So many arenas, one behind the other, and the buffers whose memory never moves: those in the first,
    and the constants."""
    memory = advise_huge_pages(torch.empty(layout.nbytes * count + ALIGNMENT, dtype=torch.uint8))
    aligned = _aligned(memory) - memory.data_ptr()
    bases: Bases = [buffer.constant for buffer in program.buffers]
    for index, offset in zip(lifetimes, layout.offsets, strict=True):
        buffer = program.buffers[index]
        block = memory[aligned + offset : aligned + offset + buffer.nbytes].view(buffer.base.dtype)
        bases[index] = block.as_strided(buffer.base.shape, buffer.base.stride)
    return memory, bases


def _getter(argument: Any, static: Bases, program: Program) -> Callable[[Bases], Any]:
    """A function that gives an argument's value during a run; views of memory that never moves are made once."""
    if isinstance(argument, View):
        if static[argument.buffer] is not None:
            tensor = tensor_at(argument, static, program)
            return lambda bases: tensor
        return lambda bases: tensor_at(argument, bases, program)
    if isinstance(argument, (list, tuple)) and views_of(argument):
        getters = [_getter(item, static, program) for item in argument]
        return lambda bases: [get(bases) for get in getters]
    return lambda bases: argument


def _result_getter(leaf: Any, static: Bases, program: Program) -> Callable[[Bases], Any]:
    """As `_getter`; a constant is handed out as a copy, since the caller may write to it."""
    get = _getter(leaf, static, program)
    if isinstance(leaf, View) and program.buffers[leaf.buffer].place is Place.CONSTANT:
        return lambda bases: get(bases).clone()
    return get


def _torch_call(step: TorchStep, static: Bases, program: Program) -> Callable[[Bases], None]:
    positional = [_getter(argument, static, program) for argument in step.args]
    named = {name: _getter(argument, static, program) for name, argument in step.kwargs.items()}
    if step.into_out:
        named["out"] = _getter(step.results[0], static, program)
    target, into_out, results, positions = step.target, step.into_out, step.results, step.positions
    is_single = positions == (0,)

    def run(bases: Bases) -> None:
        result = target(*[get(bases) for get in positional], **{name: get(bases) for name, get in named.items()})
        if into_out:
            return
        leaves = [result] if is_single and isinstance(result, Tensor) else pytree.tree_leaves(result)
        for position, view in zip(positions, results, strict=True):
            if view == program.buffers[view.buffer].base:
                bases[view.buffer] = _in_layout(leaves[position], view)

    return run


def _in_layout(tensor: Tensor, view: View) -> Tensor:
    """`tensor` itself if its elements lie as `view` says, else a copy that does. Raises `ValueError` for another shape:
    it followed from the values of other inputs."""
    if tensor.shape != view.shape:
        raise ValueError(
            f"inputs: expected values that lead to a result of shape {list(view.shape)} as captured, got "
            f"{list(tensor.shape)}; call the model itself, whose shapes may depend on values"
        )
    if all(size <= 1 or a == b for size, a, b in zip(view.shape, tensor.stride(), view.stride, strict=True)):
        return tensor
    return torch.empty_strided(view.shape, view.stride, dtype=view.dtype).copy_(tensor)
