"""Where a benchmark runs: on a CUDA device, or as a dry run on the CPU: everything tiny, and no time counts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kernelpress
from kernelpress import ops
from kernelpress.bench import ours
from kernelpress.bench.calls import Call
from kernelpress.ops import registry
from kernelpress.ops.registry import Tensors
from kernelpress.runtime.clock import Timing, time_alternately
from kernelpress.runtime.device_clock import time_graphs, time_on_device

__all__ = ["DRY", "Place", "on_device"]

TUNING_SECONDS = 3.0
"""Of a layer's Triton kernel. Other layers find compiled what was compiled for this one."""


@dataclass(frozen=True)
class Place:
    """A device, and the dtype of floating layers on it."""

    device: torch.device
    dtype: torch.dtype
    is_dry: bool

    @property
    def name(self) -> str:
        """The device's name, as in `NVIDIA H200`."""
        return "dry run" if self.is_dry else torch.cuda.get_device_name(self.device)

    @contextlib.contextmanager
    def backend(self) -> Iterator[None]:
        """Our ops choose their backend inside; in a dry run it is the reference."""
        with kernelpress.use_backend("reference" if self.is_dry else "auto"):
            yield

    def backend_of(self, op: str, tensors: Tensors, options: Mapping[str, Any]) -> str:
        """The backend that an op takes here."""
        with self.backend():
            return ours.backend_of(op, tensors, options)

    def here(self, call: Call) -> Call:
        """A call of our ops on the backend of this place."""

        def run() -> Tensor:
            with self.backend():
                return call()

        return run

    def ours(self, op: str, tensors: Tensors, options: Mapping[str, Any]) -> Call:
        """A call of our op."""
        return self.here(lambda: getattr(ops, op)(*tensors, **options))

    def unfused(self, op: str, tensors: Tensors, options: Mapping[str, Any]) -> Call | None:
        """Calls of our ops for each step of a fused one; None where it is none."""
        with self.backend():
            steps = ours.unfused(op, tensors, options)
        return None if steps is None else self.here(steps)

    def triton(self, op: str, tensors: Tensors, options: Mapping[str, Any]) -> Call | None:
        """A call of the op's Triton kernel, tuned for it here and now; None where it has none, or that cannot run it,
        or takes it by itself."""
        reasons = registry.why_not(op, *tensors, **options)
        if reasons.get("triton", "no kernel") is not None or self.backend_of(op, tensors, options) == "triton":
            return None
        with contextlib.suppress(RuntimeError):  # the call itself will tell
            ops.tune(op, *tensors, **options, backend="triton", seconds=TUNING_SECONDS)
        return lambda: getattr(ops, op)(*tensors, **options, backend="triton")

    def time(self, calls: Mapping[str, Callable[[], object]], *, budget_seconds: float = 20e-3) -> dict[str, Timing]:
        """Times of layers, in turn: as CUDA graphs by the device's clock; in a dry run each call once."""
        return _once(calls) if self.is_dry else time_graphs(calls, self.device, budget_seconds=budget_seconds)

    def time_models(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
        """Times of whole models that are graphs already, in turn, from the cache as they leave it."""
        if self.is_dry:
            return _once(calls)
        return time_on_device(calls, self.device, budget_seconds=0.2, flush_cache=False)


def _once(calls: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
    return time_alternately(calls, budget_seconds=1e-6, rounds=1, warmup=1, repeats=1)


DRY = Place(torch.device("cpu"), torch.float32, True)


def on_device() -> Place:
    """The current CUDA device, in bfloat16. Raises `RuntimeError` where torch sees none."""
    if not torch.cuda.is_available():
        raise RuntimeError("torch.cuda.is_available() is False: this needs a CUDA device, or --dry-run")
    torch.backends.cudnn.benchmark = True  # the peers get cuDNN's best algorithm, not its guess
    return Place(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16, False)
