"""Parameter watches and bound calls in Python, for where the native module cannot look at torch's tensors.

They are what `kernelpress._cpu.ParameterWatch` and `kernelpress._cpu.BoundCall` are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelpress.ops.calls.prepared import generation, panel_width
from kernelpress.ops.registry import Run
from kernelpress.runtime.interception import is_plain
from kernelpress.runtime.snapshot import PythonSnapshot
from kernelpress.runtime.torch_private import any_requires_grad

__all__ = ["BoundCall", "ParameterWatch"]


class ParameterWatch:
    """Looks at the parameters in slots, `(table, name)` each; `epoch` is another number when it saw something else."""

    def __init__(self, slots: Sequence[tuple[dict[str, Tensor | None], str]]) -> None:
        self.epoch = 0
        self._slots = tuple(slots)
        self._seen = _Seen((-1, -1), PythonSnapshot(()), False)

    def look(self) -> bool:
        """Whether bound calls can run on what is in the slots now: plain tensors, none of which wants a gradient."""
        environment, snapshot, all_plain = self._seen
        now = tuple([table.get(name) for table, name in self._slots])
        if environment != (generation(), panel_width()) or not snapshot(now):
            all_plain = self._look_anew(now)
        return all_plain and not (torch.is_grad_enabled() and any_requires_grad(*now))

    def _look_anew(self, now: tuple[Tensor | None, ...]) -> bool:
        self.epoch += 1  # before `_seen`: another thread may look at the same time
        all_plain = all(t is not None and is_plain(t) for t in now)
        self._seen = _Seen((generation(), panel_width()), PythonSnapshot(now if all_plain else ()), all_plain)
        return all_plain


class _Seen(NamedTuple):
    """What a watch saw: a snapshot of the parameters if all of them are plain tensors."""

    environment: tuple[int, int]
    snapshot: PythonSnapshot
    all_plain: bool


class _Known(NamedTuple):
    """The last call: in which epoch, on activations of which form; its tensors (activations left out), and what ran."""

    epoch: int
    positions: tuple[int, ...]
    forms: list[tuple[Any, ...]]
    tensors: list[Tensor | None]
    prepared: Run


class BoundCall:
    """An op as a function of its activations. It remembers the last call; any other is `renew`'s."""

    def __init__(self, name: str, watch: ParameterWatch, renew: Callable[..., Tensor]) -> None:
        self.__name__ = name
        self._watch = watch
        self._renew = renew
        self._known = _Known(-1, (), [], [], renew)

    def __call__(self, *activations: Tensor) -> Tensor:
        epoch, positions, forms, held, prepared = self._known
        if epoch != self._watch.epoch:
            return self._renew(*activations)
        tensors = held.copy()
        for position, t, form in zip(positions, activations, forms):  # noqa: B905
            if not is_plain(t) or _form(t) != form:
                return self._renew(*activations)
            tensors[position] = t
        return prepared(tensors)

    def remember(
        self, epoch: int, positions: tuple[int, ...], tensors: tuple[Tensor | None, ...], prepared: Run
    ) -> None:
        """What to run in that epoch for activations like those that stand in `tensors` at `positions`."""
        forms = [_form(t) for position in positions if (t := tensors[position]) is not None]
        held = [None if position in positions else t for position, t in enumerate(tensors)]
        self._known = _Known(epoch, positions, forms, held, prepared)


def _form(t: Tensor) -> tuple[Any, ...]:
    return t.shape, t.dtype, t.stride(), t.device
