"""What Triton's compiler makes of the kernels for devices that are not here: nothing fails, nothing spills, products
run on tensor cores. A family is compiled in a process of its own, as this one has Triton's interpreter.

Tiles are chosen for the Triton of constraints.txt. Another one has registers of its own: there, little may be spilled,
and what its compiler for AMD fails at is not ours.

Of the dtypes of a tile one is compiled here for each target, by turns; under another Triton each tile for one target;
`python benchmarks/triton_resources.py --all` compiles all of them.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

import triton
import triton_builds
import triton_layers
import triton_resources
from support import BUILT
from triton_builds import TARGETS, Build

from kernelpress.kernels.triton.launch import Device

LAYERS_OF_AN_OP = 300
IS_PINNED = f"triton=={triton.__version__} " in Path(__file__).parents[1].joinpath("constraints.txt").read_text()
LITTLE = 64
"""Bytes."""

WITHOUT_PRODUCT = {
    "cheap_kernel",
    "depthwise_rows_kernel",
    "depthwise_taps_kernel",
    "elementwise_kernel",
    "int8_depthwise_rows_kernel",
    "int8_depthwise_taps_kernel",
    "quantize_rows_kernel",
    "shuffle_kernel",
}


@pytest.mark.slow
@pytest.mark.parametrize("family", triton_builds.families())
def test_every_tile_compiles_for_every_target(family: str) -> None:
    known = BUILT / f"triton-{triton.__version__}-{family}.json"
    builds = triton_builds.build(family, "sample" if IS_PINNED else "turns", known=known)
    if IS_PINNED:
        assert {build.target for build in builds} == {target.name for target in TARGETS}
        assert triton_resources.written_rows(family) == Counter(build.kernel for build in builds), (
            "run `make resources`"
        )
    else:
        builds = [build for build in builds if not (build.error and build.target.startswith("gfx"))]
        builds = [replace(build, spilled_bytes=max(0, build.spilled_bytes - LITTLE)) for build in builds]
    wrong = [fault for build in builds for fault in triton_builds.faults(build)]
    assert not wrong, "\n".join(wrong)
    misjudged = {build.kernel for build in builds if build.has_product == (build.kernel in WITHOUT_PRODUCT)}
    assert not misjudged, "these kernels have a product, or none, against what is known of them"


@pytest.mark.slow
def test_a_damaged_memory_of_builds_is_none(tmp_path: Path) -> None:
    known = tmp_path / "triton-quantize.json"
    triton_builds.build("int8_quantize", known=known)
    good, whole = triton_builds.remembered(known), known.read_bytes()
    assert good
    for damaged in (b"", b"{}", whole.replace(b"registers", b"registerz", 1), whole[:-9]):
        known.write_bytes(damaged)
        assert triton_builds.remembered(known) == {}


@pytest.mark.slow
def test_a_sample_has_every_tile_on_every_target_and_all_kinds_in_turn_and_turns_each_tile_once() -> None:
    found = {target.name: triton_builds.launches("dense")[target.name] for target in TARGETS}
    taken = {target.name: triton_builds.sample(found[target.name], target) for target in TARGETS}
    for name in found:
        assert {launch.shape for launch in taken[name]} == {launch.shape for launch in found[name]}
        assert len(taken[name]) < len(found[name])
    assert {launch.kind for name in found for launch in taken[name]} == {"bf16", "tf32", "fp32", "fp16"}
    in_turn = {target.name: {launch.shape for launch in triton_builds.turns(found, target)} for target in TARGETS}
    assert set().union(*in_turn.values()) == {launch.shape for name in found for launch in found[name]}
    assert sum(map(len, in_turn.values())) == len(set().union(*in_turn.values()))
    assert all(in_turn.values()), "every target has its turns"


@pytest.mark.slow
@pytest.mark.parametrize("op", triton_builds.ops())
def test_layers_of_any_size_take_a_tile_that_is_compiled(op: str) -> None:
    consumer = replace(TARGETS[0], device=Device("RTX 4090", 89, 128, 99 * 1024))
    draw = random.Random(random.getrandbits(32))
    for _ in range(LAYERS_OF_AN_OP):
        target = draw.choice((*TARGETS[:3], consumer))
        layer, kind = triton_layers.any_layer(draw), draw.choice(triton_builds.kinds_of(op))
        name, form = draw.choice(list(triton_layers.FORMS[op].items()))
        call = form(layer, triton_builds.KINDS[kind][0])
        for launched in triton_builds.launches_of(op, call, kind, target.device, name):
            for launch in launched:
                is_compiled = launch.variant in compiled(launch.family, target.name)
                assert is_compiled, f"{layer}: {launch.variant} is not compiled for {target.name}"


@functools.cache
def compiled(family: str, target: str) -> set[object]:
    return {launch.variant for launch in triton_builds.launches(family)[target]}


def test_the_table_in_the_documentation_has_no_other_families() -> None:
    assert triton_resources.written_families() == set(triton_builds.families()), "`make resources` renews docs/gpu.md"


PRODUCT = Build(
    *("dense", "product_kernel", "linear", "", "bf16", "64x64x64, 4 warps, 4 stages", "sm_90"),
    registers=96,
    shared_bytes=65536,
    has_product=True,
    instructions=("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16",),
)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, None),
        ({"spilled_bytes": 8}, "8 bytes spilled at 96 registers"),
        ({"shared_bytes": 228 * 1024}, "bytes of shared memory, H200 has 232448"),
        ({"tensor_columns": 513}, "columns of tensor memory"),
        ({"instructions": ()}, "no product on tensor cores"),
        ({"kind": "int8"}, "no product on tensor cores like s8"),
        ({"kind": "fp32"}, "expected no product on tensor cores, got wgmma"),
        ({"has_product": False}, "expected no product on tensor cores, got wgmma"),
        ({"error": "CompilationError: line 7"}, "CompilationError: line 7"),
    ],
    ids=["none", "spill", "shared", "columns", "no tensor cores", "of another type", "rounded", "unmeant", "error"],
)
def test_faults_name_the_build_and_what_is_wrong(changes: dict[str, object], told: str | None) -> None:
    found = list(triton_builds.faults(replace(PRODUCT, **changes)))
    assert len(found) == (told is not None)
    if told is not None:
        assert told in found[0]
        for part in (
            "linear",
            "product_kernel",
            "64x64x64, 4 warps, 4 stages",
            "sm_90",
            str(changes.get("kind", "bf16")),
        ):
            assert part in found[0]


def test_the_table_has_ranges_over_dtypes_and_configurations() -> None:
    other = replace(PRODUCT, kind="tf32", registers=120, shared_bytes=1, target="sm_80", instructions=("mma.sync.m16",))
    lines = triton_resources.table([PRODUCT, other, replace(PRODUCT, registers=72)]).splitlines()
    row = "| dense | `product_kernel` | bf16, tf32 | 3 | 120 | 72–96 | – | – | 1–64 | 0 | `mma.sync`, `wgmma` |"
    assert lines[2:] == [row]
