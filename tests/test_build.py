"""The build: folders and import names, native modules, the wheel, and what importing costs."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from setuptools import Distribution
from setuptools.errors import CompileError

import kernelpress
from kernelpress.runtime import native

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ["torch", "numpy", "sklearn", "PIL", "matplotlib", "jinja2", "accelerate", "pydantic", "rich", "typer", "yaml"]

needs_native = pytest.mark.skipif(native.cpu() is None, reason=f"no native module: {native.load().absent_because}")
needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86-64 has more than one instruction set")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a fresh interpreter, outside the checkout."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd="/",
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.fixture(scope="module")
def builder():
    """The module `build_native` of this checkout."""
    for needed in ("ninja", "pybind11"):
        pytest.importorskip(needed, reason=f"{needed} is needed to build; `make test` installs it")
    spec = importlib.util.spec_from_file_location("build_native", ROOT / "build_native.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toy_tree(tmp_path: Path, monkeypatch) -> Path:
    """A source tree with one kernel that has inline functions, statics of templates and the standard library inside."""
    monkeypatch.setenv("CXXFLAGS", "-O0")  # after -O3, so it holds: what is tested here is not the speed
    kernels, bindings = tmp_path / "kernels/cpu", tmp_path / "pyext/csrc"
    kernels.mkdir(parents=True)
    bindings.mkdir(parents=True)
    (kernels / "scale.h").write_text("inline constexpr float kScale = 2.0f;\n")
    (kernels / "toy.cpp").write_text(
        """
        #include <algorithm>
        #include <functional>
        #include <vector>
        #include "scale.h"
        #define JOIN_(a, b) a##b
        #define JOIN(a, b) JOIN_(a, b)
        template <class T> __attribute__((noinline)) T twice(T x) {
          static T factor = T(kScale);
          return factor * x;
        }
        float JOIN(sum_, KERNELPRESS_ISA)(const float* x, int n) {
          std::vector<float> copy(x, x + n);
          std::sort(copy.begin(), copy.end());
          std::function<float(float)> f = [&](float a) { return twice(a) + copy[0]; };
          float sum = 0;
          for (float a : copy) sum += f(a);
          return sum;
        }
        """
    )
    (bindings / "cpu.cpp").write_text(
        """
        #include <pybind11/pybind11.h>
        float sum_baseline(const float*, int);
        PYBIND11_MODULE(_cpu, m) {
          m.def("sum", [] { const float x[] = {3, 1, 2}; return sum_baseline(x, 3); });
        }
        """
    )
    return tmp_path


def import_file(path: Path, name: str = "_cpu"):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def defined_symbols(path: Path) -> dict[str, str]:
    """Name → type letter of `nm` of the symbols that an object file defines."""
    command = ["nm", "--defined-only", "--format=posix", str(path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split()[0]: line.split()[1] for line in lines}


def test_folders_carry_their_import_names():
    assert Path(kernelpress.__path__[0]).name in ("pyext", "kernelpress")
    from kernelpress import kernels

    assert kernels.__name__ == "kernelpress.kernels"


def test_import_fetches_nothing_heavy():
    result = run_python(f"import sys, kernelpress; print([name for name in {HEAVY} if name in sys.modules])")
    assert result.stdout.strip() == "[]", result.stderr


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'emmit'"):
        kernelpress.emmit  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import kernelpress as kp",
        "import kernelpress.emit.fold, kernelpress as kp",
        "from kernelpress import emit; import kernelpress as kp; assert emit is kp.emit",
        "import kernelpress as kp; kp.emit; import kernelpress.emit.fold",
        "from kernelpress.emit import emit; import kernelpress as kp; assert emit is kp.emit.emit",
    ],
)
def test_emit_is_a_function_and_a_package(imports: str):
    result = run_python(
        f"{imports}\nimport types\nassert isinstance(kp.emit, types.ModuleType)\n"
        "from kernelpress.emit import fold\nassert kp.emit.fold is fold\nkp.emit(42)"
    )
    assert "TypeError" in result.stderr.splitlines()[-1], result.stderr
    assert "not callable" not in result.stderr


@pytest.mark.slow
@needs_native
@pytest.mark.parametrize("name", ["sse9", "AVX2", "neon512"])
def test_an_instruction_set_that_cannot_run_is_refused(name: str):
    result = run_python("from kernelpress.runtime import native; native.load()", KERNELPRESS_CPU=name)
    assert result.returncode != 0
    for part in ("ValueError: KERNELPRESS_CPU", repr(name), *native.cpu().variants()):
        assert part in result.stderr.splitlines()[-1]


@pytest.mark.slow
@needs_native
def test_every_runnable_instruction_set_can_be_chosen():
    for name in native.cpu().variants():
        result = run_python(
            "from kernelpress.runtime import native; print(native.cpu().variant())", KERNELPRESS_CPU=name
        )
        assert result.stdout.strip() == name, result.stderr


@pytest.mark.slow
def test_without_the_native_module_the_reason_is_kept():
    result = run_python(
        "import sys; sys.modules['kernelpress._cpu'] = None\n"
        "from kernelpress.runtime import native; print(native.cpu(), native.load().absent_because)"
    )
    assert result.stdout.startswith("None ")
    assert "_cpu" in result.stdout


@pytest.mark.slow
@needs_native
def test_native_loops_run_on_the_threads_of_torch():
    result = run_python(
        "import torch; from kernelpress.runtime import native\n"
        "for threads in (3, 1):\n"
        "    torch.set_num_threads(threads); print(native.load().threads, native.cpu().thread_count())"
    )
    assert result.stdout.splitlines() == ["torch's thread pool 3", "torch's thread pool 1"], result.stderr


@pytest.mark.slow
@needs_native
@pytest.mark.parametrize("threads", [1, 2])
def test_a_native_loop_occupies_as_many_threads_as_torch_is_told(threads: int):
    result = run_python(
        "import time, torch; from kernelpress.runtime import native\n"
        f"module = native.cpu(); torch.set_num_threads({threads})\n"
        "def by_others(): return time.process_time() - time.thread_time()\n"
        "before = by_others(); module.fma_peak(0.5, 2); print(by_others() - before)"
    )
    # Seconds of the processor that were not this thread's, however many others wait for it.
    assert (float(result.stdout) > 0.02) == (threads == 2), result.stderr


@pytest.mark.slow
def test_an_inner_change_of_a_header_recompiles_the_kernels_and_nothing_else(builder, toy_tree: Path, capfd):
    first = import_file(builder.build(toy_tree, "cpu")).sum()
    capfd.readouterr()
    builder.build(toy_tree, "cpu")
    assert "no work to do" in capfd.readouterr().out

    (toy_tree / "kernels/cpu/scale.h").write_text("inline constexpr float kScale = 3.0f;\n")
    rebuilt = shutil.copy(builder.build(toy_tree, "cpu"), toy_tree / "_cpu_rebuilt.so")
    compiled = capfd.readouterr().out
    assert "toy.cpp baseline" in compiled
    assert "pyext/csrc/cpu.cpp" not in compiled
    second = subprocess.run(
        [sys.executable, "-c", "import importlib.util as u, sys; s = u.spec_from_file_location('_cpu', sys.argv[1]); "
         "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.sum())", str(rebuilt)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (first, float(second.stdout)) == (15.0, 21.0)


@pytest.mark.slow
@needs_x86
def test_code_of_a_newer_instruction_set_stays_inside_its_variant(builder, toy_tree: Path):
    builder.build(toy_tree, "cpu")
    for variant in ("avx2", "avx512"):
        compiled = defined_symbols(toy_tree / f"build/native/{variant}/toy.o")
        isolated = defined_symbols(toy_tree / f"build/native/{variant}.o")
        assert {"W", "V"} <= set(compiled.values()), "the toy must contain what is to be isolated"
        exported = {name for name, kind in isolated.items() if kind.isupper() or kind in "uvw"}
        assert exported == {f"_Z{len(f'sum_{variant}')}sum_{variant}PKfi"}


@needs_native
@needs_x86
@pytest.mark.parametrize("variant", ["avx2", "avx2_vnni", "avx512", "avx512_vnni"])
def test_no_variant_runs_code_or_lends_symbols_before_it_is_chosen(variant: str):
    path = ROOT / f"build/native/{variant}.o"
    if not path.exists():
        pytest.skip("objects of the build are not in this checkout; `make build` makes them")
    assert [name for name, kind in defined_symbols(path).items() if kind in "uvwVW"] == []
    sections = subprocess.run(["readelf", "-SW", str(path)], capture_output=True, text=True, check=True).stdout
    assert ".init_array" not in sections
    assert ".ctors" not in sections


@pytest.mark.parametrize("variant", ["avx512", "avx2"])
def test_the_register_tile_keeps_its_sums_in_registers(variant: str):
    path = ROOT / f"build/native/{variant}/tile.o"
    if not path.exists() or shutil.which("objdump") is None:
        pytest.skip("needs the build's objects, of an x86 processor, and objdump")
    listing = subprocess.run(["objdump", "-dC", path], capture_output=True, text=True, check=True).stdout
    tiles = [code for code in listing.split("\n\n") if re.match(r"\w+ <.*compute_tile<\d+, \d>", code)]
    products = [re.findall(r"vfmadd.*", tile) for tile in tiles]
    in_memory = [sum(bool(re.search(r"\(%r[bs]p\)", one)) for one in tile) for tile in products]
    assert len(tiles) >= 12
    # A call among what the tile inlines costs it registers on all paths: a fifth of the speed, once.
    assert max(count / len(tile) for count, tile in zip(in_memory, products, strict=True)) < 0.05


@pytest.fixture
def cuda_toy_tree(toy_tree: Path, monkeypatch) -> Path:
    """The toy with a CUDA kernel as well."""
    monkeypatch.delenv("KERNELPRESS_CUDA", raising=False)
    monkeypatch.delenv("KERNELPRESS_CUDA_ARCHS", raising=False)
    (toy_tree / "kernels/cuda").mkdir()
    (toy_tree / "kernels/cuda/toy.cu").write_text(
        "__global__ void twice(float* x) { x[threadIdx.x] *= 2; }\n"
        "int launch_twice(float* x) { twice<<<1, 32>>>(x); return cudaGetLastError(); }\n"
    )
    (toy_tree / "pyext/csrc/cuda.cpp").write_text(
        """
        #include <pybind11/pybind11.h>
        int launch_twice(float*);
        #define TEXT_(...) #__VA_ARGS__
        #define TEXT(...) TEXT_(__VA_ARGS__)
        PYBIND11_MODULE(_cuda, m) {
          m.def("built_for", [] { return TEXT(KERNELPRESS_CUDA_ARCHITECTURES); });
          m.def("twice", [] { return launch_twice(nullptr); });
        }
        """
    )
    return toy_tree


def fake_nvcc(folder: Path) -> str:
    """A compiler that knows some architectures and fails at everything else."""
    path = folder / "nvcc"
    path.write_text(
        "#!/bin/sh\n[ \"$1\" = --list-gpu-code ] && echo 'sm_75 sm_80 sm_90 sm_100' | tr ' ' '\\n' && exit\n"
        "echo 'no compiler at all' >&2; exit 1\n"
    )
    path.chmod(0o755)
    return str(path)


def test_cuda_can_be_turned_off(builder, cuda_toy_tree: Path, monkeypatch):
    monkeypatch.setenv("CUDACXX", fake_nvcc(cuda_toy_tree))
    names = [module.name for module in builder.native_modules(cuda_toy_tree)]
    assert names == ["kernelpress._cpu", "kernelpress._cuda"]
    monkeypatch.setenv("KERNELPRESS_CUDA", "0")
    assert [module.name for module in builder.native_modules(cuda_toy_tree)] == ["kernelpress._cpu"]


def test_where_cuda_cannot_be_compiled_the_way_without_it_is_told(builder, cuda_toy_tree: Path, monkeypatch, capfd):
    monkeypatch.setenv("CUDACXX", fake_nvcc(cuda_toy_tree))
    monkeypatch.setattr(builder, "__file__", str(cuda_toy_tree / "build_native.py"))
    command = builder.BuildNative(Distribution({"ext_modules": builder.native_modules(cuda_toy_tree)}))
    command.build_lib = str(cuda_toy_tree / "lib")
    command.ensure_finalized()
    with pytest.raises(CompileError, match=r"kernelpress\._cuda: not built; .*KERNELPRESS_CUDA=0 installs kernelpress"):
        command.build_extension(command.extensions[1])
    assert "no compiler at all" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("", ["sm_80", "sm_90", "sm_100", "compute_80"]),
        ("80;90", ["sm_80", "sm_90"]),
        ("8.0, 9.0a ", ["sm_80", "sm_90a"]),
        ("90+PTX", ["sm_90", "compute_90"]),
    ],
)
def test_cuda_architectures_can_be_chosen(builder, monkeypatch, wanted: str, expected: list[str]):
    monkeypatch.setenv("KERNELPRESS_CUDA_ARCHS", wanted)
    assert builder.cuda_architectures(["sm_80", "sm_90", "sm_100", "sm_103"]) == expected


@pytest.mark.parametrize("wanted", ["75", "80;sm_90", "80+", "a", "120"])
def test_an_architecture_that_nvcc_or_the_kernels_do_not_know_is_refused(builder, cuda_toy_tree, monkeypatch, wanted):
    monkeypatch.setenv("CUDACXX", fake_nvcc(cuda_toy_tree))
    monkeypatch.setenv("KERNELPRESS_CUDA_ARCHS", wanted)
    with pytest.raises(ValueError, match=r"ARCHS: expected some of 80, 90, 100, \+PTX behind any, got "):
        builder.build(cuda_toy_tree, "cuda")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc; a CUDA toolkit has one")
def test_one_module_has_code_for_several_architectures_and_needs_no_gpu_to_be_imported(
    builder, cuda_toy_tree: Path, monkeypatch
):
    monkeypatch.setenv("KERNELPRESS_CUDA_ARCHS", "80;90+PTX")
    path = builder.build(cuda_toy_tree, "cuda")
    module = import_file(path, "_cuda")
    architectures = module.built_for().split(":")
    assert architectures == ["sm_80", "sm_90", "compute_90"]
    notes = (builder.cuda_objects(cuda_toy_tree, architectures) / "toy.o.ptxas").read_text()
    assert sorted(re.findall(r"Compiling entry function '\w*twice\w*' for '(\w+)'", notes)) == ["sm_80", "sm_90"]
    exported = subprocess.run(["nm", "-D", "--defined-only", str(path)], capture_output=True, text=True, check=True)
    assert "PyInit__cuda" in exported.stdout
    assert "cuda" not in exported.stdout.replace("PyInit__cuda", ""), "the static cudart must not be seen from outside"
    if not torch_sees_a_gpu():
        assert module.twice() != 0, "no device: an error code"


def torch_sees_a_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def test_a_missing_compiler_is_named(builder, toy_tree: Path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"CXX: expected a C\+\+17 compiler, found no program 'no-such-compiler'"):
        builder.build(toy_tree, "cpu")


@pytest.mark.slow
def test_a_wheel_builds_from_the_source_archive_without_torch(tmp_path: Path):
    """Source archive → wheel, each in an environment that holds what `pyproject.toml` asks for and nothing else."""
    pytest.importorskip("pybind11", reason="pybind11 is needed to build; `make test` installs it")
    archive = make_source_archive(tmp_path)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(tmp_path), str(archive)]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "CXXFLAGS": "-O0"}
    environment["KERNELPRESS_CUDA"] = "0"  # minutes of nvcc; tests/test_cuda_build.py makes the wheel with _cuda
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    if "No matching distribution found for setuptools" in result.stderr:
        pytest.skip("no package index can be reached; an isolated build fetches setuptools, pybind11 and ninja")
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        file.extractall(unpacked)
    packages = ("kernelpress/__init__.py", "kernelpress/py.typed", "kernelpress/kernels/__init__.py")
    for expected in (*packages, "kernelpress/recipes/methods.yaml"):
        assert expected in names
    assert not [name for name in names if name.endswith((".cpp", ".h", ".cu", ".cuh"))]
    check = "import kernelpress; print(kernelpress.__file__)"
    if native.cpu() is not None:
        check += "; from kernelpress.runtime import native; print(native.cpu().variants())"
    imported = run_python(f"import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]; "
                          f"sys.path.insert(0, {str(unpacked)!r}); {check}")  # fmt: skip
    assert imported.stdout.startswith(str(unpacked)), imported.stderr
    assert imported.returncode == 0, imported.stderr


def make_source_archive(folder: Path) -> Path:
    """The source archive of a copy of this checkout: the copy keeps the build away from the tree under test."""
    ignored = shutil.ignore_patterns(".git", ".venv*", "build", "dist", "results", "*.egg-info", "__pycache__", "*.so")
    tree = Path(shutil.copytree(ROOT, folder / "tree", ignore=ignored))
    code = "import setuptools.build_meta as b; print(b.build_sdist('dist'))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tree, capture_output=True, text=True)
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        carried = {name.partition("/")[2] for name in file.getnames()}
    needed = [path for kind in ("cpp", "h", "cu", "cuh") for path in (ROOT / "kernels").rglob(f"*.{kind}")]
    assert {"build_native.py", *(str(path.relative_to(ROOT)) for path in needed)} <= carried
    return archive
