"""Bound calls: an op on the parameters of a module, for a place in a network that is run again and again.

Everything that stays the same from run to run is looked up once; a run only makes sure that it did stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from kernelpress.ops.calls import bound_python, prepared
from kernelpress.ops.calls.dispatch import call
from kernelpress.ops.registry import Operator
from kernelpress.runtime import native

__all__ = ["BoundCall", "ParameterSlot", "ParameterWatch", "bound_call"]

BoundCall = Callable[..., Tensor]
"""An op as a function of its activations."""

_types: Any = native.cpu() if native.load().reads_tensors else bound_python

ParameterWatch: Any = _types.ParameterWatch
"""`ParameterWatch(slots)` tells bound calls when what they prepared holds no longer: `look()`, to be called before each
run, says whether they can run on what is in the slots now, without a gradient being wanted of it; `epoch` is another
number once it saw something else.

It notices other tensors in the slots, writes to them as far as a `snapshot.Snapshot` does, `prepared.clear`, and
another instruction set.
"""


class ParameterSlot(NamedTuple):
    """Where a module keeps a parameter: its `_parameters` or `_buffers`, and the name there."""

    table: dict[str, Tensor | None]
    name: str


def bound_call(
    operator: Operator,
    parameters: Mapping[int, ParameterSlot],
    given: Sequence[int],
    options: tuple[Any, ...],
    backend: str,
    watch: Any,
) -> BoundCall:
    """An op as a function of its activations only, those at the positions `given` among the op's tensors.

    Args:
        parameters: position among the op's tensors → where the parameter is found; tensors at other positions are
            absent.
        options, backend: as `library.call` takes them, no list among them, the backend not `"auto"`.
        watch: the `ParameterWatch` that looks at these parameters before each run.

    It may be called only while no tensor wants a gradient and nothing is intercepted (`interception.is_intercepted`).
    It remembers the last call; any other takes the way of the op's typed function, and raises what that does.
    """
    positions = tuple(given)

    def renew(*activations: Tensor) -> Tensor:
        epoch = watch.epoch
        tensors: list[Tensor | None] = [None] * len(operator.tensors)
        for position, (table, name) in parameters.items():
            tensors[position] = table.get(name)
        for position, t in zip(positions, activations, strict=True):
            tensors[position] = t
        y = call(operator, tuple(tensors), options, backend)
        found = prepared.recall(operator, tensors, options, backend)
        if found is not None:
            bound.remember(epoch, positions, tuple(tensors), found.run)
        return y

    bound = _types.BoundCall(operator.name, watch, renew)
    return bound
