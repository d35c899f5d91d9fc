"""Loads the native CPU module `_cpu`: picks the instruction set and lends it torch's own thread pool.

`KERNELPRESS_CPU=avx512|avx2|baseline` picks another instruction set than the widest that this processor runs.
"""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

__all__ = ["NativeCpu", "cpu", "load"]


@dataclass(frozen=True)
class NativeCpu:
    """What loading `_cpu` gave: the module, or why there is none; and who runs its parallel loops."""

    module: ModuleType | None
    absent_because: str | None
    threads: str


@functools.cache
def load() -> NativeCpu:
    """Loads `_cpu` once per process.

    Raises: ValueError where `KERNELPRESS_CPU` names an instruction set that is unknown or cannot run here.
    """
    wanted = os.environ.get("KERNELPRESS_CPU", "")
    try:
        module = import_module("kernelpress._cpu")
    except ImportError as error:
        if wanted:
            raise ValueError(f"KERNELPRESS_CPU: got {wanted!r}, but nothing native can run: {error}") from error
        how = " (`make build` compiles it in a checkout)" if isinstance(error, ModuleNotFoundError) else ""
        return NativeCpu(None, f"{error}{how}", "none")
    if wanted:
        runnable = module.variants()
        if wanted not in runnable:
            raise ValueError(f"KERNELPRESS_CPU: expected one that runs here ({', '.join(runnable)}), got {wanted!r}")
        module.select(wanted)
    return NativeCpu(module, None, _lend_threads(module))


def cpu() -> Any:
    """The module `_cpu`, or None where it was not built; `load().absent_because` then says why."""
    return load().module


def _lend_threads(module: ModuleType) -> str:
    """Hands torch's parallel loop over by address, so that `torch.set_num_threads` holds for native kernels too."""
    path = Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"
    try:
        library = ctypes.CDLL(str(path))
        addresses = [
            ctypes.cast(getattr(library, name), ctypes.c_void_p).value
            for name in ("torch_parallel_for", "torch_get_num_threads")
        ]
    except (OSError, AttributeError) as error:
        return f"serial: {error}"
    module.set_parallel_for(*addresses)
    return "torch's thread pool"
