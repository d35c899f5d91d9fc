"""Where a model's time and FLOPs go, module by module."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kernelpress.measure.cost import count_parameters
from kernelpress.measure.units import count_text, latency_text, text_table
from kernelpress.preserve import evaluation

__all__ = ["LayerCost", "layer_table", "profile_layers"]


@dataclass(frozen=True)
class LayerCost:
    """The cost of one module that has no children; summed over its calls if the model calls it more than once."""

    name: str
    kind: str
    """The class name, e.g. `Conv2d`."""
    output_shape: tuple[int, ...]
    flops: int
    parameters: int
    median_ms: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        return asdict(self)


def _now(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter_ns()


def profile_layers(module: nn.Module, *inputs: Any, repeats: int = 20, warmup: int = 3) -> tuple[LayerCost, ...]:
    """Cost of every childless submodule that one forward pass over `inputs` calls, in call order.

    Hooks read the clock before and after each call, which adds a few µs to it; work between modules (additions,
    reshapes) is not seen.

    Raises `TypeError` where `module` is not an `nn.Module`, `ValueError` for counts that are not positive.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected an nn.Module, got {type(module).__name__}")
    for label, value in (("repeats", repeats), ("warmup", warmup)):
        if value < 1:
            raise ValueError(f"{label}: expected a positive integer, got {value!r}")
    parameter = next(module.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    leaves = {part: name for name, part in module.named_modules() if next(part.children(), None) is None}
    flops: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    samples: dict[str, list[float]] = {}
    elapsed: dict[str, float] = {}
    started: dict[nn.Module, int] = {}
    counter = FlopCounterMode(display=False)

    def count_before(part: nn.Module, _: Any) -> None:
        started[part] = counter.get_total_flops()

    def count_after(part: nn.Module, _: Any, output: Any) -> None:
        name = leaves[part]
        flops[name] = flops.get(name, 0) + counter.get_total_flops() - started[part]
        shapes[name] = tuple(output.shape) if isinstance(output, torch.Tensor) else ()

    def clock_before(part: nn.Module, _: Any) -> None:
        started[part] = _now(device)

    def clock_after(part: nn.Module, _: Any, __: Any) -> None:
        elapsed[leaves[part]] = elapsed.get(leaves[part], 0.0) + (_now(device) - started[part]) * 1e-6

    with evaluation(module, inputs), torch.no_grad():
        hooks = [leaf.register_forward_pre_hook(count_before) for leaf in leaves]
        hooks += [leaf.register_forward_hook(count_after) for leaf in leaves]
        try:
            with counter:
                module(*inputs)
        finally:
            for hook in hooks:
                hook.remove()
        for _ in range(warmup):
            module(*inputs)
        hooks = [leaf.register_forward_pre_hook(clock_before) for leaf in leaves]
        hooks += [leaf.register_forward_hook(clock_after) for leaf in leaves]
        try:
            for _ in range(repeats):
                elapsed.clear()
                module(*inputs)
                for name, milliseconds in elapsed.items():
                    samples.setdefault(name, []).append(milliseconds)
        finally:
            for hook in hooks:
                hook.remove()

    parts = {name: part for part, name in leaves.items()}
    return tuple(
        LayerCost(
            name=name or "(model)",
            kind=type(parts[name]).__name__,
            output_shape=shapes[name],
            flops=flops[name],
            parameters=count_parameters(parts[name]),
            median_ms=statistics.median(samples[name]),
        )
        for name in flops
    )


def layer_table(layers: tuple[LayerCost, ...]) -> str:
    """The layers as text: time and its share, FLOPs and their share, achieved FLOP/s."""
    time_sum = sum(layer.median_ms for layer in layers) or 1.0
    flop_sum = sum(layer.flops for layer in layers) or 1
    rows = [
        (
            layer.name,
            layer.kind,
            "×".join(map(str, layer.output_shape)),
            latency_text(layer.median_ms),
            f"{layer.median_ms / time_sum:.1%}",
            count_text(layer.flops) if layer.flops else "–",
            f"{layer.flops / flop_sum:.1%}" if layer.flops else "–",
            count_text(int(layer.flops / (layer.median_ms * 1e-3)), "FLOP/s") if layer.flops else "–",
            count_text(layer.parameters) if layer.parameters else "–",
        )
        for layer in layers
    ]
    return text_table(("layer", "kind", "output", "time", "share", "FLOPs", "share", "speed", "parameters"), rows)
