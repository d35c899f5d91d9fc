"""Loads the native modules: `_cpu`, which gets its instruction set and torch's own thread pool, and `_cuda`.

`KERNELPRESS_CPU=avx512_vnni|avx512|avx2_vnni|avx2|baseline` picks another instruction set than the widest that this
processor runs.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

__all__ = ["NativeCpu", "NativeCuda", "cpu", "cuda", "cuda_reason", "load", "load_cuda", "runs_on"]


@dataclass(frozen=True)
class NativeCpu:
    """What loading `_cpu` gave: the module, or why there is none; who runs its parallel loops; and whether it can look
    at torch's tensors, so that it recalls prepared calls without Python.
    """

    module: ModuleType | None
    absent_because: str | None
    threads: str
    reads_tensors: bool = False


@dataclass(frozen=True)
class NativeCuda:
    """What loading `_cuda` gave: the module, or why there is none."""

    module: ModuleType | None
    absent_because: str | None


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
        return NativeCpu(None, _absence(error, "`make build` compiles it in a checkout"), "none")
    if wanted:
        runnable = module.variants()
        if wanted not in runnable:
            raise ValueError(f"KERNELPRESS_CPU: expected one that runs here ({', '.join(runnable)}), got {wanted!r}")
        module.select(wanted)
    reads_tensors = module.read_tensors(torch.Tensor, torch.nn.Parameter, torch.is_grad_enabled)
    return NativeCpu(module, None, _lend_threads(module), reads_tensors)


def cpu() -> Any:
    """The module `_cpu`, or None where it was not built; `load().absent_because` then says why."""
    return load().module


@functools.cache
def load_cuda() -> NativeCuda:
    """Loads `_cuda` once per process. It needs neither a GPU nor a driver for that."""
    try:
        return NativeCuda(import_module("kernelpress._cuda"), None)
    except ImportError as error:
        how = "building it takes nvcc, and KERNELPRESS_CUDA other than 0; `make build` compiles it in a checkout"
        return NativeCuda(None, _absence(error, how))


def cuda() -> Any:
    """The module `_cuda`, or None where it was not built; `load_cuda().absent_because` then says why."""
    return load_cuda().module


@functools.cache
def cuda_reason(index: int | None = None) -> str | None:
    """Why nothing of `_cuda` runs on the device of that index (None: on any device); None where it runs."""
    module = cuda()
    if module is None:
        return f"the native module is absent: {load_cuda().absent_because}"
    unavailable: str | None = module.unavailable_because()
    if unavailable is not None or index is None:
        return unavailable
    try:
        device = module.device(index)
    except (ValueError, RuntimeError) as error:
        return str(error)
    architectures = module.architectures()
    if runs_on(architectures, device["capability"]):
        return None
    return (
        f"_cuda has code for {', '.join(architectures)}, device {index} ({device['name']}) is "
        f"sm_{device['capability']}; build it with KERNELPRESS_CUDA_ARCHS={device['capability']}"
    )


def runs_on(architectures: Sequence[str], capability: int) -> bool:
    """Whether a device of `capability` (10 · major + minor) can run code of one of the architectures.

    Machine code (`sm_86`) runs on its own major version from its minor version on, `sm_90a` on 9.0 only; text that the
    driver compiles (`compute_120`) on that and everything later.
    """
    for name in architectures:
        kind, _, version = name.partition("_")
        if version.endswith("a"):
            matches = int(version[:-1]) == capability
        elif kind == "compute":
            matches = int(version) <= capability
        else:
            matches = int(version) // 10 == capability // 10 and int(version) <= capability
        if matches:
            return True
    return False


def _absence(error: ImportError, how: str) -> str:
    return f"{error} ({how})" if isinstance(error, ModuleNotFoundError) else str(error)


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
