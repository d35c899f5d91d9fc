"""The bench machinery on small shapes: what it counts, that contestants compute the same, what it says and records."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import exact
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kernelpress import bench, ops
from kernelpress.bench import Layer, Roofline, ours, peers
from kernelpress.bench.blocks import Block, blocks, low_rank, measure_block
from kernelpress.bench.contest import OURS, TOLERANCE, UNFUSED, expected_of, relative_error
from kernelpress.bench.int8_peers import SATURATING, signed
from kernelpress.bench.layers import (
    channel_shuffle,
    convolution,
    depthwise_conv2d,
    ghost_conv2d,
    grouped_conv2d,
    int8_conv2d,
    int8_linear,
    int8_matmul,
    inverted_residual,
    linear,
    separable_conv2d,
    shuffle_concat,
    sparse_conv2d,
    sparse_matmul,
    squeeze_excite,
)
from kernelpress.bench.run import measure_layer
from kernelpress.layers import GhostBottleneck
from kernelpress.runtime import native

ROOFLINE = Roofline(
    threads=1, fma_gflops=100.0, l2_gbs=50.0, llc_gbs=20.0, memory_gbs=10.0, l2_bytes=1000, llc_bytes=10_000
)

SMALL = {
    "stem": convolution("test", 1, 9, 3, 8, 3, 2),
    "dense_with_residual": convolution("test", 1, 5, 6, 10, 3, residual=True),
    "pointwise": convolution("test", 2, 5, 12, 7, activation="relu6"),
    "pointwise_with_residual": convolution("test", 1, 4, 5, 8, activation="identity", residual=True),
    "linear": linear("test", 3, 11, 6),
    "depthwise": depthwise_conv2d("test", 1, 8, 10, 5, 2, "hardswish"),
    "separable": separable_conv2d("test", 1, 6, 8, 12, 2),
    "inverted_residual": inverted_residual("test", 1, 6, 4, 24, 4, 1),
    "grouped": grouped_conv2d("test", 2, 5, 6, 9, 1, 3, shuffle=3),
    "grouped_3x3": grouped_conv2d("test", 1, 5, 8, 8, 3, 4),
    "channel_shuffle": channel_shuffle("test", 2, 4, 6, 3),
    "shuffle_concat": shuffle_concat("test", 1, 4, 3),
    "ghost": ghost_conv2d("test", 2, 5, 6, 8, "relu"),
    "squeeze_excite": squeeze_excite("test", 2, 5, 12, 4),
}
CPU = torch.device("cpu")


@pytest.fixture(params=SMALL.values(), ids=SMALL.keys())
def small(request: pytest.FixtureRequest) -> Layer:
    return request.param


def drawn(layer: Layer) -> tuple[str, list[torch.Tensor | None], dict[str, Any]]:
    return layer.op, *layer.make(CPU, torch.float32)


def test_flops_and_traffic_are_those_of_the_tensors(small: Layer) -> None:
    op, tensors, options = drawn(small)
    with FlopCounterMode(display=False) as counter:
        y = peers.eager(op, tensors, options)()
    assert small.flops == counter.get_total_flops()
    moved = {id(tensor): tensor.nbytes for tensor in [y, *tensors] if tensor is not None}
    assert small.traffic_bytes(torch.float32) == sum(moved.values())


def test_labels_tell_the_layers_of_a_family_apart() -> None:
    for family in bench.FAMILIES:
        names = [(layer.op, layer.title) for layer in bench.layers(family)]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("stem", "9×9 3→8 3×3/2 relu"),
        ("linear", "11→6 batch 3"),
        ("depthwise", "8×8 10 5×5/2 hardswish"),
        ("inverted_residual", "6×6 4→24→4 3×3 relu6 +res"),
        ("squeeze_excite", "5×5 12→4→12 batch 2"),
    ],
)
def test_labels_name_the_shape(name: str, label: str) -> None:
    assert SMALL[name].title == label


def test_all_contestants_agree_with_double_precision(small: Layer) -> None:
    op, tensors, options = drawn(small)
    expected = peers.eager(op, exact(tensors), options)()
    calls = {
        OURS: ours.on_backend(op, tensors, options, ours.backend_of(op, tensors, options)),
        **peers.peers(op, tensors, options),
    }
    steps = ours.unfused(op, tensors, options)
    assert ("oneDNN prepacked" in calls) == (small.flops > 0)
    assert (steps is not None) == (small.family == "separable")
    if steps is not None:
        calls[UNFUSED] = steps
    with torch.no_grad():
        errors = {name: relative_error(call(), expected) for name, call in calls.items()}
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pointwise_with_residual", "grouped", "shuffle_concat", "ghost", "squeeze_excite"])
def test_the_compiled_peer_agrees_with_eager(name: str) -> None:
    call = drawn(SMALL[name])
    chain = peers.inductor(*call)
    with torch.no_grad():
        assert relative_error(chain(), peers.eager(*call)()) < 1e-5


def test_inputs_are_fresh_each_time() -> None:
    (_, first, _), (_, second, _) = (drawn(SMALL["stem"]) for _ in range(2))
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


def test_contiguous_inputs_hold_the_same_values() -> None:
    _, tensors, _ = drawn(SMALL["dense_with_residual"])
    for t, plain in zip(tensors, peers.contiguous(tensors), strict=True):
        if t is not None:
            assert plain.is_contiguous()
            assert t.dim() < 4 or t.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(plain, t)


def test_a_row_says_what_its_timings_say(small: Layer) -> None:
    row = measure_layer(small, ROOFLINE, peers=True, rounds=2, budget_seconds=0.005)
    times = {contestant.name: contestant.ms for contestant in row.contestants}
    assert row.ms == times[OURS]
    assert row.tflops == pytest.approx(small.flops / row.ms * 1e-9)
    assert row.gbs == pytest.approx(small.traffic_bytes(torch.float32) / row.ms * 1e-6)
    rivals = {name: ms for name, ms in times.items() if name not in (OURS, UNFUSED)}
    assert row.best_peer == min(rivals, key=lambda name: rivals[name])
    assert row.ratio == pytest.approx(min(rivals.values()) / row.ms)
    bound = ROOFLINE.bound_ms(small.flops, small.traffic_bytes(torch.float32))
    assert bound is not None
    assert row.roofline_fraction == pytest.approx(bound / row.ms)
    if small.family == "separable":
        assert row.unfused_ratio == pytest.approx(times[UNFUSED] / row.ms)
    else:
        assert row.unfused_ratio is None


@pytest.mark.slow
def test_a_block_is_timed_beside_the_same_of_stock_layers() -> None:
    block = Block("test", lambda: GhostBottleneck(4, 8, 6, 3, 2, 0.5), (1, 4, 9, 9), "small")
    row = measure_block(block, ROOFLINE, rounds=1, budget_seconds=0.005)
    assert {contestant.name for contestant in row.contestants} == {OURS, "eager", "eager channels_last"}
    assert row.relative_error is not None
    assert row.relative_error < 1e-5
    assert (row.family, row.op, row.backend) == ("blocks", "GhostBottleneck", "emitted")
    assert row.ratio is not None
    assert row.flops > 0


def test_blocks_of_networks_take_their_images_and_are_told_apart() -> None:
    found = [*blocks(batch=2), *low_rank(batch=2)]
    assert len({(block.network, block.label) for block in found}) == len(found)
    with torch.device("meta"):
        for block in found:
            assert block.make()(torch.empty(block.x)).shape[0] == 2


@pytest.mark.slow
def test_without_peers_only_ours_are_timed() -> None:
    (row,) = bench.run("separable", only=[SMALL["separable"]], threads=1, rounds=2, budget_seconds=0.005)
    assert {contestant.name for contestant in row.contestants} == {OURS, UNFUSED}
    assert row.ratio is None
    assert row.best_peer is None
    assert row.unfused_ratio is not None


def test_a_wrong_kernel_is_no_contestant(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = SMALL["pointwise"]
    right = ours.on_backend
    monkeypatch.setattr(ours, "on_backend", lambda *given: lambda: right(*given)() * 1.01)
    with pytest.raises(RuntimeError, match=r"pointwise_conv2d .*: kernelpress: its result is off by 1\.0e-02"):
        measure_layer(layer, ROOFLINE, rounds=1, budget_seconds=0.005)


def test_the_row_names_a_forced_backend() -> None:
    from kernelpress.ops import use_backend

    with use_backend("reference"):
        row = measure_layer(SMALL["depthwise"], ROOFLINE, rounds=1, budget_seconds=0.005)
    assert row.backend == "reference"


def test_backends_are_timed_side_by_side() -> None:
    needed = [name for name in ("cpu", "reference") if name != "cpu" or native.cpu() is not None]
    only = [SMALL[name] for name in ("depthwise", "separable")]
    for row, layer in zip(
        bench.run_backends("separable", needed, only=only, rounds=1, budget_seconds=2e-3), only, strict=True
    ):
        assert [entry.name for entry in row.entries] == needed
        first, last = row.entries[0], row.entries[-1]
        assert first.ms is not None
        assert last.ms is not None
        assert row.ratio(first) == 1.0
        assert row.ratio(last) == pytest.approx(first.ms / last.ms)
        work = layer.traffic_bytes(torch.float32) if layer.family == "depthwise" else layer.flops
        assert row.rate(last) == pytest.approx(work / last.ms * 1e-6)


@pytest.mark.usefixtures("interpreted_triton")
def test_triton_is_a_backend_like_others_and_what_it_lacks_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    rich = pytest.importorskip("rich.console", reason="rich prints the table; the extra `cli` installs it")
    only = [SMALL[name] for name in ("linear", "stem")]
    options: dict[str, Any] = {"only": only, "rounds": 1, "budget_seconds": 2e-3}
    rows = bench.run_backends("dense", ["reference", "triton"], dtype="fp16", **options)
    linear, stem = rows
    assert linear.layer.traffic_bytes(torch.float16) == SMALL["linear"].traffic_bytes(torch.float32) // 2
    assert linear.ratio(linear.entries[1]) is not None
    assert stem.entries[1].ms is None
    assert stem.entries[1].reason == "conv2d has no implementation on it"
    assert stem.ratio(stem.entries[1]) is None
    rich.Console(width=200).print(bench.backend_table(rows))
    printed = capsys.readouterr().out
    for part in (
        "dense on cpu, fp16",
        "triton cannot run conv2d: conv2d has no",
        f"{linear.ratio(linear.entries[1]):.2f}×",
    ):
        assert part in printed
    with pytest.raises(RuntimeError, match="'triton' cannot run dense on cpu in fp16: conv2d has no implementation"):
        bench.run_backends("dense", ["reference", "triton"], dtype="fp16", **{**options, "only": only[1:]})


def test_a_backend_that_computes_something_else_is_no_contestant(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ours.on_backend
    monkeypatch.setattr(ours, "on_backend", lambda *given: lambda: right(*given)() * 1.01)
    with pytest.raises(RuntimeError, match=r"linear .*: reference: its result is off by 1\.0e-02"):
        bench.run_backends("dense", ["reference"], only=[SMALL["linear"]])


SMALL_LAYERS = {
    "grouped": grouped_conv2d("test", 2, 5, 6, 9, 3, 3, shuffle=3),
    "channel_shuffle": channel_shuffle("test", 2, 4, 6, 3),
    "shuffle_concat": shuffle_concat("test", 1, 4, 3),
    "ghost": ghost_conv2d("test", 2, 5, 6, 8, "relu"),
    "sparse_matmul": sparse_matmul("test", 5, 32, 48, 16, 0.0),
    "sparse_conv2d": sparse_conv2d("test", 2, 5, 16, 32, 3, 16, 0.0),
    "int8_matmul": int8_matmul("test", 3, 20, 7),
    "int8_conv2d": int8_conv2d("test", 2, 5, 6, 7, 3),
    "int8_depthwise": int8_conv2d("test", 2, 5, 6, 6, 3, depthwise=True),
    "int8_stem": int8_conv2d("test", 1, 9, 3, 8, 3, stride=2),
    "int8_linear": int8_linear("test", 2, 21, 9),
    "int8_end": int8_linear("test", 1, 21, 9, "identity"),
}
INT8_PEERS = [name for name in SMALL_LAYERS if name.startswith("int8_") and name != "int8_matmul"]


@pytest.mark.parametrize("layer", SMALL_LAYERS.values(), ids=SMALL_LAYERS.keys())
def test_work_and_traffic_of_a_layer_are_those_of_its_tensors(layer: bench.Layer) -> None:
    tensors, options = layer.make(CPU, torch.float32)
    y = getattr(ops, layer.op)(*tensors, **options, backend="reference")
    indices = {torch.int32}
    moved = sum(t.nbytes for t in (*tensors, y) if t is not None and t.dtype not in indices)
    assert layer.traffic_bytes(torch.float32) == moved
    weights = [t for t in tensors if t is not None and t.dim() > 1 and t is not tensors[0] and t.dtype not in indices]
    positions = y.numel() // y.shape[1]
    products = 0 if layer.op == "shuffle_concat" else sum(w.numel() for w in weights) * positions
    assert layer.flops == 2 * products


@pytest.mark.parametrize("family", bench.ALL_FAMILIES)
def test_layers_of_a_family_are_told_apart_and_scale_with_the_batch(family: str) -> None:
    found, twice = bench.layers(family), bench.layers(family, batch=2)
    assert len({(layer.op, layer.title) for layer in found}) == len(found)
    for one, two in zip(found, twice, strict=True):
        assert one.family == family
        assert two.flops == 2 * one.flops
        moved = one.traffic_bytes(torch.float32)
        assert moved < two.traffic_bytes(torch.float32) <= 2 * moved


@pytest.mark.parametrize("layer", SMALL_LAYERS.values(), ids=SMALL_LAYERS.keys())
def test_a_layer_in_plain_torch_computes_what_its_op_does(layer: bench.Layer) -> None:
    tensors, options = layer.make(CPU, torch.float32)
    expected = expected_of(layer.op, tensors, options)
    for given in (tensors, peers.contiguous(tensors)):
        result = layer.plain(given)()
        assert result.shape == expected.shape
        if layer.dtype is None:
            assert relative_error(result, expected) < 1e-5


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted_triton")
@pytest.mark.parametrize("layer", SMALL_LAYERS.values(), ids=SMALL_LAYERS.keys())
def test_every_kind_of_layer_runs_on_backends_side_by_side(layer: bench.Layer) -> None:
    options: dict[str, Any] = {"only": [layer], "rounds": 1, "budget_seconds": 2e-3, "dtype": "bf16"}
    (row,) = bench.run_backends(layer.family, ["reference", "triton"], **options)
    assert row.dtype == ("int8" if layer.family == "int8" else "bf16")
    rates = [row.rate(entry) for entry in row.entries]
    assert None not in rates
    assert row.unit == ("GFLOP/s" if layer.flops > 0 and "depthwise" not in layer.op else "GB/s")


@pytest.mark.parametrize("name", INT8_PEERS)
def test_int8_peers_compute_what_the_op_does(name: str) -> None:
    layer = SMALL_LAYERS[name]
    tensors, options = layer.make(CPU, torch.float32)
    assert tensors[1] is not None
    tensors[1] //= 4  # or products saturate without VNNI
    calls = peers.peers(layer.op, tensors, options)
    needed = {"oneDNN int8"} if torch.backends.mkldnn.is_available() else set()
    if "fbgemm" in torch.backends.quantized.supported_engines and name != "int8_end":
        needed.add(SATURATING if name == "int8_depthwise" else "FBGEMM")
    assert calls.keys() == needed
    expected = expected_of(layer.op, tensors, options)
    for call in calls.values():
        result = signed(call())
        assert result.dtype == expected.dtype
        assert relative_error(result, expected) < TOLERANCE[torch.int8]


def test_an_int8_layer_is_measured_against_the_int8_peak_and_a_peer_that_saturates_keeps_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = SMALL_LAYERS["int8_conv2d"]

    def with_a_wrong_one(*call: Any, **options: Any) -> dict[str, Any]:
        expected = expected_of(*call)
        return {"right": lambda: expected, "saturated": lambda: expected.clamp(max=-64)}

    monkeypatch.setitem(measure_layer.__globals__, "peer_calls", with_a_wrong_one)
    roofline = replace(ROOFLINE, int8_gops=400.0)
    row = measure_layer(layer, roofline, peers=True, rounds=1, budget_seconds=0.005)
    assert row.kind == "int8"
    assert row.relative_error == 0
    assert row.best_peer == "right"
    assert {entry.name: entry.reason is None for entry in row.contestants} == {
        OURS: True,
        "right": True,
        "saturated": False,
    }
    bound = max(layer.flops / 400e6, 1e-6 * layer.traffic_bytes(torch.int8) / roofline.l2_gbs)
    assert row.ms is not None
    assert row.roofline_fraction == pytest.approx(bound / row.ms)


def test_a_roofline_of_an_older_file_has_no_int8_peak() -> None:
    assert ROOFLINE.peak_gflops("int8") is None
    assert "int8" not in ROOFLINE.told()
    assert "FMA 100 GFLOP/s, int8 400 GOP/s" in replace(ROOFLINE, int8_gops=400.0).told()


def test_on_a_cuda_device_backends_are_timed_by_its_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernelpress.bench import backends

    asked: list[torch.device] = []
    monkeypatch.setattr(backends, "time_graphs", lambda calls, device, **options: asked.append(device) or {})
    backends._timings({"cuda": torch.zeros_like}, torch.device("cuda", 0), 1, 1.0)
    assert asked == [torch.device("cuda", 0)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "dens"}, "family: expected one of dense, depthwise, .*squeeze_excite, int8, got 'dens'"),
        ({"family": "dense", "device": "tpu"}, "device: expected one of cpu.*got 'tpu'"),
        ({"family": "dense", "batch": 0}, "batch: expected a positive integer, got 0"),
        ({"family": "dense", "threads": 0}, "threads: expected a positive integer"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench.run(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("working_set", "gbs"), [(1000, 50.0), (1001, 20.0), (10_000, 20.0), (10_001, 10.0)], ids=lambda value: str(value)
)
def test_bandwidth_is_that_of_the_level_that_holds_the_working_set(working_set: int, gbs: float) -> None:
    assert ROOFLINE.bandwidth(working_set) == gbs


def test_the_bound_is_the_slower_of_compute_and_bandwidth() -> None:
    assert ROOFLINE.bound_ms(flops=10**8, traffic_bytes=1000) == pytest.approx(1.0)
    assert ROOFLINE.limited_by(flops=10**8, traffic_bytes=1000) == "compute"
    assert ROOFLINE.bound_ms(flops=10**6, traffic_bytes=10**7) == pytest.approx(1.0)
    assert ROOFLINE.limited_by(flops=10**6, traffic_bytes=10**7) == "bandwidth"


def test_without_an_fma_peak_there_is_no_fraction() -> None:
    unknown = replace(ROOFLINE, fma_gflops=None, fma_absent_because="not built")
    row = measure_layer(SMALL["pointwise"], unknown, rounds=1, budget_seconds=0.005)
    assert row.roofline_fraction is None
    assert row.limited_by is None


@pytest.mark.slow
def test_the_measured_roofline_is_plausible() -> None:
    roofline = bench.measure_roofline(1)
    assert roofline.threads == 1
    assert (roofline.fma_gflops is None) == (roofline.fma_absent_because is not None)
    assert (roofline.fma_gflops is None) == (roofline.int8_gops is None)
    assert all(gbs > 0 for gbs in (roofline.l2_gbs, roofline.llc_gbs, roofline.memory_gbs))
    assert roofline.l2_bytes <= roofline.llc_bytes


def test_measuring_again_only_raises_the_roofline(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernelpress.bench import roofline as module

    higher = replace(ROOFLINE, fma_gflops=120.0, l2_gbs=40.0, memory_gbs=11.0)
    measured = iter([ROOFLINE, higher])
    monkeypatch.setattr(module, "_best_so_far", {})
    monkeypatch.setattr(module, "_measure", lambda threads: next(measured))
    assert bench.measure_roofline(1) is bench.measure_roofline(1) is ROOFLINE
    assert bench.measure_roofline(1, again=True) == replace(ROOFLINE, fma_gflops=120.0, memory_gbs=11.0)


def test_the_table_shows_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    rich = pytest.importorskip("rich.console", reason="rich prints the table; the extra `cli` installs it")
    rows = [
        measure_layer(SMALL[name], ROOFLINE, peers=True, rounds=1, budget_seconds=0.005)
        for name in ("separable", "inverted_residual")
    ]
    rich.Console(width=200).print(bench.table(rows, ROOFLINE))
    printed = capsys.readouterr().out
    for row in rows:
        assert row.layer in printed
        assert f"{row.ratio:.2f}×" in printed
        assert f"{row.unfused_ratio:.2f}×" in printed
    assert "FMA 100 GFLOP/s" in printed


def test_a_table_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="rows: expected at least one row"):
        bench.table([])


def test_the_machine_has_a_folder_name_and_versions() -> None:
    machine = bench.describe_machine()
    assert machine.slug == "".join(c for c in machine.slug if c.isalnum() or c in ".-")
    assert dict(machine.versions)["torch"].startswith(torch.__version__.split("+")[0])
    assert machine.cpus >= 1
    json.dumps(machine.versions)


def test_weights_keep_values_at_their_size_along_a_chain() -> None:
    y = peers.eager(*drawn(SMALL["inverted_residual"]))()
    assert math.isfinite(float(y.norm()))
    assert 0.1 < float(y.std()) < 10
    assert not isinstance(y, nn.Parameter)
