"""The networks of kernelpress by name."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from kernelpress.models.mobilenet_v1 import mobilenet_v1
from kernelpress.models.mobilenet_v2 import mobilenet_v2
from kernelpress.models.resnet import resnet18, resnet20, resnet34, resnet50

__all__ = ["create", "names"]

_BUILDERS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {
        "mobilenet_v1": mobilenet_v1,
        "mobilenet_v2": mobilenet_v2,
        "resnet18": resnet18,
        "resnet20": resnet20,
        "resnet34": resnet34,
        "resnet50": resnet50,
    }
)


def names() -> list[str]:
    """Names that `create` accepts, sorted."""
    return sorted(_BUILDERS)


def create(name: str, **options: Any) -> nn.Module:
    """A freshly initialised network by name; `options` (num_classes, in_channels, …) are those of its function.

    Raises `ValueError` for an unknown name or a value out of range, `TypeError` for an option this network lacks.
    """
    if name not in _BUILDERS:
        raise ValueError(f"name: expected one of {', '.join(names())}, got {name!r}")
    return _BUILDERS[name](**options)
