"""Bound calls: an op on the parameters of a module, for a place in a network that is run again and again.

Everything that stays the same from run to run is looked up once; a run only makes sure that it did stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelpress.ops import prepared
from kernelpress.ops.interception import is_plain
from kernelpress.ops.library import call
from kernelpress.ops.prepared import generation, panel_width
from kernelpress.ops.registry import Operator, Run

__all__ = ["BoundCall", "ParameterSlot", "ParameterWatch", "bound_call"]

BoundCall = Callable[..., Tensor]
"""An op as a function of its activations."""


class ParameterSlot(NamedTuple):
    """Where a module keeps a parameter: its `_parameters` or `_buffers`, and the name there."""

    table: dict[str, Tensor | None]
    name: str


class ParameterWatch:
    """Tells bound calls when what they prepared holds no longer: `epoch` is another object then.

    It notices other tensors in the slots, writes to them as far as a `snapshot.Snapshot` does, `prepared.clear`, and
    another instruction set.
    """

    def __init__(self, slots: Sequence[ParameterSlot]) -> None:
        self.epoch = object()
        self._slots = tuple(slots)
        self._seen = _Seen((-1, -1), [], [], [], False)

    def tensors(self) -> list[Tensor | None]:
        """What is in the slots now; None where a module has the parameter no longer."""
        return [table.get(name) for table, name in self._slots]

    def look(self) -> bool:
        """To be called before a run: whether bound calls can run on what is in the slots now."""
        environment, held, versioned, states, all_plain = self._seen
        now: list[Any] = [table.get(name) for table, name in self._slots]
        if (
            environment == (generation(), panel_width())
            and len(held) == len(now)
            and all(map(is_, now, held))
            and states == [(t.data_ptr(), t.shape, has and t._version) for t, has in zip(now, versioned)]  # noqa: B905
        ):
            return all_plain
        return self._look_anew(now)

    def _look_anew(self, now: list[Tensor | None]) -> bool:
        self.epoch = object()  # before `_seen`: another thread may look at the same time
        tensors = [t for t in now if t is not None and is_plain(t)]
        versioned = [not t.is_inference() for t in tensors]
        states = [(t.data_ptr(), t.shape, has and t._version) for t, has in zip(tensors, versioned, strict=True)]
        self._seen = _Seen((generation(), panel_width()), tensors, versioned, states, len(tensors) == len(now))
        return self._seen.all_plain


class _Seen(NamedTuple):
    """What a watch saw: the parameters (those of no special kind), which of them count their writes."""

    environment: tuple[int, int]
    parameters: list[Tensor]
    versioned: list[bool]
    states: list[tuple[int, torch.Size, int | bool]]
    all_plain: bool


class _Known(NamedTuple):
    """The last call: in which epoch, on activations of which form; its tensors (activations left out), and what ran."""

    epoch: object
    forms: list[tuple[torch.Size, torch.dtype, tuple[int, ...], torch.device]]
    tensors: list[Tensor | None]
    run: Run


def bound_call(
    operator: Operator,
    parameters: Mapping[int, ParameterSlot],
    given: Mapping[int, bool],
    options: tuple[Any, ...],
    backend: str,
    watch: ParameterWatch,
) -> BoundCall:
    """An op as a function of its activations only, those at the positions `given` among the op's tensors.

    Args:
        parameters: position among the op's tensors → where the parameter is found; tensors at other positions are
            absent.
        given: position → whether that activation is always the output of another bound call, which has no surprises
            but its shape and dtype.
        options, backend: as `library.call` takes them, no list among them, the backend not `"auto"`.
        watch: looks at these parameters before each run.

    It may be called only while no tensor wants a gradient and nothing is intercepted (`interception.is_intercepted`).
    It remembers the last call; any other takes the way of the op's typed function, and raises what that does.
    """
    positions = tuple(given)
    trusted = tuple(given.values())
    known: _Known | None = None

    def run(*activations: Tensor) -> Tensor:
        if known is None:
            return renew(activations)
        epoch, forms, held, compute = known
        if epoch is not watch.epoch:
            return renew(activations)
        tensors = held.copy()
        for position, is_trusted, t, form in zip(positions, trusted, activations, forms):  # noqa: B905
            shape, dtype, stride, device = form
            if (
                t.shape != shape
                or t.dtype is not dtype
                or not (
                    is_trusted or (t.stride() == stride and type(t) is Tensor and t.device == device and not t.is_neg())
                )
            ):
                return renew(activations)
            tensors[position] = t
        return compute(tensors)

    def renew(activations: tuple[Tensor, ...]) -> Tensor:
        nonlocal known
        epoch = watch.epoch
        held: list[Tensor | None] = [None] * len(operator.tensors)
        for position, (table, name) in parameters.items():
            held[position] = table.get(name)
        tensors = held.copy()
        for position, t in zip(positions, activations, strict=True):
            tensors[position] = t
        y = call(operator, tuple(tensors), options, backend)
        found = prepared.recall(operator, tensors, options, backend)
        if found is not None:
            known = _Known(epoch, [(t.shape, t.dtype, t.stride(), t.device) for t in activations], held, found.run)
        return y

    return run
