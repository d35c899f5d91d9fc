"""What modules take as emission runs them, time or energy: for passes that weigh layers by it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from kernelpress.emit.pipeline import emit
from kernelpress.emit.plans.plan import capture
from kernelpress.measure.energy import energy_per_call
from kernelpress.measure.race import race
from kernelpress.ops.layout import IMAGES_OR_ROWS

__all__ = ["layer_energies", "layer_times", "plan_latencies"]

ENERGY_SECONDS = 0.1
"""A layer runs for so long while its energy is counted."""


def plan_latencies(modules: Mapping[str, nn.Module], x: Tensor) -> dict[str, float]:
    """Milliseconds of each of `modules`, emitted for `x` and captured as a plan, measured in turn.

    Images are read in channels_last memory, as emitted layers hand them on, whatever memory `x` has. Raises what `emit`
    and `capture` raise.
    """
    x = IMAGES_OR_ROWS.copy(x)
    plans = {name: capture(emit(module, x, dynamic_batch=False, progress=False), x) for name, module in modules.items()}
    calls = {name: (lambda plan=plan: plan(x)) for name, plan in plans.items()}
    return race(calls, [{(name,)} for name in plans])


def layer_times(layers: Sequence[tuple[nn.Module, Tensor]], *, cache: bool = True) -> list[float]:
    """Milliseconds of each layer on what it reads: of the fastest kernel or operation that `emit` finds for it.

    Images are read in channels_last memory, as emitted layers hand them on, whatever memory they come in. Each layer is
    timed with emptied inner caches, as it finds them in a model, and not fused with any other. Times are those of this
    device and remembered on disk (`cache`), so a layer is timed once. What emission leaves alone is timed as it is.
    """
    layers = [(layer, IMAGES_OR_ROWS.copy(x)) for layer, x in layers]
    if not layers:
        return []
    apart = _Apart([layer for layer, _ in layers])
    record = emit(apart, tuple(x for _, x in layers), dynamic_batch=False, cache=cache, progress=False).record
    times = [0.0] * len(layers)
    for place in record.places:
        times[int(place.name.split(".")[1])] += place.milliseconds
    left = {str(i): functools.partial(layers[i][0], layers[i][1]) for i, time in enumerate(times) if time == 0}
    measured = race(left, [{(name,)} for name in left])
    return [measured.get(str(index), time) for index, time in enumerate(times)]


def layer_energies(layers: Sequence[tuple[nn.Module, Tensor]]) -> list[float]:
    """Joules of each layer on what it reads, as a plan by itself; the package's idle share is in them.

    Images are read as `layer_times` reads them. Takes a tenth of a second and an emission a layer. Raises `ValueError`
    with the reason where the processor's energy counters cannot be read.
    """
    joules = []
    for layer, given in layers:
        x = IMAGES_OR_ROWS.copy(given)
        plan = capture(emit(layer, x, dynamic_batch=False, progress=False), x)
        energy = energy_per_call(functools.partial(plan, x), device=x.device, seconds=ENERGY_SECONDS)
        if energy.joules is None:
            raise ValueError(f"energy: expected a device that counts it, got {x.device}: {energy.reason}")
        joules.append(energy.joules)
    return joules


class _Apart(nn.Module):
    """Layers side by side."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer, x in zip(self.layers, inputs, strict=True))
