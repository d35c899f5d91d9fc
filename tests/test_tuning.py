"""Tuning: which calls are alike, what `KERNELPRESS_AUTOTUNE` allows, what is kept on disk, and emission that tunes.

Kernels of the backend "triton" stand for all that can be tuned. Unless a test looks at results, launches go to a
recorder that notes their configurations and computes nothing.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_cases import CASES, OpCase
from interpreting import INTERPRETED
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import kernelpress as kp
from kernelpress import ops
from kernelpress.files.sealed import seal, unseal
from kernelpress.kernels.triton.launch import Configuration, launching_with
from kernelpress.ops import registry
from kernelpress.ops.backends import triton
from kernelpress.ops.calls import prepared
from kernelpress.ops.tuning import search, stored
from kernelpress.runtime.torch_private import FakeTensorMode

OutOfResources = pytest.importorskip("triton", reason="pip install triton").OutOfResources


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> Iterator[Path]:
    """An empty cache folder, and nothing said about tuning."""
    monkeypatch.delenv("KERNELPRESS_AUTOTUNE", raising=False)
    stored.forget()
    yield own_cache
    stored.forget()


class Recorder:
    """Takes the launches: `ran` are the configurations so far, `refused` those that take more than the device has."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.refused: set[str] = set()

    def __call__(self, kernel: Any, grid: Any, arguments: Any, constants: Any, configuration: Configuration) -> None:
        if str(configuration) in self.refused:
            raise OutOfResources(300_000, 232_448, "shared memory")
        self.ran.append(str(configuration))

    def prefers(self, best: str) -> Callable[[Callable[[], Tensor]], float]:
        """A clock by which one configuration is the fastest."""

        def measure(run: Callable[[], Tensor]) -> float:
            run()
            return 1.0 if self.ran[-1] == best else 2.0

        return measure


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder = Recorder()
    with triton.TARGET.changed(**INTERPRETED), launching_with(recorder):
        yield recorder


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Instead of measuring: the names that were to be measured, the last of which is the fastest."""
    asked: list[list[str]] = []

    def milliseconds(calls: dict[str, Any], device: torch.device) -> dict[str, float]:
        asked.append(list(calls))
        return {name: 1.0 / (1 + at) for at, name in enumerate(calls)}

    monkeypatch.setattr(search, "milliseconds", milliseconds)
    return asked


def image(batch: int, channels: int = 24, height: int = 5, width: int = 1) -> Tensor:
    return torch.randn(batch, channels, height, width).contiguous(memory_format=torch.channels_last)


WEIGHT = torch.randn(40, 24, 1, 1)


def run(batch: int, weight: Tensor = WEIGHT) -> Tensor:
    return ops.pointwise_conv2d(image(batch), weight, backend="triton")


def names(batch: int) -> tuple[str, ...]:
    """The configurations that are tried for a batch."""
    *_, candidates = search._candidates("pointwise_conv2d", (image(batch), WEIGHT), {}, "triton")
    return candidates.names


def heuristic(batch: int) -> str:
    problem, tensors, _ = search._candidates("pointwise_conv2d", (image(batch), WEIGHT), {}, "triton")
    kernel = registry.operator("pointwise_conv2d").kernel("triton")
    return str(triton.configurations(kernel, problem, tensors)[0])


def tune(batch: int, **options: Any) -> search.Tuning:
    return ops.tune("pointwise_conv2d", image(batch), WEIGHT, backend="triton", **options)


# What is alike


def test_the_fastest_is_kept_and_run_by_every_batch_up_to_the_next_power_of_two(recorder, cache) -> None:
    best = names(8)[-1]
    assert best != heuristic(8)
    found = tune(7, measure=recorder.prefers(best))
    assert found.best == best
    assert set(found.milliseconds) == set(names(8))
    for batch in range(5, 9):
        run(batch)
        assert recorder.ran[-1] == best, f"batch {batch}"
    for batch in (4, 9):
        run(batch)
        assert recorder.ran[-1] == heuristic(batch), f"batch {batch} is of another class"
    (file,) = cache.iterdir()
    assert json.loads(file.read_text())["device"] == INTERPRETED["describe"](0).name


def test_all_of_a_class_choose_from_the_same_configurations() -> None:
    with triton.TARGET.changed(**INTERPRETED):
        kernel = registry.operator("pointwise_conv2d").kernel("triton")
        problem, tensors, _ = search._candidates("pointwise_conv2d", (image(3), WEIGHT), {}, "triton")
        alone = triton.configurations(kernel, problem, tensors)
        assert len(alone) != len(names(3)), "15 rows are fewer than what the class may have"
        assert names(3) == names(4)


@pytest.mark.parametrize(
    ("changed", "is_alike"),
    [
        ({"x": image(6)}, True),
        ({"residual": image(5, 40)}, False),
        ({"x": image(5, height=6)}, False),
        ({"x": image(5, 48)[:, :24]}, False),
        ({"weight": torch.randn(41, 24, 1, 1)}, False),
        ({"bias": torch.randn(40)}, False),
        ({"activation": "relu"}, False),
        ({"x": image(5).half(), "weight": WEIGHT.half()}, False),
    ],
    ids=["batch", "residual", "height", "spacing", "channels", "bias", "activation", "dtype"],
)
def test_only_the_batch_is_rounded(recorder, changed: dict[str, Any], is_alike: bool) -> None:
    def key(**arguments: Any) -> str:
        problem, _, candidates = search._candidates("pointwise_conv2d", (), arguments, "triton")
        return stored.problem_key(candidates.kernel, problem)

    arguments: dict[str, Any] = {"x": image(5), "weight": WEIGHT}
    assert (key(**arguments) == key(**arguments | changed)) is is_alike


def test_float32_in_tf32_and_exact_are_two_classes(recorder, monkeypatch) -> None:
    tune(4, measure=recorder.prefers(names(4)[-1]))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    run(4)
    assert recorder.ran[-1] == heuristic(4)


TUNABLE = [case for case in CASES if registry.operator(case.op).on("triton")]


@pytest.mark.parametrize("case", TUNABLE, ids=lambda case: case.name)
def test_configurations_are_chosen_by_shapes_and_dtypes_alone(recorder, case: OpCase) -> None:
    entry = registry.operator(case.op)
    for dtype in case.dtypes:
        tensors, options, _ = entry.signature.bind(case.tensors(dtype), case.options)
        implementation = registry.implementation(problem := registry.problem_of(entry, tensors, options), "triton")
        assert implementation.candidates is not None
        candidates = implementation.candidates(problem, tensors)
        assert candidates.names
        assert len(set(candidates.names)) == len(candidates.names)


# Measuring


def test_without_a_clock_of_ones_own_all_are_timed(recorder) -> None:
    found = tune(4)
    assert set(found.milliseconds) == set(names(4))
    assert all(time > 0 for time in found.milliseconds.values())
    assert found.best == min(found.milliseconds, key=found.milliseconds.__getitem__)


def test_configurations_that_the_device_refuses_are_left_out(recorder) -> None:
    first, *others = names(4)
    recorder.refused = {first}
    assert set(tune(4).milliseconds) == set(others)
    recorder.refused = set(names(4))
    with pytest.raises(RuntimeError, match="no configuration of triton pointwise_conv2d runs this call: out of resour"):
        tune(4)


def test_when_the_time_is_up_no_further_configuration_is_tried(recorder) -> None:
    assert list(tune(4, seconds=0.0).milliseconds) == [names(4)[0]]


def test_what_cannot_be_tuned_says_why(recorder) -> None:
    with pytest.raises(ValueError, match=r"can be tuned on triton \(.*pointwise_conv2d.*\), got 'max_pool2d'"):
        ops.tune("max_pool2d", image(1), kernel_size=2, stride=2, backend="triton")
    with pytest.raises(ValueError, match="can be tuned on reference"):
        ops.tune("pointwise_conv2d", image(1), WEIGHT, backend="reference")
    with pytest.raises(RuntimeError, match=r"backend 'triton' cannot run this call: .*float64"):
        ops.tune("pointwise_conv2d", image(1).double(), WEIGHT.double(), backend="triton")
    with pytest.raises(ValueError, match=r"something to compute, its output is \[0, 40, 5, 1\]"):
        tune(0)


# KERNELPRESS_AUTOTUNE


def test_zero_means_heuristics_and_reads_nothing(recorder, monkeypatch) -> None:
    tune(4, measure=recorder.prefers(names(4)[-1]))
    monkeypatch.setenv("KERNELPRESS_AUTOTUNE", "0")
    monkeypatch.setattr(stored, "recall", lambda *_: pytest.fail("read what was measured"))
    run(4)
    assert recorder.ran[-1] == heuristic(4)
    assert search.best_known("pointwise_conv2d", image(4), WEIGHT, backend="triton") is None


def test_one_means_that_the_first_call_of_a_class_measures_and_says_so(
    recorder, measured, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KERNELPRESS_AUTOTUNE", "1")
    run(3)
    assert measured == [list(names(4))]
    assert recorder.ran[-1] == names(4)[-1]
    (line,) = capsys.readouterr().err.splitlines()
    for part in ("tuning triton pointwise_conv2d", "[3, 24, 5, 1]", "float32", f"{len(names(4))} configurations"):
        assert part in line
    for weight in (WEIGHT, torch.randn_like(WEIGHT)):
        run(4, weight)
        assert recorder.ran[-1] == names(4)[-1]
    assert len(measured) == 1, "one class"
    prepared.clear()
    stored.forget()
    run(3)
    assert len(measured) == 1, "kept on disk"
    assert capsys.readouterr().err == ""
    run(5)
    assert len(measured) == 2


def test_nothing_said_means_that_no_call_measures(recorder, measured) -> None:
    run(4)
    assert recorder.ran == [heuristic(4)]
    assert measured == []


@pytest.mark.parametrize("value", ["2", "yes", " "])
def test_any_other_value_is_an_error_that_names_the_variable(recorder, monkeypatch, value: str) -> None:
    monkeypatch.setenv("KERNELPRESS_AUTOTUNE", value)
    with pytest.raises(ValueError, match=f"KERNELPRESS_AUTOTUNE: expected 0 .* got '{value}'"):
        run(1)


def test_no_call_measures_while_it_is_captured(recorder, measured, monkeypatch) -> None:
    monkeypatch.setenv("KERNELPRESS_AUTOTUNE", "1")
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_initialized", lambda: True)
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        run(4)
        assert recorder.ran == [heuristic(4)]
        stored.remember("triton pointwise_conv2d", *_problem(8), names(8)[-1])
        run(8)
        assert recorder.ran[-1] == names(8)[-1], "what is known already is used"
    assert measured == []


def _problem(batch: int) -> tuple[registry.Problem, str]:
    problem, _, candidates = search._candidates("pointwise_conv2d", (image(batch), WEIGHT), {}, "triton")
    return problem, candidates.device


def test_no_call_measures_while_it_is_traced_or_watched(recorder, measured, monkeypatch) -> None:
    monkeypatch.setenv("KERNELPRESS_AUTOTUNE", "1")
    kernel = registry.operator("pointwise_conv2d").kernel("triton")
    problem, tensors, _ = search._candidates("pointwise_conv2d", (image(4), WEIGHT), {}, "triton")
    with FlopCounterMode(display=False):
        assert str(triton.configuration_of(kernel, problem, tensors)) == heuristic(4)
    with FakeTensorMode() as mode:
        fakes = [None if t is None else mode.from_tensor(t) for t in tensors]
    assert str(triton.configuration_of(kernel, problem, fakes)) == heuristic(4)
    assert measured == []


def test_an_empty_batch_measures_nothing(recorder, measured, monkeypatch) -> None:
    monkeypatch.setenv("KERNELPRESS_AUTOTUNE", "1")
    assert run(0).shape == (0, 40, 5, 1)
    assert measured == []


def test_where_nothing_can_be_kept_a_class_is_still_measured_once_a_process(
    recorder, measured, monkeypatch, cache
) -> None:
    monkeypatch.setenv("KERNELPRESS_AUTOTUNE", "1")
    cache.write_text("a file where the folder should be")
    for weight in (WEIGHT, torch.randn_like(WEIGHT)):
        run(4, weight)
        assert recorder.ran[-1] == names(4)[-1]
    assert len(measured) == 1
    with pytest.raises(OSError, match="cache"):
        tune(4, measure=recorder.prefers(names(4)[0]))


# The file


def test_threads_that_measure_at_once_lose_nothing(recorder, cache) -> None:
    problem, kernels = _problem(1), [f"kernel {at}" for at in range(24)]
    begin = threading.Barrier(len(kernels))

    def remember(kernel: str) -> None:
        begin.wait()
        stored.remember(kernel, *problem, f"best of {kernel}")

    threads = [threading.Thread(target=remember, args=(kernel,)) for kernel in kernels]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stored.forget()
    assert [stored.recall(kernel, *problem) for kernel in kernels] == [f"best of {kernel}" for kernel in kernels]


def test_what_another_process_wrote_meanwhile_stays(recorder, cache) -> None:
    first, second = _problem(1), _problem(2)
    stored.remember("kernel", *first, "mine")
    assert stored.recall("kernel", *second) is None
    (file,) = cache.iterdir()
    content = unseal(file.read_bytes(), "tuned configurations", 1, file.name)
    content["configurations"][stored.problem_key("kernel", second[0])] = "theirs"
    file.write_bytes(seal("tuned configurations", 1, content))
    stored.remember("kernel", *_problem(4), "mine too")
    assert stored.recall("kernel", *second) == "theirs"
    assert stored.recall("kernel", *first) == "mine"


# Emission


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(24, 40, 1), nn.ReLU()).eval()


def timings(cache: Path) -> dict[str, float]:
    """What emission measured of layers on the backend "triton"."""
    (file,) = cache.glob("timings-*.json")
    found = json.loads(file.read_text())["milliseconds"]
    return {key: time for key, time in found.items() if "triton" in key}


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted_triton")
class TestEmission:
    def test_kernels_are_tuned_before_they_are_timed_and_again_when_that_changes(self, model, measured, cache) -> None:
        x = image(1, height=20)
        kp.emit(model, x, progress=False)
        (tried,) = measured
        before = timings(cache)
        assert {key.partition("; tiles ")[2] for key in before} == {tried[-1]}

        kp.emit(model, x, progress=False)
        assert len(measured) == 1, "tuned and timed already"
        assert timings(cache) == before

        (layer, _) = model
        ops.tune("pointwise_conv2d", x, layer.weight, layer.bias, activation="relu", backend="triton", seconds=0.0)
        kp.emit(model, x, progress=False)
        (added,) = set(timings(cache)) - set(before)
        assert added.endswith(f"tiles {measured[-1][0]}")

    def test_zero_leaves_it_to_the_heuristics(self, model, measured, cache, monkeypatch) -> None:
        monkeypatch.setenv("KERNELPRESS_AUTOTUNE", "0")
        kp.emit(model, image(1, height=20), progress=False)
        assert measured == []
        assert {key.partition("; tiles ")[2] for key in timings(cache)} == {"by heuristic"}

    def test_with_costs_given_nothing_is_measured(self, model, measured) -> None:
        kp.emit(
            model, image(1, height=20), progress=False, cost=lambda candidate: 1.0 + (candidate.variant != "triton")
        )
        assert measured == []
