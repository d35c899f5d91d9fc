"""Modules of a model: those that a caller names, and the kinds that have a weight."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from kernelpress.files.plain import did_you_mean

__all__ = ["WEIGHTED", "layers_in"]

WEIGHTED = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    nn.Linear,
)
"""Convolutions and linear layers."""


def layers_in(model: nn.Module, names: Iterable[str], argument: str) -> frozenset[str]:
    """The paths of the modules of these names and of all in them. Raises `ValueError`, which begins with `argument`,
    for a name that `model` does not have, with the one closest to it."""
    names = (names,) if isinstance(names, str) else tuple(names)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if name not in modules or not name:
            hint = did_you_mean(str(name), filter(None, modules))
            raise ValueError(f"{argument}: {type(model).__name__} has no module named {name!r}{hint}")
    return frozenset(path for path in modules if any(path == name or path.startswith(f"{name}.") for name in names))
