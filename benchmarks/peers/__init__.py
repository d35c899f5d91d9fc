"""Runtimes for whole-model comparisons, each run in a process of its own (`peers.runtimes`)."""

from torch import nn

from kernelpress import layers

__all__ = ["to_plain"]


def to_plain(network: nn.Module) -> nn.Module:
    """`network` with our layers, in place, as those of PyTorch that they are kinds of. Raises `ValueError` for a fused
    activation."""
    for layer in network.modules():
        if isinstance(layer, (layers.Conv2d, layers.PointwiseConv2d, layers.DepthwiseConv2d, layers.Linear)):
            if layer.activation != "identity":
                fused = f"got {layer.activation} fused into a layer"
                raise ValueError(f"network: expected activations that are modules, {fused}")
            layer.__class__ = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d  # type: ignore[assignment]
    return network
