"""Compiles the native modules with ninja: every CPU kernel once per instruction set, every CUDA kernel for all
architectures into one object, the bindings once.

Needs no torch and no GPU; without ninja `build_plain` takes its place, without pybind11 the copy that torch carries.
`python build_native.py cuda` compiles one module into the checkout and needs nothing but Python and the compilers.
Objects stay in `build/native/`, so a second build compiles only what changed. `KERNELPRESS_CUDA=0` leaves `_cuda` out,
`KERNELPRESS_CUDA_ARCHS="80;90"` compiles it for other architectures.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

try:
    from setuptools import Extension
    from setuptools.command.build_ext import build_ext
    from setuptools.errors import CompileError
except ImportError:  # `build` alone needs none of it
    build_ext = object

__all__ = [
    "BuildNative",
    "build",
    "build_in_place",
    "cpu_variants",
    "cuda_architectures",
    "cuda_objects",
    "find_nvcc",
    "native_modules",
]

BUILD_FOLDER = "build/native"

CXX_FLAGS = [
    *["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"],
    *["-Wall", "-Wextra"],
    # NaN and infinity must propagate as in PyTorch, which rules -ffast-math out.
    *["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"],
    "-fno-gnu-unique",  # weak symbols can be made local to a variant, unique ones cannot
    *["-I.", "-Ikernels/cpu"],
]

BASE = "-DKERNELPRESS_BASE="
"""Names the variant that another one differs from in its int8 kernels alone: it has no others of its own."""

OWN_OF_BASED = re.compile(r"int8|table")

_AVX2 = ["-march=x86-64", "-mavx2", "-mfma"]
_AVX512 = [
    *[*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
    *["-Wno-maybe-uninitialized", "-Wno-uninitialized"],  # GCC's own AVX-512 header trips over them
]

X86_VARIANTS = {
    "baseline": ["-march=x86-64"],
    "avx2": _AVX2,
    "avx2_vnni": [*_AVX2, "-mavxvnni", f"{BASE}avx2"],
    "avx512": _AVX512,
    "avx512_vnni": [*_AVX512, "-mavx512vnni", f"{BASE}avx512"],
}

# What one kernel file needs beyond its variant's flags: (file stem, variant) -> flags.
EXTRA_FLAGS: dict[tuple[str, str], list[str]] = {}

CUDA_ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
"""Machine code is made for these, as far as nvcc knows them; and text of the first, for all others from there on."""

OLDEST_CUDA_ARCHITECTURE = 80

# Source lines for a profiler quadruple the module: NVCC_APPEND_FLAGS=-lineinfo, which nvcc reads itself, has them.
NVCC_FLAGS = [
    *["-std=c++17", "-O3", "--expt-relaxed-constexpr"],
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Wno-unknown-pragmas",
    *["-I.", "-Ikernels/cuda"],
]


def cpu_variants(machine: str) -> dict[str, list[str]]:
    """The instruction sets that kernels are compiled for on `machine`, with the compiler flags of each."""
    return X86_VARIANTS if machine.lower() in ("x86_64", "amd64") else {"baseline": []}


def find_nvcc() -> str | None:
    """The CUDA compiler, or None where there is none or `KERNELPRESS_CUDA=0` turns it off."""
    if os.environ.get("KERNELPRESS_CUDA") == "0":
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    names = [os.environ.get("CUDACXX"), "nvcc", *(f"{home}/bin/nvcc" for home in homes if home)]
    return next(filter(None, (shutil.which(name) for name in names if name)), None)


def native_modules(root: Path) -> list[Extension]:
    """The modules that can be built from the sources under `root`: `_cpu`, and `_cuda` where there is an nvcc."""
    modules = []
    for kind, suffix in [("cpu", "cpp"), *([("cuda", "cu")] if find_nvcc() else [])]:
        bindings, kernels = _sources(root, kind, suffix)
        if bindings and kernels:
            modules.append(Extension(f"kernelpress._{kind}", sources=[*bindings, *kernels]))
    return modules


class BuildNative(build_ext):
    """setuptools' `build_ext` with ninja in place of the compile loop."""

    def build_extension(self, ext: Extension) -> None:
        root = Path(__file__).resolve().parent
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        kind = ext.name.rpartition("._")[2]
        try:
            built = build(root, kind)
        except subprocess.CalledProcessError as error:
            without = "; KERNELPRESS_CUDA=0 installs kernelpress without it" if kind == "cuda" else ""
            raise CompileError(f"{ext.name}: not built; the compiler's message is above{without}") from error
        _put(built, target)


def build(root: Path, kind: str) -> Path:
    """Compiles what changed of module `_{kind}` ("cpu" or "cuda") of the tree `root`; returns the shared library.

    Raises: RuntimeError where compiler or Python headers are missing, CalledProcessError where compiling fails.
    """
    folder = root / BUILD_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    target = f"{BUILD_FOLDER}/_{kind}{sysconfig.get_config_var('EXT_SUFFIX')}"
    script = folder / f"{kind}.ninja"
    describe = _describe_cpu if kind == "cpu" else _describe_cuda
    jobs = os.environ.get("MAX_JOBS")
    with _locked(folder):
        if find_spec("ninja") is None:
            from build_plain import Plan

            plan = Plan()
            describe(plan, root, target)
            plan.run(root, int(jobs or os.cpu_count() or 1))
            return root / target
        import ninja
        from ninja.ninja_syntax import Writer

        with script.open("w") as file:
            writer = Writer(file)
            writer.variable("builddir", BUILD_FOLDER)
            describe(writer, root, target)
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-f", str(script.relative_to(root))]
        subprocess.run([*command, *(["-j", jobs] if jobs else []), target], cwd=root, check=True)
    return root / target


def build_in_place(root: Path, kind: str) -> Path:
    """`build`, and the module put where the package of this checkout has it; returns its path."""
    built = build(root, kind)
    return _put(built, root / "pyext" / built.name)


def _put(built: Path, target: Path) -> Path:
    """Copies a module; renamed into place, as a running process may have the old file mapped."""
    shutil.copy2(built, target.with_suffix(".new"))
    os.replace(target.with_suffix(".new"), target)
    return target


def _describe_cpu(writer: Any, root: Path, target: str) -> None:
    """Ninja rules of `_cpu`: kernels × variants, bindings, one link."""
    bindings, kernels = _sources(root, "cpu", "cpp")
    writer.variable("cxx", _cxx())
    writer.variable("objcopy", _binutil("objcopy"))
    writer.variable("nm", _binutil("nm"))
    _compile_rule(writer, [*CXX_FLAGS, os.environ.get("CXXFLAGS", "")])
    # Inline functions of the standard library are compiled with the variant's instruction set. Were they left weak, the
    # linker could take them for the whole module, and it would die on older processors: so the objects of a variant are
    # merged and their weak symbols made local to it. Their list begins with no name: objcopy fails on an empty one.
    writer.rule(
        "isolate",
        "$cxx -nostdlib -r -Wl,--force-group-allocation -o $out.merged $in"
        " && $nm --defined-only --format=posix $out.merged"
        " | awk 'BEGIN {print 0} $$2 ~ /^[uvwVW]$$/ {print $$1}' > $out.weak"
        " && $objcopy --localize-symbols=$out.weak $out.merged $out",
        description="isolate $out",
    )
    writer.rule("link", f"$cxx -shared -o $out $in {os.environ.get('LDFLAGS', '')}", description="link $out")

    objects = []
    for variant, flags in cpu_variants(platform.machine()).items():
        compiled = []
        is_based = any(flag.startswith(BASE) for flag in flags)
        for source in kernels:
            stem = Path(source).stem
            if is_based and not OWN_OF_BASED.match(stem):
                continue
            extra = [f"-DKERNELPRESS_ISA={variant}", *flags, *EXTRA_FLAGS.get((stem, variant), [])]
            compiled += _object(writer, "compile", source, f"{variant}/{stem}.o", extra)
        if variant != "baseline" and compiled:
            compiled = writer.build(f"{BUILD_FOLDER}/{variant}.o", "isolate", compiled)
        objects += compiled
    for source in bindings:
        objects += _object(writer, "compile", source, f"{_python_tag()}/{Path(source).stem}.o", _python_flags())
    writer.build(target, "link", objects)


def _describe_cuda(writer: Any, root: Path, target: str) -> None:
    """Ninja rules of `_cuda`: all by nvcc, which knows where its headers are; cudart linked statically.

    What ptxas tells of every kernel's registers and spills stays beside its object, in `<object>.ptxas`.
    """
    bindings, kernels = _sources(root, "cuda", "cu")
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc: needed to build _cuda, none found (or KERNELPRESS_CUDA=0)")
    architectures = cuda_architectures(_known_to(nvcc))
    folder = cuda_objects(Path(), architectures).relative_to(BUILD_FOLDER)
    codes = [
        f"-gencode=arch={source},code={name}" for name, source in zip(architectures, _texts(architectures), strict=True)
    ]
    writer.variable("cxx", f"{nvcc} -ccbin {_cxx()}")
    _compile_rule(writer, NVCC_FLAGS)
    options = "-Xptxas=-v -Xfatbin=-compress-all -MMD -MF $out.d -c $in -o $out"
    command = " ".join(["$cxx", *NVCC_FLAGS, *codes, options, ">$out.ptxas 2>&1"])
    notes = "grep -Ev '^ptxas info|bytes stack frame' $out.ptxas"
    writer.rule(
        "kernel",
        f"{command} && {{ {notes} || true; }} || {{ {notes}; false; }}",
        depfile="$out.d",
        deps="gcc",
        description="$in for " + " ".join(architectures),
    )
    # The static cudart stays inside: torch brings another one, whose symbols are global.
    writer.rule("link", "$cxx -shared -cudart static -Xlinker --exclude-libs=ALL -o $out $in", description="link $out")
    objects = []
    for source in kernels:
        objects += _object(writer, "kernel", source, f"{folder}/{Path(source).stem}.o", [])
    compiled_for = f"-DKERNELPRESS_CUDA_ARCHITECTURES={':'.join(architectures)}"
    for source in bindings:
        extra = [*_python_flags(), compiled_for]
        objects += _object(writer, "compile", source, f"{_python_tag()}/{Path(source).stem}.o", extra)
    writer.build(target, "link", objects)


def cuda_architectures(known: Sequence[str]) -> list[str]:
    """What `_cuda` is compiled for, `["sm_80", …, "sm_120", "compute_80"]`: those that `KERNELPRESS_CUDA_ARCHS` lists,
    separated by semicolons, commas or spaces, each `90`, `90a` or `90+PTX`; by default all of `CUDA_ARCHITECTURES` that
    are `known` to nvcc, and PTX of the first, which runs on every one between and after them.

    Raises: ValueError for one that nvcc does not know.
    """
    chosen = re.split(r"[;,\s]+", os.environ.get("KERNELPRESS_CUDA_ARCHS", "").strip("; ,"))
    if chosen == [""]:
        versions = [version for version in CUDA_ARCHITECTURES if f"sm_{version}" in known]
        return [*(f"sm_{version}" for version in versions), f"compute_{versions[0]}"]
    names = []
    for version in chosen:
        number, plus, text = version.replace(".", "").partition("+")
        if f"sm_{number.rstrip('a')}" not in known or text.upper() not in ("", "PTX") or (plus and not text):
            allowed = ", ".join(name.removeprefix("sm_") for name in known)
            raise ValueError(f"KERNELPRESS_CUDA_ARCHS: expected some of {allowed}, +PTX behind any, got {version!r}")
        names.append(f"sm_{number}")
        if text:
            names.append(f"compute_{number}")
    return names


def _texts(architectures: Sequence[str]) -> list[str]:
    """The PTX that each one's code is made of. Kernels use nothing newer than the oldest architecture has, so its PTX
    serves all, and the longer half of the compiler's work is done once; `sm_90a` and PTX asked for have their own.
    """
    common = [name.removeprefix("sm_") for name in architectures if re.fullmatch(r"sm_\d+", name)]
    oldest = min(common, key=int, default="")
    return [
        f"compute_{oldest}" if name.removeprefix("sm_") in common else name.replace("sm_", "compute_")
        for name in architectures
    ]


def cuda_objects(root: Path, architectures: Sequence[str]) -> Path:
    """The folder of the CUDA kernels' objects, and of what ptxas told of them, for these architectures."""
    return root / BUILD_FOLDER / "cuda" / "-".join(architectures)


def _known_to(nvcc: str) -> list[str]:
    """What nvcc can make that the kernels run on: they copy to shared memory asynchronously, as from 8.0 on."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    versions = sorted(int(version) for version in re.findall(r"^sm_(\d+)$", listed, re.MULTILINE))
    return [f"sm_{version}" for version in versions if version >= OLDEST_CUDA_ARCHITECTURE]


def _compile_rule(writer: Any, flags: list[str]) -> None:
    command = " ".join(["$cxx", *flags, "$extra -MMD -MF $out.d -c $in -o $out"])
    writer.rule("compile", command, depfile="$out.d", deps="gcc", description="$in $variant")


def _object(writer: Any, rule: str, source: str, target: str, extra: list[str]) -> list[str]:
    variables = {"extra": " ".join(extra), "variant": target.partition("/")[0]}
    return writer.build(f"{BUILD_FOLDER}/{target}", rule, source, variables=variables)


def _sources(root: Path, kind: str, suffix: str) -> tuple[list[str], list[str]]:
    """Bindings and kernels of module `_{kind}`, relative to `root`."""
    patterns = (f"pyext/csrc/*{kind}*.cpp", f"kernels/{kind}/*.{suffix}")
    bindings, kernels = (sorted(str(path.relative_to(root)) for path in root.glob(pattern)) for pattern in patterns)
    return bindings, kernels


def _python_tag() -> str:
    return sys.implementation.cache_tag or "python"


def _python_flags() -> list[str]:
    headers = sysconfig.get_path("include")
    if not (Path(headers) / "Python.h").exists():
        raise RuntimeError(
            f"Python.h: not found in {headers}; install this Python's headers (python3-dev, python3-devel)"
        )
    return [f"-isystem {headers}", f"-isystem {_pybind11_headers()}"]


def _pybind11_headers() -> str:
    """pybind11's own headers, or those of the torch that is installed, found without importing it."""
    if find_spec("pybind11") is not None:
        import pybind11

        return str(pybind11.get_include())
    torch = find_spec("torch")
    for folder in (torch.submodule_search_locations or []) if torch is not None else []:
        if (Path(folder) / "include/pybind11/pybind11.h").exists():
            return str(Path(folder) / "include")
    raise RuntimeError("pybind11: needed to build; `pip install pybind11`, or a torch that carries its headers")


def _cxx() -> str:
    name = os.environ.get("CXX") or "g++"
    if shutil.which(name.split()[0]) is None:
        raise RuntimeError(f"CXX: expected a C++17 compiler, found no program {name!r}; install g++ or set CXX")
    return name


def _binutil(name: str) -> str:
    """The binutils program that belongs to the compiler, which matters where it is a cross compiler."""
    command = [*_cxx().split(), f"-print-prog-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the build folder for this process: ninja itself does not keep two builds apart."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    for wanted in sys.argv[1:]:
        print(build_in_place(Path(__file__).resolve().parent, wanted))
