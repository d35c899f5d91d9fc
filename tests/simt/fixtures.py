"""The pytest fixtures `simt` (launchers on the host emulator) and `emulated_cuda` (ops' backend "cuda" on it)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType

import pytest
import torch
from simt.build import load, readable
from torch import Tensor

from kernelpress.ops.backends import cuda

__all__ = ["ORDERS", "Simt", "emulated_cuda", "simt"]

ORDERS = ("random", "ascending", "descending")

Tensors = Sequence[Tensor | None] | Mapping[str, Tensor | None]


class Simt:
    """The emulator with the launchers of one module."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def run(
        self,
        name: str,
        tensors: Tensors,
        arguments: Sequence[int | float],
        *,
        seed: int = 0,
        order: str = "random",
        outputs: Sequence[Tensor] = (),
        counts_shared: bool = False,
        device: int = 0,
    ) -> None:
        """Runs launcher `name` on the fields of its argument struct.

        The kernel may touch the elements of `tensors` alone (what lies between those of a slice is out of bounds). Of
        `outputs`, it may read nothing that it has not written, and must write every byte. `order`: in which threads and
        blocks run, one of `ORDERS`. `counts_shared`: count the bank conflicts of plain accesses of shared memory too.
        `device`: 1 is one of two multiprocessors.

        Raises: AssertionError with the emulator's report; RuntimeError where the launch itself is refused.
        """
        self.register(tensors, outputs)
        self.module.configure(seed, order, counts_shared)
        try:
            getattr(self.module, name)(*arguments, 0, device)
        except RuntimeError:
            self.check_report()
            raise
        self.check()

    def statistics(self) -> dict[str, int]:
        """Counts since `clear_statistics`: bank conflicts and the accesses that had them, blocks, collectives."""
        return self.module.statistics()

    def clear_statistics(self) -> None:
        self.module.clear_statistics()

    def register(self, tensors: Tensors, outputs: Sequence[Tensor] = ()) -> None:
        """Tells the emulator which memory there is."""
        named = tensors if isinstance(tensors, Mapping) else {f"tensor {i}": t for i, t in enumerate(tensors)}
        self.module.clear_extents()
        addresses = {t.data_ptr() for t in outputs}
        listed = [(name, t, t.data_ptr() in addresses) for name, t in named.items() if t is not None]
        held = {t.data_ptr() for _, t, _ in listed}
        listed += [(f"output {i}", t, True) for i, t in enumerate(outputs) if t.data_ptr() not in held]
        for group in _overlapping([entry for entry in listed if entry[1].numel()]):
            begin = min(t.data_ptr() for _, t, _ in group)
            mask = torch.zeros(max(t.data_ptr() + _span(t) for _, t, _ in group) - begin, dtype=torch.uint8)
            for _, t, _ in group:
                _mark(mask[t.data_ptr() - begin :], t)
            names = " and ".join(dict.fromkeys(name for name, _, _ in group))
            is_unwritten = all(is_output for _, _, is_output in group)
            self.module.register_extent(begin, mask.numel(), names, 0 if mask.all() else mask.data_ptr(), is_unwritten)

    def check(self) -> None:
        """Raises AssertionError where the last launch has a report or left outputs unwritten."""
        self.check_report()
        unwritten = self.module.unwritten_outputs()
        assert not unwritten, unwritten

    def check_report(self) -> None:
        """Raises AssertionError where the last launch has a report."""
        report = readable(self.module.take_report(), str(self.module.__file__))
        assert not report, report


def _span(t: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    return (sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True)) + 1) * t.element_size()


def _mark(mask: Tensor, t: Tensor) -> None:
    """Sets the bytes of `t`'s elements in a mask that begins where it does."""
    size = t.element_size()
    steps = [step * size for step in t.stride()]
    mask.as_strided((*t.shape, size), (*steps, 1)).fill_(1)


Entry = tuple[str, Tensor, bool]


def _overlapping(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Tensors grouped so that no two groups share memory."""
    groups: list[list[Entry]] = []
    end = 0
    for entry in sorted(entries, key=lambda entry: entry[1].data_ptr()):
        begin = entry[1].data_ptr()
        if groups and begin < end:
            groups[-1].append(entry)
        else:
            groups.append([entry])
        end = max(end, begin + _span(entry[1]))
    return groups


@pytest.fixture(scope="session")
def simt() -> Simt:
    """All kernels of this tree on the host emulator."""
    return Simt(load())


@pytest.fixture
def emulated_cuda(simt: Simt) -> Iterator[Simt]:
    """Sends the backend "cuda" to the emulator, where it takes CPU tensors; each launch has an order of its own."""
    launches = 0

    def launch(name: str, tensors: Sequence[Tensor], fields: Sequence[int | float], index: int) -> None:
        nonlocal launches
        simt.run(name, tensors, fields, seed=launches, order=ORDERS[launches % len(ORDERS)], outputs=tensors[:1])
        launches += 1

    def describe(index: int) -> cuda.CudaDevice:
        return cuda.CudaDevice(**simt.module.device(index))

    with cuda.TARGET.changed(
        device_type="cpu",
        reason=lambda index: None,
        describe=describe,
        launch=launch,
        configurations=simt.module.configurations,
    ):
        yield simt
