"""Cold emissions of one model: how long each takes, and how far their plans lie apart, beside that of an emission which
times every candidate to the end.

python benchmarks/emission.py mobilenet_v2 timm:resnet50 --emissions 10
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from bench_models import positive
from recording import RESULTS, save
from rich.console import Console
from rich.progress import track

import kernelpress as kp
from kernelpress import models
from kernelpress.emit import evaluate
from kernelpress.measure.race import Heat, race
from kernelpress.ops.registry import NATIVE_BACKENDS

IMAGE = (1, 3, 224, 224)
TO_THE_END = (Heat(20, float("inf")),)


@dataclass(frozen=True)
class Emissions:
    """Seconds of each cold emission, best milliseconds of its plan, layers left to torch in it; and the milliseconds of
    the plan that an emission chose which timed every candidate to the end."""

    model: str
    seconds: tuple[float, ...]
    plan_ms: tuple[float, ...]
    torch_calls: tuple[int, ...]
    exhaustive_ms: float

    def __str__(self) -> str:
        worst, best = max(self.plan_ms) / min(self.plan_ms), statistics.median(self.plan_ms) / self.exhaustive_ms
        return (
            f"{self.model}: {statistics.median(self.seconds):.1f} s (longest {max(self.seconds):.1f}), "
            f"plans {min(self.plan_ms):.2f} to {max(self.plan_ms):.2f} ms ({worst:.3f}), {best:.3f} of the exhaustive "
            f"choice, layers left to torch: {', '.join(map(str, self.torch_calls))}"
        )


def emission(name: str, count: int, rounds: int) -> Emissions:
    """Emits a model so many times with nothing known, then times the plans in turn."""
    model, x = models.build(name).eval(), torch.randn(IMAGE)
    seconds: list[float] = []
    calls: list[int] = []
    plans: dict[str, Callable[[], object]] = {}
    for i in track(range(count + 1), name, console=Console(stderr=True), transient=True):
        with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, KERNELPRESS_CACHE=folder):
            timing = functools.partial(race, heats=TO_THE_END) if i == count else race
            with mock.patch.object(evaluate, "race", timing):
                begin = time.perf_counter()
                emitted = kp.emit(model, x, progress=False)
                seconds.append(time.perf_counter() - begin)
            backends = [place.choice.rpartition("[")[2].rstrip("]") for place in emitted.record.places]
            calls.append(sum(backend not in NATIVE_BACKENDS for backend in backends))
            plans[str(i)] = functools.partial(kp.capture(emitted, x), x)
    times: dict[str, list[float]] = {key: [] for key in plans}
    for _ in range(rounds):
        for key, taken in kp.measure.time_alternately(plans, budget_seconds=0.1, rounds=1).items():
            times[key].append(taken.median)
    best = [min(taken) for taken in times.values()]
    return Emissions(name, tuple(seconds[:-1]), tuple(best[:-1]), tuple(calls[:-1]), best[-1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures the models asked for, prints a line each and records them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("models", nargs="+", help="as in recipes, such as mobilenet_v2 or timm:resnet50")
    parser.add_argument("--emissions", type=positive, default=10)
    parser.add_argument("--rounds", type=positive, default=20, help="in which the plans are timed in turn")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    results = []
    for name in options.models:
        results.append(emission(name, options.emissions, options.rounds))
        print(results[-1], flush=True)
    print(f"recorded in {save('emission', results, options.results)}")


if __name__ == "__main__":
    main()
