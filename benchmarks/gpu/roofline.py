"""What a device can do at best, measured: a copy through its memory, and matrix products in torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gpu.place import Place
from kernelpress.bench.calls import random_tensor
from kernelpress.bench.roofline import Ceilings
from kernelpress.runtime.torch_private import int_mm

__all__ = ["Roofline", "measure_roofline"]

COPY_BYTES = 2 << 30
MATRIX = 8192
SECONDS = 0.1


@dataclass(frozen=True)
class Roofline(Ceilings):
    """GB/s (read + written) of a copy that no cache holds; TFLOP/s of a bfloat16 and TOP/s of an int8 product."""

    copy_gbs: float
    bf16_tflops: float
    int8_tops: float

    def peak_gflops(self, kind: str) -> float | None:
        return (self.int8_tops if kind == "int8" else self.bf16_tflops) * 1e3

    def bandwidth(self, working_set_bytes: int) -> float:
        return self.copy_gbs


def measure_roofline(place: Place) -> Roofline:
    """Measures the ceilings of a device, on random data: zeros cost less power and run faster."""
    count, size = (1 << 12, 64) if place.is_dry else (COPY_BYTES, MATRIX)
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)
    a, b = (random_tensor(place.device, place.dtype, size, size) for _ in range(2))
    a8, b8 = (random_tensor(place.device, torch.int8, size, size) for _ in range(2))
    timings = place.time(
        {
            "copy": lambda: target.copy_(source),
            "bf16": lambda: a @ b,
            "int8": lambda: int_mm(a8, b8.t()),
        },
        budget_seconds=SECONDS,
    )
    work = 2 * size**3
    return Roofline(
        copy_gbs=2 * count / timings["copy"].median * 1e-6,
        bf16_tflops=work / timings["bf16"].median * 1e-9,
        int8_tops=work / timings["int8"].median * 1e-9,
    )
