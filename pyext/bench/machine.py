"""The machine and the software a measurement was made on, as a record to keep beside the figures."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass

import torch

from kernelpress.runtime import native
from kernelpress.runtime.host import processor_name, version_of

__all__ = ["Machine", "describe_machine"]

_PACKAGES = ("kernelpress", "torch", "onnx", "onnxruntime", "openvino", "nncf", "executorch", "torchao")


@dataclass(frozen=True)
class Machine:
    """Processor, system and versions; `versions` are (package, version) pairs of what is installed."""

    processor: str
    cpus: int
    torch_capability: str
    kernel_variant: str
    system: str
    python: str
    versions: tuple[tuple[str, str], ...]

    @property
    def slug(self) -> str:
        """Folder name for this machine's results, as `intel-xeon-processor-2.50ghz-2-cpus-avx512`: VNNI, which int8
        kernels alone use, is not in it."""
        name = re.sub(r"\((r|tm)\)|\bcpu\b|@", " ", f"{self.processor.lower()}")
        words = re.findall(r"[a-z0-9.]+", name)
        variant = self.kernel_variant.split()[0].removesuffix("_vnni")
        return "-".join([*words, str(self.cpus), "cpu" if self.cpus == 1 else "cpus", variant])


def describe_machine() -> Machine:
    """Describes this machine; no host name, no paths."""
    return Machine(
        processor=processor_name(),
        cpus=torch.multiprocessing.cpu_count(),
        torch_capability=torch.backends.cpu.get_cpu_capability(),
        kernel_variant=_kernel_variant(),
        system=f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
        python=platform.python_version(),
        versions=tuple((name, version) for name in _PACKAGES if (version := version_of(name)) is not None),
    )


def _kernel_variant() -> str:
    module = native.cpu()
    return "reference kernels" if module is None else str(module.variant())
