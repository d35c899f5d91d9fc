"""CONTRIBUTING.md and docs/architecture.md name files that exist; every kernel took the steps that a new one takes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from kernelpress.kernels import reference
from kernelpress.ops import registry
from kernelpress.runtime import native

ROOT = Path(__file__).resolve().parent.parent
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")

PATH = re.compile(r"[\w.<>-]+(/[\w.<>-]+)*(/|\.(py|h|cpp|cu|cuh|md|txt))")
WRITTEN_LATER = {"docs/zoo.md"}
"""By `make zoo`."""


def named_paths(text: str) -> list[str]:
    return sorted({token for token in re.findall(r"`([^`\n]+)`", text) if PATH.fullmatch(token)} - WRITTEN_LATER)


def is_there(path: str) -> bool:
    """From the root, or below one of the folders of sources; `<family>` and the like stand for one at least."""
    pattern = re.sub(r"<\w+>", "*", path).rstrip("/")
    return any(
        next(folder.glob(pattern), None) or next(folder.glob(f"*/{pattern}"), None)
        for folder in (ROOT, ROOT / "pyext", ROOT / "kernels")
    )


@pytest.mark.parametrize("path", named_paths(CONTRIBUTING + ARCHITECTURE))
def test_a_file_that_is_named_exists(path: str) -> None:
    assert is_there(path)


def test_files_that_do_not_exist_are_seen() -> None:
    assert named_paths("`pyext/nowhere.py`, `a b/c.py`, `docs/zoo.md`, `x`, `kernels/lost/`") == [
        "kernels/lost/",
        "pyext/nowhere.py",
    ]
    assert not any(map(is_there, ("pyext/nowhere.py", "kernels/lost/", "pyext/ops/<family>_lost.py")))


def source(path: str) -> str:
    return "".join(file.read_text(encoding="utf-8") for file in sorted(ROOT.glob(path.replace("<family>", "*"))))


def listed_kernels() -> dict[str, str]:
    """Kernel → argument struct of `KP_KERNELS`."""
    listed = source("kernels/cpu/args.h").partition("#define KP_KERNELS")[2].partition("\n\n")[0]
    return dict(re.findall(r"KERNEL\((\w+), (\w+)\)", listed))


def has_own_test(kernel: str) -> bool:
    texts = (file.read_text(encoding="utf-8") for file in ROOT.glob("tests/test_*.py"))
    return any("cpu_variant" in text and f'"{kernel}"' in text for text in texts)


STEPS: dict[str, Callable[[str, str], bool]] = {
    "kernels/reference/": lambda kernel, arguments: hasattr(reference, kernel),
    "kernels/cpu/args.h": lambda kernel, arguments: f"struct {arguments} {{" in source("kernels/cpu/args.h"),
    "kernels/cpu/<family>.cpp": lambda kernel, arguments: (
        f"\nvoid {kernel}(const {arguments}&" in source("kernels/cpu/<family>.cpp")
    ),
    "docs/architecture.md": lambda kernel, arguments: f"\n{kernel}(x, " in ARCHITECTURE,
    "pyext/ops/<family>.py": lambda kernel, arguments: any(
        found.backend == "cpu" for found in registry.operator(kernel).implementations
    ),
    "tests/test_<family>.py": lambda kernel, arguments: has_own_test(kernel),
}


def test_the_steps_to_a_cpu_kernel_are_those_that_are_checked() -> None:
    section = CONTRIBUTING.partition("**A CPU kernel**")[2].partition("**A CUDA kernel**")[0]
    steps = re.split(r"\n\d\. ", section)[1:]
    assert [next(path for path in STEPS if f"`{path}`" in step) for step in steps] == list(STEPS)


@pytest.mark.parametrize("step", STEPS)
def test_every_cpu_kernel_has_taken_every_step(step: str) -> None:
    kernels = listed_kernels()
    del kernels["chain"]  # made by a plan from other layers
    assert len(kernels) >= 8
    assert [kernel for kernel, arguments in kernels.items() if not STEPS[step](kernel, arguments)] == []


@pytest.mark.skipif(native.cpu() is None, reason=f"no native module: {native.load().absent_because}")
def test_the_native_module_offers_the_kernels_listed_and_no_others() -> None:
    module = native.cpu()
    offered = {name for name in vars(module.Plan) if not name.startswith("_")}
    assert offered - {"copy", "external", "join", "run"} == listed_kernels().keys() - {"chain"}
    assert all(hasattr(module, kernel) for kernel in listed_kernels() if kernel != "chain")
