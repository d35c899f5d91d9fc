"""A network of a comparison and its twins: one set of random weights, as our model, as plain PyTorch and as ONNX."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kernelpress import models
from kernelpress.bench.plain import to_plain
from kernelpress.bench.worker import Job

__all__ = ["build", "build_plain_in", "export_onnx", "import_torchvision", "prepare"]

CALIBRATION_IMAGES = 8
"""At least: a batch of the input where that is larger."""


def prepare(job: Job, size: int, seed: int) -> nn.Module:
    """Draws weights and images to calibrate on from `seed`, the first of which are the input; writes all where `job`
    says, and returns the plain network.

    BatchNorm gets the statistics of those images, and scales and shifts off the identity: values keep their size from
    layer to layer, and folding it is real work.
    """
    torch.manual_seed(seed)
    network = to_plain(_made(job.model))
    _set_zeros(network, job)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.1)
        norm.momentum = None
    images = torch.randn(max(CALIBRATION_IMAGES, job.batch), 3, size, size)
    with torch.no_grad():
        network.train()(images)
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, job.weights_file)
    np.save(job.calibration_file, images.numpy())
    np.save(job.input_file, images[: job.batch].numpy())
    return network.eval()


def _set_zeros(network: nn.Module, job: Job) -> None:
    """At random, as many in each layer; no output channel loses all, as BatchNorm would amplify what rounding leaves of
    it."""
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.groups == 1 and m.in_channels > 3]
    with torch.no_grad():
        for weight in [layer.weight for layer in layers] if job.sparsity else []:
            outputs, inputs, *kernel = weight.shape
            blocks = torch.rand(-(-outputs // job.block), -(-inputs // job.depth), *kernel) >= job.sparsity
            rows = blocks.view(len(blocks), -1)
            rows[torch.arange(len(rows)), torch.randint(rows.shape[1], (len(rows),))] |= ~rows.any(1)
            spread = blocks.repeat_interleave(job.block, dim=0).repeat_interleave(job.depth, dim=1)
            weight *= spread[:outputs, :inputs]


def import_torchvision() -> None:
    """Imports torchvision, also where its operations do not load, as those of a wheel for CUDA on a machine without:
    importing it wants two of them declared. Raises `ImportError` where there is none."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")


def _made(model: str) -> nn.Module:
    """The network of that name, timm's and torchvision's among them."""
    if model.startswith(("timm:", "torchvision:")):
        import_torchvision()
    return models.build(model)


def build(job: Job, *, plain: bool) -> nn.Module:
    """The network of `job` with its weights, for inference: plain PyTorch, or ours."""
    network = _made(job.model)
    if plain:
        network = to_plain(network)
    network.load_state_dict(load_file(job.weights_file))
    return network.eval()


def build_plain_in(job: Job, memory_format_name: str) -> tuple[nn.Module, Tensor]:
    """The plain network of `job` and its input, both `contiguous` or `channels_last`."""
    memory_format = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}[memory_format_name]
    x = torch.from_numpy(job.load_input()).contiguous(memory_format=memory_format)
    network: nn.Module = build(job, plain=True).to(memory_format=memory_format)  # type: ignore[call-overload]
    return network, x


def export_onnx(network: nn.Module, x: Tensor, path: Path) -> None:
    """Writes `network` as ONNX, exported at the shape of `x`; needs onnx and onnxscript."""
    # It warns of each torchvision operator that it cannot register where torchvision is absent.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    # In one file: the quantizer of ONNX Runtime refuses weights beside it.
    torch.onnx.export(network, (x,), path, dynamo=True, verbose=False, external_data=False)
