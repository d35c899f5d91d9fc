"""`build`: a model by name, from here or from a library that is installed, or by somebody's function."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from kernelpress.models.registry import create, names

__all__ = ["build"]


def build(
    name: str, options: Mapping[str, Any] | None = None, *, in_channels: int | None = None, classes: int | None = None
) -> nn.Module:
    """The model that `name` stands for: one of `names()`, `timm:NAME`, `torchvision:NAME`, `transformers:CLASS` (an
    image classifier made from its configuration), `transformers:OWNER/NAME` (with its published weights), or
    `package.module:factory`, a function that is imported and called with `options` alone.

    `options` go to the library's function and come before `in_channels` and `classes`, which the data ask for.

    Raises `ValueError` for an unknown name, `ImportError` for a library or module that is missing, `TypeError` for an
    option that the model does not take, or where what comes is no module.
    """
    source, colon, rest = name.partition(":")
    maker = _SOURCES.get(source, _from_factory) if colon else _own
    asked = {} if maker is _from_factory else {"in_channels": in_channels, "classes": classes}
    given = {_ARGUMENTS[maker][key]: value for key, value in asked.items() if value is not None}
    model = maker(name if maker in (_own, _from_factory) else rest, {**given, **(options or {})})
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected {name} to return an nn.Module, got {type(model).__name__}")
    return model


def _own(name: str, options: dict[str, Any]) -> nn.Module:
    if name not in names():
        raise ValueError(
            f"model: expected one of {', '.join(names())}, {', '.join(f'{library}:…' for library in _SOURCES)} "
            f"or package.module:factory, got {name!r}"
        )
    return create(name, **options)


def _from_timm(name: str, options: dict[str, Any]) -> nn.Module:
    timm = _library("timm")
    if not timm.is_model(name):
        raise ValueError(f"model: timm {timm.__version__} has no model {name!r}")
    model: nn.Module = timm.create_model(name, **options)
    return model


def _from_torchvision(name: str, options: dict[str, Any]) -> nn.Module:
    models = _library("torchvision.models")
    if options.pop("in_channels", 3) != 3:
        raise ValueError(f"model: torchvision:{name} takes images of 3 channels")
    if name not in models.list_models():
        raise ValueError(f"model: torchvision has no model {name!r}")
    model: nn.Module = models.get_model(name, **options)
    return model


def _from_transformers(name: str, options: dict[str, Any]) -> nn.Module:
    transformers = _library("transformers")
    if "/" in name:
        loader = transformers.AutoModelForImageClassification
        return Logits(loader.from_pretrained(name, use_safetensors=True, ignore_mismatched_sizes=True, **options))
    factory = getattr(transformers, name, None)
    if not name.endswith("ForImageClassification") or factory is None:
        raise ValueError(f"model: transformers has no class {name!r} for image classification")
    return Logits(factory(factory.config_class(**options)))


class Logits(nn.Module):
    """An image classifier of transformers, as one that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x).logits
        return logits


def _from_factory(name: str, options: dict[str, Any]) -> Any:
    module_name, _, factory_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ImportError(f"model: cannot import {module_name}: {error}") from error
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        raise ValueError(f"model: {module_name} has no function {factory_name!r}")
    return factory(**options)


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        package = name.partition(".")[0]
        raise ImportError(f"model: {package}: takes {package}, which cannot be imported here ({error})") from error


_SOURCES: Mapping[str, Callable[[str, dict[str, Any]], Any]] = {
    "timm": _from_timm,
    "torchvision": _from_torchvision,
    "transformers": _from_transformers,
}
_ARGUMENTS: Mapping[Callable[[str, dict[str, Any]], Any], Mapping[str, str]] = {
    _own: {"in_channels": "in_channels", "classes": "num_classes"},
    _from_timm: {"in_channels": "in_chans", "classes": "num_classes"},
    _from_torchvision: {"in_channels": "in_channels", "classes": "num_classes"},
    _from_transformers: {"in_channels": "num_channels", "classes": "num_labels"},
}
"""What each source calls the channels of the images and the classes."""
