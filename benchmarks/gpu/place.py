"""Where a benchmark runs: on a CUDA device, or as a dry run on the CPU: everything tiny, and no time counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

import kernelpress
from kernelpress.runtime.clock import Timing, time_alternately
from kernelpress.runtime.device_clock import time_graphs, time_on_device

__all__ = ["DRY", "Place", "on_device"]


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

    def backend(self) -> AbstractContextManager[None]:
        """Our ops choose their backend inside; in a dry run it is the reference."""
        return kernelpress.use_backend("reference" if self.is_dry else "auto")

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
