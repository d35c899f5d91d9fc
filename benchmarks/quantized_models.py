"""Plans of networks in float32 and in int8, in turn in one process: what quantization gains on this machine.

python benchmarks/quantized_models.py --models mobilenet_v2 resnet18 --threads 2 --rounds 8
"""

from __future__ import annotations

import functools
import statistics
import timeit
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, repeat

import torch
from bench_models import contest_parser
from recording import save
from torch import nn

import kernelpress as kp
from kernelpress import compress, models
from kernelpress.runtime.clock import threads_set_to

CALIBRATION = 8
"""Random images, with which BatchNorm gets its statistics as well."""
SETTLE_CALLS = 3


@dataclass(frozen=True)
class Row:
    """One network: best round's median of each plan in ms, places that run int8, none
    where emission kept the simulation in float, and ‖y − y₀‖ ÷ ‖y₀‖ of its output."""

    model: str
    float_ms: float
    int8_ms: float
    int8_places: int
    places: int
    relative_error: float

    def __str__(self) -> str:
        return (
            f"{self.model:20} float {self.float_ms:.2f} ms, int8 {self.int8_ms:.2f} ms, ratio "
            f"{self.int8_ms / self.float_ms:.2f}; {self.int8_places} of {self.places} places in int8, "
            f"error {self.relative_error:.1%}"
        )


def measure(name: str, rounds: int, iterations: int) -> Row:
    """Quantizes, emits and captures one network, and times both plans."""
    torch.manual_seed(0)
    model, images = models.create(name), torch.randn(CALIBRATION, 3, 224, 224)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
    with torch.no_grad():
        model(images)
    x = images[:1]
    emitted = {"float": kp.emit(model.eval(), x, progress=False)}
    emitted["int8"] = kp.emit(compress.quantize(model, x, data=images, progress=False), x, progress=False)
    plans = {kind: kp.capture(e, x) for kind, e in emitted.items()}
    medians: dict[str, list[float]] = {kind: [] for kind in plans}
    for kind, plan in chain.from_iterable(repeat(plans.items(), rounds)):
        call = functools.partial(plan, x)
        timeit.repeat(call, number=1, repeat=SETTLE_CALLS)
        medians[kind].append(statistics.median(timeit.repeat(call, number=1, repeat=iterations)) * 1e3)
    exact, rounded = (plans[kind](x) for kind in ("float", "int8"))
    record = emitted["int8"].record
    in_int8 = 0 if record.kept_original else sum("int8" in place.choice for place in record.places)
    error = float((rounded - exact).norm() / exact.norm())
    return Row(name, min(medians["float"]), min(medians["int8"]), in_int8, len(record.places), error)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures the networks asked for, prints a line each and records them."""
    options = contest_parser(__doc__, rounds=8).parse_args(arguments)
    rows = []
    with threads_set_to(options.threads):
        for name in options.models:
            rows.append(measure(name, options.rounds, options.iterations))
            print(rows[-1], flush=True)
    print(f"recorded in {save('quantized_models', rows, options.results)}")


if __name__ == "__main__":
    main()
