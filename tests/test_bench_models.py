"""The whole-model contest and the result files: what they check, skip and write down."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kernelpress import bench, layers, models
from kernelpress.bench import Roofline
from kernelpress.bench.layers import convolution
from kernelpress.bench.run import measure_layer
from kernelpress.runtime.torch_private import TorchDispatchMode

ROOFLINE = Roofline(
    threads=1, fma_gflops=100.0, l2_gbs=50.0, llc_gbs=20.0, memory_gbs=10.0, l2_bytes=1000, llc_bytes=10_000
)


def model_result(**rounds_ms: tuple[float, ...]) -> Any:
    from kernelpress.bench.model_contest import ModelResult, RuntimeResult

    results = [
        RuntimeResult(name, "as it is", rounds, 1e-6, 0.0) if rounds else RuntimeResult(name, skipped="not installed")
        for name, rounds in rounds_ms.items()
    ]
    return ModelResult("mobilenet_v1", 1, 224, 2, 7, 30, tuple(results))


class Namespaces(TorchDispatchMode):
    """Whose ops are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.namespace)
        return func(*args, **(kwargs or {}))


TWINS = [
    "ghostnet", "ghostnet_v2", "mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small", "resnet20", "shufflenet_v1",
    "shufflenet_v2", "squeezenet1_1",
]  # fmt: skip


@pytest.mark.parametrize("name", TWINS)
def test_the_plain_twin_computes_the_same_without_our_layers(name: str) -> None:
    from kernelpress.bench.plain import to_plain

    network = models.create(name, num_classes=10).eval()
    twin = to_plain(models.create(name, num_classes=10)).eval()
    twin.load_state_dict(network.state_dict())
    x = torch.randn(2, 3, 33, 34)
    with torch.no_grad():
        expected = network.double()(x.double())
        with Namespaces() as ops:
            result = twin(x)
    assert ops.seen == {"aten"}
    assert float((result - expected).norm() / expected.norm()) < 1e-5


def test_a_fused_activation_has_no_plain_twin() -> None:
    from kernelpress.bench.plain import to_plain

    with pytest.raises(ValueError, match="relu fused into a layer"):
        to_plain(nn.Sequential(layers.Conv2d(3, 4, 3, activation="relu")))


def test_layers_of_others_stay_what_they_are() -> None:
    from kernelpress.bench.plain import to_plain

    class Same(nn.Conv2d):
        pass

    network = to_plain(nn.Sequential(Same(3, 4, 3), layers.Linear(4, 2)))
    assert [type(layer) for layer in network] == [Same, nn.Linear]


def test_prepared_weights_are_the_same_in_every_process_and_values_keep_their_size(tmp_path: Path) -> None:
    from kernelpress.bench.twins import build, prepare
    from kernelpress.bench.worker import Job

    job = Job("mobilenet_v1", "eager", str(tmp_path), 1, 2, 1)
    network = prepare(job, 32, seed=3)
    x = torch.from_numpy(job.load_input())
    assert x.shape == (2, 3, 32, 32)
    with torch.no_grad():
        expected = network(x)
        for plain in (True, False):
            assert float((build(job, plain=plain)(x) - expected).norm() / expected.norm()) < 1e-5
    assert 1e-3 < float(expected.std()) < 1e3
    assert any(float(norm.bias.detach().std()) > 0 for norm in network.modules() if isinstance(norm, nn.BatchNorm2d))


@pytest.mark.slow
def test_runtimes_answer_in_turn_agree_and_are_skipped_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernelpress.bench import model_contest as contest
    from kernelpress.bench import processes

    monkeypatch.setattr(processes, "SETTLE_SECONDS", 0.0)
    runtimes = [
        contest.Runtime("eager", "eager", ("contiguous",)),
        contest.Runtime("eager channels_last", "eager", ("channels_last",)),
        contest.Runtime("kernelpress", "ours", ("loaded",), needs_emitted=True),
        contest.Runtime("nobody", "no_such_runtime"),
    ]
    said: list[str] = []
    result = contest.compare(
        "resnet20", runtimes=runtimes, threads=1, size=16, rounds=2, iterations=2, report=said.append
    )
    eager, channels_last, ours, nobody = result.runtimes
    for runtime in (eager, channels_last, ours):
        assert runtime.skipped is None
        assert len(runtime.rounds_ms) == 2
        assert min(runtime.rounds_ms) > 0
        assert runtime.relative_error is not None
        assert runtime.relative_error < 1e-4
        assert runtime.start is not None
        assert min(runtime.start.import_s, runtime.start.load_s, runtime.start.first_s) > 0
        assert runtime.peak_bytes is None or runtime.peak_bytes > 0
        assert (runtime.joules is None) != (runtime.energy_reason is None)
    assert result.flops is not None
    assert result.emission_s is not None
    assert result.weight_bytes == pytest.approx(4 * result.parameters, rel=0.05)
    assert nobody.rounds_ms == ()
    assert nobody.skipped is not None
    assert "no_such_runtime" in nobody.skipped
    assert len(said) == 4


@pytest.mark.slow
def test_int8_runtimes_quantize_for_themselves_and_absent_ones_say_what_installs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("torchao", reason="needs torchao: pip install 'kernelpress[quantize]'")
    from kernelpress.bench import model_contest as contest
    from kernelpress.bench import processes

    monkeypatch.setattr(processes, "SETTLE_SECONDS", 0.0)
    runtimes = [it for it in contest.CONTESTS["int8"] if it.name != "Inductor"]  # which compiles for half a minute
    result = contest.compare(
        "resnet8",
        runtimes=runtimes,
        dtype="int8",
        threads=1,
        size=32,
        rounds=1,
        iterations=1,
        report=lambda text: None,
    )
    assert result.dtype == "int8"
    found = {runtime.runtime: runtime for runtime in result.runtimes}
    for runtime in found.values():
        if runtime.skipped is not None:
            assert "pip install kernelpress[peers]" in runtime.skipped
            continue
        assert runtime.relative_error is not None
        assert runtime.relative_error < 0.5
    ours, exact = found["kernelpress"], found["kernelpress float32"]
    assert ours.relative_error is not None
    assert ours.relative_error > 1e-3, "it is rounded"
    assert "places in int8" in ours.settings
    assert exact.relative_error is not None
    assert exact.relative_error < 1e-4


@pytest.mark.slow
def test_sparse_runtimes_meet_on_one_network_with_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernelpress.bench import model_contest as contest
    from kernelpress.bench import processes

    monkeypatch.setattr(processes, "SETTLE_SECONDS", 0.0)
    runtimes = [
        it for it in contest.CONTESTS["sparse"] if it.name in ("DeepSparse", "kernelpress", "kernelpress dense")
    ]
    asked = {"threads": 1, "size": 32, "rounds": 1, "iterations": 1, "sparsity": 0.9, "block": 4}
    result = contest.compare("resnet8", runtimes=runtimes, report=lambda text: None, **asked)
    assert (result.sparsity, result.block) == (0.9, 4)
    found = {runtime.runtime: runtime for runtime in result.runtimes}
    for name, runtime in found.items():
        if runtime.skipped is not None:
            assert name == "DeepSparse"
            assert "pip install kernelpress[peers]" in runtime.skipped
            continue
        assert runtime.relative_error is not None
        assert runtime.relative_error < 1e-4


def test_quantizers_calibrate_on_the_images_of_batchnorms_statistics(tmp_path: Path) -> None:
    from kernelpress.bench.twins import CALIBRATION_IMAGES, prepare
    from kernelpress.bench.worker import Job

    for batch, batches in ((1, CALIBRATION_IMAGES), (3, CALIBRATION_IMAGES // 3), (10, 1)):
        job = Job("resnet20", "eager", str(tmp_path), 1, batch, 1)
        network = prepare(job, 16, seed=batch)
        given = job.calibration_batches()
        assert [images.shape for images in given] == [(batch, 3, 16, 16)] * batches
        if batch == 10:
            first = network.get_submodule("conv1")(torch.from_numpy(given[0]))
            norm: Any = network.get_submodule("bn1")
            assert torch.allclose(norm.running_mean, first.mean((0, 2, 3)), atol=1e-5)


def test_a_graph_for_inductor_computes_about_the_same_on_rounded_values(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="needs torchao: pip install 'kernelpress[quantize]'")
    from kernelpress.bench.quantizers import for_inductor
    from kernelpress.bench.twins import prepare
    from kernelpress.bench.worker import Job

    job = Job("resnet8", "inductor", str(tmp_path), 1, 2, 1)
    network = prepare(job, 16, seed=5)
    graph, x = for_inductor(job)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert "quantize_per_channel" in graph.code
    with torch.no_grad():
        expected = network(x)
        error = float((graph(x) - expected).norm() / expected.norm())
    assert 1e-4 < error < 0.3


class Answer:
    """Stands for a runtime's process that computed `logits`."""

    def __init__(self, logits: list[float]) -> None:
        self.logits = np.array([logits])
        self.stopped = False

    def output(self) -> np.ndarray[Any, Any]:
        return self.logits

    def stop(self) -> None:
        self.stopped = True


def test_a_runtime_that_computes_something_else_leaves_the_contest() -> None:
    from kernelpress.bench import model_contest as contest

    running: Any = {"eager": Answer([1.0, -2.0]), "close": Answer([1.0, -2.0001]), "wrong": Answer([1.0, -2.1])}
    broken = Answer([float("nan"), 1.0])
    running["broken"] = broken
    results = {name: contest.RuntimeResult(name) for name in running}
    contest._check_outputs(results, running, np.array([[1.0, -2.0]]), 1e-3)
    assert list(running) == ["eager", "close"]
    assert results["close"].relative_error == pytest.approx(5e-5)
    assert results["wrong"].skipped == "logits differ from eager's by 5.0e-02"
    assert results["broken"].skipped is not None
    assert broken.stopped


def test_ratios_are_between_best_rounds_of_ours_and_of_the_best_peer() -> None:
    from recording import model_cells, verdict_on

    told = asdict(model_result(eager=(9.0, 8.0), OpenVINO=(5.0, 4.0, 6.0), kernelpress=(3.0, 2.0), absent=()))
    header, rows = model_cells(told)
    assert [row[header.index("time ÷ ours")] for row in rows] == ["4.00×", "2.00×", "–", "–"]
    assert verdict_on(told) == "Best peer: OpenVINO; ours takes 0.50 of its time"
    told["runtimes"] = told["runtimes"][:2]
    assert verdict_on(told) == ""


def test_ours_in_float32_is_no_peer_of_ours_in_int8() -> None:
    from recording import model_cells, verdict_on

    told = asdict(model_result(OpenVINO=(5.0, 4.0), **{"kernelpress float32": (3.0,), "kernelpress": (2.0,)}))
    header, rows = model_cells(told)
    assert [row[header.index("time ÷ ours")] for row in rows] == ["2.00×", "1.50×", "–"]
    assert verdict_on(told) == "Best peer: OpenVINO; ours takes 0.50 of its time"


def test_the_page_shows_what_was_saved_losses_and_skips_included(tmp_path: Path) -> None:
    import recording

    path = recording.save("models", [model_result(OpenVINO=(5.0, 4.0), kernelpress=(8.0, 9.0), Other=())], tmp_path)
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved["results"][0]["runtimes"][1]["rounds_ms"] == [8.0, 9.0]
    assert saved["machine"]["processor"] == bench.describe_machine().processor
    assert saved["date"]
    row = measure_layer(convolution("test", 1, 5, 12, 7), ROOFLINE, peers=True, rounds=1, budget_seconds=0.005)
    recording.save("dense", [row], tmp_path, roofline=ROOFLINE)
    recording.save("models_int8", [model_result(kernelpress=(1.5,))], tmp_path)
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "Best peer: OpenVINO; ours takes 2.00 of its time." in page
    assert page.index("Whole models, float32") < page.index("Whole models, int8") < page.index("| kernelpress | 1.50")
    assert "| OpenVINO | 4.00 | 4.50 | 5.00 | 0.50× |" in page
    assert "skipped: not installed" in page
    assert row.layer in page
    assert "FMA 100 GFLOP/s" in page
    assert not list(tmp_path.rglob(".*"))


def test_runs_on_other_points_leave_rows_where_they_are_with_their_own_commit(tmp_path: Path) -> None:
    import recording
    from bench_models import KEY

    first = model_result(eager=(9.0,), kernelpress=(3.0,))
    path = recording.save("models", [first, replace(first, batch=16)], tmp_path, key=KEY)
    old = {**json.loads(path.read_text(encoding="utf-8")), "date": "then", "commit": "before"}
    path.write_text(json.dumps(old), encoding="utf-8")
    again = replace(first, runtimes=first.runtimes[:1])
    for _ in range(2):
        recording.save("models", [replace(first, model="alexnet"), again], tmp_path, key=KEY)
    rows = json.loads(path.read_text(encoding="utf-8"))["results"]
    assert [(row["model"], row["batch"], len(row["runtimes"])) for row in rows] == [
        ("mobilenet_v1", 1, 1),
        ("mobilenet_v1", 16, 2),
        ("alexnet", 1, 2),
    ]
    assert [row.get("recorded", {}).get("commit") for row in rows] == [None, "before", None]
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| mobilenet_v1 | 16 | 224×224 | 2 | 9.00 | 3.00 | – | 0.33 | then; commit before" in page
    assert "| alexnet | 1 | 224×224 | 2 | 9.00 | 3.00 | – | 0.33 | 2" in page


def test_growth_changes_one_thing_at_a_time_and_bursts_of_long_calls_are_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import growth

    asked: list[tuple[int, ...]] = []

    def run(options: Any, runtimes: Any, *, batch: int, size: int) -> list[Any]:
        assert [runtime.name for runtime in runtimes] == ["ONNX Runtime", "kernelpress"]
        asked.append((batch, size, options.threads, options.iterations))
        result = model_result(kernelpress=(1.0 * batch,))
        return [replace(result, batch=batch, size=size, threads=options.threads, flops=8_000_000)]

    monkeypatch.setattr(growth, "run", run)
    arguments = ["--batches", "1", "4", "64", "--sizes", "96", "224", "448", "--iterations", "16"]
    growth.main(["--models", "mobilenet_v1", *arguments, "--results", str(tmp_path)])
    assert asked == [(1, 224, 2, 16), (4, 224, 2, 4), (64, 224, 2, 3), (1, 96, 2, 16), (1, 448, 2, 4), (1, 224, 1, 16)]
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| mobilenet_v1 | 4 | 224×224 | 2 | 4.00 | 2 | – |" in page
    assert page.count("| mobilenet_v1 |") == 6


def test_calls_that_take_long_are_warm_after_few(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernelpress.bench import worker

    calls: list[int] = []
    assert worker._settled(lambda: calls.append(1) or len(calls), 5) == 5
    monkeypatch.setattr(worker, "ENOUGH_SECONDS", -1.0)
    assert worker._settled(lambda: calls.append(1) or len(calls), 5) == 6


def test_a_failed_write_leaves_the_old_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import recording

    path = recording.save("overhead", [], tmp_path)
    old, files = path.read_bytes(), sorted(tmp_path.rglob("*"))

    def full_disk(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        recording.save("overhead", [], tmp_path)
    assert path.read_bytes() == old
    assert sorted(tmp_path.rglob("*")) == files


def test_the_table_of_a_network_names_winner_and_skips(capsys: pytest.CaptureFixture[str]) -> None:
    from bench_models import table
    from rich.console import Console

    result = model_result(OpenVINO=(5.0, 4.0), kernelpress=(2.0, 3.0), Other=())
    Console(width=160).print(table(result))
    printed = capsys.readouterr().out
    assert "2.00×" in printed
    assert "Best peer: OpenVINO; ours takes 0.50 of its time" in printed
    assert "skipped: not installed" in printed
