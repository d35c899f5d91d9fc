"""CONTRIBUTING.md and docs/architecture.md name files that exist; whatever there is took the steps of something new."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from kernelpress import compress, ops
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


def any_name(path: str) -> str:
    """A pattern in which what stands in angle brackets is any name."""
    return re.sub(r"<\w+>", "*", path)


def is_there(path: str) -> bool:
    """From the root, or below one of the folders of sources; `<family>` and the like stand for one at least."""
    pattern = any_name(path).rstrip("/")
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
    return "".join(file.read_text(encoding="utf-8") for file in sorted(ROOT.glob(any_name(path))))


def listed_kernels() -> dict[str, str]:
    """Kernel → argument struct of `KP_KERNELS`, which is two lists."""
    listed = source("kernels/cpu/args.h").partition("#define KP_FLOAT_KERNELS")[2].partition("\n\n")[0]
    return dict(re.findall(r"KERNEL\((\w+), (\w+)\)", listed))


def has_struct(arguments: str) -> bool:
    """Whether the struct says how many of its fields are addresses, those before the first integer."""
    body = source("kernels/cpu/args.h").partition(f"struct {arguments} {{")[2].partition("};")[0]
    stated, fields = re.search(r"kAddresses = (\d+)", body), body.partition("int64_t ")[0]
    return stated is not None and int(stated[1]) == fields.count("*")


def has_own_test(kernel: str) -> bool:
    texts = (file.read_text(encoding="utf-8") for file in ROOT.glob("tests/test_*.py"))
    return any("cpu_variant" in text and f'"{kernel}"' in text for text in texts)


def has_pattern(op: str) -> bool:
    return op in CALLED_BY_LAYERS or f'"{op}"' in source("pyext/emit/fuse/*.py")


def pass_source(name: str) -> str:
    """A file, or a folder of files."""
    return source(f"pyext/compress/{name}.py") + source(f"pyext/compress/{name}/*.py")


CALLED_BY_LAYERS = {"quantize_rows"}
SCHEMAS = ARCHITECTURE.partition("\n## Ops")[2].partition("\n## ")[0]

Steps = dict[str, Callable[[str], bool]]

OP_STEPS: Steps = {
    "kernels/reference/": lambda op: op in reference.__all__ and callable(getattr(reference, op)),
    "pyext/ops/<family>.py": lambda op: re.search(rf"\n@op\([^@]*\ndef _?{op}\(", source("pyext/ops/*.py")) is not None,
    "pyext/ops/__init__.py": lambda op: op in ops.__all__ and callable(getattr(ops, op)),
    "docs/architecture.md": lambda op: f"\n{op}(" in SCHEMAS,
    "pyext/emit/fuse/": has_pattern,
    "tests/test_<family>.py": lambda op: re.search(rf'"{op}"|ops\.{op}\(', source("tests/test_*.py")) is not None,
}
KERNEL_STEPS: Steps = {
    "kernels/cpu/args.h": lambda kernel: has_struct(listed_kernels()[kernel]),
    "kernels/cpu/<family>.cpp": lambda kernel: (
        f"\nvoid {kernel}(const {listed_kernels()[kernel]}&" in source("kernels/cpu/<family>.cpp")
    ),
    "pyext/ops/<family>.py": lambda kernel: (
        any(
            (entry := op.on(backend)) is not None and entry.kernel is not None and entry.kernel.name == kernel
            for op in registry.operators()
            for backend in registry.NATIVE_BACKENDS
        )
        or f'"{kernel}"' in source("pyext/ops/calls/*.py")
        or f'int8_kernel("{kernel}")' in source("pyext/ops/*.py")
    ),
    "tests/test_<family>.py": has_own_test,
}


PASS_STEPS: Steps = {
    "pyext/compress/<pass>.py": lambda name: f"\ndef {name}(" in pass_source(name) and name in compress.__all__,
    "compress/changes.py": lambda name: "from kernelpress.compress.changes import" in pass_source(name),
    "measure/cost.py": lambda name: re.search(r"PassRecord\(|add_pruning_record\(", pass_source(name)) is not None,
    "pyext/press/passes/<pass>.py": lambda name: f'register(Pass("{name}", ' in source(f"pyext/press/passes/{name}.py"),
    "tests/test_<pass>.py": lambda name: source(f"tests/test_{name}.py") != "",
}

OPS = [operator.name for operator in registry.operators()]
MADE_BY_PLANS = {"chain", "int8_chain"}
"""From other layers."""
KERNELS = [kernel for kernel in listed_kernels() if kernel not in MADE_BY_PLANS]
PASSES = [path.stem for path in ROOT.glob("pyext/press/passes/[a-z]*.py")]

LISTS = pytest.mark.parametrize(
    ("title", "steps", "all_there"),
    [("An op", OP_STEPS, OPS), ("A CPU kernel", KERNEL_STEPS, KERNELS), ("A compression pass", PASS_STEPS, PASSES)],
    ids=lambda value: value if isinstance(value, str) else "",
)


@LISTS
def test_the_steps_that_are_listed_are_those_that_are_checked(title: str, steps: Steps, all_there: list[str]) -> None:
    section = re.split(r"\n\n(?=\*\*|## )", CONTRIBUTING.partition(f"\n**{title}**")[2])[0]
    listed = re.split(r"\n\d\. ", section)[1:]
    assert len(listed) == len(steps)
    assert [f"`{path}`" in step for step, path in zip(listed, steps, strict=True)] == [True] * len(steps)


@LISTS
def test_whatever_there_is_has_taken_every_step(title: str, steps: Steps, all_there: list[str]) -> None:
    assert all_there
    missed = {path: [name for name in all_there if not has_taken(name)] for path, has_taken in steps.items()}
    assert {path: names for path, names in missed.items() if names} == {}


@pytest.mark.parametrize("steps", [OP_STEPS, PASS_STEPS], ids=["op", "pass"])
def test_steps_that_were_left_out_are_seen(steps: Steps) -> None:
    absent = "not_" + "there"  # nor is the whole word in this file
    assert [path for path, has_taken in steps.items() if has_taken(absent)] == []
    assert not has_struct(absent)
    assert not has_own_test(absent)


@pytest.mark.skipif(native.cpu() is None, reason=f"no native module: {native.load().absent_because}")
def test_the_native_module_offers_the_kernels_listed_and_no_others() -> None:
    module = native.cpu()
    offered = {name for name in vars(module.Plan) if not name.startswith("_")}
    assert offered - {"copy", "external", "join", "run"} == set(KERNELS)
    assert all(hasattr(module, kernel) for kernel in KERNELS)
