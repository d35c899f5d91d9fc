"""Latency, memory, energy, FLOPs and the comparison made of them."""

import itertools
import json
import time
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn

from kernelpress import measure
from kernelpress.measure.energy import energy_per_call
from kernelpress.measure.memory import peak_memory_bytes
from kernelpress.measure.theory import int8_peak_ratio
from kernelpress.measure.units import count_text, latency_text, memory_text, text_table
from kernelpress.runtime import clock as runtime_clock
from kernelpress.runtime.clock import Timing

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def small_network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)).eval()


def sleeper(milliseconds: float):
    return lambda: time.sleep(milliseconds * 1e-3)


@pytest.fixture
def wait(monkeypatch):
    """Lets so many milliseconds pass, and no others, on the clock that calls are timed by."""
    clock = [0.0]
    monkeypatch.setattr(runtime_clock, "time", SimpleNamespace(perf_counter_ns=lambda: clock[0]))

    def wait(milliseconds: float) -> None:
        clock[0] += milliseconds * 1e6

    return wait


class TestLatency:
    def test_a_sleep_takes_no_less_than_its_length(self):
        timing = measure.time_alternately({"sleep": sleeper(5)}, budget_seconds=0.1, rounds=2)["sleep"]
        assert timing.median >= 5
        assert timing.p10 <= timing.median <= timing.p90
        assert timing.median == min(timing.rounds)

    def test_a_call_is_measured_to_its_length(self, wait):
        timing = measure.time_alternately({"x": lambda: wait(5)}, budget_seconds=0.1, rounds=2)["x"]
        assert (timing.p10, timing.median, timing.p90) == pytest.approx((5, 5, 5))
        assert timing.calls == 0.1 / 5e-3

    def test_candidates_run_in_turn_within_each_round(self, wait):
        order: list[str] = []
        candidates = {name: (lambda name=name: (order.append(name), wait(1))) for name in "abc"}
        measure.time_alternately(candidates, rounds=2, repeats=2, warmup=1)
        assert [name for name, _ in itertools.groupby(order)] == list("abc" * 3)

    def test_best_round_gives_the_median_and_the_others_the_spread(self, wait):
        durations = iter([1] * 2 + [8] * 4 + [2] * 100)
        candidates = {"x": lambda: wait(next(durations))}
        timing = measure.time_alternately(candidates, rounds=2, repeats=3, warmup=2)["x"]
        assert timing.rounds == pytest.approx((8, 2))
        assert timing.median == timing.rounds[1]
        assert timing.spread == pytest.approx(timing.rounds[0] / timing.rounds[1] - 1)

    def test_a_call_of_nanoseconds_is_repeated_inside_a_sample(self, wait):
        timing = measure.time_alternately({"nothing": lambda: wait(128e-6)}, rounds=1, repeats=5)["nothing"]
        assert timing.calls == 5 * 391, "as many as last 50 µs"
        assert timing.median == pytest.approx(128e-6)

    def test_gradients_are_off_while_candidates_run(self):
        seen: list[bool] = []
        measure.time_alternately({"x": lambda: seen.append(torch.is_grad_enabled())}, rounds=1, repeats=1)
        assert not any(seen)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"rounds": 0}, "rounds: expected a positive integer, got 0"),
            ({"warmup": -1}, "warmup: expected"),
            ({"repeats": 2.5}, "repeats: expected"),
            ({"budget_seconds": 0}, "budget_seconds: expected"),
        ],
    )
    def test_bad_argument_is_named(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            measure.time_alternately({"x": lambda: None}, **arguments)

    def test_no_candidates_is_refused(self):
        with pytest.raises(ValueError, match="candidates"):
            measure.time_alternately({})


class TestCost:
    def test_flops_count_two_per_multiplication_and_addition(self):
        network = small_network()
        assert measure.count_flops(network, torch.randn(2, 3, 4, 4)) == 2 * 2 * (8 * 27 * 16 + 8 * 16 * 5)

    def test_shared_parameters_count_once(self):
        linear = nn.Linear(4, 4)
        assert measure.count_parameters(nn.Sequential(linear, linear)) == 20

    def test_allocations_of_the_call_are_its_peak(self):
        def two_tensors_alive_at_once():
            torch.empty(1 << 20)
            first, second = torch.empty(1 << 18), torch.empty(1 << 18)
            return first.numel() + second.numel()

        assert peak_memory_bytes(two_tensors_alive_at_once, device=CPU) == pytest.approx(4 << 20, rel=0.01)

    def test_arena_is_added_to_the_peak(self):
        assert peak_memory_bytes(lambda: torch.empty(1 << 18), device=CPU, arena_bytes=1 << 20) == pytest.approx(
            2 << 20, rel=0.01
        )


class TestEnergy:
    def fake_package(self, root, number, name, microjoules):
        domain = root / f"intel-rapl:{number}"
        domain.mkdir(parents=True)
        (domain / "name").write_text(name + "\n")
        (domain / "max_energy_range_uj").write_text("1000000000\n")
        (domain / "energy_uj").write_text(f"{microjoules}\n")
        return domain / "energy_uj"

    def test_packages_are_summed_and_parts_of_them_are_not(self, tmp_path):
        packages = [self.fake_package(tmp_path, number, f"package-{number}", 10_000_000) for number in (0, 1)]
        self.fake_package(tmp_path, "0:0", "core", 0)
        self.fake_package(tmp_path, 2, "psys", 0)

        def spend_half_a_joule_in_each():
            for counter in packages:
                counter.write_text(str(int(counter.read_text()) + 500_000))

        energy = energy_per_call(spend_half_a_joule_in_each, device=CPU, seconds=0.01, powercap=tmp_path)
        assert energy.joules == pytest.approx(1.0)
        assert energy.source == "RAPL package-0 + package-1"
        assert energy.reason is None

    def test_a_counter_that_wraps_is_continued(self, tmp_path):
        counter = self.fake_package(tmp_path, 0, "package-0", 999_500_000)
        energy = energy_per_call(lambda: counter.write_text("500000"), device=CPU, seconds=1e-9, powercap=tmp_path)
        assert energy.joules == pytest.approx(1.0)

    def test_without_counters_there_is_a_reason_and_no_figure(self, tmp_path):
        energy = energy_per_call(lambda: None, device=CPU, powercap=tmp_path / "absent")
        assert energy.joules is None
        assert "does not exist" in energy.reason

    def test_a_counter_that_stands_still_gives_no_figure(self, tmp_path):
        self.fake_package(tmp_path, 0, "package-0", 5)
        energy = energy_per_call(lambda: None, device=CPU, seconds=0.01, powercap=tmp_path)
        assert energy.joules is None
        assert "did not advance" in energy.reason

    def test_unreadable_counter_is_named(self, tmp_path):
        self.fake_package(tmp_path, 0, "package-0", "garbage")
        energy = energy_per_call(lambda: None, device=CPU, powercap=tmp_path)
        assert energy.joules is None
        assert "intel-rapl:0" in energy.reason


class TestProfile:
    def test_profile_holds_every_metric(self):
        network, x = small_network(), torch.randn(3, 3, 4, 4)
        result = measure.profile(network, x, rounds=2, repeats=3)
        assert result.batch == 3
        assert result.threads == 1
        assert result.device == "cpu"
        assert result.parameters == 8 * 27 + 128 * 5 + 5
        assert result.weight_bytes == 4 * result.parameters  # plain torch packs nothing
        assert result.flops == measure.count_flops(network, x)
        assert result.peak_memory_bytes >= 2 * 4 * 3 * 8 * 16
        assert result.throughput == pytest.approx(3000 / result.latency.median)
        assert (result.energy_joules is None) != (result.energy_reason is None)
        json.dumps(result.to_dict())
        assert "median" in result.table()

    def test_training_modes_are_restored(self):
        network = small_network()
        network[0].train()
        network[1].train(False)
        seen = []
        network[0].register_forward_hook(lambda module, *_: seen.append(module.training))
        measure.profile(network, torch.randn(1, 3, 4, 4), rounds=1, repeats=1)
        assert not any(seen)
        assert network[0].training
        assert not network[1].training

    def test_thread_number_holds_for_the_measurement_only(self):
        seen = []
        result = measure.profile(lambda: seen.append(torch.get_num_threads()), rounds=1, repeats=1, threads=2)
        assert set(seen) == {2}
        assert result.threads == 2
        assert torch.get_num_threads() == 1

    def test_a_plain_callable_has_no_proxies(self):
        result = measure.profile(torch.relu, torch.randn(2, 2), rounds=1, repeats=1)
        assert (result.flops, result.parameters, result.weight_bytes) == (None, None, None)

    def test_what_cannot_be_called_is_refused(self):
        with pytest.raises(TypeError, match="model: expected a module or another callable, got str"):
            measure.profile("mobilenet_v2")


class TestComparison:
    def hand_made(self, **medians: tuple[tuple[float, float], int | None]) -> measure.Comparison:
        profiles = tuple(
            measure.Profile(
                name=name, device="cpu", threads=1, batch=1,
                latency=Timing(min(rounds), min(rounds), max(rounds), rounds, 1, 10),
                peak_memory_bytes=0, weight_bytes=0, flops=flops, promised_flops=flops, parameters=0,
                energy_joules=None, energy_source=None, energy_reason="none here",
            )
            for name, (rounds, flops) in medians.items()
        )  # fmt: skip
        return measure.Comparison(profiles[0].name, profiles)

    def test_realisation_is_measured_over_theoretical(self):
        comparison = self.hand_made(dense=((8.0, 10.0), 400), pressed=((2.0, 5.0), 200))
        ratio = comparison.speedup("pressed")
        assert (ratio.measured, ratio.low, ratio.high) == (4.0, 2.0, 4.0)
        assert ratio.theoretical == 2.0
        assert ratio.realisation == 2.0
        assert comparison.against("pressed").speedup("dense").measured == 0.25
        assert comparison.fastest().name == "pressed"
        assert comparison.fastest("dense").name == "dense"

    def test_unknown_flops_give_no_realisation(self):
        comparison = self.hand_made(dense=((8.0,), 400), other=((2.0,), None))
        assert comparison.speedup("other").realisation is None
        assert "none here" in comparison.table()

    def test_real_models_are_compared(self):
        small = small_network()
        large = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1))
        x = torch.randn(4, 3, 32, 32)
        comparison = measure.compare(
            {"large": large, "small": (small, (torch.randn(4, 3, 4, 4),))}, x, rounds=2, budget_seconds=0.05
        )
        assert comparison.baseline == "large"
        assert comparison.speedup("small").measured > 2
        assert comparison.speedup("small").theoretical > 100
        assert [entry["name"] for entry in comparison.to_dict()["contestants"]] == ["large", "small"]
        json.dumps(comparison.to_dict())

    def test_bad_contestants_are_named(self):
        with pytest.raises(ValueError, match=r"baseline: expected one of a, got 'b'"):
            measure.compare({"a": torch.relu}, torch.ones(1), baseline="b")
        with pytest.raises(TypeError, match=r"contestants\['a'\]: expected a module"):
            measure.compare({"a": 3}, torch.ones(1))
        with pytest.raises(ValueError, match=r"promised: expected some of a, got c"):
            measure.compare({"a": torch.relu}, torch.ones(1), promised={"c": 1.0})
        with pytest.raises(ValueError, match="contestants: expected at least one"):
            measure.compare({})
        with pytest.raises(KeyError, match="expected one of a"):
            measure.compare({"a": torch.relu}, torch.ones(1), rounds=1, budget_seconds=0.01)["b"]


class TestTheory:
    FLOPS: ClassVar = {"": 5, "stem": 100, "body.conv": 1000, "body.conv.0": 200, "body.convolution": 40}

    def test_layers_flops_sum_to_the_models(self):
        network, x = nn.Sequential(small_network(), nn.Linear(5, 2)), torch.randn(2, 3, 4, 4)
        flops = measure.layer_flops(network, x)
        assert flops == {"0.0": 2 * 2 * 8 * 27 * 16, "0.3": 2 * 2 * 128 * 5, "1": 2 * 2 * 5 * 2}
        assert sum(flops.values()) == measure.count_flops(network, x)

    @pytest.mark.parametrize(
        ("promises", "expected"),
        [
            ((), 1345),
            ((measure.Promise("stem", density=0.1),), 1345 - 90),
            ((measure.Promise("body.conv", density=0.5),), 1345 - 600),
            ((measure.Promise("body", is_int8=True),), 105 + 1240 / 4),
            ((measure.Promise("body.conv", 0.5), measure.Promise("body.conv.0", 0.5)), 1345 - 600 - 50),
            ((measure.Promise("stem", 0.5), measure.Promise("stem", is_int8=True)), 1345 - 100 + 100 / 8),
            ((measure.Promise("elsewhere", 0.5),), 1345),
        ],
        ids=str,
    )
    def test_promises_scale_the_layers_they_are_about(self, promises, expected):
        assert measure.promised_flops(self.FLOPS, promises, int8_ratio=4.0) == pytest.approx(expected)

    def test_int8_counts_by_the_machines_peaks(self):
        ratio = int8_peak_ratio()
        assert 1 <= ratio < 100
        promised = measure.promised_flops({"a": 100}, (measure.Promise("a", is_int8=True),))
        assert promised == pytest.approx(100 / ratio)

    def test_density_is_a_share(self):
        with pytest.raises(ValueError, match=r"density: expected a share from 0 to 1, got -0\.5"):
            measure.Promise("a", density=-0.5)

    def test_compared_models_are_held_to_their_promises(self):
        """Pruned weights have as many FLOPs as others: that no sparse kernel won shows in the realisation."""
        network, x = small_network(), torch.randn(1, 3, 4, 4)
        flops = measure.layer_flops(network, x)
        promised = measure.promised_flops(flops, (measure.Promise("0", 0.1), measure.Promise("3", 0.1)))
        comparison = measure.compare(
            {"dense": network, "pruned": network}, x, rounds=1, budget_seconds=0.01, promised={"pruned": promised}
        )
        ratio = comparison.speedup("pruned")
        assert comparison["pruned"].flops == comparison["dense"].flops
        assert ratio.theoretical == pytest.approx(10)
        assert ratio.realisation == pytest.approx(ratio.measured / 10)


class TestLayers:
    def test_layer_flops_sum_to_the_models(self):
        network, x = small_network(), torch.randn(2, 3, 4, 4)
        layers = measure.profile_layers(network, x, repeats=3)
        assert [layer.kind for layer in layers] == ["Conv2d", "ReLU", "Flatten", "Linear"]
        assert sum(layer.flops for layer in layers) == measure.count_flops(network, x)
        assert layers[0].output_shape == (2, 8, 4, 4)
        assert all(layer.median_ms > 0 for layer in layers)
        assert "Conv2d" in measure.layer_table(layers)

    def test_hooks_are_gone_afterwards_even_after_a_failure(self):
        network = small_network()
        with pytest.raises(RuntimeError):
            measure.profile_layers(network, torch.randn(1, 7, 4, 4))
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in network.modules())

    def test_a_module_called_twice_counts_both_calls(self):
        linear = nn.Linear(4, 4)
        (layer,) = measure.profile_layers(nn.Sequential(linear, linear), torch.randn(1, 4), repeats=1)
        assert layer.flops == 2 * 2 * 16


class TestUnits:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            (count_text(3504872), "3.50 M"),
            (count_text(12), "12"),
            (count_text(None), "–"),
            (count_text(117_000_000_000, "FLOP/s"), "117 GFLOP/s"),
            (memory_text(2 << 20), "2.00 MiB"),
            (memory_text(512), "512 B"),
            (latency_text(0.0123), "12.3 µs"),
            (latency_text(1.2345), "1.23 ms"),
            (latency_text(7.0), "7.00 ms"),
            (latency_text(999.7), "1000 ms"),
            (latency_text(123.4), "123 ms"),
        ],
    )
    def test_numbers_carry_their_units(self, text, expected):
        assert text == expected

    def test_columns_line_up(self):
        lines = text_table(("a", "b"), [("long name", "1"), ("x", "100")]).splitlines()
        assert lines[2].endswith("  1")
        assert len({len(line) for line in lines}) == 1


def test_what_runs_before_a_sample_is_called_for_each_and_not_timed(wait) -> None:
    before: list[None] = []
    timing = measure.time_alternately(
        {"quick": lambda: wait(1)},
        budget_seconds=1e-3,
        rounds=2,
        repeats=3,
        before_sample=lambda: before.append(wait(5)),
    )
    assert len(before) == 2 * 3
    assert timing["quick"].median == pytest.approx(1)
