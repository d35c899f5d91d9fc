"""What every test shares: a seed that can be varied, few threads, and the instruction sets of the native module."""

import os
import random
import zlib
from collections.abc import Iterator

import numpy
import pytest
import torch
from hypothesis import settings

from kernelpress import native

SEED = int(os.environ.get("KERNELPRESS_TEST_SEED", "0"))

# Machines are shared and a kernel's first call packs its weights: the time of one example says nothing.
settings.register_profile("kernelpress", deadline=None, print_blob=True)
settings.load_profile("kernelpress")

torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_report_header() -> list[str]:
    module = native.cpu()
    kernels = module.variant() if module else f"none: {native.load().absent_because}"
    return [
        f"kernelpress: native kernels {kernels}, torch {torch.__version__} on {torch.get_num_threads()} threads",
        f"seed: {SEED} (KERNELPRESS_TEST_SEED draws other inputs)",
    ]


def _seed(who: str) -> None:
    seed = zlib.crc32(f"{SEED}:{who}".encode())
    random.seed(seed)
    numpy.random.seed(seed)  # noqa: NPY002 - code under test may draw from the global state
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """Every test draws inputs of its own, the same in each run with the same seed, in whatever order tests run."""
    _seed(request.node.nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object], request: pytest.FixtureRequest) -> None:
    """So does every fixture that several tests share."""
    if fixturedef.scope != "function":
        _seed(f"{request.node.nodeid}:{fixturedef.argname}:{request.param_index}")


@pytest.fixture(params=native.cpu().variants() if native.cpu() else ["native"])
def cpu_variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with each instruction set that this processor has, and puts back the one in use."""
    module = native.cpu()
    if module is None:
        pytest.skip(f"no native module: {native.load().absent_because}")
    before = module.variant()
    module.select(request.param)
    yield request.param
    module.select(before)
