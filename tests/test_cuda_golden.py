"""Every PTX wrapper, on the emulator and on a GPU, against plainly computed vectors."""

from __future__ import annotations

import pytest
import torch
from cuda_golden import GOLDEN, NVCC, Runner, compile_for_device, on_emulator, on_gpu


@pytest.fixture(scope="module", params=["emulator", "gpu"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    if request.param == "emulator":
        return on_emulator
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: torch.cuda.is_available() is False")
    if NVCC is None:
        pytest.skip("needs nvcc on the PATH or in CUDACXX, to compile tests/simt/golden.cu")
    return on_gpu(compile_for_device(tmp_path_factory.mktemp("golden")))


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_vectors(run: Runner, name: str) -> None:
    GOLDEN[name](run)
