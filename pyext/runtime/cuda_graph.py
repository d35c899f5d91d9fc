"""A function's CUDA kernels recorded into one graph, to be run again and again without Python."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

__all__ = ["Recording", "record"]

WARM_UPS = 2
"""Calls before the recording: they pack weights, choose algorithms and load kernels, which a recording must not do."""

Output = TypeVar("Output")


@dataclass(frozen=True)
class Recording(Generic[Output]):
    """What was recorded: `replay` runs it again on the current stream, on the memory it was recorded with.

    `outputs` is what the function returned: each replay writes them anew. `pool_bytes` is what the recording took from
    the device for tensors of its own, kept as long as it lives.
    """

    graph: torch.cuda.CUDAGraph
    outputs: Output
    pool_bytes: int

    def replay(self) -> None:
        """Run it once more; returns before the device is done."""
        self.graph.replay()


def record(
    function: Callable[[], Output],
    device: torch.device,
    *,
    pool: Any = None,
    stream: torch.cuda.Stream | None = None,
    warm_ups: int = WARM_UPS,
) -> Recording[Output]:
    """Record what `function` runs on `device`.

    Whatever the function reads must stay where it is as long as the recording is used. It is called `warm_ups` times
    first, on another stream than the current one, as is recorded: the device's default stream cannot be. Recordings
    that are never used at the same time share their memory if they are given one `pool` (of
    `torch.cuda.graph_pool_handle()`) and one `stream`.

    Raises: `RuntimeError` where the function does what cannot be recorded (waiting for the device, copying from it,
        allocating memory of the system's); `torch.OutOfMemoryError` where memory is short. What it raises passes
        through.
    """
    with torch.cuda.device(device), torch.no_grad():
        caller = torch.cuda.current_stream(device)
        beside = torch.cuda.Stream(device)
        beside.wait_stream(caller)
        with torch.cuda.stream(beside):
            for _ in range(warm_ups):
                function()
        caller.wait_stream(beside)
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_reserved(device)
        graph = torch.cuda.CUDAGraph()
        # A stream of each recording's own: libraries keep a workspace by stream, which two graphs must not share.
        with torch.cuda.stream(torch.cuda.Stream(device) if stream is None else stream):
            outputs = _recorded(graph, function, pool)
        return Recording(graph, outputs, max(torch.cuda.memory_reserved(device) - before, 0))


def _recorded(graph: torch.cuda.CUDAGraph, function: Callable[[], Output], pool: Any) -> Output:
    # Other threads may go on allocating meanwhile.
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        outputs = function()
    except BaseException:
        with contextlib.suppress(RuntimeError):  # a recording that failed does not end well either
            graph.capture_end()
        raise
    graph.capture_end()
    return outputs
