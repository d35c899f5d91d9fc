"""kernelpress: the network emitted onto our kernels, and captured."""

from __future__ import annotations

import torch

import kernelpress as kp
from peers.networks import build
from peers.protocol import Contestant, Job, serve

__all__ = ["load"]


def load(job: Job) -> Contestant:
    """The captured plan; its input is in PyTorch's default memory format, as that of the other runtimes."""
    torch.set_num_threads(job.threads)
    x = torch.from_numpy(job.load_input())
    plan = kp.capture(kp.emit(build(job, plain=False), (x,)), x)
    return Contestant(lambda: plan(x), lambda y: y.numpy(), "emitted and captured, contiguous input")


if __name__ == "__main__":
    serve(load)
