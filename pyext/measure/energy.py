"""Energy per inference from the counters the hardware offers (RAPL, NVML), or the reason why there is none."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

__all__ = ["Energy", "energy_per_call", "nvml_status", "rapl_status"]

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Energy:
    """Energy of one inference; `joules` is `None` exactly where `reason` says why it could not be measured."""

    joules: float | None
    source: str | None
    """Which counter was read, e.g. `RAPL package-0`."""
    reason: str | None


@dataclass(frozen=True)
class _Counter:
    """A running energy counter: `read()` in joules, wrapping to zero after `range` joules."""

    source: str
    read: Callable[[], float]
    range: float


def _read_joules(counter: Path) -> float:
    return int(counter.read_text()) * 1e-6


def _rapl_counters(powercap: Path) -> list[_Counter] | str:
    """One counter per processor package, or the reason why there is none."""
    if not powercap.is_dir():
        return f"{powercap} does not exist: this machine (or its container) exposes no RAPL counters"
    counters = []
    # Domains with one colon are packages; `intel-rapl:0:1` lies inside one and would be counted twice, as would `psys`.
    for domain in sorted(powercap.glob("intel-rapl:*")):
        if domain.name.count(":") != 1:
            continue
        try:
            name = (domain / "name").read_text().strip()
            if name == "psys":
                continue
            limit = int((domain / "max_energy_range_uj").read_text()) * 1e-6
            counter = domain / "energy_uj"
            _read_joules(counter)
        except PermissionError:
            return f"{domain / 'energy_uj'} is not readable by this user (root may grant it: chmod o+r)"
        except (OSError, ValueError) as error:
            return f"{domain} is not readable: {error}"
        counters.append(_Counter(name, partial(_read_joules, counter), limit))
    return counters or f"{powercap} holds no processor package domain (intel-rapl:N)"


def _nvml_counters(device: torch.device) -> list[_Counter] | str:
    try:
        import pynvml  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return "the package nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except (pynvml.NVMLError, AssertionError, RuntimeError) as error:
        return f"NVML gives no energy reading: {error}"
    return [_Counter("NVML", lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) * 1e-3, float("inf"))]


def rapl_status(powercap: Path = POWERCAP) -> str | None:
    """`None` where the processor's energy counters are readable, otherwise the reason why not."""
    counters = _rapl_counters(powercap)
    return counters if isinstance(counters, str) else None


def nvml_status() -> str | None:
    """`None` where the GPU's energy counter is readable, otherwise the reason why not."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    counters = _nvml_counters(torch.device("cuda"))
    return counters if isinstance(counters, str) else None


def energy_per_call(
    call: Callable[[], object], *, device: torch.device, seconds: float = 0.5, powercap: Path = POWERCAP
) -> Energy:
    """Energy in joules that the package (CPU) or board (CUDA) of `device` spends per call, its idle share included.

    `call` runs for at least `seconds`, since the counters tick in milliseconds (RAPL) or tens of them (NVML).
    """
    counters = _nvml_counters(device) if device.type == "cuda" else _rapl_counters(powercap)
    if isinstance(counters, str):
        return Energy(None, None, counters)
    kind = "NVML" if device.type == "cuda" else "RAPL " + " + ".join(counter.source for counter in counters)

    before = [counter.read() for counter in counters]
    end = time.perf_counter() + seconds
    calls = 0
    while calls == 0 or time.perf_counter() < end:
        call()
        calls += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    spent = [counter.read() - start for counter, start in zip(counters, before, strict=True)]
    joules = sum(value if value >= 0 else value + counter.range for counter, value in zip(counters, spent, strict=True))
    if joules == 0:
        return Energy(None, None, f"{kind} did not advance in {seconds} s")
    return Energy(joules / calls, kind, None)
