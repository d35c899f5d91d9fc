"""Compiles Triton kernels for devices that are not here, and reads what became of them.

`launches(family)` runs its launchers on tensors without memory in every configuration that a device's heuristic names,
and notes what they would launch. Each `variant` is compiled for each target: of launches that differ in window,
operands, divisibility or the length of a step only, the most demanding one stands for the others, and bfloat16 for
float16. For AMD's device it is what an op tries first. `sample` is a part of all that: each tile on each target,
bfloat16, TF32, exact float32 and int8 by turns; `turns` has each tile on one of the targets.

`build(family)` compiles in a process of its own: nothing can be compiled where TRITON_INTERPRET is set, as in tests.
What is found is known again by the content of what was compiled and of this file.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from triton_layers import DEMANDING, DEVICE, FORMS, Call, usual_layers

from kernelpress.files import write_atomically
from kernelpress.files.sealed import seal, unseal
from kernelpress.kernels.triton.launch import Configuration, Device, launching_with
from kernelpress.ops import registry
from kernelpress.ops.backends import triton

__all__ = [
    "KINDS",
    "PARTS",
    "TARGETS",
    "Build",
    "Launch",
    "Target",
    "build",
    "families",
    "faults",
    "kinds_of",
    "launches",
    "launches_of",
    "ops",
    "remembered",
    "sample",
    "turns",
]


@dataclass(frozen=True)
class Target:
    """A device to compile for; `backend`, `architecture` and `lanes` of a warp are what Triton calls it by."""

    name: str
    device: Device
    backend: str
    architecture: int | str
    lanes: int


TARGETS = (
    Target("sm_80", Device("A100", 80, 108, 163 * 1024), "cuda", 80, 32),
    Target("sm_90", Device("H200", 90, 132, 227 * 1024), "cuda", 90, 32),
    Target("sm_100", Device("B200", 100, 148, 227 * 1024), "cuda", 100, 32),
    Target("gfx942", Device("MI300X", 0, 304, 64 * 1024), "hip", "gfx942", 64),
)

KINDS: Mapping[str, tuple[torch.dtype, bool]] = {
    "bf16": (torch.bfloat16, True),
    "tf32": (torch.float32, True),
    "fp32": (torch.float32, False),
    "int8": (torch.int8, True),
    "fp16": (torch.float16, True),
}
"""The dtype of x, and whether float32 may be rounded to TF32."""

_OF_A_TILE = re.compile(r"TILE_(?!DEPTH)|BLOCK_")
_OF_A_PATCH = re.compile(r"TILE_CHANNELS|LANES")

_TENSOR_MEMORY_COLUMNS = 512
"""Of a multiprocessor of sm_100."""


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments and constants of one launch."""

    op: str
    form: str
    kind: str
    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    configuration: Configuration

    @property
    def name(self) -> str:
        """Of the kernel."""
        return str(self.kernel.fn.__name__)

    @property
    def family(self) -> str:
        """The file that the kernel is in."""
        return str(self.kernel.fn.__module__).rpartition(".")[2]

    @property
    def shape(self) -> tuple[Any, ...]:
        """Kernel and tile. Steps of a sum are left out, as shorter ones need less than the longest; patches are alike
        that fill as many lanes; the blocks of a sparse weight are a part of the tile."""
        of_tile = _OF_A_PATCH if "LANES" in self.constants else _OF_A_TILE
        parts = [value for value in sorted(self.constants.items()) if of_tile.match(value[0])]
        return self.name, self.configuration.warps, self.configuration.stages, *parts

    @property
    def reading(self) -> tuple[str, bool]:
        """The kind, and whether channels are read in less than 8 bytes at once: an address for each access."""
        units = [value for name, value in self.constants.items() if name.endswith("UNIT")]
        element_bytes = KINDS[self.kind][0].itemsize
        return "bf16" if self.kind == "fp16" else self.kind, any(unit * element_bytes < 8 for unit in units)

    @property
    def variant(self) -> tuple[Any, ...]:
        """What must have been compiled once for each device."""
        return self.shape, self.reading

    @property
    def source(self) -> tuple[Any, ...]:
        """What tells compiled code apart, but for what is divisible by what."""
        kinds = tuple(a.dtype if isinstance(a, torch.Tensor) else a is None for a in self.arguments)
        return self.name, self.configuration, kinds, tuple(sorted(self.constants.items()))


def ops() -> tuple[str, ...]:
    """Every op with a Triton kernel."""
    return tuple(entry.name for entry in registry.operators() if entry.on("triton"))


def family_of(op: str) -> str:
    """The file that an op's launcher is in."""
    return registry.operator(op).kernel("triton").family


def families() -> tuple[str, ...]:
    """Every family of an op."""
    return tuple(dict.fromkeys(map(family_of, ops())))


def kinds_of(op: str) -> tuple[str, ...]:
    """Those of `KINDS` that an op's kernel takes."""
    taken = registry.operator(op).kernel("triton").dtypes
    return tuple(kind for kind, (dtype, _) in KINDS.items() if dtype in taken)


def launches_of(op: str, call: Call, kind: str, device: Device, form: str = "") -> Iterator[list[Launch]]:
    """What a call launches in each of its configurations, the best guess first; nothing where it is not supported."""
    elsewhere = triton.TARGET.changed(
        device_type=DEVICE,
        reason=lambda index: None,
        describe=lambda index: device,
        launch=lambda run, index: run(),
    )
    found: list[Launch] = []

    def note(kernel: Any, grid: object, arguments: Any, constants: Any, configuration: Configuration) -> None:
        is_exact = kind == "tf32" and constants.get("PRECISION") != "tf32"
        found.append(Launch(op, form, "fp32" if is_exact else kind, kernel, arguments, constants, configuration))

    with elsewhere, launching_with(note):
        for run in _runs(op, call, kind):
            run()
            yield found.copy()
            found.clear()


def _runs(op: str, call: Call, kind: str) -> Iterator[Callable[[], object]]:
    entry = registry.operator(op)
    kernel = entry.kernel("triton")
    bound, named, _ = entry.signature.bind(*call)
    problem = registry.problem(entry, registry.specs_of(bound), named, DEVICE, KINDS[kind][1])
    if kernel.supports(problem) is None:
        for configuration in triton.configurations(kernel, problem, bound):
            yield partial(triton.prepare_with(kernel, problem, bound, configuration), bound)


def _first_choices(op: str, device: Device) -> Iterator[Launch]:
    """All forms in all kinds, and all windows in bfloat16 or what there is instead."""
    (plain, _), *_ = FORMS[op].items()
    for at, kind in enumerate(kinds_of(op)):
        for layer in DEMANDING if at == 0 else DEMANDING[:1]:
            for name, form in FORMS[op].items():
                if kind != "fp16" or name == plain:
                    yield from next(launches_of(op, form(layer, KINDS[kind][0]), kind, device, name), [])


@functools.cache
def _all_calls(op: str) -> tuple[tuple[str, str, Call], ...]:
    """Forms, kinds and calls of layers of all sizes, those of the form that stands for the others and the most
    demanding ones first; without layers that differ in what the op has no use for."""
    found: dict[Any, tuple[str, str, Call]] = {}
    for name, form in FORMS[op].items():
        for layer in (*DEMANDING, *usual_layers()):
            for kind in kinds_of(op):
                if kind != "fp16":
                    tensors, options = form(layer, KINDS[kind][0])
                    sizes = tuple(None if t is None else t.shape for t in tensors)
                    found.setdefault((name, kind, sizes, str(options)), (name, kind, (tensors, options)))
    return tuple(found.values())


def _all_choices(op: str, device: Device) -> Iterator[Launch]:
    for name, kind, call in _all_calls(op):
        for launched in launches_of(op, call, kind, device, name):
            yield from launched


@functools.cache
def launches(family: str) -> Mapping[str, tuple[Launch, ...]]:
    """Target → what is to be compiled for it of kernels that no other family's file has."""
    own = [op for op in ops() if family_of(op) == family]
    others = set(families()) - {family}
    chosen: dict[str, tuple[Launch, ...]] = {}
    for target in TARGETS:
        known = attrgetter("variant" if target.backend == "cuda" else "name")
        first = (launch for op in own for launch in _first_choices(op, target.device) if launch.family not in others)
        more = (launch for op in own for launch in _all_choices(op, target.device) if launch.family not in others)
        found = _first_of_each(first, attrgetter("source"))
        seen = {known(launch) for launch in found}
        found += [launch for launch in _first_of_each(more, known) if known(launch) not in seen]
        chosen[target.name] = tuple(found)
    return chosen


def _first_of_each(found: Iterable[Launch], key: Callable[[Launch], Any]) -> list[Launch]:
    kept: dict[Any, Launch] = {}
    for launch in found:
        kept.setdefault(key(launch), launch)
    return list(kept.values())


def sample(found: Sequence[Launch], target: Target) -> tuple[Launch, ...]:
    """Of launches that differ in the kind only one, so that all targets together see several kinds."""
    by_shape: dict[tuple[Any, ...], list[Launch]] = {}
    for launch in found:
        by_shape.setdefault((launch.shape, launch.form), []).append(launch)
    turn = TARGETS.index(target)
    chosen = []
    for at, alike in enumerate(by_shape.values()):
        classes = list(dict.fromkeys(launch.reading for launch in alike))
        of_turn = classes[(at + turn) % len(classes)]
        chosen += [launch for launch in alike if launch.reading == of_turn]
    return tuple(chosen)


def turns(found: Mapping[str, Sequence[Launch]], target: Target) -> tuple[Launch, ...]:
    """Of the samples of all targets each tile for one alone: those that have it take turns."""
    samples = {it.name: sample(found[it.name], it) for it in TARGETS}
    having: dict[tuple[Any, ...], dict[str, None]] = {}
    for name, launched in samples.items():
        for launch in launched:
            having.setdefault(launch.shape, {})[name] = None
    turn = {shape: list(names)[at % len(names)] for at, (shape, names) in enumerate(having.items())}
    return tuple(launch for launch in samples[target.name] if turn[launch.shape] == target.name)


@dataclass(frozen=True)
class Build:
    """What became of a launch: `spilled_bytes` of local memory a thread, `tensor_columns` of sm_100's tensor memory;
    `error` says why there is nothing."""

    family: str
    kernel: str
    op: str
    form: str
    kind: str
    configuration: str
    target: str
    registers: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0
    tensor_columns: int = 0
    has_product: bool = False
    instructions: tuple[str, ...] = ()
    error: str | None = None

    def __str__(self) -> str:
        form = f" ({self.form})" if self.form else ""
        return f"{self.op}{form}, {self.kernel} in {self.configuration}, {self.kind} for {self.target}"


def faults(build: Build) -> Iterator[str]:
    """What is wrong with a build, if anything."""
    if build.error is not None:
        yield f"{build}: {build.error}"
        return
    target = next(target for target in TARGETS if target.name == build.target)
    if build.spilled_bytes:
        yield f"{build}: {build.spilled_bytes} bytes spilled at {build.registers} registers"
    if build.shared_bytes > target.device.shared_bytes:
        device = target.device
        yield f"{build}: {build.shared_bytes} bytes of shared memory, {device.name} has {device.shared_bytes}"
    if build.tensor_columns > _TENSOR_MEMORY_COLUMNS:
        yield f"{build}: {build.tensor_columns} columns of tensor memory of {_TENSOR_MEMORY_COLUMNS}"
    meant = _MEANT[target.backend][build.kind] if build.has_product else None
    if meant is not None and not any(re.search(meant, name) for name in build.instructions):
        yield f"{build}: no product on tensor cores like {meant}, but {', '.join(build.instructions) or 'none at all'}"
    if meant is None and build.instructions:
        yield f"{build}: expected no product on tensor cores, got {', '.join(build.instructions)}"


_MEANT: Mapping[str, Mapping[str, str | None]] = {
    "cuda": {"bf16": r"bf16|kind::f16", "fp16": r"f16", "tf32": "tf32", "fp32": None, "int8": r"s8|kind::i8"},
    "hip": {"bf16": "bf16", "fp16": r"_f16", "tf32": r"f32|xf32", "fp32": "f32", "int8": "i8"},
}
"""Backend → kind → what must stand in the name of an instruction."""

_PRODUCTS = re.compile(r"\b(?:(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\.[\w.:]+|v_mfma_\w+)")
_OF_STACK = re.compile(r"\b(?:STL|LDL)\b")
_USE = re.compile(r"REG:(?P<registers>\d+) STACK:(?P<stack>\d+) .*?LOCAL:(?P<local>\d+)")


def _compile(launch: Launch, target: Target, folder: Path, known: Mapping[str, Any], used: dict[str, Any]) -> Build:
    """What became of a launch, told by `known` or compiled in `folder`; in `used` under its key too."""
    import triton

    from kernelpress.runtime.triton_private import GPUTarget, compiled, source_of

    described = GPUTarget(target.backend, target.architecture, target.lanes)
    settings = {
        "num_warps": launch.configuration.warps,
        "num_stages": launch.configuration.stages,
        "enable_fp_fusion": True,
    }
    source, identity = source_of(launch.kernel, launch.arguments, launch.constants, settings, described)
    told = (identity, triton.__version__, Path(__file__).read_text())
    key = hashlib.sha256(repr(told).encode()).hexdigest()
    used[key] = known.get(key) or _read(compiled(source, settings, described), target, folder)
    return Build(**_identity(launch, target), **used[key])


def _read(built: Any, target: Target, folder: Path) -> dict[str, Any]:
    """The fields of a build that tell what became of it."""
    text = built.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    registers, spilled = _use_of_cubin(built.asm["cubin"], folder) if target.backend == "cuda" else _use_of_amdgcn(text)
    return {
        "registers": registers,
        "spilled_bytes": spilled,
        "shared_bytes": built.metadata.shared,
        "tensor_columns": getattr(built.metadata, "tmem_size", None) or 0,
        "has_product": "tt.dot" in built.asm["ttir"],
        "instructions": sorted(set(_PRODUCTS.findall(text))),
    }


def _identity(launch: Launch, target: Target) -> dict[str, Any]:
    """The fields of a build that tell what was compiled."""
    blocks = [f"{name.lower()} {value}" for name, value in launch.constants.items() if name.startswith("BLOCK_")]
    configuration = ", ".join([str(launch.configuration), *blocks])
    return {
        "family": launch.family,
        "kernel": launch.name,
        "op": launch.op,
        "form": launch.form,
        "kind": launch.kind,
        "configuration": configuration,
        "target": target.name,
    }


def _use_of_cubin(cubin: bytes, folder: Path) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack and local memory; ptxas may reserve some that nothing touches."""
    from kernelpress.runtime.triton_private import cuobjdump

    path = folder / "kernel.cubin"
    path.write_bytes(cubin)

    def told(what: str) -> str:
        command = [cuobjdump(), what, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    use = _USE.search(told("-res-usage"))
    if use is None:
        raise ValueError(f"cuobjdump: expected REG, STACK and LOCAL, got {told('-res-usage')!r}")
    memory = int(use["stack"]) + int(use["local"])
    return int(use["registers"]), memory if memory and _OF_STACK.search(told("-sass")) else 0


def _use_of_amdgcn(text: str) -> tuple[int, int]:
    """Vector registers of a thread, and bytes of its scratch memory."""
    registers, scratch = (
        int(found[1])
        for name in ("vgpr_count", "private_segment_fixed_size")
        if (found := re.search(rf"^\s*\.{name}:\s*(\d+)", text, re.MULTILINE)) is not None
    )
    return registers, scratch


PARTS: Mapping[str, Callable[[Mapping[str, Sequence[Launch]], Target], Sequence[Launch]]] = {
    "all": lambda found, target: found[target.name],
    "sample": lambda found, target: sample(found[target.name], target),
    "turns": turns,
}
"""Of a family's launches, by targets, those for one."""


def build(
    family: str, part: str = "sample", tell: Callable[[Build], object] | None = None, known: Path | None = None
) -> list[Build]:
    """Compiles a part of the launches of a family, one of `PARTS`, in a process of its own with an empty cache; `tell`
    gets each build as soon as it is there. `known`: a file that remembers what became of them, and of no others.

    Raises `RuntimeError` with what it said where that process dies.
    """
    command = [sys.executable, __file__, family, "--part", part, *(["--known", str(known)] if known else [])]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    found: list[Build] = []
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryFile("w+") as said:
        environment |= {"TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=said, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                found.append(Build(**json.loads(line)))
                if tell is not None:
                    tell(found[-1])
        if process.returncode != 0:
            said.seek(0)
            raise RuntimeError(
                f"{family}: the compiling process ended with {process.returncode}: {said.read()[-3000:]}"
            )
    return found


_SEAL = ("builds of Triton kernels", 1)


def remembered(path: Path) -> dict[str, Any]:
    """What a file remembers of builds; nothing where it is absent or damaged."""
    try:
        content: dict[str, Any] = unseal(path.read_bytes(), *_SEAL, path.name)
    except (OSError, ValueError):
        return {}
    return content


def _main() -> None:
    parser = argparse.ArgumentParser(description="Compiles the Triton kernels of a family; a line of JSON for each.")
    parser.add_argument("family", choices=families())
    parser.add_argument("--part", choices=PARTS, default="all")
    parser.add_argument("--known", type=Path, help="a file that remembers builds")
    options = parser.parse_args()
    known = remembered(options.known) if options.known else {}
    used: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for target in TARGETS:
            for launch in PARTS[options.part](launches(options.family), target):
                try:
                    made = _compile(launch, target, Path(folder), known, used)
                except Exception as error:  # whatever the compiler raises is a fault of this build alone
                    made = Build(**_identity(launch, target), error=f"{type(error).__name__}: {error}")
                print(json.dumps(asdict(made)), flush=True)
    if options.known and used.keys() != known.keys():
        options.known.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.known, seal(*_SEAL, used))


if __name__ == "__main__":
    _main()
