"""`torch.compile` with Inductor and frozen weights, in the memory format of its second argument."""

from __future__ import annotations

import sys

import torch

from peers.networks import build_plain_in
from peers.protocol import Contestant, Job, serve

__all__ = ["load"]


def load(job: Job) -> Contestant:
    """The compiled network; the first call compiles."""
    torch.set_num_threads(job.threads)
    name = sys.argv[2]
    network, x = build_plain_in(job, name)
    compiled = torch.compile(network, options={"freezing": True})

    def call() -> torch.Tensor:
        with torch.no_grad():
            return compiled(x)

    return Contestant(call, lambda y: y.numpy(), f"freezing, {name} weights and input")


if __name__ == "__main__":
    serve(load)
