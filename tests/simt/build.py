"""Compiles kernels and bindings as C++ against the host emulator, with ninja, in `build/simt/`; reads its reports.

A library is known again by the content of all that it is made from, in the user's cache folder: another clone, or a
tree that goes back to what it was, compiles nothing.

`KERNELPRESS_SIMT_ONLY=depthwise,dense` restricts the build to the files of those families, in a folder of its own; the
module then lacks the launchers of the others.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import ninja
import pybind11
from ninja.ninja_syntax import Writer
from support import BUILT

__all__ = ["ROOT", "build", "load", "readable"]

ROOT = Path(__file__).resolve().parents[2]
FOLDER = f"build/simt/{sys.implementation.cache_tag}"
EMULATOR = "tests/simt"

MEMORY = ("memory", "shared_memory", "global_memory", "conflicts")
MACHINE = [f"{EMULATOR}/{stem}.cpp" for stem in ("scheduler", *MEMORY, "instructions", "hooks", "module")]
SELF_TEST = [f"{EMULATOR}/self_module.cpp", f"{EMULATOR}/faults.cu", f"{EMULATOR}/golden.cu"]

FLAGS = [
    *["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-DKERNELPRESS_SIMT"],
    *["-I.", f"-I{EMULATOR}", "-Ikernels/cuda", "-Ipyext/csrc"],
]
MACHINE_FLAGS = ["-O3"]
BINDING_FLAGS = ["-O1"]
KERNEL_FLAGS = [
    *["-x c++", "-O1", "-g1", "-ffp-contract=off", "-Wno-unknown-pragmas", "-Wno-unused-variable"],
    *["-fsanitize=thread,alignment,bounds", "--param tsan-instrument-func-entry-exit=0"],
]
REPLACED = ["memcpy", "memmove", "memset"]
"""Functions of the C library whose accesses the emulator must see; in kernels' objects, other names stand for them."""

KEPT_LIBRARIES = 6
"""Of each name; more are forgotten, the oldest first."""


def build(name: str = "_simt") -> Path:
    """Compiles what changed of `_simt` (kernels) or `_simt_self` (the emulator's own test); returns the library.

    Raises: RuntimeError with the compiler's messages.
    """
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    kept = BUILT / name / f"{_content()}{suffix}"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with _locked(kept.parent):
        if not kept.exists():
            shutil.copy(_compile(name, suffix), partial := kept.with_suffix(".new"))
            partial.replace(kept)
        kept.touch()
        for old in sorted(kept.parent.glob("*.so"), key=lambda path: path.stat().st_mtime)[:-KEPT_LIBRARIES]:
            old.unlink()
    return kept


def _content() -> str:
    """A digest of sources, flags and compiler."""
    version = subprocess.run([*_cxx().split(), "--version"], capture_output=True, text=True, check=True).stdout
    flags = [FLAGS, MACHINE_FLAGS, BINDING_FLAGS, KERNEL_FLAGS, REPLACED, _families()]
    digest = hashlib.sha256(f"{flags}{version}{pybind11.__version__}{sys.version}".encode())
    for folder in ("kernels/cuda", "pyext/csrc", EMULATOR):
        for path in sorted((ROOT / folder).rglob("*.*")):
            if path.suffix in (".cpp", ".cu", ".cuh", ".h", ".py"):
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:32]


def _compile(name: str, suffix: str) -> Path:
    machine = f"{FOLDER}/machine.o"
    _run_ninja("machine", MACHINE, "merge", machine)
    part = name if name == "_simt_self" or not _families() else "-".join((name, *_families()))
    sources = SELF_TEST if name == "_simt_self" else [*_bindings(part), *_kernels()]
    library = f"{FOLDER}/{part}/{name}{suffix}"
    # Emulator first: of inline functions that it shares with the kernels, its own, which are not instrumented, stay.
    _run_ninja(part, sources, "link", library, first=machine)
    return ROOT / library


@functools.cache
def load(name: str = "_simt") -> ModuleType:
    """Builds and imports `_simt` or `_simt_self`. Raises: RuntimeError with the compiler's messages."""
    library = build(name)
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def readable(report: str, library: str) -> str:
    """The report with functions and source lines in place of addresses."""
    return re.sub(r"\[([0-9a-f]+)\]", lambda match: _place(library, match[1]), report)


def _place(library: str, address: str) -> str:
    """The innermost line of a kernel file at an address, and the calls around it."""
    command = [_tool("addr2line"), "-f", "-i", "-C", "-e", library, address]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    frames = []
    for function, place in zip(lines[::2], lines[1::2], strict=True):
        path = re.sub(r" \(discriminator \d+\)$", "", place).removeprefix("./")
        if not path.startswith((f"{EMULATOR}/device.h", f"{EMULATOR}/instructions.h", "/")):
            frames.append(f"{path} in {function.replace('kernelpress::cuda::', '')}")
    return ", called from ".join(frames) or f"{lines[0]} ({lines[1]})"


def _families() -> list[str]:
    return [name for name in os.environ.get("KERNELPRESS_SIMT_ONLY", "").split(",") if name]


def _is_wanted(stem: str) -> bool:
    """Whether a file of `kernels/cuda` belongs to the families to build."""
    families = _families()
    return not families or any(stem == family or stem.startswith(f"{family}_") for family in families)


def _kernels() -> list[str]:
    stems = [path.stem for path in sorted((ROOT / "kernels/cuda").glob("*.cu"))]
    wanted = [stem for stem in stems if _is_wanted(stem)]
    if stems and not wanted:
        raise RuntimeError(f"KERNELPRESS_SIMT_ONLY: expected some of {', '.join(stems)}, got {','.join(_families())}")
    return [f"kernels/cuda/{stem}.cu" for stem in wanted]


def _bindings(part: str) -> list[str]:
    """All of `_cuda`'s bindings but the one that talks to a device."""
    sources = [path for path in sorted((ROOT / "pyext/csrc").glob("*cuda*.cpp")) if path.name != "cuda_runtime.cpp"]
    if _families():
        sources = [_restricted(path, part) if path.name == "cuda_module.cpp" else path for path in sources]
    return [str(path.relative_to(ROOT)) for path in sources]


def _restricted(module: Path, part: str) -> Path:
    """A copy of the module's source without the headers and launchers of families that are not built."""
    headers = [path for path in (ROOT / "kernels/cuda").glob("*.h") if _is_wanted(path.stem)]
    launchers = {name for path in headers for name in re.findall(r"^Status (\w+)\(", path.read_text(), re.MULTILINE)}
    lines = []
    for line in module.read_text().splitlines(keepends=True):
        header = re.match(r'#include "kernels/cuda/(\w+)\.h"', line)
        launcher = re.match(r'\s*bind\w*\(module, "(\w+)"', line)
        if not (header and not _is_wanted(header[1])) and not (launcher and launcher[1] not in launchers):
            lines.append(line)
    copy, text = ROOT / FOLDER / part / module.name, "".join(lines)
    copy.parent.mkdir(parents=True, exist_ok=True)
    if not copy.exists() or copy.read_text() != text:
        copy.write_text(text)
    return copy


def _run_ninja(part: str, sources: Sequence[str], rule: str, target: str, first: str | None = None) -> None:
    """Compiles `sources` in the folder of `part` and makes `target` of the objects by `rule`; alone in that folder."""
    folder = ROOT / FOLDER / part
    folder.mkdir(parents=True, exist_ok=True)
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    script = folder / "build.ninja"
    with _locked(folder):
        with script.open("w") as file:
            writer = Writer(file)
            writer.variable("builddir", f"{FOLDER}/{part}")
            _describe_rules(writer)
            objects = [_object(writer, part, source) for source in sources]
            writer.build(target, rule, [*([first] if first else []), *objects])
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-f", str(script.relative_to(ROOT)), *jobs, target]
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if finished.returncode != 0:
        raise RuntimeError(f"the emulator's build failed:\n{finished.stdout}{finished.stderr}")


def _describe_rules(writer: Writer) -> None:
    renamed = " ".join(f"--redefine-sym {name}=kernelpress_{name}" for name in REPLACED)
    compile_it = f"{_cxx()} {' '.join(FLAGS)} -fdebug-prefix-map={ROOT}=. $extra -MMD -MF $out.d -c $in -o $out"
    rename = f"{_tool('objcopy')} {renamed} $out"
    writer.rule("compile", compile_it, depfile="$out.d", deps="gcc", description="compile $in")
    writer.rule("compile_kernel", f"{compile_it} && {rename}", depfile="$out.d", deps="gcc", description="compile $in")
    # Renamed into place: a running process may have the old file mapped.
    writer.rule("merge", f"{_cxx()} -nostdlib -r -o $out.new $in && mv $out.new $out", description="merge $out")
    writer.rule("link", f"{_cxx()} -shared -Wl,-Bsymbolic -o $out.new $in && mv $out.new $out", description="link $out")


def _object(writer: Writer, part: str, source: str) -> str:
    """Describes the object of a source; its name."""
    python = [f"-isystem {sysconfig.get_path('include')}", f"-isystem {pybind11.get_include()}"]
    if source.endswith(".cu"):
        rule, flags = "compile_kernel", KERNEL_FLAGS
    else:
        rule, flags = "compile", [*(MACHINE_FLAGS if source in MACHINE else BINDING_FLAGS), *python]
    target = f"{FOLDER}/{part}/{Path(source).stem}.o"
    writer.build(target, rule, source, variables={"extra": " ".join(flags)})
    return target


def _cxx() -> str:
    return os.environ.get("CXX") or "g++"


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name}: not found; it comes with the compiler (binutils)")
    return found


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
