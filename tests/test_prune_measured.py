"""`prune_channels` for latency or energy: the table of what layers cost, the knapsack, and what emission measures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from pruning import X, conv3x3
from torch import Tensor, nn

from kernelpress import compress
from kernelpress.compress.channels.dependency import Axis, Occurrence, Pool, find_dependencies
from kernelpress.compress.prune_channels.groups import ranked
from kernelpress.compress.prune_channels.measured import _knapsack, _losses, measured_left, smoothed
from kernelpress.emit import layer_costs, layer_energies, layer_times, plan_latencies
from kernelpress.measure import count_flops
from kernelpress.measure.energy import Energy
from kernelpress.runtime import native
from kernelpress.trace import trace


class Net(nn.Module):
    """Dense, depthwise, grouped, transposed and linear layers, one of them behind a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv3x3(3, 32, bias=False), conv3x3(32, 32, groups=32)
        self.grouped, self.up = conv3x3(32, 24, groups=4, padding_mode="zeros"), nn.ConvTranspose2d(24, 16, 2, stride=2)
        self.c, self.head = nn.Conv2d(40, 16, 1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.grouped(self.b(self.a(x)).relu())
        z = nn.functional.interpolate(y, scale_factor=2)
        return self.head(self.c(torch.cat([self.up(y), z], 1)).mean((2, 3)))


def in_flops(layers: Sequence[tuple[nn.Module, Tensor]]) -> list[float]:
    """A device whose time is its FLOPs."""

    def flops(layer: Any, x: Tensor) -> int:
        positions = x if "transpose" in str(layer._target) else layer(x)
        return 2 * positions.numel() * layer.weight[0].numel()

    return [flops(layer, x) * 1e-6 for layer, x in layers]


def in_steps(layers: Sequence[tuple[nn.Module, Tensor]]) -> list[float]:
    """A device that works on 16 channels at once."""
    return [
        math.ceil(layer(x).shape[1] / 16) * math.ceil(x.shape[1] / 16) * x[0, 0].numel() * 1e-3 for layer, x in layers
    ]


def test_the_table_knows_every_layer_at_every_count() -> None:
    model = Net().double().eval()
    graph = trace(model, X, dynamic_batch=False)
    dependencies = find_dependencies(graph, model)
    left = measured_left(graph, dependencies, 1, in_flops)
    assert left([0] * len(dependencies.pools)) == pytest.approx(count_flops(model, X) * 1e-6)
    pruned = compress.prune_channels(model, X, ratio=0.6, target="latency", round_to=1, layer_costs=in_flops)
    removed = compress.record_of(pruned)[0].flops_removed
    assert 0.6 <= removed < 0.7


def test_a_table_becomes_monotone_and_a_monotone_one_stays() -> None:
    table = torch.arange(12.0).view(3, 4) + torch.randn(3, 4)
    out = smoothed(table)
    assert bool((out.diff(dim=0) >= 0).all())
    assert bool((out.diff(dim=1) >= 0).all())
    assert float(table.min()) <= float(out.min()) <= float(out.max()) <= float(table.max())
    torch.testing.assert_close(smoothed(out), out)
    torch.testing.assert_close(smoothed(torch.tensor([[1.0, 3, 2, 4]])), torch.tensor([[1.0, 2.5, 2.5, 4]]))


def test_the_knapsack_loses_least_of_all_choices() -> None:
    for _ in range(20):
        savings = [[0.0, *torch.rand(3).cumsum(0).tolist()] for _ in range(4)]
        losses = [[0.0, *torch.rand(3).cumsum(0).tolist()] for _ in range(4)]
        wanted = 0.7 * sum(saving[-1] for saving in savings)

        def total(values: list[list[float]], steps: Sequence[int]) -> float:
            return sum(value[step] for value, step in zip(values, steps, strict=True))

        every = [steps for steps in itertools.product(range(4), repeat=4) if total(savings, steps) >= wanted]
        best = min(total(losses, steps) for steps in every)
        found = _knapsack(savings, losses, wanted)
        assert total(savings, found) >= wanted * 0.99
        # What is saved is rounded down to thousandths of what is wanted.
        stricter = min(total(losses, steps) for steps in every if total(savings, steps) >= wanted * 1.004)
        assert best <= total(losses, found) + 1e-9 <= stricter + 2e-9 or total(losses, found) <= best


def test_channels_that_cost_no_time_stay() -> None:
    """24 channels take as long as 32, 16 half as long: the time is saved there, and nothing is removed in between."""
    model = nn.Sequential(conv3x3(3, 32), nn.ReLU(), conv3x3(32, 32), nn.ReLU(), conv3x3(32, 4)).double()
    pruned = compress.prune_channels(model, X, ratio=0.3, target="latency", layer_costs=in_steps)
    counts = [pruned[0].out_channels, pruned[2].out_channels]
    assert set(counts) <= {16, 32}
    assert counts != [32, 32]
    by_flops = compress.prune_channels(model, X, ratio=0.3)
    assert by_flops[0].out_channels == 24


def test_channels_that_several_layers_make_count_in_all_of_them() -> None:
    pool = Pool((1, 2, 3), (), (Occurrence(Axis("a.weight", 0), 1), Occurrence(Axis("b.weight", 0), 1)))
    group = ranked(pool, 0, torch.tensor([3.0, 1.0, 2.0]), round_to=1, gone=0, makers=2)
    assert _losses(group, 0, "global") == [0, 2, 6]
    assert _losses(group, 0, "local") == pytest.approx([0, -2 * math.log(5 / 6), -2 * math.log(3 / 6)])
    assert _losses(group, 1, "global") == [0, 4]


def test_importance_decides_between_layers_of_equal_time() -> None:
    model = nn.Sequential(conv3x3(3, 32), conv3x3(32, 32), conv3x3(32, 32), conv3x3(32, 4)).double()
    with torch.no_grad():
        model[1].weight[:16] *= 1e-3
    pruned = compress.prune_channels(model, X, ratio=0.2, target="latency", layer_costs=in_steps, criterion="l1")
    assert [layer.out_channels for layer in pruned] == [32, 16, 32, 4]


@pytest.mark.parametrize(("scope", "counts"), [("local", [16, 56]), ("global", [8, 64])])
def test_a_narrow_layer_is_spared_where_shares_count(scope: str, counts: list[int]) -> None:
    """Half of its channels have half the norm: less importance than as many of the wide layer, but a larger share."""
    model = nn.Sequential(conv3x3(3, 16), conv3x3(16, 64), conv3x3(64, 4)).double()
    with torch.no_grad():
        for layer in (model[0], model[1]):
            layer.weight.fill_(1.0)
        model[0].weight[:8] *= 0.5

    def in_outputs(layers: Sequence[tuple[nn.Module, Tensor]]) -> list[float]:
        return [float(layer(x).shape[1]) for layer, x in layers]

    pruned = compress.prune_channels(
        model, X, ratio=0.09, target="latency", layer_costs=in_outputs, scope=scope, criterion="l2"
    )
    assert [layer.out_channels for layer in pruned[:2]] == counts


def test_a_latency_budget_may_be_reached_in_iterations() -> None:
    model = Net().double()
    pruned = compress.prune_channels(
        model, X, ratio=0.5, target="latency", layer_costs=in_flops, iterations=2, round_to=4
    )
    assert compress.record_of(pruned)[0].flops_removed >= 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"layer_costs": None},
            "layer_costs: expected a function for target='latency' and 'energy', and only there, got None",
        ),
        (
            {"target": "flops"},
            "layer_costs: expected a function for target='latency' and 'energy', and only there, got <function",
        ),
        ({"layer_costs": lambda layers: [1.0]}, r"layer_costs: expected \d+ numbers above zero for a, got \[1.0\]"),
        ({"layer_costs": lambda layers: [0.0] * len(layers)}, "layer_costs: expected .* above zero for a"),
        ({"ratio": 0.99}, r"ratio: expected at most 0\.\d+.* of the latency of this model, got 0.99"),
        ({"schedule": "greedy"}, "schedule: expected 'one-shot' for target='latency', got 'greedy'"),
    ],
    ids=["none", "for FLOPs", "number", "zero", "unreachable", "greedy"],
)
def test_bad_times_and_budgets_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress.prune_channels(Net().double(), X, **{"target": "latency", "layer_costs": in_flops, **arguments})


@pytest.mark.skipif(native.cpu() is None, reason="no native kernels: build them with `make build`")
def test_times_of_emission_are_of_each_layer_and_remembered(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNELPRESS_CACHE", str(tmp_path))
    small, large = nn.Conv2d(8, 8, 1), nn.Conv2d(64, 256, 3, padding=1)
    layers = [
        (large, torch.randn(1, 64, 28, 28)),
        (small, torch.randn(1, 8, 7, 7)),
        (nn.Linear(8, 4), torch.randn(1, 8)),
    ]
    times = layer_times([*layers, (nn.Conv1d(4, 4, 3), torch.randn(1, 4, 9))])
    assert len(times) == 4
    assert min(times) > 0
    assert times[0] > 20 * times[1]
    assert layer_times(layers) == times[:3]
    assert layer_times([]) == []


def test_layers_are_timed_on_memory_that_emitted_layers_hand_on(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNELPRESS_CACHE", str(tmp_path))
    read: set[tuple[int, ...]] = set()

    class Reading(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            read.add(x.stride())
            return super().forward(x)

    layer, x = Reading(8, 8, 3, padding=1).eval(), torch.randn(1, 8, 6, 6)
    layer_times([(layer, x)])
    plan_latencies({"layer": layer}, x)
    assert read == {(288, 1, 48, 8)}


def test_energy_is_counted_layer_by_layer_and_buys_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[Any] = []

    def count(call: Callable[[], object], *, device: torch.device, seconds: float) -> Energy:
        counted.append(call())
        return Energy(float(counted[-1].shape[1]), "RAPL package-0", None)

    monkeypatch.setattr(layer_costs, "energy_per_call", count)
    small, large = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 16, 1)
    x = torch.randn(1, 8, 7, 7)
    assert layer_energies([(small, x), (large, x)]) == [8.0, 16.0]
    torch.testing.assert_close(counted[1], large(x), rtol=1e-4, atol=1e-5)
    pruned = compress.prune_channels(Net(), X.float(), ratio=0.3, target="energy", layer_costs=in_flops)
    assert compress.record_of(pruned)[0].arguments["target"] == "energy"


def test_energy_that_cannot_be_read_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_costs, "energy_per_call", lambda *_, **__: Energy(None, None, "no RAPL counters"))
    with pytest.raises(ValueError, match="energy: expected a device that counts it, got cpu: no RAPL counters"):
        layer_energies([(nn.Conv2d(4, 4, 1), torch.randn(1, 4, 5, 5))])
