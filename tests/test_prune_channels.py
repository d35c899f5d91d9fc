"""`prune_channels`: removing channels that contribute nothing changes nothing, whatever connects the layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pruning import X, conv3x3
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kernelpress import compress
from kernelpress.compress.channels.dependency import Axis, contradiction, find_dependencies
from kernelpress.trace import trace

HALF = torch.arange(0, 16, 2)


def _silence(*modules: nn.Module, channels: Tensor = HALF) -> None:
    """Makes filters and BatchNorm channels produce exact zeros."""
    with torch.no_grad():
        for module in modules:
            for name in ("weight", "bias", "running_mean"):
                tensor = getattr(module, name, None)
                if tensor is not None:
                    tensor[channels] = 0


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = conv3x3(3, 16, bias=False), nn.BatchNorm2d(16), conv3x3(16, 4)
        _silence(self.a, self.norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.norm(self.a(x))))


class Residual(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv3x3(16, 16), nn.BatchNorm2d(16))
        _silence(*self.body)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.a(x)), inplace=True)
        z = self.body(y)
        z += y
        return self.b(F.relu(z))


class Concatenation(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.b = conv3x3(3, 16), conv3x3(32, 4)
        _silence(self.c, channels=torch.arange(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.cat([self.norm(self.a(x)), self.c(x)], 1))


class ConcatenationWithInput(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.b = conv3x3(19, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.cat([x, self.norm(self.a(x))], 1))


class Depthwise(Plain):
    multiplier = 1

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = conv3x3(16, 16 * self.multiplier, groups=16)
        self.b = conv3x3(16 * self.multiplier, 4)
        made = torch.stack([HALF * self.multiplier + i for i in range(self.multiplier)]).flatten()
        _silence(self.depthwise, channels=made)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.hardswish(self.depthwise(F.relu6(self.norm(self.a(x))))))


class DepthwiseWithMultiplier(Depthwise):
    multiplier = 3


class SqueezeExcite(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
        _silence(self.squeeze)
        with torch.no_grad():
            self.excite.weight[HALF] = 0
            self.excite.bias[HALF] = 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x))
        scale = self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True))))
        return self.b(y * F.hardsigmoid(scale))


class LinearSqueezeExcite(SqueezeExcite):
    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Linear(16, 16), nn.Linear(16, 16)
        _silence(self.squeeze, self.excite)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x))
        batch, channels, _, _ = y.shape
        scale = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1).view(batch, channels))))
        return self.b(y * scale.sigmoid().view(batch, channels, 1, 1))


class FlattenLinear(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(16 * 9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.adaptive_avg_pool2d(self.norm(self.a(x)), 3).flatten(1))


class ViewLinear(FlattenLinear):
    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(self.norm(self.a(x)), 2)
        return self.b(F.adaptive_max_pool2d(y, 3).view(x.size(0), -1))


class Grouped(Plain):
    """Four groups: the even channels of every group are silent."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = conv3x3(16, 16, groups=4)
        _silence(self.grouped)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.grouped(self.norm(self.a(x)))))


class Shuffled(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.second = conv3x3(16, 16, groups=2)
        silent = torch.cat([torch.arange(4), torch.arange(8, 12)])
        for module in (self.a, self.norm, self.second):
            nn.init.normal_(module.weight)
            _silence(module, channels=silent)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x))
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        # Channels 0 … 7 of the shuffled tensor come from 0, 8, 1, 9, …: two chunks pair 0 with 4, 1 with 5, …
        first, second = y.chunk(2, 1)
        return self.b(torch.cat([second, first], 1)) + self.b(self.second(self.norm(self.a(x))))


class PaddedShortcut(Plain):
    """ResNet's option A: a strided slice with zero channels around it."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.b = conv3x3(16, 32, stride=2), conv3x3(32, 4)
        _silence(self.c, channels=HALF + 8)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.a(x)))
        return self.b(F.relu(self.c(y) + F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))))


class LayerScale(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(16, 1, 1))
        self.slope = nn.PReLU(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.slope(self.norm(self.a(x)) * self.scale))


class ChannelsLastLinear(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)).permute(0, 2, 3, 1))


class Transposed(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)
        with torch.no_grad():
            self.up.weight[:, HALF] = 0
            self.up.bias[HALF] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.interpolate(self.up(self.norm(self.a(x))), scale_factor=2, mode="bilinear"))


class SharedLayer(Plain):
    """One convolution applied twice: its inputs and outputs are the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = conv3x3(16, 16)
        _silence(self.shared)

    def forward(self, x: Tensor) -> Tensor:
        y = self.shared(F.relu(self.norm(self.a(x))))
        return self.b(self.shared(F.relu(y)))


NETWORKS = [
    Plain,
    Residual,
    Concatenation,
    ConcatenationWithInput,
    Depthwise,
    DepthwiseWithMultiplier,
    SqueezeExcite,
    LinearSqueezeExcite,
    FlattenLinear,
    ViewLinear,
    Grouped,
    PaddedShortcut,
    LayerScale,
    ChannelsLastLinear,
    Transposed,
    SharedLayer,
]


def _built(network: Callable[[], nn.Module]) -> nn.Module:
    model = network()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
    return model.double().eval()


@pytest.mark.parametrize("network", NETWORKS)
def test_removing_silent_channels_changes_no_output(network: type[nn.Module]) -> None:
    model = _built(network)
    pruned = compress.prune_channels(model, X, ratio=0.5, target="channels")
    assert pruned.a.out_channels == 8
    assert type(pruned) is type(model)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(pruned(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("network", [Residual, DepthwiseWithMultiplier, FlattenLinear, Grouped, Shuffled, SharedLayer])
def test_pruned_network_equals_the_original_whose_lost_inputs_are_cut(network: type[nn.Module]) -> None:
    """Whatever leaves, and however it is ranked: without a channel is the same as no layer reading it."""
    model = _built(network)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    pruned = compress.prune_channels(model, X, ratio=0.3, round_to=1, scope="global")
    cut = copy.deepcopy(model)
    dependencies = find_dependencies(trace(model, X, dynamic_batch=False), model)
    for call in dependencies.calls:
        before, after = cut.get_parameter(call.input.parameter), pruned.get_parameter(call.input.parameter)
        columns, kept = before.detach().movedim(call.input.dim, 0), after.detach().movedim(call.input.dim, 0)
        if len(kept) < len(columns):
            _cut_columns(cut, model, pruned, call.input.parameter, call.input.dim, call.output.dim)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(pruned(x), cut(x), rtol=1e-9, atol=1e-9)


def _cut_columns(
    cut: nn.Module, model: nn.Module, pruned: nn.Module, name: str, input_dim: int, output_dim: int
) -> None:
    """Zeroes the input columns of a weight that the pruned weight lacks, found by looking for its values."""
    whole, part = model.get_parameter(name).detach(), pruned.get_parameter(name).detach()
    lost = torch.tensor([not bool(torch.isin(column, part).any()) for column in whole.movedim(input_dim, 0)])
    assert lost.sum() == whole.size(input_dim) - part.size(input_dim)
    with torch.no_grad():
        cut.get_parameter(name).movedim(input_dim, 0)[lost] = 0


def _flops(model: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(x)
    return counter.get_total_flops()


def _assert_channels_are_multiples(pruned: nn.Module, of: int) -> None:
    record = compress.record_of(pruned)[0]
    weights = [
        (change.before["weight"], change.after["weight"]) for change in record.changes if "weight" in change.after
    ]
    outputs = [after[0] for before, after in weights if len(after) > 1 and before[0] != after[0]]
    assert outputs
    assert all(count % of == 0 for count in outputs)


MODELS = {"resnet20": 0.5, "resnet50": 0.4, "mobilenet_v1": 0.5, "mobilenet_v2": 0.3}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_network_of_ours_loses_its_flops_in_multiples_of_eight_and_trains(name: str) -> None:
    from kernelpress import models

    ratio = MODELS[name]
    model = getattr(models, name)(num_classes=10).train()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    pruned = compress.prune_channels(model, x, ratio=ratio)
    record = compress.record_of(pruned)[0]
    assert model.training
    assert pruned.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    removed = 1 - _flops(copy.deepcopy(pruned), x) / _flops(copy.deepcopy(model), x)
    assert ratio <= removed < ratio + 0.06
    assert removed == pytest.approx(record.flops_removed)
    assert {skipped.reason for skipped in record.skipped} == {"an output of the network"}
    _assert_channels_are_multiples(pruned, of=8)

    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.01)
    F.cross_entropy(pruned(x), torch.tensor([1, 2])).backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())
    optimizer.step()
    assert torch.isfinite(pruned(x)).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ResNet", "MobileNetV2"])
def test_transformers_models_keep_their_class_and_output(name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install transformers runs this test")
    sizes = (
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 1]}
        if name == "ResNet"
        else {"depth_multiplier": 0.5}
    )
    model = getattr(transformers, f"{name}ForImageClassification")(getattr(transformers, f"{name}Config")(**sizes))
    pruned = compress.prune_channels(model, torch.randn(1, 3, 32, 32), ratio=0.3)
    assert type(pruned) is type(model)
    record = compress.record_of(pruned)[0]
    assert record.flops_removed >= 0.3
    reasons = {skipped.reason for skipped in record.skipped}
    assert reasons <= {"an output of the network", "too few channels to keep a multiple of 8"}
    assert pruned.eval()(torch.randn(3, 3, 32, 32)).logits.shape == model(torch.randn(3, 3, 32, 32)).logits.shape
    _assert_channels_are_multiples(pruned, of=8)


@pytest.mark.parametrize("criterion", ["l1", "l2"])
def test_the_filters_of_smallest_norm_leave(criterion: str) -> None:
    """One filter is spread (L1 norm 9·27, L2 norm about 47), one concentrated (L1 100, L2 100); the rest is larger."""
    model = Plain()
    with torch.no_grad():
        model.a.weight.fill_(50)
        model.a.weight[3] = 9
        model.a.weight[5] = 0
        model.a.weight[5, 0, 0, 0] = 100
    pruned = compress.prune_channels(
        model, torch.randn(1, 3, 8, 8), ratio=1 / 16, target="channels", round_to=1, criterion=criterion
    )
    gone = 5 if criterion == "l1" else 3
    kept = [channel for channel in range(16) if channel != gone]
    torch.testing.assert_close(pruned.a.weight, model.a.weight[kept])
    torch.testing.assert_close(pruned.norm.weight, model.norm.weight[kept])
    torch.testing.assert_close(pruned.b.weight, model.b.weight[:, kept])


class TwoBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.even, self.uneven, self.b = conv3x3(3, 16), conv3x3(3, 16), conv3x3(32, 4)
        with torch.no_grad():
            self.even.weight.fill_(1)
            self.uneven.weight.fill_(1)
            self.uneven.weight[:8] = 0.01

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.cat([self.even(x), self.uneven(x)], 1))


def test_local_scope_prunes_alike_and_global_scope_where_it_matters_least() -> None:
    model, x = TwoBranches(), torch.randn(1, 3, 8, 8)
    local = compress.prune_channels(model, x, ratio=0.5, target="channels", round_to=4)
    ranked = compress.prune_channels(model, x, ratio=0.25, target="channels", round_to=4, scope="global")
    assert (local.even.out_channels, local.uneven.out_channels) == (8, 8)
    assert (ranked.even.out_channels, ranked.uneven.out_channels) == (16, 8)


def test_channel_counts_are_rounded_down_from_uneven_sizes() -> None:
    model = nn.Sequential(conv3x3(3, 20), conv3x3(20, 13), conv3x3(13, 4))
    pruned = compress.prune_channels(model, torch.randn(1, 3, 8, 8), ratio=0.3)
    assert [layer.out_channels for layer in pruned] in ([16, 8, 4], [8, 8, 4])
    assert [layer.in_channels for layer in pruned] == [3, pruned[0].out_channels, pruned[1].out_channels]


def test_one_channel_input_is_not_taken_for_depthwise() -> None:
    model = nn.Sequential(conv3x3(1, 16), nn.ReLU(), conv3x3(16, 4))
    pruned = compress.prune_channels(model, torch.randn(1, 1, 8, 8))
    assert (pruned[0].in_channels, pruned[0].out_channels, pruned[0].groups) == (1, 8, 1)


def test_depthwise_and_grouped_layers_state_their_new_sizes() -> None:
    pruned = compress.prune_channels(_built(DepthwiseWithMultiplier), X, target="channels")
    layer = pruned.depthwise
    assert (layer.in_channels, layer.out_channels, layer.groups, layer.weight.shape[0]) == (8, 24, 8, 24)
    pruned = compress.prune_channels(_built(Grouped), X, target="channels")
    layer = pruned.grouped
    assert (layer.in_channels, layer.out_channels, layer.groups, layer.weight.shape[1]) == (8, 8, 4, 2)


def test_ignored_modules_keep_their_output_channels() -> None:
    pruned = compress.prune_channels(
        nn.Sequential(nn.Sequential(conv3x3(3, 16)), conv3x3(16, 16), conv3x3(16, 4)),
        torch.randn(1, 3, 8, 8),
        ratio=0.4,
        ignore=["0"],
    )
    assert (pruned[0][0].out_channels, pruned[1].out_channels) == (16, 8)
    assert any("ignored" in skipped.reason for skipped in compress.record_of(pruned)[0].skipped)


class _Between(nn.Module):
    """Prunable convolutions around an operation that must keep the channels of `a` as they are."""

    def __init__(self, operation: Callable[[Tensor], Tensor], channels: int = 16) -> None:
        super().__init__()
        self.a, self.b, self.c = conv3x3(3, 16), conv3x3(channels, 16), conv3x3(16, 4)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.operation(self.a(x))))


@pytest.mark.parametrize(
    ("operation", "channels", "reason"),
    [
        (lambda y: y[:, :8], 8, "slice takes channels at fixed positions"),
        (lambda y: y.split(4, 1)[1], 4, "split takes channels at fixed positions"),
        (lambda y: F.unfold(y, 1).unflatten(2, (8, 8)), 16, "im2col is not understood"),
        (lambda y: F.normalize(y, dim=1), 16, "linalg_vector_norm is not understood"),
        (lambda y: y.softmax(1), 16, "softmax normalises over channels"),
        (lambda y: y * y.mean(1, keepdim=True), 16, "mean reduces over channels"),
        (lambda y: y.view(y.size(0), 16, 8, 8), 16, "view reshapes channels"),
        (lambda y: y + torch.arange(16.0).view(1, 16, 1, 1), 16, "combines them with channels that stay"),
    ],
    ids=["slice", "split", "unfold", "normalize", "softmax", "mean", "literal view", "constant"],
)
def test_channels_that_cannot_be_followed_stay_with_a_reason(
    operation: Callable[[Tensor], Tensor], channels: int, reason: str
) -> None:
    model = _Between(operation, channels)
    x = torch.randn(2, 3, 8, 8)
    pruned = compress.prune_channels(model, x, ratio=0.1)
    assert (pruned.a.out_channels, pruned.b.out_channels) == (16, 8)
    assert pruned(x).shape == model(x).shape
    assert any(
        "a" in s.layers and reason in s.reason.replace("reshape ", "view ")
        for s in compress.record_of(pruned)[0].skipped
    )


def test_wrongly_connected_channels_would_be_noticed() -> None:
    model = _built(Concatenation)
    graph = trace(model, X, dynamic_batch=False)
    kept = dict(find_dependencies(graph, model).axes)
    assert contradiction(graph, model, kept) is None
    kept[Axis("b.weight", 1)] = kept[Axis("b.weight", 1)].flip(0)
    assert "b.weight" in str(contradiction(graph, model, kept))


def test_model_that_relies_on_its_size_is_refused_and_left_alone() -> None:
    class Checked(Plain):
        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            if y.shape[1] != 16:
                raise RuntimeError("sixteen channels, please")
            return self.b(y)

    model = Checked()
    with pytest.raises(ValueError, match=r"Checked does not work with fewer channels.*sixteen channels.*`ignore`"):
        compress.prune_channels(model, torch.randn(1, 3, 8, 8))
    assert model.a.out_channels == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 1.0}, r"ratio: expected a fraction in \[0, 1\), got 1.0"),
        ({"ratio": -0.1}, "ratio: expected a fraction"),
        ({"ratio": float("nan")}, "ratio: expected a fraction"),
        ({"ratio": 0.99}, r"ratio: expected at most 0\.\d+.*round_to=8"),
        ({"criterion": "taylor2"}, "criterion: expected one of 'l1', 'l2', .*, got 'taylor2'"),
        ({"scope": "layer"}, "scope: expected one of 'local', 'global'"),
        ({"target": "time"}, "target: expected one of 'flops', 'channels', .*, got 'time'"),
        ({"round_to": 0}, "round_to: expected a positive integer, got 0"),
        ({"round_to": 32}, "no channel can be pruned.*too few channels"),
        ({"ignore": ["stem"]}, "ignore: Plain has no module named 'stem'"),
        ({"ignore": "a"}, "no channel can be pruned.*a is ignored"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress.prune_channels(Plain(), torch.randn(1, 3, 8, 8), **arguments)  # type: ignore[arg-type]


def test_model_without_layers_and_weights_with_nan_are_refused() -> None:
    with pytest.raises(ValueError, match="no channel can be pruned: it has no convolution or linear layer"):
        compress.prune_channels(nn.ReLU(), torch.randn(1, 3, 8, 8))
    model = Plain()
    with torch.no_grad():
        model.a.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"a\.weight holds NaN or Inf"):
        compress.prune_channels(model, torch.randn(1, 3, 8, 8))


def test_ratio_zero_returns_an_equal_copy() -> None:
    model = _built(Residual)
    copied = compress.prune_channels(model, X, ratio=0)
    assert copied is not model
    torch.testing.assert_close(copied(X), model(X), rtol=0, atol=0)


def test_tied_weights_stay_tied() -> None:
    class Tied(SharedLayer):
        def __init__(self) -> None:
            super().__init__()
            self.twin = conv3x3(16, 16)
            self.twin.weight = self.shared.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.twin(self.shared(self.a(x))))

    model = _built(Tied)
    pruned = compress.prune_channels(model, X, ratio=0.4)
    assert pruned.twin.weight is pruned.shared.weight
    assert (pruned.twin.in_channels, pruned.twin.out_channels) == (8, 8)


def test_frozen_parameters_and_buffers_keep_their_kind() -> None:
    model = Plain()
    model.a.weight.requires_grad_(False)
    pruned = compress.prune_channels(model, torch.randn(1, 3, 8, 8))
    assert not pruned.a.weight.requires_grad
    assert pruned.b.weight.requires_grad
    assert not isinstance(pruned.norm.running_mean, nn.Parameter)


def test_saved_model_returns_with_weights_sizes_and_record(tmp_path: Path) -> None:
    model = _built(DepthwiseWithMultiplier)
    pruned = compress.prune_channels(model, X)
    compress.save(pruned, tmp_path / "small.safetensors")
    loaded = compress.load(tmp_path / "small.safetensors", _built(DepthwiseWithMultiplier))
    torch.testing.assert_close(loaded(X), pruned(X), rtol=0, atol=0)
    assert loaded.depthwise.groups == pruned.depthwise.groups == 8
    assert compress.record_of(loaded) == compress.record_of(pruned) != ()
    assert "prune_channels: FLOPs" in str(compress.record_of(loaded)[0])


def test_second_pruning_adds_a_second_record() -> None:
    model = nn.Sequential(conv3x3(3, 32), conv3x3(32, 4))
    x = torch.randn(1, 3, 8, 8)
    twice = compress.prune_channels(compress.prune_channels(model, x, ratio=0.2), x, ratio=0.2)
    assert [record.name for record in compress.record_of(twice)] == ["prune_channels"] * 2
    assert (compress.record_of(model), twice[0].out_channels) == ((), 16)


def test_loading_into_another_architecture_changes_nothing(tmp_path: Path) -> None:
    compress.save(Plain(), tmp_path / "plain.safetensors")
    other = Residual()
    with pytest.raises(ValueError, match=r"model: Residual is not the architecture saved in .*body\.0\.bias"):
        compress.load(tmp_path / "plain.safetensors", other)
    (tmp_path / "junk").write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        compress.load(tmp_path / "junk", other)
    with pytest.raises(FileNotFoundError, match="absent"):
        compress.load(tmp_path / "absent", other)


def test_failed_saving_leaves_the_older_file_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plain.safetensors"
    compress.save(Plain(), path)
    content = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        compress.save(Plain(), path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]
