"""kernelpress: compressed and efficient CNNs, as fast as their FLOP counts promise.

Importing this package imports neither torch nor any of its rooms: a name is fetched from its home at its first use.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernelpress import compress, data, kernels, layers, measure, models, ops
    from kernelpress.emit import capture, emit, load
    from kernelpress.ops import use_backend

__all__ = [
    "capture",
    "compress",
    "data",
    "emit",
    "kernels",
    "layers",
    "load",
    "measure",
    "models",
    "ops",
    "use_backend",
]

__version__ = "0.1.0"

_HOMES = {"capture": "kernelpress.emit", "load": "kernelpress.emit", "use_backend": "kernelpress.ops"}


class _EmitPackage(ModuleType):
    """`kernelpress.emit`: the package, and by a call its function of the same name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.emit(*args, **kwargs)


class _Kernelpress(ModuleType):
    """This package: `emit` becomes callable when the import system binds the subpackage here, whoever imports it."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "emit" and isinstance(value, ModuleType):
            value.__class__ = _EmitPackage
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Kernelpress
