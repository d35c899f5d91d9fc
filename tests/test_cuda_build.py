"""What nvcc makes of the CUDA kernels: registers and spills, the machine instructions meant, the wheel; no GPU needed.

All of it looks at the build that `_cuda` comes from, so nothing is compiled twice.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kernelpress.runtime import native

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels" / "cuda"
FILES = sorted(path.stem for path in KERNELS.glob("*.cu"))
TESTED = ("sm_80", "sm_90")

needs_module = pytest.mark.skipif(
    native.cuda() is None, reason=f"no _cuda: {native.load_cuda().absent_because}; an nvcc and `make build` make it"
)

STORE_16 = r"STG\.E\.128"
GLOBAL_16 = {r"LDG\.E\.(NA\.)?128(\.CONSTANT)?", STORE_16}
COPY_16 = r"LDGSTS\.E\.BYPASS\..*\b128"
TENSOR_16 = {r"HMMA\.16816\.F32", r"HMMA\.16816\.F32\.BF16"}
TENSOR_FLOAT = TENSOR_16 | {r"HMMA\.1688\.F32\.TF32"}
TENSOR_INT8 = {r"IMMA\.16832\.S8\.S8"}
PIPELINE = {COPY_16, r"LDSM\.16\.M88\.4", STORE_16}

INSTRUCTIONS: dict[str, set[str]] = {
    "dense": TENSOR_FLOAT | PIPELINE,
    "depthwise": GLOBAL_16 | {COPY_16},
    "int8_depthwise": {r"IDP\.4A\.S8\.S8", COPY_16},
    "depthwise_tensor": TENSOR_16 | {r"LDGSTS\.E\.64", r"STG\.E\.64"},
    "ghost": TENSOR_FLOAT | PIPELINE,
    "grouped": TENSOR_FLOAT | PIPELINE,
    "grouped_shuffle": GLOBAL_16,
    "int8": TENSOR_INT8 | PIPELINE,
    "int8_conv": TENSOR_INT8 | PIPELINE,
    "int8_quantize": GLOBAL_16,
    "lowrank": TENSOR_FLOAT | PIPELINE,
    "separable": TENSOR_FLOAT | PIPELINE,
    "separable_inverted": TENSOR_FLOAT | PIPELINE,
    "sparse": TENSOR_FLOAT | TENSOR_INT8 | PIPELINE,
}
"""File → patterns of instructions that its machine code must contain."""


@pytest.fixture(scope="module")
def resources() -> Iterator[ModuleType]:
    """The module `benchmarks/resources.py`."""
    spec = importlib.util.spec_from_file_location("resources", ROOT / "benchmarks" / "resources.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["resources"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["resources"]


@pytest.fixture(scope="module")
def objects(resources: ModuleType) -> Path:
    """The folder of the objects that `_cuda` was linked from."""
    for needed in ("ninja", "pybind11"):
        pytest.importorskip(needed, reason=f"{needed} is needed to build; `make test` installs it")
    try:
        return resources.object_folder()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def uses(resources: ModuleType, objects: Path) -> list[Any]:
    """What ptxas told of every kernel."""
    return resources.read(objects)


@needs_module
def test_every_kernel_file_was_compiled_for_the_architectures_in_use(uses) -> None:
    compiled = {(use.family, use.architecture) for use in uses}
    machine_code = [name for name in native.cuda().architectures() if name.startswith("sm_")]
    assert compiled == {(family, name) for family in FILES for name in machine_code}


@needs_module
@pytest.mark.parametrize("family", FILES)
def test_no_kernel_spills_registers(uses, family: str) -> None:
    spilling = [
        f"{use.kernel} for {use.architecture}: {use.spilled_bytes} bytes spilled at {use.registers} registers"
        for use in uses
        if use.family == family and use.architecture in TESTED and use.spilled_bytes
    ]
    assert not spilling, "\n".join(spilling)


@needs_module
def test_the_table_in_the_documentation_has_every_kernel_and_no_other(resources, uses) -> None:
    written = resources.read_table(resources.PAGE)
    listed = set(re.findall(r"^\| (\w+) \| `(\w+)` \| (\d+) \|", written, re.MULTILINE))
    now = {(use.family, use.template): set() for use in uses}
    for use in uses:
        now[use.family, use.template].add(use.kernel)
    expected = {(family, kernel, str(len(found))) for (family, kernel), found in now.items()}
    assert listed == expected, "`make resources` renews the table in docs/gpu.md"


def test_spills_of_called_functions_are_counted_and_names_are_short(resources) -> None:
    notes = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN11kernelpress4cuda12_GLOBAL__N_14ringIfLi7ELb1EEEvPKT_' for 'sm_80'
ptxas info    : Function properties for _ZN11kernelpress4cuda12_GLOBAL__N_14ringIfLi7ELb1EEEvPKT_
    8 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for helper
    8 bytes stack frame, 0 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 151 registers, used 1 barriers, 4096 bytes smem, 728 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN11kernelpress4cuda4copyEv' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""
    assert resources.parse(notes, "toy") == [
        resources.Use("toy", "ring<float, 7, true>", "sm_80", 151, 4096, 16),
        resources.Use("toy", "copy", "sm_90", 8, 0, 0),
    ]


def test_the_table_is_written_between_its_marks(resources, tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    page.write_text("before\n{}\nold\n{}\nafter\n".format(*resources.MARKS))
    uses = [
        resources.Use("toy", f"ring<{kernel}>", name, registers, 0, 0)
        for kernel, name, registers in (("3", "sm_80", 40), ("5", "sm_80", 64), ("3", "sm_90", 42), ("5", "sm_90", 42))
    ]
    resources.write_table(page, resources.table(uses))
    lines = page.read_text().splitlines()
    assert lines[0] == "before"
    assert lines[-1] == "after"
    assert "| toy | `ring` | 2 | 40–64 | 42 | 0 | 0 |" in lines
    assert "old" not in lines
    page.write_text("no marks")
    with pytest.raises(ValueError, match="expected the marks"):
        resources.write_table(page, "")


def test_of_every_kernel_file_it_is_said_which_instructions_are_meant() -> None:
    assert set(FILES) == set(INSTRUCTIONS)


def find_cuobjdump() -> str | None:
    """The system's, the toolkit's or that of the triton package, which carries one."""
    found = shutil.which("cuobjdump")
    if found is None and (nvcc := shutil.which("nvcc")) is not None:
        found = shutil.which(str(Path(nvcc).resolve().with_name("cuobjdump")))
    if found is None and (spec := importlib.util.find_spec("triton")) is not None and spec.origin is not None:
        found = shutil.which(str(Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"))
    return found


def instructions(cuobjdump: str, path: Path, architecture: str) -> set[str]:
    """Every machine instruction in an object, with its modifiers."""
    command = [cuobjdump, "-sass", "-arch", architecture, str(path)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)", listing, re.MULTILINE))


@pytest.mark.slow
@needs_module
@pytest.mark.parametrize("architecture", TESTED)
@pytest.mark.parametrize("family", FILES)
def test_the_machine_code_has_the_instructions_meant(objects: Path, family: str, architecture: str) -> None:
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("no cuobjdump: a full CUDA toolkit has one, and so has the package triton")
    if architecture not in native.cuda().architectures():
        pytest.skip(f"_cuda was built without {architecture}; KERNELPRESS_CUDA_ARCHS='80;90' make build has it")
    found = instructions(cuobjdump, objects / f"{family}.o", architecture)
    missing = {meant for meant in INSTRUCTIONS[family] if not any(re.fullmatch(meant, name) for name in found)}
    relatives = sorted(name for name in found if name.startswith(("HMMA", "IMMA", "IDP", "LD", "ST")))
    assert not missing, f"none of {', '.join(missing)} among {', '.join(relatives)}"


@pytest.mark.slow
@needs_module
def test_a_wheel_of_this_build_has_the_module_and_imports_without_a_gpu(objects: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "KERNELPRESS_CUDA_ARCHS": ";".join(_chosen()), "KERNELPRESS_CUDA": "1"}
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "-b", str(tmp_path / "bdist"), "-d", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "unpacked")
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        f"sys.path.insert(0, {str(tmp_path / 'unpacked')!r})\n"
        "import kernelpress._cuda as c; print(c.__file__, *c.architectures())"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    where, *architectures = loaded.stdout.split()
    assert where.startswith(str(tmp_path)), loaded.stderr
    assert architectures == native.cuda().architectures()


def _chosen() -> list[str]:
    """`KERNELPRESS_CUDA_ARCHS` that gives the architectures of the module in use."""
    names = native.cuda().architectures()
    text = {name.removeprefix("compute_") for name in names if name.startswith("compute_")}
    machine_code = [name.removeprefix("sm_") for name in names if name.startswith("sm_")]
    return [f"{number}+PTX" if number in text else number for number in machine_code]
