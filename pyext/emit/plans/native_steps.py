"""The native steps of a plan: appended to a `_cpu.Plan`, some of them joined to chains, run in stretches without the
GIL."""

from __future__ import annotations

import operator
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kernelpress.emit.cache import TimingCache
from kernelpress.emit.lower import Buffer, NativeStep, Place, Program, View, views_of
from kernelpress.emit.plans.streaming import choose_chains, interleaving, name_of_plan, private_bytes, with_others
from kernelpress.ops.calls.aten import aten_call
from kernelpress.ops.calls.steps import native_call
from kernelpress.runtime import native

__all__ = ["Bases", "Chain", "NativeSteps", "tensor_at"]

_NO_STEPS: Any = ()

Bases = list[Tensor | None]
"""The memory of every buffer during one run."""

Chain = tuple[int, int]
"""Positions of the first and the last step that run as one."""


class NativeSteps:
    """Appends native steps to a `_cpu.Plan`, joined where a chain says so, and keeps alive what they point to."""

    def __init__(
        self, program: Program, static: Bases, chains: Sequence[Chain], arena: tuple[int, int] | None = None
    ) -> None:
        """`arena`: address and bytes of memory that runs are given anew, as the last of the external buffers."""
        self._program = program
        native_steps = {i: step for i, step in enumerate(program.steps) if isinstance(step, NativeStep)}
        self._plan: Any = native.cpu().Plan() if native_steps else _NO_STEPS
        self._held: list[tuple[Tensor, ...]] = []
        self._positions: list[int] = []
        self.external: list[int] = []
        used = {view.buffer for step in native_steps.values() for view in views_of((step.args, step.results))}
        stand_ins = [
            _like(buffer) if base is None and index in used else base
            for index, (base, buffer) in enumerate(zip(static, program.buffers, strict=True))
        ]
        for index, buffer in enumerate(program.buffers):
            stand_in = stand_ins[index]
            is_moving = buffer.place in (Place.INPUT, Place.OUTPUT, Place.TORCH)
            if stand_in is not None and is_moving and buffer.nbytes:
                self._plan.external(stand_in.data_ptr(), buffer.nbytes)
                self.external.append(index)
        self._stand_ins = stand_ins
        if arena is not None:
            self._plan.external(*arena)
        for position, step in native_steps.items():
            if 0 not in step.out.shape:
                self._append(step)
                self._positions.append(position)
        for chain in reversed(chains):
            first, last = bisect_left(self._positions, chain[0]), bisect_right(self._positions, chain[1])
            if not self._plan.join(first, last):
                raise RuntimeError(f"steps {chain[0]} to {chain[1]}: expected layers that can be streamed by rows")
            self._positions[first:last] = self._positions[first : first + 1]

    @property
    def run(self) -> Callable[[int, int, list[int]], None]:
        """Runs steps `first` … `last - 1` with the external buffers at the addresses given."""
        run: Callable[[int, int, list[int]], None] = self._plan.run
        return run

    def __len__(self) -> int:
        return len(self._plan)

    def _append(self, step: NativeStep) -> None:
        args = [tensor_at(a, self._stand_ins, self._program) if isinstance(a, View) else a for a in step.args]
        out, *further = (tensor_at(view, self._stand_ins, self._program) for view in step.results)
        if step.target is None:
            call = native_call(step.op, args, step.kwargs, (out, *further))
        else:
            call = aten_call(step.target, args, step.kwargs, out, step.activation)  # type: ignore[assignment]
        getattr(self._plan, call.name)(*call.arguments)
        self._held.append(call.tensors)

    def faster_chains(self, cache: TimingCache) -> list[Chain]:
        """The steps that take less time joined, by timing, and the shuffles that layers make as they store; for a plan
        in which none are joined."""
        links = private_bytes(self._program, self._positions)
        if not any(links):
            return []
        steps = self._steps()
        addresses = [base.data_ptr() for i in self.external if (base := self._stand_ins[i]) is not None]
        found = choose_chains(self._plan, addresses, steps, links, cache)
        return self._chains(found)

    def joinable(self, chains: Sequence[Chain]) -> list[Chain]:
        """Those chains of which this plan has the steps, natively, and the shuffles that layers make as they store."""
        trial, found, steps = self._plan, [], self._steps()
        links = private_bytes(self._program, self._positions)
        for chain in chains:
            first, last = bisect_left(self._positions, chain[0]), bisect_right(self._positions, chain[1])
            is_whole = last - first == chain[1] - chain[0] + 1
            if is_whole and all(links[first : last - 1]) and trial.copy().join(first, last):
                found.append((first, last))
        return self._chains(with_others(found, interleaving(trial, steps, links)))

    @property
    def name(self) -> str:
        """Tells plans of other steps apart."""
        return name_of_plan(self._steps())

    def _steps(self) -> list[NativeStep]:
        return [step for i in self._positions if isinstance(step := self._program.steps[i], NativeStep)]

    def _chains(self, ranges: Sequence[tuple[int, int]]) -> list[Chain]:
        return [(self._positions[first], self._positions[last - 1]) for first, last in ranges]

    def side_by_side(self, offsets: Sequence[Sequence[Sequence[int]]]) -> Callable[[Sequence[int]], None]:
        """A function that runs all steps with external buffers at addresses and these offsets from them: worker after
        worker those of each of its runs, the workers side by side."""
        plans = [self._plan.copy() for _ in offsets]
        run_side_by_side = native.cpu().run_side_by_side

        def run(addresses: Sequence[int], held: list[tuple[Tensor, ...]] = self._held) -> None:
            run_side_by_side(plans, [[[*map(operator.add, addresses, moved)] for moved in runs] for runs in offsets])

        return run

    def between(self, after: int, before: int) -> tuple[int, int]:
        """The native plan's steps that stand between two positions of the program."""
        return bisect_right(self._positions, after), bisect_left(self._positions, before)

    def stretch(self, first: int, last: int) -> Callable[[Bases], None]:
        """A function that runs steps `first` … `last - 1` with the buffers of the moment."""
        plan, external, held = self._plan, self.external, self._held

        def run(bases: Bases, held: list[tuple[Tensor, ...]] = held) -> None:
            addresses = [0 if (base := bases[index]) is None else base.data_ptr() for index in external]
            plan.run(first, last, addresses)

        return run


def _like(buffer: Buffer) -> Tensor:
    """Memory of the form of a buffer's base, which nothing need ever touch."""
    return torch.empty_strided(buffer.base.shape, buffer.base.stride, dtype=buffer.base.dtype)


def tensor_at(view: View, bases: Bases, program: Program) -> Tensor:
    """The tensor that a view describes, in the memory of the moment."""
    base = bases[view.buffer]
    assert base is not None
    if view == program.buffers[view.buffer].base:
        return base
    return base.as_strided(view.shape, view.stride, base.storage_offset() + view.offset)
