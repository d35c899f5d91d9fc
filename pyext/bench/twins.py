"""A network of a comparison and its twins: one set of random weights, as our model, as plain PyTorch and as ONNX."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kernelpress import layers, models
from kernelpress.bench.plain import with_plain_blocks
from kernelpress.bench.worker import Job

__all__ = ["build", "build_plain_in", "export_onnx", "prepare", "to_plain"]

CALIBRATION_BATCH = 4
OURS = (layers.Conv2d, layers.PointwiseConv2d, layers.DepthwiseConv2d, layers.GroupedConv2d, layers.Linear)


def prepare(job: Job, size: int, seed: int) -> nn.Module:
    """Draws weights and an input from `seed`, writes both where `job` says, and returns the plain network.

    BatchNorm gets the statistics of random images, and scales and shifts off the identity: values keep their size from
    layer to layer, and folding it is real work.
    """
    torch.manual_seed(seed)
    network = to_plain(models.build(job.model))
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.1)
        norm.momentum = None
    with torch.no_grad():
        network.train()(torch.randn(CALIBRATION_BATCH, 3, size, size))
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, job.weights_file)
    np.save(job.input_file, torch.randn(job.batch, 3, size, size).numpy())
    return network.eval()


def build(job: Job, *, plain: bool) -> nn.Module:
    """The network of `job` with its weights, for inference: plain PyTorch, or ours."""
    network = models.build(job.model)
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


def to_plain(network: nn.Module) -> nn.Module:
    """`network` with our layers replaced, in place, by PyTorch's own of the same parameters and state-dict keys."""
    with_plain_blocks(network)
    for name, child in network.named_children():
        setattr(network, name, _plain_layer(child) or to_plain(child))
    return network


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    height, width = values
    return height, width


def _plain_layer(layer: nn.Module) -> nn.Module | None:
    """PyTorch's own layer for one of ours, `None` for any other module. Raises `ValueError` for a fused activation."""
    if not isinstance(layer, OURS):
        return None
    if layer.activation != "identity":
        raise ValueError(f"network: expected activations that are modules, got {layer.activation} fused into a layer")
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    return nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        _pair(layer.kernel_size),
        stride=_pair(layer.stride),
        padding=layer.padding if isinstance(layer.padding, str) else _pair(layer.padding),
        dilation=_pair(layer.dilation),
        groups=layer.groups,
        bias=layer.bias is not None,
    )


def export_onnx(network: nn.Module, x: Tensor, path: Path) -> None:
    """Writes `network` as ONNX, exported at the shape of `x`; needs onnx and onnxscript."""
    # It warns of each torchvision operator that it cannot register where torchvision is absent.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    torch.onnx.export(network, (x,), path, dynamo=True, verbose=False)
