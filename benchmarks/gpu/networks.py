"""Whole models, captured as CUDA graphs: that each can be, and how fast, beside torch's own ways to run them.

`python -m gpu.networks capture` captures every model and compares it with eager; `python -m gpu.networks bench
--seconds 90 --out FOLDER` times them. Layers may run on Triton's kernels only with `--triton`: to compile and tune them
takes minutes a model.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kernelpress
from gpu import results, stage_parser
from gpu.contest import BATCHES
from gpu.place import DRY, Place, on_device
from gpu.roofline import measure_roofline
from kernelpress.bench.contest import MODEL_TOLERANCE, Contestant, reason_of, relative_error
from kernelpress.bench.plain import to_plain
from kernelpress.emit import Candidate
from kernelpress.ops.backends import triton
from kernelpress.runtime.cuda_graph import record

__all__ = ["MODELS", "ModelRow", "build", "main"]

IMAGE = 224

MODELS = (
    *("mobilenet_v2", "resnet50", "mobilenet_v1", "torchvision:shufflenet_v2_x1_0"),
    *("torchvision:mobilenet_v3_large", "timm:ghostnet_100", "resnet18"),
)
"""Most telling first: a short time ends the list early."""

AUTOTUNED = 'torch.compile(mode="max-autotune")'


@dataclass(frozen=True)
class ModelRow:
    """One model at one batch; ratios are the other's time ÷ ours."""

    model: str
    batch: int
    ms: float | None
    relative_error: float | None
    steps: int
    native_steps: int
    pool_bytes: int
    kept_original: bool
    emit_seconds: float
    best_peer: str | None = None
    ratio: float | None = None
    contestants: tuple[Contestant, ...] = ()


def build(name: str, place: Place) -> nn.Module:
    """The model with random weights, in evaluation mode, on the device of `place`. Raises `ImportError` where the
    package that has it is absent."""
    torch.manual_seed(0)
    model = kernelpress.models.build(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # fresh statistics let activations grow layer by layer
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return model.eval().to(place.device, place.dtype)


def onto(backend: str) -> Callable[[Candidate], float]:
    """A cost that puts every layer on a backend, wherever that can run it."""
    return lambda candidate: 1.0 if candidate.variant == backend else 10.0 * len(candidate.nodes)


Captured = tuple[ModelRow, nn.Module, Tensor, Callable[[], Tensor]]
"""A model's row so far, the model, its input, a call."""


def captured(name: str, batch: int, place: Place, *, is_timed: bool) -> Captured:
    """The model emitted and captured and compared with eager. Layers are the fastest ones where `is_timed`, else our
    kernels wherever they can be, which are to give the same twice."""
    model = build(name, place)
    size = 32 if place.is_dry else IMAGE
    x = torch.randn(batch, 3, size, size, device=place.device, dtype=place.dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    begin = time.monotonic()
    with torch.no_grad():
        expected = to_plain(copy.deepcopy(model))(x)
        cost = None if is_timed and not place.is_dry else onto("reference" if place.is_dry else "cuda")
        emitted = kernelpress.emit(model, x, cost=cost, progress=False, dynamic_batch=False)
    seconds = time.monotonic() - begin
    plan = kernelpress.capture(emitted, x)
    row = ModelRow(
        model=name.rpartition(":")[2],
        batch=batch,
        ms=None,
        relative_error=relative_error(plan(x), expected),
        steps=len(plan),
        native_steps=plan.native_steps,
        pool_bytes=plan.arena_bytes,
        kept_original=emitted.record.kept_original,
        emit_seconds=seconds,
    )
    if not is_timed:
        once = plan(x)
        torch.testing.assert_close(plan(x), once, rtol=0, atol=0)
    return row, model, x, lambda: plan(x)


def attempted(name: str, batch: int, place: Place, *, is_timed: bool) -> Captured | Exception:
    """`captured`, or why not, which is printed; an `ImportError` is no failure."""
    try:
        return captured(name, batch, place, is_timed=is_timed)
    except ImportError as error:
        print(f"skipped {name}: {error}", flush=True)
        return error
    except Exception as error:  # the others are to be captured all the same
        print(f"FAILED {name} batch {batch}: {reason_of(error)}", flush=True)
        return error


def capture_all(place: Place) -> int:
    """Captures every model at a small batch; returns how many failed."""
    failures = 0
    for name in MODELS:
        found = attempted(name, 2, place, is_timed=False)
        if isinstance(found, Exception):
            failures += not isinstance(found, ImportError)
            continue
        row = found[0]
        is_close = row.relative_error is not None and row.relative_error <= MODEL_TOLERANCE[place.dtype]
        failures += not is_close
        print(
            f"{'captured' if is_close else 'FAILED'} {name}: {row.native_steps} of {row.steps} steps native, pool of "
            f"{row.pool_bytes >> 20} MiB, error {row.relative_error:.1e}, emitted in {row.emit_seconds:.0f} s",
            flush=True,
        )
    return failures


def bench(place: Place, seconds: float, out: Path) -> int:
    """Times every model at every batch until the time is up: cheap peers first, then those that compile long."""
    begin = time.monotonic()
    roofline = measure_roofline(place)
    rows: list[ModelRow] = []
    wanted = list(itertools.product((2,) if place.is_dry else BATCHES, MODELS[:2] if place.is_dry else MODELS))
    failures = 0
    left_out = [f"{name} at batch {batch}" for batch, name in wanted]
    for batch, name in wanted:
        if time.monotonic() - begin > seconds:
            break
        left_out.pop(0)
        found = attempted(name, batch, place, is_timed=True)
        if isinstance(found, Exception):
            failures += not isinstance(found, ImportError)
            continue
        row, model, x, call = found
        rows.append(row)
        for peer, make in _peers(model, x, place):
            if time.monotonic() - begin > seconds and row.ms is not None:
                break
            rows[-1] = row = _timed(row, call, peer, make, place)
            results.save("models", rows, place, roofline, out, left_out=left_out)
        times = ", ".join(map(str, row.contestants))
        print(f"{name} batch {batch}: {row.ms} ms, {row.ratio} [{times}]", flush=True)
        with contextlib.suppress(AttributeError):
            torch.compiler.reset()
    return failures


def _peers(model: nn.Module, x: Tensor, place: Place) -> Iterator[tuple[str, Callable[[], Callable[[], object]]]]:
    """Every peer by name, made when it is its turn."""
    network = to_plain(copy.deepcopy(model)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def recorded() -> Callable[[], object]:
        return (lambda: network(x)) if place.is_dry else record(lambda: network(x), place.device).replay

    def compiled() -> Callable[[], Tensor]:
        options: dict[str, Any] = {"backend": "eager"} if place.is_dry else {"mode": "max-autotune"}
        function = torch.compile(network, dynamic=False, **options)
        for _ in range(3):  # compiled, warmed up, recorded
            function(x)
        return lambda: function(x)

    yield from (("eager, captured", recorded), (AUTOTUNED, compiled))


def _timed(
    row: ModelRow, call: Callable[[], Tensor], peer: str, make: Callable[[], Callable[[], object]], place: Place
) -> ModelRow:
    """The row with one more peer, timed in turn with ours."""
    with torch.no_grad():
        try:
            other = make()
            timings = place.time_models({"ours": call, "peer": other})
        except Exception as error:  # a compiler fails in as many ways as it has parts
            return replace(row, contestants=(*row.contestants, Contestant(peer, None, None, reason_of(error))))
    mine = timings["ours"].median
    added = Contestant(peer, timings["peer"].median, timings["peer"].spread)
    row = replace(row, ms=min(mine, row.ms or mine), contestants=(*row.contestants, added))
    times = {entry.name: entry.ms for entry in row.contestants if entry.ms is not None}
    best = min(times, key=times.__getitem__)
    assert row.ms is not None
    return replace(row, best_peer=best, ratio=times[best] / row.ms)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns how many models failed, at most 1."""
    parser = stage_parser(__doc__, seconds=90.0)
    parser.add_argument("what", choices=("capture", "bench"))
    parser.add_argument("--triton", action="store_true", help="layers may run on Triton's kernels, tuned")
    options = parser.parse_args(arguments)
    place = DRY if options.dry_run else on_device()
    with contextlib.nullcontext() if options.triton else without_triton():
        failures = capture_all(place) if options.what == "capture" else bench(place, options.seconds, options.out)
    return min(failures, 1)


def without_triton() -> contextlib.AbstractContextManager[None]:
    """No op runs on Triton's kernels inside."""
    return triton.TARGET.changed(reason=lambda index: "left out: gpu.networks --triton")


if __name__ == "__main__":
    sys.exit(main())
