"""Registers, shared memory and spills of every CUDA kernel, as ptxas told while the module was built.

`python benchmarks/resources.py` writes the table into docs/gpu.md; `make resources` builds first.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import groupby
from pathlib import Path

from kernelpress.bench.tables import markdown
from kernelpress.files import write_atomically
from kernelpress.runtime import native

__all__ = [
    "MARKS",
    "PAGE",
    "ROOT",
    "Use",
    "object_folder",
    "parse",
    "read",
    "read_table",
    "span",
    "table",
    "write_table",
]

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "gpu.md"
MARKS = ("<!-- resources: written by `make resources` -->", "<!-- /resources -->")

_ENTRY = re.compile(r"Compiling entry function '(?P<name>[^']+)' for '(?P<architecture>[^']+)'")
_SPILLS = re.compile(r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (?P<registers>\d+) registers")
_SHARED = re.compile(r"(?P<bytes>\d+) bytes smem")


@dataclass(frozen=True)
class Use:
    """What one specialisation of a kernel takes on one architecture; `shared_bytes` are the static ones."""

    family: str
    kernel: str
    architecture: str
    registers: int
    shared_bytes: int
    spilled_bytes: int

    @property
    def template(self) -> str:
        """The kernel's name without its namespace and the arguments of its template."""
        return self.kernel.partition("<")[0].rpartition("::")[2]


def object_folder() -> Path:
    """Where the build of the `_cuda` in use keeps its objects. Raises `FileNotFoundError` where they are not there."""
    module = native.cuda()
    if module is None:
        raise FileNotFoundError(native.load_cuda().absent_because)
    sys.path.insert(0, str(ROOT))
    try:
        folder: Path = import_module("build_native").cuda_objects(ROOT, module.architectures())
    finally:
        sys.path.remove(str(ROOT))
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder.relative_to(ROOT)}: _cuda was not built in this checkout; `make build` does")
    return folder


def read(folder: Path) -> list[Use]:
    """All kernels whose source is still there, in the order of families, kernels and architectures."""
    sources = {path.stem for path in (ROOT / "kernels" / "cuda").glob("*.cu")}
    found = [
        use
        for notes in folder.glob("*.o.ptxas")
        if (family := notes.name.partition(".")[0]) in sources
        for use in parse(notes.read_text(encoding="utf-8"), family)
    ]
    return sorted(found, key=lambda use: (use.family, use.template, use.kernel, use.architecture))


def parse(notes: str, family: str) -> list[Use]:
    """What `ptxas -v` wrote. Spills of a function that a kernel calls count as the kernel's."""
    starts = list(_ENTRY.finditer(notes))
    names = _demangled([start["name"] for start in starts])
    uses = []
    for start, end, name in zip(starts, [*starts[1:], None], names, strict=True):
        section = notes[start.end() : end.start() if end else len(notes)]
        registers = _REGISTERS.search(section)
        if registers is None:
            raise ValueError(f"notes: expected the registers of {name}, got {section!r}")
        shared = _SHARED.search(section)
        spills = sum(int(match["stores"]) + int(match["loads"]) for match in _SPILLS.finditer(section))
        uses.append(
            Use(
                family,
                name,
                start["architecture"],
                int(registers["registers"]),
                int(shared["bytes"]) if shared else 0,
                spills,
            )
        )
    return uses


def _demangled(names: Sequence[str]) -> list[str]:
    """`depthwise_ring<float, 7, 2>`: without namespaces, result and parameters."""
    command = ["c++filt", "--no-params"]
    told = subprocess.run(command, input="\n".join(names), capture_output=True, text=True, check=True).stdout
    told = told.replace("(anonymous namespace)::", "").replace("kernelpress::cuda::", "")
    return re.sub(r"\((?:\w+)\)(-?\d)", r"\1", told).splitlines()  # (bool)1


def table(uses: Sequence[Use]) -> str:
    """A Markdown table with a row for each kernel; ranges run over its specialisations."""
    architectures = sorted({use.architecture for use in uses}, key=lambda name: int(re.sub(r"\D", "", name)))
    head = ["family", "kernel", "specialisations", *(f"registers, {name}" for name in architectures)]
    rows = []
    for (family, kernel), of_kernel in groupby(uses, key=lambda use: (use.family, use.template)):
        found = list(of_kernel)
        registers = [span(use.registers for use in found if use.architecture == name) for name in architectures]
        row = [family, f"`{kernel}`", str(len({use.kernel for use in found})), *registers]
        row += [span(use.shared_bytes for use in found), str(sum(use.spilled_bytes for use in found))]
        rows.append(row)
    return "\n".join(markdown(([*head, "static shared memory, bytes", "spilled bytes"], rows)))


def span(values: Iterable[int]) -> str:
    """`3–5`, or the one value, or a dash for none."""
    found = sorted(values)
    if not found:
        return "–"
    return str(found[0]) if found[0] == found[-1] else f"{found[0]}–{found[-1]}"


def read_table(page: Path, marks: tuple[str, str] = MARKS) -> str:
    """What stands between the marks of a page. Raises `ValueError` where it has none."""
    return _parts(page, marks)[1]


def write_table(page: Path, text: str, marks: tuple[str, str] = MARKS) -> None:
    """Puts `text` between the marks of a page. Raises `ValueError` where it has none."""
    before, _, after = _parts(page, marks)
    write_atomically(page, f"{before}{marks[0]}\n{text}\n{marks[1]}{after}".encode())


def _parts(page: Path, marks: tuple[str, str]) -> tuple[str, str, str]:
    before, begin, rest = page.read_text(encoding="utf-8").partition(marks[0])
    text, end, after = rest.partition(marks[1])
    if not begin or not end:
        raise ValueError(f"{page}: expected the marks {marks[0]!r} and {marks[1]!r}, each on a line of its own")
    return before, text, after


if __name__ == "__main__":
    try:
        write_table(PAGE, table(read(object_folder())))
    except (FileNotFoundError, ValueError) as problem:
        sys.exit(str(problem))
