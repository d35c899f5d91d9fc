"""`prune_channels`: removing channels that contribute nothing changes nothing, whatever connects the layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kernelpress import compress

HALF = torch.arange(0, 16, 2)


def _silence(*modules: nn.Module, channels: Tensor = HALF) -> None:
    """Makes filters and BatchNorm channels produce exact zeros."""
    with torch.no_grad():
        for module in modules:
            for name in ("weight", "bias", "running_mean"):
                tensor = getattr(module, name, None)
                if tensor is not None:
                    tensor[channels] = 0


def _conv(inputs: int, outputs: int, **kwargs: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **kwargs)  # type: ignore[arg-type]


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = _conv(3, 16, bias=False), nn.BatchNorm2d(16), _conv(16, 4)
        _silence(self.a, self.norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.norm(self.a(x))))


class Residual(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(16, 16), nn.BatchNorm2d(16))
        _silence(*self.body)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.a(x)), inplace=True)
        z = self.body(y)
        z += y
        return self.b(F.relu(z))


class Concatenation(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.b = _conv(3, 16), _conv(32, 4)
        _silence(self.c, channels=torch.arange(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.cat([self.norm(self.a(x)), self.c(x)], 1))


class ConcatenationWithInput(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.b = _conv(19, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.cat([x, self.norm(self.a(x))], 1))


class Depthwise(Plain):
    multiplier = 1

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = _conv(16, 16 * self.multiplier, groups=16)
        self.b = _conv(16 * self.multiplier, 4)
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
        self.grouped = _conv(16, 16, groups=4)
        _silence(self.grouped)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.grouped(self.norm(self.a(x)))))


class Shuffled(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.second = _conv(16, 16, groups=2)
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
        self.c, self.b = _conv(16, 32, stride=2), _conv(32, 4)
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
        self.shared = _conv(16, 16)
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
X = torch.randn(2, 3, 8, 8, dtype=torch.float64)


def _built(network: Callable[[], nn.Module]) -> nn.Module:
    model = network()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
    return model.double().eval()


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("scope", ["local", "global"])
def test_removing_silent_channels_changes_no_output(network: type[nn.Module], scope: str) -> None:
    model = _built(network)
    pruned = compress.prune_channels(model, X, ratio=0.5, target="channels", scope=scope)
    assert pruned.a.out_channels == 8
    assert type(pruned) is type(model)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(pruned(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("network", [*NETWORKS, Shuffled])
def test_pruned_network_equals_the_original_whose_lost_inputs_are_cut(network: type[nn.Module]) -> None:
    """Whatever leaves, and however it is ranked: without a channel is the same as no layer reading it."""
    from kernelpress.compress.dependency import find_dependencies
    from kernelpress.trace import trace

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
