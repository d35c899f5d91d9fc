"""The networks of kernelpress by name: how they are made, and what is published of them."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from kernelpress.models.alexnet import ARCHITECTURES as ALEXNETS
from kernelpress.models.architecture import Architecture, Published
from kernelpress.models.ghostnet import ARCHITECTURES as GHOSTNETS
from kernelpress.models.mobilenet_v1 import ARCHITECTURES as MOBILENETS_V1
from kernelpress.models.mobilenet_v2 import ARCHITECTURES as MOBILENETS_V2
from kernelpress.models.mobilenet_v3 import ARCHITECTURES as MOBILENETS_V3
from kernelpress.models.resnet import ARCHITECTURES as RESNETS
from kernelpress.models.shufflenet_v1 import ARCHITECTURES as SHUFFLENETS_V1
from kernelpress.models.shufflenet_v2 import ARCHITECTURES as SHUFFLENETS_V2
from kernelpress.models.squeezenet import ARCHITECTURES as SQUEEZENETS
from kernelpress.models.weights import create_with_weights

__all__ = ["ARCHITECTURES", "create", "names", "published"]

_FAMILIES = (
    ALEXNETS,
    GHOSTNETS,
    MOBILENETS_V1,
    MOBILENETS_V2,
    MOBILENETS_V3,
    RESNETS,
    SHUFFLENETS_V1,
    SHUFFLENETS_V2,
    SQUEEZENETS,
)
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {architecture.name: architecture for family in _FAMILIES for architecture in family}
)
"""Every network, by name."""


def names() -> list[str]:
    """Names that `create` accepts, sorted."""
    return sorted(ARCHITECTURES)


def create(name: str, *, weights: str | Path | None = None, **options: Any) -> nn.Module:
    """A network by name; `options` (num_classes, in_channels, …) are those of its function.

    weights: a safetensors file of a state dict, ours, torchvision's or timm's; `weights_of(network)` tells whose keys
        were found. Without it the network is freshly initialised.

    Raises `ValueError` for an unknown name, a value out of range or a checkpoint that is not this network's,
    `TypeError` for an option this network lacks, `FileNotFoundError` for a file that is not there.
    """
    architecture = _architecture(name)
    return architecture.build(**options) if weights is None else create_with_weights(architecture, weights, options)


def published(name: str, **options: Any) -> Published:
    """What is published of the network that `create(name, **options)` makes.

    Raises `ValueError` for an unknown name, or options whose variant nobody published.
    """
    variants = _architecture(name).published
    for variant in variants:
        if variant.options == options:
            return variant
    known = "; ".join(", ".join(f"{key}={value}" for key, value in v.options.items()) or "none" for v in variants)
    raise ValueError(f"options: figures of {name} are published for {known}, got {options}")


def _architecture(name: str) -> Architecture:
    if name not in ARCHITECTURES:
        raise ValueError(f"name: expected one of {', '.join(names())}, got {name!r}")
    return ARCHITECTURES[name]
