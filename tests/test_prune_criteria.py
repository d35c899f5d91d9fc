"""Criteria of `prune_channels`: each equals its definition computed by hand, and finds the channel that may leave."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pruning import X, conv3x3
from torch import Tensor, nn
from unchanged import unchanged

from kernelpress import compress
from kernelpress.compress.channels.dependency import find_dependencies
from kernelpress.compress.prune_channels.criteria import CRITERIA
from kernelpress.compress.prune_channels.evidence import Evidence, batches_of
from kernelpress.trace import trace

CHANNELS = 6
DATA_CRITERIA = [name for name, criterion in CRITERIA.items() if criterion.needs != "weights"]


class Network(nn.Module):
    """Convolution, BatchNorm and ReLU make the channels; two layers read them, one through the residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = conv3x3(3, CHANNELS), nn.BatchNorm2d(CHANNELS)
        self.body, self.head = conv3x3(CHANNELS, CHANNELS, stride=1, groups=1), nn.Linear(CHANNELS, 4)
        for tensor in (self.norm.weight, self.norm.running_var):
            nn.init.uniform_(tensor, 0.5, 2)
        nn.init.normal_(self.norm.bias)

    def hidden(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.a(x)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.hidden(x)
        return self.head(F.adaptive_avg_pool2d(y + self.body(y), 1).flatten(1))

    def read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What `body` and `head` read, [images, channels, positions]."""
        y = self.hidden(x)
        return y.flatten(2), (y + self.body(y)).mean((2, 3)).unsqueeze(2)

    def gated(self, x: Tensor, gate: Tensor) -> Tensor:
        """The output if both layers read the channels times `gate` [channels]."""
        y = self.hidden(x)
        z = y + self.body(y * gate.view(-1, 1, 1))
        return self.head(F.adaptive_avg_pool2d(z, 1).flatten(1) * gate)


def _batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    """Of other sizes than the example inputs."""
    return [(torch.randn(n, 3, 8, 8, dtype=torch.float64), torch.randint(0, 4, (n,))) for n in sizes]


def _importance(model: nn.Module, criterion: str, data: list[Any] | None = None, loss: Any = None) -> list[Tensor]:
    dependencies = find_dependencies(trace(model, X, dynamic_batch=False), model)
    held = batches_of(model, (X,), data, loss) if data is not None else None
    with torch.no_grad():
        found = CRITERIA[criterion].score(Evidence(dependencies, dependencies.pools, frozenset(), held), model)
    assert all(isinstance(score, Tensor) for score in found)
    return found  # type: ignore[return-value]


@pytest.fixture
def network() -> Network:
    return Network().double().eval()


def _relative(score: Tensor) -> Tensor:
    return score / score.mean()


def test_norms_and_distances_of_filters(network: Network) -> None:
    layers = [layer.weight.detach().flatten(1) for layer in (network.a, network.body)]
    definitions: dict[str, Callable[[Tensor], list[float]]] = {
        "l1": lambda w: [float(f.abs().sum()) for f in w],
        "l2": lambda w: [math.sqrt(float((f * f).sum())) for f in w],
        "fpgm": lambda w: [sum(math.dist(f.tolist(), g.tolist()) for g in w) for f in w],
    }
    for criterion, definition in definitions.items():
        scores = [torch.tensor(definition(weight), dtype=torch.float64) for weight in layers]
        (found,) = _importance(network, criterion)
        torch.testing.assert_close(found, sum(map(_relative, scores)) / 2)


def test_batch_norm_scales(network: Network) -> None:
    with torch.no_grad():
        network.norm.weight[2] *= -1
    torch.testing.assert_close(_importance(network, "bn_scale")[0], network.norm.weight.detach().abs())


def test_activations(network: Network) -> None:
    data = _batches(5, 2)
    reads = [torch.cat(parts) for parts in zip(*(network.read(x) for x, _ in data), strict=True)]
    samples = [read.detach().movedim(1, 2).flatten(0, 1) for read in reads]
    means = [_relative(a.abs().mean(0)) for a in samples]
    torch.testing.assert_close(_importance(network, "activation", data)[0], sum(means) / 2)
    shares = [(a != 0).double().mean(0) for a in samples]
    assert float(shares[0].min()) < 1
    torch.testing.assert_close(_importance(network, "apoz", data)[0], sum(shares) / 2)


def test_principal_components(network: Network) -> None:
    data = _batches(5, 2)
    expected = torch.zeros(CHANNELS, dtype=torch.float64)
    for parts in zip(*(network.read(x) for x, _ in data), strict=True):
        samples = torch.cat(parts).detach().movedim(1, 2).flatten(0, 1)
        covariance = torch.cov(samples.T, correction=0)
        values, vectors = torch.linalg.eigh(covariance)
        held, explained = torch.zeros(CHANNELS, dtype=torch.float64), 0.0
        components = 0
        for k in reversed(range(CHANNELS)):
            if explained >= 0.95 * float(covariance.trace()):
                break
            held += values[k] * vectors[:, k] ** 2
            explained += float(values[k])
            components += 1
        assert components < CHANNELS
        expected += held / explained / 2
    (found,) = _importance(network, "pca", data)
    torch.testing.assert_close(found, expected)
    assert float(found.sum()) == pytest.approx(1)


def test_taylor_is_the_squared_derivative_by_a_gate(network: Network) -> None:
    data, expected = _batches(5, 2), torch.zeros(CHANNELS, dtype=torch.float64)
    for x, target in data:
        gate = torch.ones(CHANNELS, dtype=torch.float64, requires_grad=True)
        F.cross_entropy(network.gated(x, gate), target).backward()
        assert gate.grad is not None
        expected += gate.grad**2
    torch.testing.assert_close(_importance(network, "taylor", data)[0], expected)


def test_taylor_ranks_channels_by_what_removing_them_does_to_the_loss(network: Network) -> None:
    """Where the loss is linear in the gates, to first order is exact."""
    data = [(x, None) for x, _ in _batches(4)]
    linear = Network().double().eval()
    linear.body.weight.data.zero_()
    (found,) = _importance(linear, "taylor", data, lambda output, _: output[:, 0].mean())
    whole = linear(data[0][0])[:, 0].mean()
    for channel in range(CHANNELS):
        gate = torch.ones(CHANNELS, dtype=torch.float64)
        gate[channel] = 0
        change = whole - linear.gated(data[0][0], gate)[:, 0].mean()
        assert float(found[channel]) == pytest.approx(float(change.detach()) ** 2)


def test_gradient_times_activation_of_each_image(network: Network) -> None:
    data, expected = _batches(3, 2), torch.zeros(CHANNELS, dtype=torch.float64)
    for x, target in data:
        for image in range(len(x)):
            y = network.hidden(x[image : image + 1]).detach().requires_grad_()
            z = F.adaptive_avg_pool2d(y.detach() + network.body(y), 1).flatten(1)
            read = z.detach().requires_grad_()
            F.cross_entropy(network.head(read), target[image : image + 1]).backward()
            assert read.grad is not None
            z.backward(read.grad)
            assert y.grad is not None
            expected += (y.grad * y.detach()).mean((2, 3)).abs()[0] / 2 / 5
            expected += (read.grad * read.detach()).abs()[0] / 2 / 5
    torch.testing.assert_close(_importance(network, "gradient_activation", data)[0], expected / expected.norm())


class Plain(nn.Module):
    """One layer makes the channels, one reads them, on another grid, in groups or not."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.a = conv3x3(3, 8)
        self.b = nn.Conv2d(8, 4, 3, stride=2, padding=1, dilation=2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


def _contributions(model: Plain, x: Tensor) -> Tensor:
    """What each channel adds to the outputs of `b`: [channels, outputs]."""
    y, parts = F.relu(model.a(x)), []
    for channel in range(8):
        only = torch.zeros_like(y)
        only[:, channel] = y[:, channel]
        parts.append((model.b(only) - model.b.bias.view(-1, 1, 1)).flatten())
    return torch.stack(parts).detach()


def test_reconstruction_grows_what_leaves_where_the_next_layer_misses_it_least() -> None:
    model, data = Plain().double().eval(), _batches(3)
    added = _contributions(model, data[0][0])
    (found,) = _importance(model, "reconstruction", data)
    order, gone = found.argsort().tolist(), list[int]()
    for chosen in order:
        losses = {c: float(added[[*gone, c]].sum(0).square().sum()) for c in range(8) if c not in gone}
        assert losses[chosen] == pytest.approx(min(losses.values()))
        gone.append(chosen)


@pytest.mark.parametrize("groups", [1, 2])
def test_reconstruction_scales_what_stays_by_least_squares(groups: int) -> None:
    model, data = Plain(groups).double().eval(), _batches(3)
    pruned = compress.prune_channels(
        model, X, ratio=0.25, target="channels", round_to=1, criterion="reconstruction", data=data
    )
    before, after = model.a.weight.detach().flatten(1), pruned.a.weight.detach().flatten(1)
    kept = [int((before - row).abs().sum(1).argmin()) for row in after]
    assert len(kept) == 6
    added = _contributions(model, data[0][0])
    half = 8 // groups
    # In groups the same channels of each leave, and have one factor, as the weight has one column for them.
    alike = added.view(groups, half, -1).sum(0)
    columns = [channel for channel in kept if channel < half]
    factors = torch.linalg.lstsq(alike[columns].T, alike.sum(0).unsqueeze(1)).solution.flatten()
    expected = model.b.weight.detach()[:, columns] * factors.view(1, -1, 1, 1)
    torch.testing.assert_close(pruned.b.weight.detach(), expected, rtol=1e-4, atol=1e-6)


def test_reconstruction_lets_one_of_two_equal_channels_stand_for_both() -> None:
    model, data = Plain().double().eval(), _batches(3)
    with torch.no_grad():
        for tensor in (model.a.weight, model.a.bias):
            tensor[6] = tensor[1]
        model.b.weight[:, 6] = model.b.weight[:, 1] * 0.05
    pruned = compress.prune_channels(
        model, X, ratio=1 / 8, target="channels", round_to=1, criterion="reconstruction", data=data
    )
    torch.testing.assert_close(pruned(X), model(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("criterion", [*DATA_CRITERIA, "bn_scale"])
def test_a_dead_channel_leaves_however_large_its_filter(network: Network, criterion: str) -> None:
    with torch.no_grad():
        network.a.weight[3] *= 100
        network.norm.weight[3] = 1e-3
        network.norm.bias[3] = -100
        network.body.weight[3], network.body.bias[3] = 0, 0
    pruned = compress.prune_channels(
        network, X, ratio=1 / 6, target="channels", round_to=1, criterion=criterion, data=_batches(5, 2)
    )
    kept = [0, 1, 2, 4, 5]
    torch.testing.assert_close(pruned.a.weight, network.a.weight[kept])
    torch.testing.assert_close(pruned(X), network(X), rtol=1e-9 if criterion != "reconstruction" else 0.2, atol=0.2)


def test_the_filter_among_the_others_leaves_by_the_geometric_median() -> None:
    model = nn.Sequential(conv3x3(3, 5), conv3x3(5, 4)).double()
    with torch.no_grad():
        # Far from zero, all in one direction but by different lengths: the middle one is nearest to all.
        model[0].weight[:] = torch.tensor([1.0, 7, 4, 2, 9]).view(-1, 1, 1, 1)
    pruned = compress.prune_channels(model, X, ratio=1 / 5, target="channels", round_to=1, criterion="fpgm")
    assert pruned[0].weight[:, 0, 0, 0].tolist() == [1, 7, 2, 9]


def test_random_channels_follow_the_generator_and_leave_it_alone() -> None:
    model = nn.Sequential(conv3x3(3, 64), conv3x3(64, 4)).double()

    def kept(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return compress.prune_channels(model, X, criterion="random")[0].weight.detach()

    first, again, other = kept(1), kept(1), kept(2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("criterion", DATA_CRITERIA)
def test_data_leave_no_trace(network: Network, criterion: str) -> None:
    network.train()
    network.a.weight.grad = torch.ones_like(network.a.weight)
    data = _batches(4)
    with unchanged(network, (X, data[0][0])):
        compress.prune_channels(network, X, ratio=0.3, round_to=1, criterion=criterion, data=data)


@pytest.mark.slow
def test_taylor_prunes_mobilenet_v2_and_keeps_what_the_loss_depends_on() -> None:
    """Torch-Pruning#303: nothing was pruned, and nobody was told."""
    from kernelpress import models

    model = models.create("mobilenet_v2", num_classes=4, small_input=True, width_mult=0.5)
    data = [(torch.randn(4, 3, 32, 32), torch.randint(0, 4, (4,)))]
    pruned = compress.prune_channels(
        model, torch.randn(2, 3, 32, 32), ratio=0.4, scope="global", criterion="taylor", data=data
    )
    record = compress.record_of(pruned)[0]
    assert 0.4 <= record.flops_removed < 0.5
    assert len(record.layers()) > 20


@pytest.mark.parametrize("criterion", DATA_CRITERIA)
def test_criteria_that_need_data_say_so(network: Network, criterion: str) -> None:
    with pytest.raises(
        ValueError, match=f"data: expected batches, which the criterion '{criterion}' looks at, got None"
    ):
        compress.prune_channels(network, X, criterion=criterion)


@pytest.mark.parametrize(
    ("data", "loss", "message"),
    [
        ([], None, "data: expected at least one batch, got none"),
        ([X], None, r"data: expected batches \(inputs, target\) for a criterion that needs gradients, got no target"),
        ([(X, X, X)], None, "data: expected batches of the 1 inputs of forward, alone or with a target, got 3 parts"),
        ([(X[:, :2], None)], None, r"data: the model does not take a batch of \[2, 2, 8, 8\]"),
        ([(X * float("nan"), torch.tensor([0, 1]))], None, "data: the activations that a reads hold NaN or Inf"),
        ([X], lambda output, _: output, "loss: expected a scalar tensor that depends on the output, got "),
        ([X], lambda output, _: 1.0, "loss: expected a scalar tensor that depends on the output, got 1.0"),
        ([X], lambda output, _: output.sum() / 0, "loss: expected a finite number, got -?inf"),
        (
            [X],
            lambda output, _: torch.sqrt((output - output.detach()).sum()),
            "data: the gradients of what (a|body|head) reads hold NaN or Inf",
        ),
    ],
    ids=["empty", "no target", "parts", "shape", "NaN", "no scalar", "no tensor", "infinite loss", "infinite gradient"],
)
def test_bad_data_and_losses_are_named(network: Network, data: list[Any], loss: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress.prune_channels(network, X, criterion="taylor", data=data, loss=loss)


@pytest.mark.parametrize("tensor", ["a.weight", "norm.weight", "norm.running_mean", "head.weight"])
@pytest.mark.parametrize("criterion", ["l1", "bn_scale", "random", "taylor"])
def test_weights_that_are_not_finite_are_named(network: Network, tensor: str, criterion: str) -> None:
    network.state_dict()[tensor].flatten()[0] = float("inf")
    with pytest.raises(ValueError, match=rf"model: {tensor} holds NaN or Inf"):
        compress.prune_channels(network, X, criterion=criterion, data=_batches(2))


def test_activations_that_overflow_inside_are_named(network: Network) -> None:
    with torch.no_grad():
        network.norm.weight.fill_(1e300)
        network.body.weight.fill_(1e300)
    with pytest.raises(ValueError, match=r"data: the activations that (body|head) reads hold NaN or Inf"):
        compress.prune_channels(network, X, criterion="apoz", data=[X])


def test_a_model_without_batch_norm_has_no_scales_to_rank_by() -> None:
    with pytest.raises(ValueError, match=r"no channel can be pruned: .*no BatchNorm with a scale follows them"):
        compress.prune_channels(Plain().double(), X, criterion="bn_scale")


def _channel_counts(model: nn.Module) -> list[int]:
    return [part.out_channels for part in model.modules() if isinstance(part, nn.Conv2d)]


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sizes = (3, 8, 12, 6)
        self.layers = nn.ModuleList(conv3x3(i, o) for i, o in pairwise(sizes))
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for o in sizes[1:])
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.relu(norm(layer(x)))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("criterion", ["l2", "activation", "taylor"])
def test_greedy_scores_anew_after_each_step(criterion: str) -> None:
    model, data = Chain().double().eval(), _batches(6)
    greedy = compress.prune_channels(
        model,
        X,
        ratio=5 / 26,
        target="channels",
        round_to=1,
        schedule="greedy",
        scope="global",
        criterion=criterion,
        data=data,
    )
    stepwise: nn.Module = model
    for step in range(5):
        stepwise = compress.prune_channels(
            stepwise,
            X,
            ratio=1 / (26 - step),
            target="channels",
            round_to=1,
            scope="global",
            criterion=criterion,
            data=data,
        )
    assert _channel_counts(greedy) == _channel_counts(stepwise)
    torch.testing.assert_close(greedy(X), stepwise(X))


def test_iterations_train_between_and_reach_the_ratio() -> None:
    model, seen = Chain().double().eval(), list[list[int]]()

    def between(pruned: nn.Module) -> None:
        seen.append(_channel_counts(pruned))
        pruned(X).square().sum().backward()
        with torch.no_grad():
            for parameter in pruned.parameters():
                parameter += 0.01

    pruned = compress.prune_channels(model, X, ratio=0.6, round_to=1, iterations=3, between=between)
    record = compress.record_of(pruned)
    assert len(seen) == 2
    assert len(record) == 1
    assert 0.6 <= record[0].flops_removed < 0.7
    totals = [sum(counts) for counts in (_channel_counts(model), *seen, _channel_counts(pruned))]
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == 4


def test_a_budget_of_parameters_counts_them() -> None:
    model = Chain().double().eval()
    for ratio in (0.2, 0.5, 0.8):
        pruned = compress.prune_channels(model, X, ratio=ratio, target="parameters", round_to=1)
        before, after = (sum(p.numel() for p in m.parameters()) for m in (model, pruned))
        assert ratio <= 1 - after / before < ratio + 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "slow"}, "schedule: expected one of 'one-shot', 'greedy', got 'slow'"),
        ({"iterations": 0}, "iterations: expected a positive integer, got 0"),
        ({"between": print}, "between: expected iterations of at least 2 to train between, got 1"),
        ({"ratio": 0.999, "target": "parameters"}, r"ratio: expected at most 0\.\d+.* of the parameters"),
        ({"ratio": 0.999, "schedule": "greedy"}, r"ratio: expected at most 0\.\d+.* of the flops"),
    ],
)
def test_bad_schedules_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress.prune_channels(Chain().double(), X, round_to=2, **arguments)
