"""How kernels are launched: tile configurations, the device they are chosen for, and who takes a launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import Tensor

__all__ = [
    "Configuration",
    "Device",
    "InTurn",
    "Launcher",
    "cdiv",
    "launch",
    "launching_with",
    "power_of_2",
    "spacing",
    "unit",
]


class Configuration(NamedTuple):
    """Sizes of a tile, in the order that the family's file says; warps of a program; stages of its pipeline."""

    tile: tuple[int, ...]
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.tile))}, {self.warps} warps, {self.stages} stages"


class InTurn(NamedTuple):
    """The configurations of kernels that run one after the other."""

    steps: tuple[Any, ...]

    def __str__(self) -> str:
        return "; ".join(map(str, self.steps))


class Device(NamedTuple):
    """What configurations are chosen by: 10 · major + minor of the compute capability (0: not NVIDIA's), the number of
    multiprocessors, and bytes of shared memory that a program may have."""

    name: str
    capability: int
    multiprocessors: int
    shared_bytes: int


Launcher = Callable[[Any, tuple[int], tuple[Any, ...], dict[str, Any], Configuration], None]


def _run(
    kernel: Any, grid: tuple[int], arguments: tuple[Any, ...], constants: dict[str, Any], configuration: Configuration
) -> None:
    warps, stages = configuration.warps, configuration.stages
    kernel[grid](*arguments, **constants, num_warps=warps, num_stages=stages, enable_fp_fusion=True)


_launcher: ContextVar[Launcher] = ContextVar("kernelpress_triton_launcher", default=_run)


def launch(kernel: Any, programs: int, configuration: Configuration, *arguments: Any, **constants: Any) -> None:
    """Run `programs` programs of a `@triton.jit` function on the current device."""
    _launcher.get()(kernel, (programs,), arguments, constants, configuration)


@contextmanager
def launching_with(launcher: Launcher) -> Iterator[None]:
    """Give the launches inside to `launcher`: a tracer, or a test that looks at them."""
    token = _launcher.set(launcher)
    try:
        yield
    finally:
        _launcher.reset(token)


def cdiv(size: int, part: int) -> int:
    """How many parts hold `size`."""
    return -(-size // part)


def power_of_2(size: int, least: int = 1) -> int:
    """The power of two that is not below `size`, nor below `least`, itself one."""
    return max(1 << (size - 1).bit_length(), least) if size > 0 else least


def spacing(t: Tensor | None) -> int:
    """Distance in elements between neighbouring pixels of channels_last memory, or rows; 0 for an absent tensor.

    Dimensions of one element tell nothing of it: it is the stride of the last one that has more.
    """
    if t is None:
        return 0
    order = (3, 2, 0) if t.dim() == 4 else range(t.dim() - 2, -1, -1)
    channels = t.shape[1 if t.dim() == 4 else -1]
    return next((t.stride(dim) for dim in order if t.shape[dim] > 1), channels)


def unit(*sizes: int) -> int:
    """The power of two, 16 at most, that divides all sizes. A kernel that is given `size // unit` and the unit as a
    constant knows what addresses are multiples of: Triton itself tells multiples of 16 from other numbers only."""
    found = 16
    while any(size % found for size in sizes):
        found //= 2
    return found
