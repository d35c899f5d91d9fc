"""Every op on a CUDA device, in every dtype, against the reference; the same cases on what stands in for a device: the
host emulator of CUDA kernels, Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from cuda_cases import CASES, OpCase, absent_because, check, has_kernel

from kernelpress.ops import registry

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: torch.cuda.is_available() is False; `make gpu` runs it"
)

EVERY = [
    pytest.param(case, dtype, backend, id=f"{case.name}, {dtype}, {backend}")
    for case in CASES
    for dtype in case.dtypes
    for backend in ("cuda", "triton", "auto")
    if backend == "auto" or has_kernel(case, backend)
]
FIRST = list({case.op: case for case in reversed(CASES)}.values())


def least_work(op: str) -> OpCase:
    """The op's case with the smallest tensors."""

    def elements(case: OpCase) -> int:
        return sum(t.numel() for t in case.tensors(case.dtypes[0]) if t is not None)

    return min((case for case in CASES if case.op == op), key=elements)


@needs_cuda
@pytest.mark.parametrize(("case", "dtype", "backend"), EVERY)
def test_on_a_device(case: OpCase, dtype: torch.dtype, backend: str) -> None:
    if backend != "auto" and (reason := absent_because(case, backend)) is not None:
        pytest.skip(reason)
    check(case, dtype, torch.device("cuda"), backend=backend)


@pytest.mark.slow
@pytest.mark.usefixtures("emulated_cuda")
@pytest.mark.parametrize("case", [case for case in FIRST if has_kernel(case)], ids=lambda case: case.name)
def test_on_the_emulator(case: OpCase) -> None:
    check(case, case.dtypes[0], torch.device("cpu"), backend="cuda")


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted_triton")
@pytest.mark.parametrize("op", sorted({case.op for case in CASES if has_kernel(case, "triton")}))
def test_on_the_interpreter(op: str) -> None:
    case = least_work(op)
    check(case, case.dtypes[0], torch.device("cpu"), backend="triton")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_cases_are_calls_that_the_ops_take(case: OpCase) -> None:
    assert check(case, case.dtypes[-1], torch.device("cpu"), backend="reference") <= 2e-3


def test_every_op_has_a_case() -> None:
    """But `quantize_rows`, whose three outputs tests/test_cuda_int8.py compares by themselves."""
    assert {case.op for case in CASES} | {"quantize_rows"} == {entry.name for entry in registry.operators()}
