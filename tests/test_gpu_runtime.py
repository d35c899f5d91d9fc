"""Plans as CUDA graphs, the device's clock and `make gpu`, on machines that have no GPU: what talks to the device is
replaced by stand-ins that note what is asked of them."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emitting import FUSED_BACKENDS, prefer
from torch import Tensor, nn

import kernelpress as kp
from kernelpress import ops
from kernelpress.emit import evaluate, pipeline
from kernelpress.emit.cache import TimingCache
from kernelpress.emit.plans import cuda_plan, plan
from kernelpress.emit.plans.cuda_plan import CudaPlan
from kernelpress.ops.backends import triton
from kernelpress.ops.calls import prepared
from kernelpress.runtime import device_clock
from kernelpress.runtime.clock import Timing
from kernelpress.runtime.cuda_graph import Recording, record

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
CUDA = torch.device("cuda", 0)


class FakeCuda:
    """`torch.cuda`, as far as the runtime uses it: every call is a line of `log`; a graph keeps what it recorded."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.streams = 0
        self.current = "default"
        self.clock = 0.0
        self.recorded: list[Callable[[], object]] = []

    def install(self, patch: pytest.MonkeyPatch) -> FakeCuda:
        replaced: dict[str, Any] = {
            "device": lambda device: self.within(f"device {device}"),
            "current_stream": lambda device=None: FakeStream(self, self.current),
            "Stream": lambda device=None: FakeStream(self),
            "stream": lambda stream: self.on(stream),
            "Event": lambda enable_timing=False: FakeEvent(self),
            "CUDAGraph": lambda: FakeGraph(self),
            "graph_pool_handle": lambda: (0, 1),
            "synchronize": lambda device=None: self.log.append("synchronize"),
            "memory_reserved": lambda device: 1 << 20,
            "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1 << 10),
        }
        for name, stand_in in replaced.items():
            patch.setattr(torch.cuda, name, stand_in)
        patch.setattr(device_clock, "sleep", lambda cycles: self.log.append("sleep"))
        return self

    def within(self, what: str) -> Any:
        return _Block(lambda: None, lambda: None)

    def on(self, stream: FakeStream) -> Any:
        before = self.current

        def enter() -> None:
            self.current = stream.name

        def leave() -> None:
            self.current = before

        return _Block(enter, leave)


class _Block:
    def __init__(self, enter: Callable[[], None], leave: Callable[[], None]) -> None:
        self.enter, self.leave = enter, leave

    def __enter__(self) -> None:
        self.enter()

    def __exit__(self, *error: object) -> None:
        self.leave()


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str | None = None) -> None:
        self.cuda = cuda
        if name is None:
            cuda.streams += 1
            name = f"stream {cuda.streams}"
        self.name = name

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: FakeEvent) -> None:
        self.cuda.log.append(f"{self.name} waits for an event")


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.at = 0.0

    def record(self, stream: FakeStream | None = None) -> None:
        self.at = self.cuda.clock
        self.cuda.log.append("event")

    def elapsed_time(self, other: FakeEvent) -> float:
        return other.at - self.at

    def synchronize(self) -> None:
        self.cuda.log.append("wait for the last call")


class FakeGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        self.cuda.log.append(f"begin on {self.cuda.current}, {capture_error_mode}")

    def capture_end(self) -> None:
        self.cuda.log.append("end")

    def replay(self) -> None:
        self.cuda.log.append("replay")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda().install(monkeypatch)


class TestRecord:
    def test_warm_ups_run_beside_the_callers_stream_and_the_recording_on_one_of_its_own(self, cuda: FakeCuda) -> None:
        recording = record(lambda: cuda.log.append(f"runs on {cuda.current}") or 7, CUDA)
        assert recording.outputs == 7
        assert cuda.log == [
            "stream 1 waits for default",
            *["runs on stream 1"] * 2,
            "default waits for stream 1",
            "synchronize",
            "begin on stream 2, thread_local",
            "runs on stream 2",
            "end",
        ]
        assert cuda.current == "default"

    def test_no_gradients_are_recorded(self, cuda: FakeCuda) -> None:
        assert record(torch.is_grad_enabled, CUDA).outputs is False

    def test_a_recording_that_fails_is_ended_and_says_why(self, cuda: FakeCuda) -> None:
        calls = iter([None, None, RuntimeError("operation not permitted when stream is capturing")])

        def function() -> None:
            if (error := next(calls)) is not None:
                raise error

        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            record(function, CUDA)
        assert cuda.log[-1] == "end"
        assert cuda.current == "default"


class TestDeviceClock:
    def test_samples_are_what_lies_between_two_events_after_a_flush(self, cuda: FakeCuda, monkeypatch: Any) -> None:
        monkeypatch.setattr(device_clock, "_cache_flush", lambda device: lambda: cuda.log.append("flush"))

        def takes(milliseconds: float) -> Callable[[], None]:
            def call() -> None:
                cuda.log.append("call")
                cuda.clock += milliseconds

            return call

        timings = device_clock.time_on_device({"a": takes(0.5), "b": takes(2.0)}, CUDA, budget_seconds=6e-3, rounds=2)
        assert timings["a"].median == pytest.approx(0.5)
        assert timings["b"].median == pytest.approx(2.0)
        assert timings["a"].calls == 2 * 6
        assert timings["b"].calls == 2 * device_clock.MIN_SAMPLES_PER_ROUND
        sample = ["flush", "event", "call", "event"]
        assert cuda.log[: 3 * 4 + 1] == [*sample * 3, "synchronize"]

    def test_whole_models_keep_their_cache_and_get_a_head_start(self, cuda: FakeCuda) -> None:
        device_clock.time_on_device({"a": lambda: None}, CUDA, flush_cache=False)
        assert cuda.log[:3] == ["sleep", "event", "event"]

    def test_candidates_are_timed_as_graphs_or_as_calls_where_they_cannot_be(
        self, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(device_clock, "_cache_flush", lambda device: lambda: None)
        calls = {"good": 0, "bad": 0}

        def good() -> None:
            calls["good"] += 1

        def bad() -> None:
            calls["bad"] += 1
            if any(line.startswith("begin") for line in cuda.log[-1:]):
                raise RuntimeError("cannot be recorded")

        device_clock.time_graphs({"good": good, "bad": bad}, CUDA, budget_seconds=1e-3, rounds=1)
        assert calls["good"] == 3, "two warm-ups and the recording"
        assert calls["bad"] > 3
        assert cuda.log.count("replay") > 3

    @pytest.mark.parametrize("arguments", [{"rounds": 0}, {"budget_seconds": 0.0}, {"warmup": -1}])
    def test_bad_arguments_are_named(self, cuda: FakeCuda, arguments: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=f"{next(iter(arguments))}: expected a positive"):
            device_clock.time_on_device({"a": lambda: None}, CUDA, **arguments)
        with pytest.raises(ValueError, match="at least one callable"):
            device_clock.time_on_device({}, CUDA)


class Small(nn.Module):
    """A kernelpress layer, a view, operations of torch, an input handed through, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        y = self.conv(x).relu()
        return {"map": F.leaky_relu(y * scale), "flat": y.flatten(2), "same": scale}


class Replayed(Recording[Any]):
    """A recording whose replay runs the function again and writes its results where the first ones are."""

    def replay(self) -> None:
        for old, new in zip(self.outputs, self.graph(), strict=True):  # type: ignore[operator]
            old.copy_(new)


@pytest.fixture
def small(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, CudaPlan]:
    """A model and its plan, on the CPU in place of a device."""
    example = (torch.randn(2, 3, 6, 5), torch.randn(1))
    emitted = kp.emit(Small().eval(), example, cost=prefer("reference"), progress=False)

    def on_cpu(function: Callable[[], Any], device: torch.device, **options: Any) -> Recording[Any]:
        outputs = list(function())
        return Replayed(function, outputs, 512)  # type: ignore[arg-type]

    monkeypatch.setattr(cuda_plan, "record", on_cpu)
    monkeypatch.setattr(plan, "_cuda_device", lambda model, inputs: torch.device("cpu"))
    return emitted, kp.capture(emitted, *example)


class TestCudaPlan:
    def test_it_computes_what_the_model_does_from_inputs_in_any_format(self, small: tuple[Any, CudaPlan]) -> None:
        emitted, captured = small
        assert isinstance(captured, CudaPlan)
        wide = torch.randn(4, 6, 6, 5)
        for x in (torch.randn(2, 3, 6, 5), wide[::2, ::2], wide[:2, :3].contiguous(memory_format=torch.channels_last)):
            scale = torch.randn(1)
            result, expected = captured(x, scale), emitted(x, scale)
            assert set(result) == set(expected)
            for name in expected:
                torch.testing.assert_close(result[name], expected[name])
                assert not result[name].requires_grad

    def test_results_and_inputs_outlive_the_next_call(self, small: tuple[Any, CudaPlan]) -> None:
        _, captured = small
        x, scale = torch.randn(2, 3, 6, 5), torch.ones(1)
        first = captured(x, scale)
        kept = {name: t.clone() for name, t in first.items()}
        captured(torch.randn(2, 3, 6, 5), torch.zeros(1))
        assert all(torch.equal(first[name], kept[name]) for name in kept)
        assert scale.item() == 1

    def test_each_call_waits_for_the_one_before_and_leaves_a_mark(
        self, small: tuple[Any, CudaPlan], cuda: FakeCuda
    ) -> None:
        _, captured = small
        cuda.log.clear()
        captured(torch.randn(2, 3, 6, 5), torch.ones(1))
        assert cuda.log == ["default waits for an event", "event"]

    def test_calls_of_several_threads_get_their_own_results(self, small: tuple[Any, CudaPlan]) -> None:
        emitted, captured = small
        inputs = [(torch.randn(2, 3, 6, 5), torch.randn(1)) for _ in range(6)]
        expected = [emitted(*given)["map"] for given in inputs]
        wrong: list[int] = []

        def work(i: int) -> None:
            wrong.extend(i for _ in range(20) if not torch.equal(captured(*inputs[i])["map"], expected[i]))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            ((torch.zeros(1, 3, 6, 5), torch.zeros(1)), r"x\.shape\[0\] .*: expected 2 as captured, got 1"),
            ((torch.zeros(2, 3, 6, 5).half(), torch.zeros(1)), r"x: expected torch.float32 as captured"),
            ((torch.zeros(2, 3, 6, 5), torch.zeros(1, device="meta")), r"scale: expected a tensor on cpu"),
            ((torch.zeros(2, 3, 6, 5), 1.0), r"scale: expected a Tensor as captured, got float"),
            ((torch.zeros(2, 3, 6, 5),), r"inputs: expected 2 as captured \(x, scale\), got 1"),
        ],
    )
    def test_other_inputs_are_refused(self, small: tuple[Any, CudaPlan], inputs: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            small[1](*inputs)

    def test_steps_tell_who_runs_what_and_views_are_none(self, small: tuple[Any, CudaPlan]) -> None:
        _, captured = small
        assert captured.steps[0] == "torch conv2d[reference]"
        assert "torch aten.leaky_relu.default" in captured.steps
        assert not any("view" in step or "flatten" in step or "reshape" in step for step in captured.steps)
        assert captured.native_steps == 0
        assert captured.arena_bytes == 512
        assert repr(captured) == f"CudaPlan(0 native steps, {len(captured)} torch steps, pool of 512 bytes)"

    @pytest.mark.parametrize(
        "change",
        [
            lambda p: p.mul_(2),
            lambda p: p.data.mul_(2),
            lambda p: setattr(p, "data", torch.zeros_like(p)),
            lambda p: p.share_memory_(),
        ],
        ids=["in place", "through .data", "other .data", "share_memory"],
    )
    def test_it_keeps_the_captured_weights_although_model_and_ops_forget_them(
        self, small: tuple[Any, CudaPlan], change: Callable[[Tensor], object]
    ) -> None:
        emitted, captured = small
        given = torch.randn(2, 3, 6, 5), torch.ones(1)
        expected = captured(*given)["map"]
        with torch.no_grad():
            prepared.clear()
            for parameter in emitted.body.parameters():
                change(parameter)
        assert len(captured._layers._runs) == 1
        assert torch.equal(captured(*given)["map"], expected)
        again = kp.capture(emitted, *given)
        torch.testing.assert_close(again(*given)["map"], emitted(*given)["map"])

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda plan: pickle.loads(pickle.dumps(plan))])
    def test_copies_are_captured_again(self, small: tuple[Any, CudaPlan], copied: Callable[[Any], Any]) -> None:
        emitted, captured = small
        same, given = copied(captured), (torch.randn(2, 3, 6, 5), torch.randn(1))
        assert isinstance(same, CudaPlan)
        assert torch.equal(same(*given)["map"], captured(*given)["map"])
        with torch.no_grad():
            emitted.body.get_parameter("conv.bias").add_(1)
        with pytest.raises(TypeError, match="plan: cannot be copied or pickled"):
            copied(captured)

    def test_weights_that_the_graph_computes_are_computed_at_each_call(
        self, cuda: FakeCuda, small: tuple[Any, CudaPlan]
    ) -> None:
        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.randn(8, 3, 1, 1))

            def forward(self, x: Tensor) -> Tensor:
                return ops.pointwise_conv2d(x, self.weight * x.mean(), backend=FUSED_BACKENDS[-1])

        model = Scaled().eval().requires_grad_(False)
        emitted = kp.emit(model, torch.randn(2, 3, 6, 5), progress=False, cost=prefer(FUSED_BACKENDS[-1]))
        captured = kp.capture(emitted, torch.randn(2, 3, 6, 5))
        for _ in range(2):
            x = torch.randn(2, 3, 6, 5)
            torch.testing.assert_close(captured(x), model(x))

    def test_the_last_call_is_waited_for_before_the_memory_goes(
        self, small: tuple[Any, CudaPlan], cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        emitted, _ = small
        other = kp.capture(emitted, torch.randn(2, 3, 6, 5), torch.randn(1))
        cuda.log.clear()
        del other
        assert cuda.log == ["wait for the last call"]

    def test_a_model_that_cannot_be_a_graph_is_refused_with_the_place(
        self, small: tuple[Any, CudaPlan], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(function: Callable[[], Any], device: torch.device) -> None:
            function()
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

        monkeypatch.setattr(cuda_plan, "record", refuse)
        with pytest.raises(
            RuntimeError, match=r"model: cannot be captured as a CUDA graph, at \w+: operation not perm"
        ):
            kp.capture(small[0], torch.randn(2, 3, 6, 5), torch.randn(1))

    def test_running_out_of_memory_stays_that_error(
        self, small: tuple[Any, CudaPlan], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(function: Callable[[], Any], device: torch.device) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(cuda_plan, "record", refuse)
        with pytest.raises(torch.OutOfMemoryError):
            kp.capture(small[0], torch.randn(2, 3, 6, 5), torch.randn(1))


def test_the_device_of_a_model_is_that_of_its_inputs_and_weights() -> None:
    def tensor(device: torch.device) -> Any:
        return SimpleNamespace(device=device)

    def model(device: torch.device) -> Any:
        return SimpleNamespace(body=SimpleNamespace(named_parameters=lambda: [("w", tensor(device))]))

    cpu = torch.device("cpu")
    inputs = [torch.zeros(1)]
    assert plan._cuda_device(model(cpu), inputs) is None
    with pytest.raises(ValueError, match=r"example_inputs\[0\]: expected the device cuda:0, as of the others, got cpu"):
        plan._cuda_device(model(CUDA), inputs)
    assert plan._cuda_device(model(CUDA), [1.0]) == CUDA


def test_emission_times_layers_and_models_by_the_devices_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def fake(calls: Any, device: torch.device, **options: Any) -> dict[str, Any]:
        asked.append(options)
        return dict.fromkeys(calls, Timing(2.0, 1.0, 3.0, (2.0,), 1, 1))

    for module in (evaluate, pipeline):
        monkeypatch.setattr(module, "time_graphs", fake)
        monkeypatch.setattr(module, "race", lambda *a, **k: pytest.fail("the host's clock"))
    cache = TimingCache(torch.device("cpu"), enabled=False)
    evaluate._time({"layer": lambda: None}, [{("layer",)}], CUDA, cache)
    assert cache.get("layer") == 1.0
    assert pipeline._time_models({"model": lambda: None}, CUDA) == {"model": 2.0}
    assert "flush_cache" not in asked[0]
    assert asked[1]["flush_cache"] is False
    monkeypatch.setattr(evaluate, "race", lambda calls, rivals, **k: asked.append(k) or {"host": 4.0})
    evaluate._time({"host": lambda: None}, [{("host",), ("layer",)}], torch.device("cpu"), cache)
    assert asked[2] == {"known": {"layer": 1.0}, "before_sample": evaluate.empty_inner_caches}
    assert cache.get("host") == 4.0


@pytest.fixture(scope="module")
def gpu() -> Any:
    """The package that `make gpu` runs."""
    import gpu.__main__
    import gpu.contest
    import gpu.kernels
    import gpu.networks

    return gpu


FAMILIES = ("dense", "depthwise", "separable", "grouped", "ghost", "sparse", "int8")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_layer_meets_its_peers_in_a_dry_run(gpu: Any, family: str) -> None:
    from gpu.contest import measure
    from gpu.place import DRY
    from gpu.roofline import Roofline

    roofline = Roofline(4300.0, 790.0, 1600.0)
    layers = {(layer.op, layer.network): layer for layer in gpu.contest.family_layers(family, DRY)}
    for layer in layers.values():
        row = measure(layer, DRY, roofline)
        reasons = {entry.name: entry.reason for entry in row.contestants if entry.reason}
        assert set(reasons) <= {"torch BSR (Triton)"}, reasons
        assert row.ms is not None
        assert row.relative_error is not None
        assert row.relative_error < 1e-3
        assert row.best_peer is not None


def test_real_shapes_are_those_of_the_networks(gpu: Any) -> None:
    from gpu.place import Place

    place = Place(CUDA, torch.bfloat16, False)
    layers = {family: gpu.contest.family_layers(family, place) for family in FAMILIES}
    assert {layer.batch for layer in layers["depthwise"]} == {1, 32, 256}
    assert [layer.batch for layer in layers["depthwise"][:3]] == [32, 256, 1], "each turn sees all batches"
    product = next(layer for layer in layers["int8"] if layer.label == "8192×8192×8192")
    assert product.flops == 2 * 8192**3
    dense = next(layer for layer in layers["depthwise"] if layer.batch == 256)
    assert dense.traffic_bytes(torch.bfloat16) > 256 * 112 * 112 * 32 * 2 * 2


def test_inductor_joins_a_row_on_its_scale(gpu: Any) -> None:
    from gpu.contest import measure, with_inductor
    from gpu.place import DRY
    from gpu.roofline import Roofline

    roofline = Roofline(4300.0, 790.0, 1600.0)
    layer = gpu.contest.family_layers("grouped", DRY)[0]
    row = measure(layer, DRY, roofline)
    joined = with_inductor(row, layer, DRY, roofline)
    assert joined.contestants[-1].name == "Inductor"
    assert joined.contestants[-1].ms is not None, joined.contestants[-1].reason
    assert joined.ms == row.ms


def test_a_wrong_result_is_no_contestant(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu.contest import measure
    from gpu.place import DRY
    from gpu.roofline import Roofline

    from kernelpress.bench import ours

    layer = gpu.contest.family_layers("ghost", DRY)[0]
    right = ours.on_backend
    monkeypatch.setattr(ours, "on_backend", lambda *given: lambda: right(*given)() * 1.1)
    row = measure(layer, DRY, Roofline(4300.0, 790.0, 1600.0))
    assert row.ms is None
    assert row.ratio is None
    assert (
        next(entry.reason for entry in row.contestants if entry.name == "kernelpress") == "its result is off by 1.0e-01"
    )


@pytest.mark.usefixtures("interpreted_triton")
@pytest.mark.parametrize(("family", "op"), [("dense", "linear"), ("grouped", "channel_shuffle")])
def test_a_triton_kernel_is_tuned_and_stands_beside_ours(
    gpu: Any, family: str, op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu import contest, place, results
    from gpu.roofline import Roofline

    from kernelpress.bench.contest import TRITON

    tuned: list[str] = []
    monkeypatch.setattr(contest.ops, "tune", lambda name, *_, **options: tuned.append(f"{options['backend']} {name}"))
    layer = next(layer for layer in gpu.contest.family_layers(family, place.DRY) if layer.op == op)
    roofline = Roofline(4300.0, 790.0, 1600.0)
    row = contest.measure(layer, place.DRY, roofline)
    assert tuned == [f"triton {op}"]
    (entry,) = (entry for entry in row.contestants if entry.name == TRITON)
    assert row.backend == "reference"
    assert row.triton_ratio == pytest.approx(entry.ms / row.ms)
    assert row.best_peer != TRITON
    results.save(family, [row], place.DRY, roofline, tmp_path)
    assert f"{row.triton_ratio:.2f}×" in (tmp_path / "dry-run" / "README.md").read_text()


def test_without_a_triton_kernel_that_runs_there_is_none_beside_ours(gpu: Any) -> None:
    from gpu.place import DRY

    from kernelpress.bench.contest import TRITON

    layers = gpu.contest.family_layers("dense", DRY)
    assert not any(gpu.contest.contest_of(layer, DRY).calls[TRITON] for layer in layers[:3])


def test_models_leave_triton_out_unless_asked(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons: list[str | None] = []
    monkeypatch.setattr(gpu.networks, "capture_all", lambda place: reasons.append(triton.TARGET.reason(None)) or 0)
    before = triton.TARGET.reason(None)
    assert gpu.networks.main(["capture", "--dry-run"]) == 0
    assert gpu.networks.main(["capture", "--dry-run", "--triton"]) == 0
    assert reasons == ["left out: gpu.networks --triton", before]


def test_triton_is_checked_by_families_where_it_is_installed(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = gpu.__main__
    names = {stage.name for stage in driver._checks(None, False, 90.0)}
    assert {f"triton-{family}" for family in FAMILIES} <= names
    assert "triton-int8" in {stage.name for stage in driver._checks("int8", False, 90.0)}
    assert not any("triton" in result.name for result in driver._absent(False))
    monkeypatch.setattr(driver, "find_spec", lambda name: None)
    assert not any("triton" in stage.name for stage in driver._checks(None, False, 90.0))
    (absent,) = [result for result in driver._absent(False) if result.name == "triton"]
    assert (absent.outcome, absent.is_good) == ("skipped", True)
    assert "pip install triton" in absent.last_lines


def test_every_case_with_a_triton_kernel_is_checked_on_it(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import cuda_cases
    from gpu import checks

    ran: list[str] = []
    monkeypatch.setattr(cuda_cases, "check", lambda case, dtype, device, backend: ran.append(f"{case.op} {backend}"))
    outcomes = list(checks.outcomes("triton", torch.device("cuda"), "depthwise"))
    assert [outcome.result for outcome in outcomes] == ["passed"] * len(ran)
    assert set(ran) == {"depthwise_conv2d triton"}
    assert len(ran) == 3 * 7


@pytest.mark.slow
def test_models_are_captured_and_timed_in_a_dry_run(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu.place import DRY

    monkeypatch.setattr(gpu.networks, "MODELS", ("resnet20",))
    assert gpu.networks.capture_all(DRY) == 0
    assert gpu.networks.bench(DRY, 60.0, tmp_path) == 0
    (result,) = json.loads((tmp_path / "dry-run" / "models.json").read_text())["results"]
    assert result["ms"] > 0
    assert {peer["name"] for peer in result["contestants"]} == {"eager, captured", gpu.networks.AUTOTUNED}
    assert "resnet20" in (tmp_path / "dry-run" / "README.md").read_text()


@pytest.mark.slow
def test_the_driver_runs_a_family_from_end_to_end(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gpu", "--dry-run", "--family", "ghost", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/")
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "dry-run" / "ghost.json").read_text())
    assert content["results"]
    assert not content["left_out"]
    page = (tmp_path / "dry-run" / "README.md").read_text()
    assert "ghost_conv2d 8×8 16→16 relu" in page
    assert "bench-ghost.log" in (tmp_path / "log.txt").read_text()


@pytest.mark.slow
def test_without_a_device_the_driver_says_what_it_needs() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device; one without runs it")
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
    done = subprocess.run([sys.executable, "-m", "gpu"], capture_output=True, text=True, env=environment, cwd="/")
    assert done.returncode == 1
    assert "this needs an NVIDIA GPU and a torch built for it" in done.stderr


@pytest.mark.slow
def test_a_stage_that_fails_or_hangs_stops_no_other(gpu: Any, tmp_path: Path) -> None:
    from gpu.stages import Stage, run_beside

    stages = [
        Stage("good", (sys.executable, "-c", "print('done')"), 30.0),
        Stage("bad", (sys.executable, "-c", "raise SystemExit('broken')"), 30.0),
        Stage("slow", ("sh", "-c", "echo begun; exec sleep 60"), 3.0),
        Stage("patient", ("sleep", "60"), 0.1, may_be_stopped=True),
    ]
    results = run_beside(stages, dict(os.environ), tmp_path, tmp_path / "logs")
    assert [result.outcome for result in results] == ["passed", "failed", "out of time", "stopped"]
    assert [result.is_good for result in results] == [True, False, False, True]
    assert "broken" in results[1].last_lines
    assert results[2].last_lines == "begun"


def test_golden_vectors_are_checked_and_a_wrong_one_is_told(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import cuda_golden
    from gpu import checks

    monkeypatch.setattr(cuda_golden, "compile_for_device", lambda folder: folder)
    monkeypatch.setattr(cuda_golden, "on_gpu", lambda library: cuda_golden.on_emulator)
    outcomes = list(checks.outcomes("golden", torch.device("cuda")))
    assert len(outcomes) >= 30
    assert [outcome for outcome in outcomes if outcome.result != "passed"] == []
    right = cuda_golden.on_emulator
    monkeypatch.setattr(cuda_golden, "on_gpu", lambda library: lambda *given: ~right(*given))
    outcomes = list(checks.outcomes("golden", torch.device("cuda")))
    assert {outcome.result for outcome in outcomes} == {"failed"}
    assert "AssertionError (dp4a_multiplies_signed_bytes, line" in next(
        outcome.reason for outcome in outcomes if outcome.name == "dp4a_multiplies_signed_bytes"
    )


class TestPlainBuild:
    @pytest.fixture
    def plan(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.syspath_prepend(str(ROOT))
        from build_plain import Plan

        (tmp_path / "a.txt").write_text("a")
        (tmp_path / "b.txt").write_text("b")
        made = Plan()
        made.variable("tool", "cat")
        note = "printf '$out: $in extra.txt\\n' > $out.d"
        made.rule("copy", f"$tool $in > $out && {note} && echo $$HOME $extra >> log", depfile="$out.d")
        made.rule("join", "$tool $in > $out && echo join >> log")
        parts = [*made.build("out/a", "copy", "a.txt"), *made.build("out/b", "copy", "b.txt", {"extra": "more"})]
        made.build("out/all", "join", parts)
        return made

    def test_it_runs_what_is_stale_and_nothing_else(self, plan: Any, tmp_path: Path) -> None:
        log, extra = tmp_path / "log", tmp_path / "extra.txt"
        extra.write_text("")
        plan.run(tmp_path, 2)
        assert (tmp_path / "out/all").read_text() == "ab"
        assert len(log.read_text().splitlines()) == 3
        plan.run(tmp_path, 2)
        assert len(log.read_text().splitlines()) == 3
        os.utime(extra, ns=(extra.stat().st_atime_ns, (tmp_path / "out/b").stat().st_mtime_ns + 10**9))
        plan.run(tmp_path, 2)
        assert len(log.read_text().splitlines()) >= 5, "both copies depend on it"

    def test_another_command_makes_it_stale_and_a_failure_is_told(self, plan: Any, tmp_path: Path) -> None:
        (tmp_path / "extra.txt").write_text("")
        plan.run(tmp_path, 1)
        failing = type(plan)()
        failing.rule("copy", "false")
        failing.build("out/a", "copy", "a.txt")
        with pytest.raises(subprocess.CalledProcessError):
            failing.run(tmp_path, 1)
