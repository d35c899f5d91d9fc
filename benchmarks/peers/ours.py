"""kernelpress: the network emitted onto our kernels; its further argument says whether it is `captured` as well."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

import kernelpress as kp
from peers.networks import build
from peers.protocol import Contestant, Job, serve

__all__ = ["load"]


def load(job: Job) -> Contestant:
    """The emitted model or its plan; the input is in PyTorch's default memory format, as that of the other runtimes."""
    torch.set_num_threads(job.threads)
    x = torch.from_numpy(job.load_input())
    emitted = kp.emit(build(job, plain=False), (x,))
    is_captured = sys.argv[2] == "captured"
    run: Callable[[torch.Tensor], torch.Tensor] = kp.capture(emitted, x) if is_captured else emitted

    def call() -> torch.Tensor:
        with torch.no_grad():
            return run(x)

    return Contestant(call, lambda y: y.numpy(), f"emitted{' and captured' * is_captured}, contiguous input")


if __name__ == "__main__":
    serve(load)
