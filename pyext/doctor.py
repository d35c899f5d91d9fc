"""`kernelpress doctor`: what this machine can run, and why not the rest."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch

from kernelpress.runtime.host import processor_facts, version_of

__all__ = ["Finding", "examine"]

FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "asimd",
    "asimddp",
)
PEERS = ("onnxruntime", "openvino", "onnx", "onnxscript")
OPTIONAL = {
    "accelerate": "compress.finetune",
    "safetensors": "saving compressed models",
    "sklearn": "the digits",
    "PIL": "image folders",
    "pydantic": "press",
    "yaml": "press",
    "jinja2": "the report",
    "matplotlib": "the report",
}


@dataclass(frozen=True)
class Finding:
    """One fact: `is_ok` tells whether a thing can be used (`None`: a mere statement), `detail` how, or why not."""

    section: str
    name: str
    is_ok: bool | None
    detail: str


def examine() -> list[Finding]:
    """Every fact about this machine that decides how fast a model runs on it."""
    return [*_processor(), *_native(), *_backends(), *_gpu(), *_energy(), *_packages(), *_cache()]


def _processor() -> Iterator[Finding]:
    from kernelpress.bench.machine import describe_machine

    machine = describe_machine()
    facts = processor_facts()
    present = facts.get("flags", facts.get("Features", "")).split()
    yield Finding("processor", "model", None, machine.processor)
    yield Finding("processor", "features", None, ", ".join(flag for flag in FEATURES if flag in present) or "unknown")
    yield Finding(
        "processor",
        "threads",
        None,
        f"torch uses {torch.get_num_threads()} of {len(os.sched_getaffinity(0))} CPUs allowed here",
    )
    yield Finding("processor", "system", None, f"{machine.system}, Python {machine.python}, torch {torch.__version__}")


def _native() -> Iterator[Finding]:
    from kernelpress.runtime import native

    loaded = native.load()
    if loaded.module is None:
        yield Finding("native kernels", "_cpu", False, loaded.absent_because or "not built")
        return
    runnable = ", ".join(loaded.module.variants())
    yield Finding("native kernels", "_cpu", True, f"{loaded.module.variant()} in use, this processor runs {runnable}")
    yield Finding("native kernels", "parallel loops", not loaded.threads.startswith("serial"), loaded.threads)


def _backends() -> Iterator[Finding]:
    import kernelpress.ops  # noqa: F401  (registers the operators)
    from kernelpress.ops import registry

    for op, backends in registry.availability().items():
        usable = [name for name, reason in backends.items() if reason is None]
        reasons = [f"{name}: {reason}" for name, reason in backends.items() if reason is not None]
        yield Finding("backends", op, bool(set(usable) - {"reference"}), "; ".join([", ".join(usable), *reasons]))


def _gpu() -> Iterator[Finding]:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        yield Finding("GPU", "CUDA", True, f"{torch.version.cuda}: {', '.join(names)}")
    elif torch.version.cuda is None:
        yield Finding("GPU", "CUDA", False, f"torch {torch.__version__} is built without CUDA")
    else:
        yield Finding(
            "GPU", "CUDA", False, f"torch is built for CUDA {torch.version.cuda}, but finds no device or driver"
        )
    yield from _cuda()
    yield from _triton()


def _triton() -> Iterator[Finding]:
    """Whether the backend "triton" can be used, and what its kernels and the CUDA ones are tuned by."""
    from kernelpress.ops.backends import triton
    from kernelpress.ops.tuning import search

    reason = triton.TARGET.reason(None)
    version = version_of("triton")
    named = "" if version is None or reason is None else f"{version}; "
    yield Finding("GPU", "Triton kernels", reason is None, f"{named}{reason or version}")
    try:
        found = {"": "as measured before, else by heuristic", "0": "by heuristic", "1": "at first call"}
        yield Finding("GPU", "tile configurations", None, f"{found[search.autotune()]} (KERNELPRESS_AUTOTUNE)")
    except ValueError as error:
        yield Finding("GPU", "tile configurations", False, str(error))


def _cuda() -> Iterator[Finding]:
    """The native module, which devices its code is for, and whether one of them can be used."""
    from kernelpress.runtime import native

    loaded = native.load_cuda()
    if loaded.module is None:
        yield Finding("GPU", "_cuda", False, loaded.absent_because or "not built")
        return
    built_for = ", ".join(loaded.module.architectures())
    yield Finding("GPU", "_cuda", None, f"code for {built_for}, built with CUDA {_version_of(loaded.module)}")
    reason = native.cuda_reason()
    if reason is not None:
        yield Finding("GPU", "CUDA kernels", False, reason)
        return
    for index in range(loaded.module.device_count()):
        device, reason = loaded.module.device(index), native.cuda_reason(index)
        detail = f"{device['name']}, sm_{device['capability']}, {device['multiprocessors']} multiprocessors"
        yield Finding("GPU", f"CUDA kernels, device {index}", reason is None, reason or detail)


def _version_of(module: ModuleType) -> str:
    """13.0 for 13000."""
    version: int = module.toolkit_version()
    return f"{version // 1000}.{version % 1000 // 10}"


def _energy() -> Iterator[Finding]:
    from kernelpress.measure.energy import nvml_status, rapl_status

    for name, reason in (("RAPL (processor)", rapl_status()), ("NVML (GPU)", nvml_status())):
        yield Finding("energy counters", name, reason is None, reason or "readable")


def _packages() -> Iterator[Finding]:
    for name in PEERS:
        version = version_of(name)
        yield Finding("peers", name, version is not None, version or "not installed: pip install 'kernelpress[peers]'")
    for module, purpose in OPTIONAL.items():
        if importlib.util.find_spec(module) is None:
            yield Finding(
                "packages", module, False, f"not installed, {purpose} takes it: pip install 'kernelpress[all]'"
            )


def _cache() -> Iterator[Finding]:
    from kernelpress.emit.cache import cache_folder

    folder = cache_folder()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    is_writable = os.access(existing, os.W_OK)
    files = list(folder.glob("timings-*.json")) if folder.is_dir() else []
    state = f"{len(files)} files of timings" if is_writable else "not writable: layers are timed anew in every process"
    yield Finding("timings cache", str(folder), is_writable, state)
