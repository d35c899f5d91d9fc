"""Registers, shared memory, spills and tensor-core instructions of every Triton kernel on devices that are not here.

`python benchmarks/triton_resources.py` compiles the sample that the tests compile, for some minutes, and writes the
table into docs/gpu.md; it ends with 1 where a build has a fault. `make resources` runs it. With `--all` it compiles
every configuration in every dtype, for most of an hour, and writes nothing.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

from resources import PAGE, read_table, span, write_table
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn
from triton_builds import KINDS, TARGETS, Build, build, families, faults

from kernelpress.bench.tables import markdown

__all__ = ["MARKS", "table", "written_families", "written_rows"]

MARKS = ("<!-- triton resources: written by `make resources` -->", "<!-- /triton resources -->")

_PROCESSES = 2

_ROW = re.compile(r"^\| (?P<family>\w+) \| `(?P<kernel>\w+)` \| [\w, ]+ \| (?P<builds>\d+) \|", re.MULTILINE)

_INSTRUCTIONS = ("mma.sync", "tcgen05.mma", "v_mfma", "wgmma")


def table(builds: Sequence[Build]) -> str:
    """A Markdown table with a row for each kernel; ranges run over its configurations and dtypes."""
    targets = [target.name for target in TARGETS]
    head = ["family", "kernel", "of", "builds", *(f"registers, {name}" for name in targets)]
    head += ["shared memory, KiB", "spilled bytes", "instructions"]
    rows = []
    for (family, kernel), alike in groupby(sorted(builds, key=_of_kernel), key=_of_kernel):
        found = list(alike)
        kinds = [kind for kind in KINDS if any(it.kind == kind for it in found)]
        registers = [span(it.registers for it in found if it.target == name) for name in targets]
        row = [family, f"`{kernel}`", ", ".join(kinds), str(len(found)), *registers]
        row += [span(-(-it.shared_bytes // 1024) for it in found), span(it.spilled_bytes for it in found)]
        rows.append([*row, _short(name for it in found for name in it.instructions)])
    return "\n".join(markdown((head, rows)))


def _of_kernel(build: Build) -> tuple[str, str]:
    return build.family, build.kernel


def _short(instructions: Iterable[str]) -> str:
    """`mma.sync`, `wgmma`, …"""
    names = {known for name in instructions for known in _INSTRUCTIONS if name.startswith(known)}
    return ", ".join(f"`{name}`" for name in sorted(names)) or "–"


def written_rows(family: str) -> dict[str, int]:
    """Kernel → builds, as the table has them."""
    return {row["kernel"]: int(row["builds"]) for row in _rows() if row["family"] == family}


def written_families() -> set[str]:
    """The families that the table has."""
    return {row["family"] for row in _rows()}


def _rows() -> Iterator[re.Match[str]]:
    return _ROW.finditer(read_table(PAGE, MARKS))


def main() -> int:
    """Writes the table; returns 1 where a build has a fault."""
    part = "all" if "--all" in sys.argv[1:] else "sample"
    with Progress(SpinnerColumn(), "{task.description}: {task.completed} builds", TimeElapsedColumn()) as progress:

        def build_family(family: str) -> list[Build]:
            task = progress.add_task(family, total=None)
            return build(family, part, lambda made: progress.advance(task))

        with ThreadPoolExecutor(_PROCESSES) as pool:
            builds = [made for of_family in pool.map(build_family, families()) for made in of_family]
    if part == "sample":
        write_table(PAGE, table([made for made in builds if made.error is None]), MARKS)
    wrong = [fault for made in builds for fault in faults(made)]
    print(*wrong, f"{len(builds)} builds, {len(wrong)} faults", sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
