"""What is private in torch and Triton is named in `kernelpress.runtime` alone, and this torch has all of it."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from kernelpress.runtime import torch_private

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path
    for folder in ("pyext", "kernels", "benchmarks", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if ROOT / "pyext/runtime" not in path.parents
)

UNDOCUMENTED = re.compile(r"torch\.(fx\.experimental|ao\.quantization\.fx)|triton\.(runtime|compiler|backends|knobs)")
"""Homes of private names that have no underscore."""

IN_ANY_NAMED_TUPLE = {"_asdict", "_fields", "_make", "_replace"}
PUBLIC = {"_exit"}
"""`os._exit` is documented."""


def private_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and path of each private name of torch or Triton that a file imports or reaches from what it imports."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield from _if_private(node, name.name)
                first = name.name.partition(".")[0]
                known[name.asname or first] = name.name if name.asname else first
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for name in node.names:
                yield from _if_private(node, f"{node.module}.{name.name}")
                known[name.asname or name.name] = f"{node.module}.{name.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            path = _path(node, known)
            if path is not None:
                yield from _if_private(node, path)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            given = node.args[0] if node.args else None
            if isinstance(given, ast.Constant):
                yield from _if_private(node, str(given.value))


def _path(node: ast.expr, known: dict[str, str]) -> str | None:
    if isinstance(node, ast.Name):
        return known.get(node.id)
    before = _path(node.value, known) if isinstance(node, ast.Attribute) else None
    return f"{before}.{node.attr}" if before is not None and isinstance(node, ast.Attribute) else None


def _if_private(node: ast.stmt | ast.expr, path: str) -> Iterator[tuple[int, str]]:
    package, *names = path.split(".")
    if package not in ("torch", "triton") or path.startswith("torch.ops."):  # names of operators are in saved models
        return
    if UNDOCUMENTED.match(path) or any(_is_private(name) for name in names):
        yield node.lineno, path


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names(tree: ast.Module) -> Iterator[str]:
    """What a file defines, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def attributes(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Private attributes that a file reads of others than `self`; operators have such names too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            owner = ast.unparse(node.value)
            if not re.fullmatch(r"self|cls|super\(\)|(torch\.ops|aten)\b.*", owner):
                yield node.lineno, node.attr


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


@pytest.mark.slow
def test_names_of_torch_and_triton_are_public_everywhere_else(trees: dict[Path, ast.Module]) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}" for path, tree in trees.items() for line, name in private_names(tree)
    ]
    assert not found, "their place is pyext/runtime/:\n" + "\n".join(found)


def test_private_attributes_are_ours_or_listed(trees: dict[Path, ast.Module]) -> None:
    known = {*torch_private.ATTRIBUTES, *IN_ANY_NAMED_TUPLE, *PUBLIC}
    ours = {name for tree in trees.values() for name in own_names(tree)}
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path, tree in trees.items()
        for line, name in attributes(tree)
        if name not in known | ours
    ]
    assert not found, "ATTRIBUTES in pyext/runtime/ lists them:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torch\ntorch._C._anything()", "torch._C._anything"),
        ("from torch.utils import _pytree as pytree", "torch.utils._pytree"),
        ("from torch._subclasses import FakeTensor", "torch._subclasses.FakeTensor"),
        (
            "from torch import nn\nx = nn.modules.module._global_forward_hooks",
            "torch.nn.modules.module._global_forward_hooks",
        ),
        ("import torch._inductor.config as settings", "torch._inductor.config"),
        ("import_module('torch._inductor.config')", "torch._inductor.config"),
        (
            "from torch.fx.experimental.symbolic_shapes import ShapeEnv",
            "torch.fx.experimental.symbolic_shapes.ShapeEnv",
        ),
        ("from triton.runtime import interpreter", "triton.runtime.interpreter"),
    ],
)
def test_the_search_finds(source: str, name: str) -> None:
    assert name in [found for _, found in private_names(ast.parse(source))]


@pytest.mark.parametrize("source", ["import torch\ntorch.ops.aten._to_copy", "from torch import nn", "x = self._own"])
def test_the_search_leaves_out(source: str) -> None:
    assert not list(private_names(ast.parse(source)))


@pytest.mark.parametrize("name", sorted({*torch_private.__all__, *torch_private.LATER}))
def test_this_torch_has(name: str) -> None:
    if name == "current_raw_stream" and torch.version.cuda is None:
        assert torch_private.current_raw_stream is None
        return
    if name == "bsr_dense_addmm" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install triton")
    assert getattr(torch_private, name) is not None


def test_objects_have_the_attributes() -> None:
    module = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)).module()
    examples: dict[Any, Any] = {
        nn.Module: nn.Linear(1, 1),
        torch.fx.GraphModule: module,
        torch.fx.Graph: module.graph,
        torch_private.OpOverload: torch.ops.aten.relu.default,
        torch.UntypedStorage: torch.empty(1).untyped_storage(),
        Tensor: torch.empty(1),
        nn.Conv2d: nn.Conv2d(1, 1, 1),
        torch_private.profiler: torch_private.profiler,
        prune.BasePruningMethod: next(iter(prune.identity(nn.Linear(1, 1), "weight")._forward_pre_hooks.values())),
    }
    missing = [name for name, owner in torch_private.ATTRIBUTES.items() if not hasattr(examples[owner], name)]
    assert not missing


def test_sizes_are_those_of_the_example() -> None:
    seen: list[tuple[int, int]] = []

    def keep(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        x = module.graph.find_nodes(op="placeholder")[-1].meta["example_value"]
        seen.append(tuple(torch_private.optimization_hint(size) for size in x.shape))  # type: ignore[arg-type]
        assert isinstance(x.shape[0], torch.SymInt)
        return module.forward

    torch.compiler.reset()
    x = torch.ones(7, 3)
    torch_private.mark_dynamic(x, 0)
    torch.compile(lambda t: t + t.shape[0], backend=keep)(x)
    assert seen == [(7, 3)]


def test_sizes_that_only_the_data_tell_are_guessed() -> None:
    with torch_private.FakeTensorMode(shape_env=torch_private.ShapeEnv()) as mode:
        size = mode.from_tensor(torch.ones(4)).nonzero().shape[0]
        assert isinstance(size, torch.SymInt)
        assert torch_private.optimization_hint(size) >= 0


def test_importing_it_imports_no_compiler() -> None:
    heavy = "('sympy', 'torch._dynamo', 'torch._inductor', 'torch.export._trace', 'triton')"
    code = f"import sys, kernelpress.runtime.torch_private\nprint([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_matrix_has_the_oldest_and_the_pinned_version() -> None:
    lines = (ROOT / ".ci/torch-versions").read_text(encoding="utf-8").splitlines()
    versions = [line for line in lines if not line.startswith("#")]
    oldest = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pinned = re.search(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert oldest is not None
    assert pinned is not None
    assert versions[0] == f"{oldest[1]}.0"
    assert pinned[1] in versions
