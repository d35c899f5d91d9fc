"""Batches as shares of a few images, which threads run side by side, each through all steps by itself: no thread waits
for another between layers, and what a layer hands on stays in the caches of the core that reads it.

    images 0 … 3 ─▶ conv ─▶ conv ─▶ … ─▶ results 0 … 3     one thread
           4 … 7 ─▶ conv ─▶ conv ─▶ … ─▶ results 4 … 7     another
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from kernelpress.emit.lower import NativeStep, Place, Program, View, lower, views_of
from kernelpress.emit.plans.in_place import without_copies
from kernelpress.runtime.torch_private import pytree
from kernelpress.trace.contract import Contract

__all__ = ["Division", "Share", "divide", "division_of", "share_of"]

MOST_IMAGES = 4
"""Of a share: enough that layers read their weights from the outer caches for several, and few enough that what these
layers hand on stays in the inner ones."""


@dataclass(frozen=True)
class Division:
    """A batch as `count` shares of so many images, which so many threads run side by side."""

    images: int
    count: int
    threads: int

    @property
    def rounds(self) -> int:
        """Shares that one thread runs, one after the other."""
        return math.ceil(self.count / self.threads)

    def first(self, inputs: Sequence[Any]) -> list[Any]:
        """The flat inputs of the first share of these."""
        return [x[: self.images] if isinstance(x, Tensor) else x for x in inputs]

    def offsets(self, bases: Sequence[View], arena_bytes: int) -> list[list[list[int]]]:
        """Bytes from the beginning of the batch's buffers, of which these are the bases, and of the threads' arenas:
        for each thread, for each share that it runs."""
        pitches = [base.stride[0] * base.dtype.itemsize * self.images for base in bases]
        ends = [self.count * thread // self.threads for thread in range(self.threads + 1)]
        return [
            [[*(pitch * i for pitch in pitches), arena_bytes * thread] for i in range(*span)]
            for thread, span in enumerate(itertools.pairwise(ends))
        ]


@dataclass(frozen=True)
class Share:
    """The program of one share of a batch."""

    program: Program
    division: Division


def divide(batch: int, threads: int) -> Division | None:
    """Shares of up to `MOST_IMAGES` that keep the threads busy alike; None for a batch too small."""
    sizes = [n for n in range(MOST_IMAGES, 0, -1) if batch % n == 0 and batch // n >= max(2, threads)]
    divisions = [Division(images, batch // images, threads) for images in sizes]
    return min(divisions, key=lambda d: d.images * d.rounds, default=None)


def division_of(contract: Contract, inputs: Sequence[Any]) -> Division | None:
    """How the batch that the flat inputs are is divided among torch's threads; None where it cannot be told, is too
    small, or a share would be no batch that the model takes."""
    tensors = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
    if not tensors or not contract.batch_carriers.issuperset(tensors) or len({len(inputs[i]) for i in tensors}) > 1:
        return None
    division = divide(len(inputs[tensors[0]]), torch.get_num_threads())
    if division is not None:
        try:
            contract.require(pytree.tree_unflatten(division.first(inputs), contract.structure)[0])
        except ValueError:
            return None
    return division


def share_of(body: GraphModule, contract: Contract, inputs: Sequence[Any], whole: Program) -> Share | None:
    """The share that `whole`, the program of these inputs, can be run in; None where a call of torch is part of it, or
    where it does not compute every image by itself alone."""
    division = division_of(contract, inputs) if all(isinstance(step, NativeStep) for step in whole.steps) else None
    if division is None:
        return None
    program = without_copies(lower(body, division.first(inputs)))
    are_apart = _Images(whole, program, division.images * division.count, division.images).are_apart()
    return Share(program, division) if are_apart else None


class _Images:
    """Compares a program with that of fewer images."""

    def __init__(self, whole: Program, share: Program, batch: int, images: int) -> None:
        self._whole, self._share, self._batch, self._images = whole, share, batch, images

    def are_apart(self) -> bool:
        """Whether each step of the whole reads and writes, of every image, what that of the share does of its own.

        Native steps compute the results of an image from that image alone, as long as dimension 0 of all they read is
        the batch, image after image in memory.
        """
        whole, share = self._whole, self._share
        if len(whole.buffers) != len(share.buffers) or len(whole.steps) != len(share.steps):
            return False
        returned = views_of(whole.output)
        return (
            all(whole.buffers[view.buffer].place is Place.OUTPUT for view in returned)
            and len(returned) == len(pytree.tree_leaves(whole.output))
            and self._are_alike((whole.inputs, whole.output), (share.inputs, share.output))
            and all(map(self._is_same_step, whole.steps, share.steps))
        )

    def _is_same_step(self, one: Any, other: Any) -> bool:
        if not isinstance(other, NativeStep):
            return False
        named = (one.op, one.target, one.activation) == (other.op, other.target, other.activation)
        moving = [v for v in views_of((one.args, one.kwargs)) if not self._is_constant(v)]
        # Fewer dimensions than the result has are lined up with its last ones: the first is then no batch.
        lined_up = one.target is None or len(moving) < 2 or all(len(v.shape) == len(one.out.shape) for v in moving)
        used = (one.args, one.kwargs, one.results), (other.args, other.kwargs, other.results)
        return named and lined_up and self._are_alike(*used)

    def _are_alike(self, of_whole: Any, of_share: Any) -> bool:
        ones, structure = pytree.tree_flatten(of_whole)
        others, same_structure = pytree.tree_flatten(of_share)
        return structure == same_structure and all(map(self._is_alike, ones, others))

    def _is_alike(self, one: Any, other: Any) -> bool:
        if not isinstance(one, View) or not isinstance(other, View):
            return type(one) is type(other) and bool(one is other or one == other)
        if self._is_constant(one):
            return self._whole.buffers[one.buffer].place is self._share.buffers[other.buffer].place and one == other
        base = self._whole.buffers[one.buffer].base
        return (
            (one.buffer, one.offset, one.dtype) == (other.buffer, other.offset, other.dtype)
            and (one.shape[:1], other.shape[:1]) == ((self._batch,), (self._images,))
            and one.shape[1:] == other.shape[1:]
            and base.shape[0] == self._batch
            and one.stride[0] == base.stride[0] == self._pitch(other, base)
            and all(s == t or n == 1 for n, s, t in zip(one.shape[1:], one.stride[1:], other.stride[1:], strict=True))
            and one.offset + _span(one.shape[1:], one.stride[1:]) <= base.stride[0]
        )

    def _pitch(self, view: View, base: View) -> int:
        """Elements from image to image of a view of the share; of a single one as in the whole."""
        return base.stride[0] if self._images == 1 else view.stride[0]

    def _is_constant(self, view: View) -> bool:
        return self._whole.buffers[view.buffer].place is Place.CONSTANT


def _span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first of a tensor to behind its last."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
