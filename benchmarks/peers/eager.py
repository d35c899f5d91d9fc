"""PyTorch as it comes, in the memory format of its second argument: `contiguous` or `channels_last`."""

from __future__ import annotations

import sys

import torch

from peers.networks import build_plain_in
from peers.protocol import Contestant, Job, serve

__all__ = ["load"]


def load(job: Job) -> Contestant:
    """The plain network and its input in the memory format asked for."""
    torch.set_num_threads(job.threads)
    name = sys.argv[2]
    network, x = build_plain_in(job, name)

    def call() -> torch.Tensor:
        with torch.inference_mode():
            return network(x)

    return Contestant(call, lambda y: y.numpy(), f"inference_mode, {name} weights and input")


if __name__ == "__main__":
    serve(load)
