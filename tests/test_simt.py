"""The host emulator's own test: healthy kernels run clean in every order, and every seeded fault is caught in each."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from enum import IntEnum, auto
from typing import NamedTuple

import pytest
import torch
from simt.build import load
from simt.fixtures import Simt
from torch import Tensor


class Fault(IntEnum):
    """In the order of `enum Fault` in simt/faults.cu."""

    HEALTHY = 0
    WAITS_FOR_TOO_FEW = auto()
    NO_BARRIER_AFTER_WAIT = auto()
    NO_COMMIT = auto()
    OVERWRITES_STAGE = auto()
    NO_SWIZZLE_ON_STORE = auto()
    WRONG_SWIZZLE = auto()
    NO_ROW_GUARD = auto()
    NO_ZERO_FILL = auto()
    SWAPPED_FRAGMENTS = auto()
    WRONG_LANE = auto()
    STORE_GUARD_OFF_BY_ONE = auto()
    BARRIER_IN_BRANCH = auto()
    EARLY_RETURN = auto()
    MISALIGNED_COPY = auto()
    TOO_LITTLE_SHARED = auto()
    TRANSPOSE_NO_BARRIER = auto()
    TRANSPOSE_GUARD = auto()
    TRANSPOSE_TWO_WRITERS = auto()
    TRANSPOSE_READS_OUTPUT = auto()
    REDUCTION_NO_WARP_BARRIER = auto()
    REDUCTION_UNWRITTEN = auto()
    REDUCTION_PARTIAL_WARP = auto()
    REDUCTION_OTHER_BLOCK = auto()
    REDUCTION_NO_FENCE = auto()
    REDUCTION_LOCAL_INDEX = auto()
    SLOW_TRANSPOSE = auto()
    SAME_VALUE = auto()
    UNSWIZZLED = auto()


IN_FLIGHT, RACE, DEADLOCK = "is in flight", "race in", "deadlock"
WRONG = "wrong result"

GEMM_FAULTS = {
    Fault.WAITS_FOR_TOO_FEW: IN_FLIGHT,
    Fault.NO_BARRIER_AFTER_WAIT: IN_FLIGHT + "|" + RACE + "|unwritten memory",
    Fault.NO_COMMIT: IN_FLIGHT,
    Fault.OVERWRITES_STAGE: IN_FLIGHT + "|" + RACE,
    Fault.NO_SWIZZLE_ON_STORE: WRONG,
    Fault.WRONG_SWIZZLE: WRONG,
    Fault.NO_ROW_GUARD: "out of bounds: thread .* reads 16 bytes at [ab],",
    Fault.NO_ZERO_FILL: WRONG,
    Fault.SWAPPED_FRAGMENTS: WRONG,
    Fault.WRONG_LANE: WRONG,
    Fault.STORE_GUARD_OFF_BY_ONE: "out of bounds: thread .* writes 4 bytes at c,",
    Fault.BARRIER_IN_BRANCH: "divergent barrier",
    Fault.EARLY_RETURN: "have returned",
    Fault.MISALIGNED_COPY: "misaligned: cp.async of 16 bytes",
    Fault.TOO_LITTLE_SHARED: "out of bounds: thread .* dynamic shared memory",
}
TRANSPOSE_FAULTS = {
    Fault.TRANSPOSE_NO_BARRIER: "unwritten memory|race in",
    Fault.TRANSPOSE_GUARD: "unwritten|out of bounds",
    Fault.TRANSPOSE_TWO_WRITERS: "race in global memory: .* with another value",
    Fault.TRANSPOSE_READS_OUTPUT: "race in global memory|unwritten memory",
}
REDUCTION_FAULTS = {
    Fault.REDUCTION_NO_WARP_BARRIER: "unwritten memory|race in",
    Fault.REDUCTION_UNWRITTEN: "unwritten memory: thread 0 .* warps",
    Fault.REDUCTION_PARTIAL_WARP: DEADLOCK,
    Fault.REDUCTION_OTHER_BLOCK: RACE + " global memory|unwritten memory",
    Fault.REDUCTION_NO_FENCE: RACE + " global memory",
    Fault.REDUCTION_LOCAL_INDEX: "out of bounds: index 4 of",
}
FAULTS = GEMM_FAULTS | TRANSPOSE_FAULTS | REDUCTION_FAULTS

SEEDS = range(3)


class Run(NamedTuple):
    order: str
    seed: int
    counts_shared: bool = False


RUNS = [*(Run("random", seed) for seed in SEEDS), Run("ascending", 0), Run("descending", 0)]


@pytest.fixture(scope="module")
def emulator() -> Simt:
    return Simt(load("_simt_self"))


@pytest.fixture(scope="module")
def library(emulator: Simt) -> ctypes.CDLL:
    return ctypes.CDLL(str(emulator.module.__file__))


def launch(
    emulator: Simt,
    function: Callable[..., int],
    tensors: dict[str, Tensor],
    outputs: list[Tensor],
    run: Run,
    *sizes: int,
) -> None:
    emulator.register(tensors, outputs)
    emulator.module.configure(run.seed, run.order, run.counts_shared)
    addresses = [ctypes.c_void_p(t.data_ptr()) for t in tensors.values()]
    *wide, blocks, fault = sizes
    code = function(
        *addresses, *map(ctypes.c_int64, wide), *([ctypes.c_int(blocks)] if blocks else []), ctypes.c_int(fault)
    )
    emulator.check()
    assert code == 0


def apart(t: Tensor) -> Tensor:
    """A copy in the middle of memory that belongs to no tensor: what reaches beyond its ends hits no other."""
    margin = (64 << 10) // t.element_size()
    room = torch.empty(t.numel() + 2 * margin, dtype=t.dtype)
    return room[margin : margin + t.numel()].view(t.shape).copy_(t)


def gemm(emulator: Simt, library: ctypes.CDLL, run: Run, fault: Fault, m: int = 90, n: int = 70, k: int = 272) -> None:
    a, b = (apart(torch.randint(-128, 128, (size, k), dtype=torch.int8)) for size in (m, n))
    c = apart(torch.empty(m, n, dtype=torch.int32))
    launch(emulator, library.kernelpress_gemm, {"a": a, "b": b, "c": c}, [c], run, m, n, k, 0, fault)
    assert torch.equal(c, (a.double() @ b.double().T).int()), WRONG


def transpose(emulator: Simt, library: ctypes.CDLL, run: Run, fault: Fault) -> None:
    x, y = torch.randn(37, 70), torch.empty(70, 37)
    launch(emulator, library.kernelpress_transpose, {"x": x, "y": y}, [y], run, 37, 70, 0, fault)
    assert torch.equal(y, x.T), WRONG


def reduction(emulator: Simt, library: ctypes.CDLL, run: Run, fault: Fault, blocks: int = 4) -> None:
    x = torch.randint(-9, 9, (2500,)).float()
    partial, total, counter = torch.empty(blocks), torch.empty(1), torch.zeros(1, dtype=torch.int32)
    tensors = {"x": x, "partial": partial, "sum": total, "counter": counter}
    launch(emulator, library.kernelpress_reduction, tensors, [partial, total], run, 2500, blocks, fault)
    assert total.item() == x.sum().item(), WRONG
    assert counter.item() == 0


def kernel_of(fault: Fault) -> Callable[..., None]:
    return gemm if fault in GEMM_FAULTS else transpose if fault in TRANSPOSE_FAULTS else reduction


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.order}{run.seed}")
@pytest.mark.parametrize("kernel", [gemm, transpose, reduction], ids=lambda kernel: kernel.__name__)
def test_a_healthy_kernel_has_no_report(
    emulator: Simt, library: ctypes.CDLL, kernel: Callable[..., None], run: Run
) -> None:
    kernel(emulator, library, run, Fault.HEALTHY)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.order}{run.seed}")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.lower())
def test_a_seeded_fault_is_caught(emulator: Simt, library: ctypes.CDLL, fault: Fault, run: Run) -> None:
    with pytest.raises(AssertionError, match=FAULTS[fault]):
        kernel_of(fault)(emulator, library, run, fault)
    kernel_of(fault)(emulator, library, run, Fault.HEALTHY)


def test_the_same_value_from_two_threads_is_no_race(emulator: Simt, library: ctypes.CDLL) -> None:
    for run in RUNS:
        transpose(emulator, library, run, Fault.SAME_VALUE)


def test_the_table_of_faults_is_that_of_the_kernels() -> None:
    assert len(FAULTS) == len(Fault) - 4  # but the healthy one, the slow ones and the same value
    assert len(FAULTS) >= 15


def test_a_report_names_thread_block_line_and_kernel(emulator: Simt, library: ctypes.CDLL) -> None:
    with pytest.raises(AssertionError) as caught:
        gemm(emulator, library, Run("ascending", 0), Fault.STORE_GUARD_OFF_BY_ONE)
    report = str(caught.value)
    assert "of block (0, 1, 0)" in report
    assert "at tests/simt/faults.cu:" in report
    assert "in the kernel tests/simt/faults.cu:" in report


def test_a_deadlock_report_says_who_waits_where(emulator: Simt, library: ctypes.CDLL) -> None:
    with pytest.raises(AssertionError) as caught:
        gemm(emulator, library, Run("random", 0), Fault.EARLY_RETURN)
    report = str(caught.value)
    assert "threads 0-63 wait in block_barrier at tests/simt/faults.cu:" in report
    assert "threads 64-127 have returned" in report


def test_elements_between_those_of_a_slice_are_out_of_bounds(emulator: Simt, library: ctypes.CDLL) -> None:
    wide = torch.randn(32, 64)
    with pytest.raises(AssertionError, match="between the tensor's elements"):
        launch(
            emulator,
            library.kernelpress_transpose,
            {"x": wide[:, :32], "y": torch.empty(32, 32)},
            [],
            Run("random", 0),
            *(32, 32, 0, Fault.HEALTHY),
        )


def test_an_output_must_be_written_wholly(emulator: Simt, library: ctypes.CDLL) -> None:
    x, y = torch.randn(32, 32), torch.empty(33, 32)
    with pytest.raises(AssertionError, match="y: byte 4096 of 4224 was never written"):
        launch(
            emulator,
            library.kernelpress_transpose,
            {"x": x, "y": y},
            [y],
            Run("random", 0),
            *(32, 32, 0, Fault.HEALTHY),
        )


def test_too_many_threads_and_too_much_shared_memory_are_refused(emulator: Simt, library: ctypes.CDLL) -> None:
    emulator.register({})
    emulator.module.configure(0, "random", False)
    none = ctypes.c_void_p(0)
    assert (
        library.kernelpress_reduction(none, none, none, none, ctypes.c_int64(0), ctypes.c_int(0), ctypes.c_int(0)) == 0
    )
    assert library.kernelpress_refused(ctypes.c_int(1025), ctypes.c_int(0)) == 9
    assert library.kernelpress_refused(ctypes.c_int(32), ctypes.c_int(300 * 1024)) == 1


def test_a_swizzle_avoids_the_bank_conflicts_of_ldmatrix(emulator: Simt, library: ctypes.CDLL) -> None:
    def conflicts(fault: Fault) -> float:
        emulator.clear_statistics()
        gemm(emulator, library, Run("random", 0), fault, 64, 64, 64)
        found = emulator.statistics()
        return found["ldmatrix_conflicts"] / found["ldmatrix_accesses"]

    assert conflicts(Fault.HEALTHY) == 0
    assert conflicts(Fault.UNSWIZZLED) == 3


def test_bank_conflicts_of_plain_accesses_are_counted(emulator: Simt, library: ctypes.CDLL) -> None:
    def conflicts(fault: Fault) -> float:
        emulator.clear_statistics()
        transpose(emulator, library, Run("random", 0, counts_shared=True), fault)
        found = emulator.statistics()
        return found["shared_conflicts"] / found["shared_accesses"]

    assert conflicts(Fault.HEALTHY) == 0
    assert conflicts(Fault.SLOW_TRANSPOSE) > 5


def test_a_gemm_is_emulated_in_milliseconds(emulator: Simt, library: ctypes.CDLL) -> None:
    def once() -> float:
        begin = time.process_time()
        gemm(emulator, library, Run("random", 0), Fault.HEALTHY, 128, 128, 256)
        return 1e3 * (time.process_time() - begin)

    assert min(once() for _ in range(5)) < 150
