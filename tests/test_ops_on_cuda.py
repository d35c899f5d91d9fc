"""Every op on a CUDA device, in every dtype, against the reference; and the same cases on the host emulator."""

from __future__ import annotations

import pytest
import torch
from cuda_cases import CASES, OpCase, check, has_kernel

from kernelpress.ops import registry

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: torch.cuda.is_available() is False; `make gpu` runs it"
)

EVERY = [pytest.param(case, dtype, id=f"{case.name}, {dtype}") for case in CASES for dtype in case.dtypes]
SMALLEST = list({case.op: case for case in reversed(CASES)}.values())


@needs_cuda
@pytest.mark.parametrize(("case", "dtype"), EVERY)
def test_on_a_device(case: OpCase, dtype: torch.dtype) -> None:
    for backend in (["cuda"] if has_kernel(case) else []) + ["auto"]:
        check(case, dtype, torch.device("cuda"), backend=backend)


@pytest.mark.usefixtures("emulated_cuda")
@pytest.mark.parametrize("case", [case for case in SMALLEST if has_kernel(case)], ids=lambda case: case.name)
def test_on_the_emulator(case: OpCase) -> None:
    check(case, case.dtypes[0], torch.device("cpu"), backend="cuda")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_cases_are_calls_that_the_ops_take(case: OpCase) -> None:
    assert check(case, case.dtypes[-1], torch.device("cpu"), backend="reference") <= 2e-3


def test_every_op_has_a_case() -> None:
    assert {case.op for case in CASES} == {entry.name for entry in registry.operators()}
