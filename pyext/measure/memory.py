"""Memory that an inference needs: the allocator's peak while it runs, and the bytes of the weights."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from kernelpress.ops.calls import packing

__all__ = ["peak_memory_bytes", "weight_bytes"]


@contextmanager
def _stderr_discarded() -> Iterator[None]:
    """Hide what the profiler's native part prints when it starts and stops."""
    saved = os.dup(2)
    try:
        with open(os.devnull, "wb") as devnull:
            os.dup2(devnull.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _allocator_peak_cpu(call: Callable[[], object]) -> int:
    """Highest sum of torch's CPU allocations during `call`, above what was allocated before it; bytes.

    The profiler records each allocation and release of torch's own allocator. Memory that a library takes by itself
    (oneDNN's scratchpad, a native plan's arena) does not pass through it.
    """
    recorder = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with _stderr_discarded():
        recorder.start()
    try:
        with torch.no_grad():
            result = call()
    finally:
        with _stderr_discarded():
            recorder.stop()
    del result
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorder.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    allocations = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    held = peak = 0
    for event in sorted(allocations, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def peak_memory_bytes(call: Callable[[], object], *, device: torch.device, arena_bytes: int = 0) -> int:
    """Peak memory of one call beyond weights and inputs, in bytes: torch's allocator plus the arena of a captured plan.

    Call it once beforehand, so that what is packed or cached lazily is not counted as memory of an inference.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with torch.no_grad():
            call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before + arena_bytes
    return _allocator_peak_cpu(call) + arena_bytes


def weight_bytes(module: nn.Module) -> int:
    """Bytes of the parameters and buffers of `module`, and of what kernels read in their place, packed from them by the
    calls so far; a tensor that several modules share counts once."""
    tensors = {tensor.data_ptr(): tensor for tensor in [*module.parameters(), *module.buffers()]}
    return sum(tensor.nbytes + packing.packed_bytes(tensor) for tensor in tensors.values())
