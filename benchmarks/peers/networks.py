"""The networks of a comparison: one set of random weights, as our model, as plain PyTorch and as ONNX."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from kernelpress import models
from peers import to_plain
from peers.protocol import Array, Job

__all__ = ["build", "build_plain_in", "export_onnx", "prepare"]

CALIBRATION_BATCH = 4


def prepare(model: str, batch: int, size: int, seed: int) -> tuple[nn.Module, Array]:
    """The plain network and an input, both drawn from `seed`.

    BatchNorm gets the statistics of random images, and scales and shifts off the identity: values keep their size from
    layer to layer, and folding it is real work.
    """
    torch.manual_seed(seed)
    network = to_plain(models.create(model))
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.1)
        norm.momentum = None
    with torch.no_grad():
        network.train()(torch.randn(CALIBRATION_BATCH, 3, size, size))
    return network.eval(), torch.randn(batch, 3, size, size).numpy()


def build(job: Job, *, plain: bool) -> nn.Module:
    """The network of `job` with its weights, for inference: plain PyTorch, or ours."""
    network = models.create(job.model)
    if plain:
        network = to_plain(network)
    network.load_state_dict({name: torch.from_numpy(weight) for name, weight in job.weights.items()})
    return network.eval()


def build_plain_in(job: Job, memory_format_name: str) -> tuple[nn.Module, Tensor]:
    """The plain network of `job` and its input, both `contiguous` or `channels_last`."""
    memory_format = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}[memory_format_name]
    x = torch.from_numpy(job.x).contiguous(memory_format=memory_format)
    network: nn.Module = build(job, plain=True).to(memory_format=memory_format)  # type: ignore[call-overload]
    return network, x


def export_onnx(network: nn.Module, x: Tensor, path: str) -> None:
    """Writes `network` as ONNX, exported at the shape of `x`; needs onnx and onnxscript."""
    # It warns of each torchvision operator that it cannot register where torchvision is absent.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    torch.onnx.export(network, (x,), path, dynamo=True, verbose=False)
