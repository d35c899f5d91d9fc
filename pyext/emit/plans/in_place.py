"""Concatenations without copies: whoever makes a part writes it where it belongs in the whole.

    a ── conv ──▶ ▇▇▇▇┐ cat                 a ── conv ──▶ ▇▇▇▇▇▇▇▇ ◀── conv ── b
                      ├──▶ ▇▇▇▇▇▇▇▇
    b ── conv ──▶ ▇▇▇▇┘

Images are channels_last, so a part is a channel slice of the whole, which kernels of ours write and read like any
image. A concatenation of parts that stand side by side in a larger one already (DenseNet's) is a view of that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from kernelpress.emit.lower import NativeStep, Place, Program, Step, View, views_of
from kernelpress.emit.plans.native_steps import Bases, tensor_at
from kernelpress.ops.calls.aten import aten_call
from kernelpress.ops.calls.elementwise import merged_dims
from kernelpress.ops.calls.steps import native_reason
from kernelpress.runtime.torch_private import pytree

__all__ = ["without_copies"]

aten = torch.ops.aten

Moved = Callable[[View], View | None]


def without_copies(program: Program) -> Program:
    """Moves the parts of concatenations into the whole, wherever every step can work on them there; changes the program
    and returns it."""
    stand_ins: Bases = [
        torch.empty_strided(b.base.shape, b.base.stride, dtype=b.base.dtype) if b.constant is None else b.constant
        for b in program.buffers
    ]
    runs = itertools.groupby(range(len(program.steps)), lambda i: _whole_of(program.steps[i]))
    gone: set[int] = set()
    for positions in reversed([list(run) for whole, run in runs if whole is not None]):
        parts = [step for i in positions if isinstance(step := program.steps[i], NativeStep)]
        beside = _beside(program, parts)
        if beside is not None and _move(program, stand_ins, parts[0].out.buffer, beside, {*gone, *positions}):
            gone.update(positions)
            continue
        for i in positions:
            (part,) = program.steps[i].args
            (place,) = program.steps[i].results
            is_whole = part == program.buffers[part.buffer].base
            if is_whole and _move(program, stand_ins, part.buffer, place, {*gone, i}):
                gone.add(i)
    program.steps = [step for i, step in enumerate(program.steps) if i not in gone]
    return program


def _whole_of(step: Step) -> int | None:
    """The buffer that the step copies a part of a concatenation into, None if it does anything else."""
    return step.out.buffer if isinstance(step, NativeStep) and step.target is aten.cat.default else None


def _beside(program: Program, parts: Sequence[NativeStep]) -> View | None:
    """Where all parts of a concatenation stand already as they are to stand in the whole."""
    first, whole = parts[0].args[0], program.buffers[parts[0].out.buffer].base
    found = View(first.buffer, whole.shape, first.stride, first.offset, whole.dtype)
    moved = _moved(whole, found)
    covered = sum(_count(part.out) for part in parts) == _count(whole)
    return found if covered and all(_same(moved(part.out), part.args[0]) for part in parts) else None


def _count(view: View) -> int:
    return torch.Size(view.shape).numel()


def _same(view: View | None, other: View) -> bool:
    """Whether two views of a shape are the same elements."""
    if view is None or (view.buffer, view.offset, view.shape) != (other.buffer, other.offset, other.shape):
        return False
    return all(size == 1 or a == b for size, a, b in zip(view.shape, view.stride, other.stride, strict=True))


def _move(program: Program, stand_ins: Bases, index: int, to: View, without: set[int]) -> bool:
    """Lays a buffer where `to` is, for all steps but those `without`. Returns whether all can work there, else nothing
    has changed."""
    buffer = program.buffers[index]
    places = {buffer.place, program.buffers[to.buffer].place}
    if buffer.place is not Place.ARENA or to.buffer == index or not places <= {Place.ARENA, Place.OUTPUT}:
        return False
    moved = _moved(buffer.base, to)
    changed: dict[int, Step] = {}
    for i, step in enumerate(program.steps):
        views = [view for view in views_of((step.args, step.kwargs, step.results)) if view.buffer == index]
        if not views or i in without:
            continue
        elsewhere = {view: moved(view) for view in views}
        if None in elsewhere.values() or not isinstance(step, NativeStep):
            return False
        args, out, further = pytree.tree_map_only(
            View,
            lambda view: elsewhere.get(view, view),  # noqa: B023
            (step.args, step.out, step.further),
        )
        changed[i] = found = replace(step, args=args, out=out, further=further)
        if not _runs(program, stand_ins, found):
            return False
    for i, step in changed.items():
        program.steps[i] = step
    return True


def _runs(program: Program, stand_ins: Bases, step: NativeStep) -> bool:
    """Whether a kernel takes its tensors as they lie."""
    args = [tensor_at(a, stand_ins, program) if isinstance(a, View) else a for a in step.args]
    out, *further = (tensor_at(view, stand_ins, program) for view in step.results)
    if step.target is None:
        return native_reason(step.op, args, step.kwargs, (out, *further)) is None
    return aten_call(step.target, args, step.kwargs, out, step.activation) is not None


def _moved(base: View, to: View) -> Moved:
    """Where the elements of a view are, when the buffer whose first view is `base` lies as `to`."""
    dims = merged_dims(base.shape, (to.stride, base.stride))

    def moved(view: View) -> View | None:
        rest, offset, ends = view.offset, to.offset, []
        for _, (new, old) in dims:
            ends.append(rest // old)
            offset, rest = offset + rest // old * new, rest % old
        strides: list[int] = []
        for size, stride in zip(view.shape, view.stride, strict=True):
            along = next((i for i, (_, (_, old)) in enumerate(dims) if old <= stride and stride % old == 0), None)
            if along is None:
                if size > 1 and stride != 0:
                    return None
                strides.append(stride)
                continue
            new, old = dims[along][1]
            strides.append(stride // old * new)
            ends[along] += stride // old * (size - 1)
        if rest or any(end >= size for end, (size, _) in zip(ends, dims, strict=True)):
            return None
        return View(to.buffer, view.shape, tuple(strides), offset, view.dtype)

    return moved
