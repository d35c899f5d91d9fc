"""What this machine can do at best, measured: fp32 and int8 products from registers, copies by level of memory."""

from __future__ import annotations

import abc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kernelpress.runtime import native
from kernelpress.runtime.clock import threads_set_to

__all__ = ["Ceilings", "Roofline", "measure_roofline"]

PEAK_SECONDS = 0.3
PEAK_BURSTS = 6
COPY_SECONDS = 0.15
DEFAULT_L2_BYTES = 1 << 20
DEFAULT_LLC_BYTES = 16 << 20
MEMORY_BYTES = 512 << 20
MAX_LLC_COPY_BYTES = 16 << 20


_MEASURED = ("fma_gflops", "int8_gops", "l2_gbs", "llc_gbs", "memory_gbs")


class Ceilings(abc.ABC):
    """What a machine can do at best (Williams et al. 2009); `kind` is that of the arithmetic."""

    @abc.abstractmethod
    def peak_gflops(self, kind: str) -> float | None:
        """GFLOP/s, or int8's GOP/s; None where unknown."""

    @abc.abstractmethod
    def bandwidth(self, working_set_bytes: int) -> float:
        """GB/s of the nearest level that holds the working set."""

    def bound_ms(self, flops: int, traffic_bytes: int, kind: str = "fp32") -> float | None:
        """Least milliseconds for this work and traffic; None where the peak is unknown."""
        peak = self.peak_gflops(kind)
        return None if peak is None else 1e-6 * max(flops / peak, traffic_bytes / self.bandwidth(traffic_bytes))

    def limited_by(self, flops: int, traffic_bytes: int, kind: str = "fp32") -> str | None:
        """Which ceiling gives `bound_ms`: `compute` or `bandwidth`."""
        peak = self.peak_gflops(kind)
        if peak is None:
            return None
        return "compute" if flops / peak >= traffic_bytes / self.bandwidth(traffic_bytes) else "bandwidth"


@dataclass(frozen=True)
class Roofline(Ceilings):
    """Ceilings with `threads` threads: GFLOP/s of register-only FMAs, GB/s (read + written) of copies that stay in the
    private caches, in the shared one, or pass through memory; a level holds working sets up to its `_bytes`;
    `int8_gops`, of register-only products of bytes, None in files that had none."""

    threads: int
    fma_gflops: float | None
    l2_gbs: float
    llc_gbs: float
    memory_gbs: float
    l2_bytes: int
    llc_bytes: int
    fma_absent_because: str | None = None
    int8_gops: float | None = None

    def best_of(self, other: Roofline) -> Roofline:
        """The higher of each ceiling of two measurements with the same number of threads."""
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in _MEASURED}
        best: dict[str, Any] = {name: max(filter(None, pair), default=None) for name, pair in pairs.items()}
        return replace(self, **best)

    def told(self) -> str:
        """In one sentence."""
        fma = "unknown" if self.fma_gflops is None else f"{self.fma_gflops:.0f} GFLOP/s"
        fma += "" if self.int8_gops is None else f", int8 {self.int8_gops:.0f} GOP/s"
        return (
            f"{self.threads} threads. Measured peaks: FMA {fma}, copy {self.l2_gbs:.0f} GB/s in L2, "
            f"{self.llc_gbs:.0f} in the last-level cache, {self.memory_gbs:.0f} in memory (read + written)."
        )

    def peak_gflops(self, kind: str) -> float | None:
        return {"fp32": self.fma_gflops, "int8": self.int8_gops}.get(kind)

    def bandwidth(self, working_set_bytes: int) -> float:
        if working_set_bytes <= self.l2_bytes:
            return self.l2_gbs
        return self.llc_gbs if working_set_bytes <= self.llc_bytes else self.memory_gbs


_best_so_far: dict[int, Roofline] = {}


def measure_roofline(threads: int | None = None, *, again: bool = False) -> Roofline:
    """The ceilings with that many threads (`None`: torch's present number), measured once in a process, in a second.

    `again` measures once more and keeps the higher of each ceiling ever seen: on a noisy machine a single moment
    understates what is possible.

    Raises `ValueError` for a number of threads that is not positive.
    """
    with threads_set_to(threads):
        used = torch.get_num_threads()
        seen = _best_so_far.get(used)
        if seen is None:
            _best_so_far[used] = _measure(used)
        elif again:
            _best_so_far[used] = seen.best_of(_measure(used))
        return _best_so_far[used]


def _measure(threads: int) -> Roofline:
    l2 = threads * (_cache_bytes(2) or DEFAULT_L2_BYTES)
    llc = max(_cache_bytes(3) or DEFAULT_LLC_BYTES, l2)
    module = native.cpu()
    return Roofline(
        threads=threads,
        fma_gflops=None if module is None else _peak(module.fma_peak, threads),
        int8_gops=None if module is None else _peak(module.int8_peak, threads),
        l2_gbs=_copy_gbs(l2 // 2),
        llc_gbs=_copy_gbs(min(llc // 2, MAX_LLC_COPY_BYTES)),
        memory_gbs=_copy_gbs(max(MEMORY_BYTES, 4 * llc)),
        l2_bytes=l2,
        llc_bytes=llc,
        fma_absent_because=native.load().absent_because,
    )


def _peak(burst: Callable[[float, int], float], threads: int) -> float:
    """10⁹ operations a second in the best of several short bursts, as a busy neighbour may take part of any one."""
    return max(float(burst(PEAK_SECONDS / PEAK_BURSTS, threads)) for _ in range(PEAK_BURSTS))


def _cache_bytes(level: int) -> int | None:
    """Size the system states for the first processor's data cache of that level; `None` where it states none."""
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            stated = {name: (folder / name).read_text(encoding="ascii").strip() for name in ("level", "type", "size")}
        except OSError:
            continue
        if stated["level"] == str(level) and stated["type"] != "Instruction" and stated["size"].endswith("K"):
            return int(stated["size"][:-1]) << 10
    return None


def _copy_gbs(traffic_bytes: int) -> float:
    """GB/s (read + written) of torch's parallel copy between two buffers of half `traffic_bytes` each; best burst."""
    source = torch.rand(traffic_bytes // 8)
    target = torch.zeros_like(source)
    target.copy_(source)
    burst = max(1, round(10e6 / traffic_bytes))
    best = float("inf")
    end = time.perf_counter() + COPY_SECONDS
    rounds = 0
    while rounds < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(burst):
            target.copy_(source)
        best = min(best, (time.perf_counter() - start) / burst)
        rounds += 1
    return source.nbytes * 2 / best * 1e-9
