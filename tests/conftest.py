"""What every test shares: a seed that can be varied, few threads, and the instruction sets of the native module."""

import importlib.util
import os
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, as torch does below kernelpress

from hypothesis import register_random, settings
from simt.fixtures import emulated_cuda, simt  # noqa: F401 - fixtures

from kernelpress.runtime import native

if importlib.util.find_spec("triton") is not None:
    from interpreting import interpreted_triton
else:

    @pytest.fixture
    def interpreted_triton() -> None:
        """Where Triton has no wheel."""
        pytest.skip("triton is not installed: pip install triton")


SEED = int(os.environ.get("KERNELPRESS_TEST_SEED", "0"))

# Machines are shared and a kernel's first call packs its weights: the time of one example says nothing.
settings.register_profile("kernelpress", deadline=None, print_blob=True)
settings.load_profile("kernelpress")


class TorchRandom:
    """Torch's generator as hypothesis manages those of Python and NumPy: what an example draws from it follows from the
    example, and with `st.random_module()` from a seed that the example draws."""

    def seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    def getstate(self) -> torch.Tensor:
        return torch.default_generator.get_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.default_generator.set_state(state)


TORCH_RANDOM = TorchRandom()
register_random(TORCH_RANDOM)

KERNEL_THREADS = 2
"""On one thread no loop is split."""

# Workers of pytest-xdist share the processor.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))


def pytest_report_header() -> list[str]:
    module = native.cpu()
    kernels = module.variant() if module else f"none: {native.load().absent_because}"
    return [
        f"kernelpress: native kernels {kernels}, torch {torch.__version__}",
        f"seed: {SEED} (KERNELPRESS_TEST_SEED draws other inputs)",
    ]


def _seed(who: str) -> None:
    seed = zlib.crc32(f"{SEED}:{who}".encode())
    random.seed(seed)
    numpy.random.seed(seed)  # noqa: NPY002 - code under test may draw from the global state
    torch.manual_seed(seed)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """Every test draws inputs of its own, the same in each run with the same seed, in whatever order tests run."""
    _seed(request.node.nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object], request: pytest.FixtureRequest) -> None:
    """So does every fixture that several tests share."""
    if fixturedef.scope != "function":
        _seed(f"{request.node.nodeid}:{fixturedef.argname}:{request.param_index}")


@pytest.fixture(autouse=True, scope="session")
def _own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither read nor write the user's timings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERNELPRESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nor does this test see what others timed; the folder, empty."""
    monkeypatch.setenv("KERNELPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def every_match_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that computes something else is refused by emission, and so would pass unnoticed."""
    from kernelpress.emit import pipeline
    from kernelpress.emit.evaluate import evaluate

    def checked(*arguments: Any) -> Any:
        evaluations = evaluate(*arguments)
        wrong = [(e.candidate.label, e.error) for e in evaluations if e.error is not None and e.refusal is not None]
        assert not wrong
        return evaluations

    monkeypatch.setattr(pipeline, "evaluate", checked)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The test runs on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _variants(*, int8: bool) -> list[str]:
    """The instruction sets of this processor; those with VNNI have no kernels of their own but for int8."""
    module = native.cpu()
    return ["native"] if module is None else [name for name in module.variants() if int8 or "vnni" not in name]


def _on_variant(variant: str) -> Iterator[str]:
    module = native.cpu()
    if module is None:
        pytest.skip(f"no native module: {native.load().absent_because}")
    before, threads = module.variant(), torch.get_num_threads()
    module.select(variant)
    torch.set_num_threads(KERNEL_THREADS)
    yield variant
    torch.set_num_threads(threads)
    module.select(before)


@pytest.fixture(params=_variants(int8=False))
def cpu_variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on two threads with each instruction set of this processor, and puts back what was in use."""
    yield from _on_variant(request.param)


@pytest.fixture(params=_variants(int8=True))
def int8_cpu_variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """`cpu_variant` for kernels of int8."""
    yield from _on_variant(request.param)
