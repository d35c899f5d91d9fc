"""Measured times on disk, so that a layer seen once on this machine is not timed again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch

import kernelpress
from kernelpress.files import cache_folder, write_atomically
from kernelpress.files.plain import from_plain
from kernelpress.files.sealed import seal, unseal
from kernelpress.runtime import native
from kernelpress.runtime.host import processor_name, version_of

__all__ = ["TimingCache", "cache_folder", "device_key"]

_KIND, _FORMAT = "times of layers", 1

LONGEST = 3.6e6
"""No layer takes an hour."""


@dataclass(frozen=True)
class _Stored:
    device: str
    milliseconds: dict[str, float]


def device_key(device: torch.device) -> str:
    """What a time depends on besides the layer and its tile configuration: the processor, its threads, the kernels'
    variant, the versions."""
    if device.type == "cuda":
        module = native.cuda()
        kernels = _build(module) if module else "no native kernels"
        where = f"{torch.cuda.get_device_name(device)}, {kernels}, triton {version_of('triton') or 'absent'}"
    else:
        where = f"{processor_name()}, {torch.get_num_threads()} threads, {_kernel_variant()}"
    return f"{where}, torch {torch.__version__}, kernelpress {kernelpress.__version__}"


def _kernel_variant() -> str:
    """The instruction set of the native kernels, and which build of them it is."""
    module = native.cpu()
    return "no native kernels" if module is None else f"{module.variant()} {_build(module)}"


def _build(module: Any) -> str:
    """Which build of a native module it is."""
    build = os.stat(module.__file__)
    return f"{build.st_size:x}{build.st_mtime_ns:x}"


class TimingCache:
    """Milliseconds by layer for one device, in one JSON file; one that is damaged or none of ours counts as empty, with
    a warning, and is replaced.

    `enabled=False` remembers for the life of the object only. Two processes that write at once lose measurements of
    one of them, never the file.
    """

    def __init__(self, device: torch.device, *, enabled: bool = True) -> None:
        key = device_key(device)
        self._path = (
            cache_folder() / f"timings-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json" if enabled else None
        )
        self._key = key
        self._times: dict[str, float] = self._read()
        self._is_changed = False

    def _read(self) -> dict[str, float]:
        if self._path is None:
            return {}
        try:
            content = unseal(self._path.read_bytes(), _KIND, _FORMAT, str(self._path))
            stored = from_plain(_Stored, content, str(self._path))
            if stored.device != self._key or not all(0 < time <= LONGEST for time in stored.milliseconds.values()):
                raise ValueError(f"{self._path} holds times that no layer takes, or of another device")
        except OSError:
            return {}
        except ValueError as error:
            warnings.warn(f"{error}; layers are timed anew", stacklevel=2)
            return {}
        return stored.milliseconds

    def get(self, name: str) -> float | None:
        """Milliseconds of layer `name`, or None if it was never timed."""
        return self._times.get(name)

    def put(self, name: str, milliseconds: float) -> None:
        """Remembers a time; `save` writes it."""
        self._times[name] = milliseconds
        self._is_changed = True

    def save(self) -> None:
        """Writes what is new; a folder that cannot be written to costs only the next run's time."""
        if self._path is None or not self._is_changed:
            return
        content = {"device": self._key, "milliseconds": self._read() | self._times}
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, seal(_KIND, _FORMAT, content))
        self._is_changed = False
