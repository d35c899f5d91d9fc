"""The speed-up that compression promises: FLOPs that shapes save, weights that are zero, arithmetic in int8."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Interpreter, Node
from torch.utils.flop_counter import FlopCounterMode

from kernelpress.runtime.torch_private import int_mm
from kernelpress.trace import module_of, trace

__all__ = ["Promise", "int8_peak_ratio", "layer_flops", "nearest_layer", "promised_flops"]

PRODUCT_SIZE = 1024
BURST_SECONDS, BURSTS = 0.05, 4


@dataclass(frozen=True)
class Promise:
    """What a pass promises of a layer beyond the FLOPs of its shapes, whichever kernel it comes to run on."""

    layer: str
    density: float = 1.0
    """The share that is not zero, of the weights that earlier passes left: promises multiply."""
    is_int8: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.density <= 1:
            raise ValueError(f"density: expected a share from 0 to 1, got {self.density}")


def layer_flops(module: nn.Module, *inputs: Any) -> dict[str, int]:
    """FLOPs of one forward pass over `inputs` by the path of the module that runs them; they sum to `count_flops`.

    Raises `TraceError` (a `ValueError`) for a model that cannot be exported.
    """
    graph, flops = trace(module, inputs, dynamic_batch=False), dict[str, int]()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:

        class Counting(Interpreter):
            def run_node(self, n: Node) -> Any:
                before = counter.get_total_flops()
                result = super().run_node(n)
                if spent := counter.get_total_flops() - before:
                    flops[module_of(n)] = flops.get(module_of(n), 0) + int(spent)
                return result

        Counting(graph).run(*inputs)
    return flops


def promised_flops(flops: Mapping[str, int], promises: Iterable[Promise], int8_ratio: float | None = None) -> float:
    """What `flops`, by layer, come to: only those of weights that are not zero count, and those in int8 by how many
    more of them a machine does in a second (`int8_ratio`, by default that of this machine).

    Promises of one layer, or of what lies below it, multiply.
    """
    made, total = tuple(promises), 0.0
    for layer, count in flops.items():
        factor, is_int8 = 1.0, False
        for promise in made:
            if nearest_layer(layer, (promise.layer,)) is not None:
                factor, is_int8 = factor * promise.density, is_int8 or promise.is_int8
        if is_int8:
            factor /= int8_peak_ratio() if int8_ratio is None else int8_ratio
        total += count * factor
    return total


def nearest_layer(path: str, layers: Iterable[str]) -> str | None:
    """The innermost of `layers` at `path` or above it, None if there is none; a model is no layer of its own."""
    above = [layer for layer in layers if layer and (path == layer or path.startswith(f"{layer}."))]
    return max(above, key=len, default=None)


@functools.cache
def int8_peak_ratio(device: str = "cpu") -> float:
    """How many times as many operations in int8 as in float32 this machine does in a second, at least 1: the best
    matrix products of PyTorch with either, measured once in a process."""
    x, y = (torch.randint(-128, 128, (PRODUCT_SIZE, PRODUCT_SIZE), device=device, dtype=torch.int8) for _ in range(2))
    a, b = x.float(), y.float()
    try:
        # cuBLAS takes the second operand by columns.
        return max(1.0, _least_seconds(lambda: a @ b, device) / _least_seconds(lambda: int_mm(x, y.t()), device))
    except RuntimeError:
        # This torch has no such product here, so none faster than the float one.
        return 1.0


def _least_seconds(call: Callable[[], object], device: str) -> float:
    """The shortest time of a call, in bursts."""
    call()
    best, end = float("inf"), time.perf_counter() + BURST_SECONDS * BURSTS
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
