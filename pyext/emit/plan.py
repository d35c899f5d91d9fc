"""Plans: an emitted model at fixed shapes, run without Python per layer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kernelpress import native
from kernelpress.emit.arena import ArenaLayout, Lifetime, lay_out
from kernelpress.emit.emitted import EmittedModel
from kernelpress.emit.lower import NativeStep, Place, Program, TorchStep, View, lower, views_of
from kernelpress.ops import registry
from kernelpress.ops.memory import ALIGNMENT, advise_huge_pages

__all__ = ["Plan", "capture"]

_NO_STEPS: Any = ()

Bases = list[Tensor | None]
"""The memory of every buffer during one run."""


def capture(model: EmittedModel, *example_inputs: Any) -> Plan:
    """Prepares `model` for inputs of exactly the shapes, dtypes and structure of `example_inputs`; their values do not
    matter.

    The plan reads the model's weights as they are now. Raises `TypeError` for a model that was not emitted,
    `ValueError` for one that is not on the CPU.
    """
    if not isinstance(model, EmittedModel):
        kind = type(model).__name__
        hint = (
            "; emit it first: kernelpress.capture(kernelpress.emit(model, x), x)"
            if isinstance(model, nn.Module)
            else ""
        )
        raise TypeError(f"model: expected an EmittedModel, got {kind}{hint}")
    flat, spec = pytree.tree_flatten((example_inputs, {}))
    expected = model.body._in_spec
    if spec != expected:
        raise ValueError(f"example_inputs: expected the structure {expected} of the model's inputs, got {spec}")
    inputs = [_own_copy(x) if isinstance(x, Tensor) else x for x in flat]
    model.body.graph.eliminate_dead_code()
    out_spec = model.body._out_spec
    assert out_spec is not None
    return Plan(model, lower(model.body, inputs), spec, out_spec)


def _own_copy(x: Tensor) -> Tensor:
    """`x` in memory of its own, dense, in the memory format it has."""
    return torch.empty_like(x.detach(), memory_format=torch.preserve_format).copy_(x.detach())


class Plan:
    """A captured model: call it with inputs of the captured shapes and dtypes, in any memory format.

    Consecutive native steps run in one call, without the GIL. Intermediate tensors lie in one arena that belongs to
    this plan, so calls from several threads run one after the other; plans of their own run at the same time. Results
    are new tensors at each call and do not require grad. Raises `ValueError` for inputs of another shape, dtype, device
    or structure.
    """

    def __init__(
        self, model: EmittedModel, program: Program, in_spec: pytree.TreeSpec, out_spec: pytree.TreeSpec
    ) -> None:
        self.model = model
        self._program = program
        self._in_spec, self._out_spec = in_spec, out_spec
        self._lock = threading.Lock()
        self._lifetimes = _lifetimes(program)
        self._layout = lay_out(list(self._lifetimes.values()))
        self._memory, self._static = _allocate(program, self._lifetimes, self._layout)
        self._outputs = [i for i, buffer in enumerate(program.buffers) if buffer.place is Place.OUTPUT]
        self._inputs = [(i, view) for i, view in enumerate(program.inputs) if isinstance(view, View)]
        self._plain = [(i, value) for i, value in enumerate(program.inputs) if not isinstance(value, View)]
        self._result = [_getter(leaf, self._static, program) for leaf in pytree.tree_leaves(program.output)]
        self._native_steps = sum(isinstance(step, NativeStep) for step in program.steps)
        self._builder = _NativeBuilder(program, self._static)
        self._run = self._compile()
        self._direct = self._compile_direct()

    @property
    def arena_bytes(self) -> int:
        """Bytes of the arena."""
        return self._layout.nbytes

    @property
    def intermediate_bytes(self) -> int:
        """Bytes that the tensors in the arena would occupy side by side."""
        return sum(lifetime.nbytes for lifetime in self._lifetimes.values())

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
    def native_steps(self) -> int:
        """How many of the steps are native."""
        return self._native_steps

    def __len__(self) -> int:
        return len(self._program.steps)

    def __repr__(self) -> str:
        native_count, torch_count = self.native_steps, len(self) - self.native_steps
        return f"Plan({native_count} native steps, {torch_count} torch steps, arena of {self.arena_bytes} bytes)"

    def __call__(self, *inputs: Any) -> Any:
        """The model's outputs for `inputs`, in the structure that the model returns."""
        if self._direct is not None:
            result = self._direct(inputs)
            if result is not None:
                return result
        flat, spec = pytree.tree_flatten((inputs, {}))
        if spec != self._in_spec:
            raise ValueError(f"inputs: expected the structure {self._in_spec}, got {spec}")
        for position, value in self._plain:
            if flat[position] != value:
                raise ValueError(f"inputs[{position}]: expected {value!r} as captured, got {flat[position]!r}")
        with torch.no_grad(), self._lock:
            bases: Bases = self._static.copy()
            for position, view in self._inputs:
                bases[view.buffer] = _bind(flat[position], view, position)
            for index in self._outputs:
                base = self._program.buffers[index].base
                bases[index] = torch.empty_strided(base.shape, base.stride, dtype=base.dtype)
            self._run(bases)
            leaves = [get(bases) for get in self._result]
        return pytree.tree_unflatten(leaves, self._out_spec)

    def _compile(self) -> Callable[[Bases], None]:
        """One function that runs all steps: native stretches and torch calls in turn."""
        stretches: list[Callable[[Bases], None]] = []
        builder = self._builder
        start = 0
        for step in self._program.steps:
            if isinstance(step, NativeStep):
                builder.append(step)
                continue
            if len(builder) > start:
                stretches.append(builder.stretch(start, len(builder)))
            start = len(builder)
            stretches.append(_torch_call(step, self._static, self._program))
        if len(builder) > start:
            stretches.append(builder.stretch(start, len(builder)))

        def run(bases: Bases) -> None:
            for stretch in stretches:
                stretch(bases)

        return run

    def _compile_direct(self) -> Callable[[tuple[Any, ...]], Tensor | None] | None:
        """A call with hardly any Python, for plans of native steps alone from tensors to one tensor.

        After a few milliseconds of kernels the interpreter's own code and data have left the caches, and each line of
        the general way costs microseconds. Gives None for inputs that need the general way.
        """
        views, outputs = [view for _, view in self._inputs], views_of(self._program.output)
        by_position = pytree.tree_structure((tuple(views), {}), is_leaf=lambda leaf: isinstance(leaf, View))
        if self._plain or by_position != self._in_spec or self._native_steps < len(self._program.steps):
            return None
        if not self._out_spec.is_leaf() or len(outputs) != 1:
            return None
        made = self._program.buffers[outputs[0].buffer].base
        moving = [view.buffer for view in (*views, made)]
        if outputs[0] != made or moving != self._builder.external:
            return None
        forms = [(view.shape, view.stride, view.dtype) for view in views]
        shape, stride, dtype, count = made.shape, made.stride, made.dtype, len(forms)
        steps, run, lock, empty = len(self._builder), self._builder.run, self._lock, torch.empty_strided

        def direct(inputs: tuple[Any, ...]) -> Tensor | None:
            if len(inputs) != count:
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
                run(0, steps, addresses)
            return result

        return direct


class _NativeBuilder:
    """Appends native steps to a `_cpu.Plan`, and keeps alive what they point to."""

    def __init__(self, program: Program, static: Bases) -> None:
        self._program = program
        has_native = any(isinstance(step, NativeStep) for step in program.steps)
        self._plan: Any = native.cpu().Plan() if has_native else _NO_STEPS
        self._stand_ins: Bases = list(static)
        self._held: list[tuple[Tensor, ...]] = []
        self.external: list[int] = []
        for index, buffer in enumerate(program.buffers):
            is_moving = buffer.place in (Place.INPUT, Place.OUTPUT, Place.TORCH)
            if is_moving and buffer.nbytes and self._is_native_operand(index):
                base = buffer.base
                stand_in = torch.empty_strided(base.shape, base.stride, dtype=base.dtype)
                self._stand_ins[index] = stand_in
                self._plan.external(stand_in.data_ptr(), buffer.nbytes)
                self.external.append(index)

    @property
    def run(self) -> Callable[[int, int, list[int]], None]:
        """Runs steps `first` … `last - 1` with the external buffers at the addresses given."""
        run: Callable[[int, int, list[int]], None] = self._plan.run
        return run

    def _is_native_operand(self, index: int) -> bool:
        steps = [step for step in self._program.steps if isinstance(step, NativeStep)]
        return any(view.buffer == index for step in steps for view in views_of((step.args, step.out)))

    def __len__(self) -> int:
        return len(self._plan)

    def append(self, step: NativeStep) -> None:
        """Adds the step; one without elements has nothing to do."""
        if 0 in step.out.shape:
            return
        args = [_tensor(a, self._stand_ins, self._program) if isinstance(a, View) else a for a in step.args]
        out = _tensor(step.out, self._stand_ins, self._program)
        call = registry.native_call(step.op, args, step.kwargs, out)
        getattr(self._plan, call.name)(*call.arguments)
        self._held.append(call.tensors)

    def stretch(self, first: int, last: int) -> Callable[[Bases], None]:
        """A function that runs steps `first` … `last - 1` with the buffers of the moment."""
        plan, external, held = self._plan, self.external, self._held

        def run(bases: Bases, held: list[tuple[Tensor, ...]] = held) -> None:
            addresses = [0 if (base := bases[index]) is None else base.data_ptr() for index in external]
            plan.run(first, last, addresses)

        return run


def _lifetimes(program: Program) -> dict[int, Lifetime]:
    """Lifetime of every buffer in the arena, by buffer."""
    spans: dict[int, tuple[int, int]] = {}
    for i, step in enumerate(program.steps):
        for view in views_of((step.args, step.kwargs, step.results)):
            if program.buffers[view.buffer].place is Place.ARENA:
                first, _ = spans.get(view.buffer, (i, i))
                spans[view.buffer] = (first, i)
    return {index: Lifetime(first, last, program.buffers[index].nbytes) for index, (first, last) in spans.items()}


def _allocate(program: Program, lifetimes: dict[int, Lifetime], layout: ArenaLayout) -> tuple[Tensor, Bases]:
    """The arena, and the buffers whose memory never moves: those in it, and the constants."""
    memory = advise_huge_pages(torch.empty(layout.nbytes + ALIGNMENT, dtype=torch.uint8))
    aligned = -memory.data_ptr() % ALIGNMENT
    bases: Bases = [buffer.constant for buffer in program.buffers]
    for index, offset in zip(lifetimes, layout.offsets, strict=True):
        buffer = program.buffers[index]
        block = memory[aligned + offset : aligned + offset + buffer.nbytes].view(buffer.base.dtype)
        bases[index] = block.as_strided(buffer.base.shape, buffer.base.stride)
    return memory, bases


def _tensor(view: View, bases: Bases, program: Program) -> Tensor:
    base = bases[view.buffer]
    assert base is not None
    if view == program.buffers[view.buffer].base:
        return base
    return base.as_strided(view.shape, view.stride, base.storage_offset() + view.offset)


def _getter(argument: Any, static: Bases, program: Program) -> Callable[[Bases], Any]:
    """A function that gives an argument's value during a run; views of memory that never moves are made once."""
    if isinstance(argument, View):
        if static[argument.buffer] is not None:
            tensor = _tensor(argument, static, program)
            return lambda bases: tensor
        return lambda bases: _tensor(argument, bases, program)
    if isinstance(argument, (list, tuple)) and views_of(argument):
        getters = [_getter(item, static, program) for item in argument]
        return lambda bases: [get(bases) for get in getters]
    return lambda bases: argument


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
    """`tensor` itself if its elements lie as `view` says, else a copy that does."""
    if all(size <= 1 or a == b for size, a, b in zip(view.shape, tensor.stride(), view.stride, strict=True)):
        return tensor
    return torch.empty_strided(view.shape, view.stride, dtype=view.dtype).copy_(tensor)


def _bind(given: Any, view: View, position: int) -> Tensor:
    """The caller's tensor for input `position`, checked, in the captured layout."""
    if not isinstance(given, Tensor):
        raise ValueError(f"inputs[{position}]: expected a Tensor, got {type(given).__name__}")
    if tuple(given.shape) != view.shape:
        raise ValueError(f"inputs[{position}]: expected shape {list(view.shape)} as captured, got {list(given.shape)}")
    if given.dtype != view.dtype:
        raise ValueError(f"inputs[{position}]: expected dtype {view.dtype} as captured, got {given.dtype}")
    if given.device.type != "cpu":
        raise ValueError(f"inputs[{position}]: expected a tensor on the CPU, got {given.device}")
    return _in_layout(given.detach(), view)
