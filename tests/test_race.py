"""Times of rivals: who cannot win is sampled little, and nothing that could is left behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch

from kernelpress.measure.race import Heat, race
from kernelpress.runtime import clock as runtime_clock

HEATS = (Heat(2, 2.0), Heat(3, 1.2), Heat(4, 1.0))


class Track:
    """Calls that last so many milliseconds each, on a clock of their own, and how often they ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.runs: dict[str, int] = {}
        monkeypatch.setattr(runtime_clock, "time", SimpleNamespace(perf_counter_ns=lambda: self.now))

    def call(self, name: str, *milliseconds: float) -> Callable[[], None]:
        """Lasts the last of `milliseconds` from the call on that the others do not reach."""

        def run() -> None:
            count = self.runs[name] = self.runs.get(name, 0) + 1
            self.now += milliseconds[min(count, len(milliseconds)) - 1] * 1e6

        return run

    def race(self, rivals: Sequence[set[tuple[str, ...]]], **times: float) -> dict[str, float]:
        return race({name: self.call(name, time) for name, time in times.items()}, rivals, heats=HEATS)


@pytest.fixture
def track(monkeypatch: pytest.MonkeyPatch) -> Track:
    return Track(monkeypatch)


def test_who_is_far_behind_leaves_early(track: Track) -> None:
    times = track.race([{("a",), ("b",), ("c",)}], a=1.0, b=1.5, c=2.5)
    assert times == pytest.approx({"a": 1.0, "b": 1.5, "c": 2.5})
    assert track.runs == {"a": 1 + 2 + 1 + 3 + 1 + 4, "b": 1 + 2 + 1 + 3, "c": 1 + 2}


def test_long_calls_are_sampled_less(track: Track) -> None:
    assert track.race([{("a",), ("b",)}], a=20.0, b=100.0) == pytest.approx({"a": 20.0, "b": 100.0})
    assert track.runs == {"a": 1 + 2 + 1 + 3 + 1 + 3, "b": 1 + 1}


def test_a_race_may_end_when_it_is_decided(track: Track) -> None:
    calls = {"a": track.call("a", 1.0), "b": track.call("b", 3.0)}
    assert race(calls, [{("a",), ("b",)}], heats=HEATS, until_decided=True) == pytest.approx({"a": 1.0, "b": 3.0})
    assert track.runs == {"a": 3, "b": 3}


def test_times_of_a_sequence_add_up(track: Track) -> None:
    track.race([{("a",), ("b", "c")}], a=1.0, b=0.9, c=0.8)
    assert track.runs["b"] == track.runs["c"] < track.runs["a"]


def test_who_leads_anywhere_stays_in_the_race(track: Track) -> None:
    track.race([{("a",), ("b",)}, {("b",), ("c",)}], a=1.0, b=5.0, c=9.0)
    assert track.runs["a"] == track.runs["b"] > track.runs["c"]


def test_rivals_measured_before_count(track: Track) -> None:
    calls = {"a": track.call("a", 5.0)}
    assert race(calls, [{("a",), ("b",)}], known={"b": 1.0}, heats=HEATS) == pytest.approx({"a": 5.0})
    assert track.runs == {"a": 3}


def test_one_slow_sample_costs_nobody_the_race(track: Track) -> None:
    calls = {"a": track.call("a", 1.0), "b": track.call("b", 1.0, 9.0, 1.0)}
    assert race(calls, [{("a",), ("b",)}], heats=HEATS) == pytest.approx({"a": 1.0, "b": 1.0})
    assert track.runs["a"] == track.runs["b"]


def test_caches_are_emptied_before_each_sample_and_gradients_are_off(track: Track) -> None:
    seen: list[str] = []
    call = track.call("a", 1.0)
    race(
        {"a": lambda: (call(), seen.append("run" if not torch.is_grad_enabled() else "gradients"))},
        [{("a",)}],
        before_sample=lambda: seen.append("emptied"),
        heats=(Heat(2, 1.0),),
    )
    assert seen == ["run", "emptied", "run", "emptied", "run"]
