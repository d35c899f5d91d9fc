"""The networks of kernelpress by name: how they are made, and what is published of them."""

from collections.abc import Mapping
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


def create(name: str, **options: Any) -> nn.Module:
    """A freshly initialised network by name; `options` (num_classes, in_channels, …) are those of its function.

    Raises `ValueError` for an unknown name or a value out of range, `TypeError` for an option this network lacks.
    """
    return _architecture(name).build(**options)


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
