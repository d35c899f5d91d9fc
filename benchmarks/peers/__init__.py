"""Runtimes for whole-model comparisons, each run in a process of its own (`peers.runtimes`)."""

from torch import nn

__all__ = ["to_plain"]


def to_plain(network: nn.Module) -> nn.Module:
    """`network` with our layers, in place, as those of PyTorch that they are kinds of. Raises `ValueError` for a fused
    activation."""
    for layer in network.modules():
        kind = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
        if isinstance(layer, kind) and type(layer) is not kind:
            if getattr(layer, "activation", "identity") != "identity":
                told = f"got {layer.activation} fused into a layer"
                raise ValueError(f"network: expected activations that are modules, {told}")
            layer.__class__ = kind
    return network
