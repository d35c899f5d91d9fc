"""Random networks: pruned, each computes what the original does whose layers do not read the channels that are gone."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pruning import without_lost_inputs
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from kernelpress import compress

NETWORKS = 25
SIZE = 8


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Concatenated(nn.Module):
    """Optionally with the input of the branches between their outputs."""

    def __init__(self, a: nn.Module, b: nn.Module, with_input: bool) -> None:
        super().__init__()
        self.a, self.b, self.with_input = a, b, with_input

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), *([x] if self.with_input else []), self.b(x)], 1)


class Fused(nn.Module):
    """A weighted sum, as in BiFPN."""

    def __init__(self, a: nn.Module, b: nn.Module, stacked: bool) -> None:
        super().__init__()
        self.a, self.b, self.stacked = a, b, stacked
        self.weights = nn.Parameter(torch.rand(2))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.weights.softmax(0)
        if self.stacked:
            return (torch.stack([self.a(x), self.b(x)], -1) * weights).sum(-1)
        return weights[0] * self.a(x) + weights[1] * self.b(x)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Linear(channels, 8), nn.Linear(8, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.excite(F.relu(self.squeeze(x.mean((2, 3))))).sigmoid()[:, :, None, None]


class Scaled(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Shuffled(nn.Module):
    """Channels of groups in turn, by the view that ShuffleNet takes or torch's operation."""

    def __init__(self, groups: int, by_view: bool) -> None:
        super().__init__()
        self.groups, self.by_view = groups, by_view

    def forward(self, x: Tensor) -> Tensor:
        if not self.by_view:
            return F.channel_shuffle(x, self.groups)
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class Halves(nn.Module):
    """A half passes, the other one is transformed."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, 1)
        return torch.cat([self.body(changed), kept], 1)


def _conv(channels: int, outputs: int, draw: random.Random) -> Any:
    groups = draw.choice([1, 1, 1, 2, 4])
    make = nn.ConvTranspose2d if draw.random() < 0.15 else nn.Conv2d
    layer = make(channels, outputs, 3, padding=1, groups=groups, bias=draw.random() < 0.5)
    kind = draw.random()
    if kind < 0.1 and make is nn.Conv2d:
        return parametrizations.weight_norm(layer)
    return prune.random_unstructured(layer, "weight", 0.3) if kind < 0.2 else layer


def _norm(channels: int, whole_groups: bool, draw: random.Random) -> nn.Module:
    return draw.choice(
        [
            nn.Identity(),
            nn.BatchNorm2d(channels),
            nn.GroupNorm(4 if whole_groups else channels, channels, affine=draw.random() < 0.5),
            nn.GroupNorm(channels, channels),
            nn.InstanceNorm2d(channels, affine=draw.random() < 0.5, track_running_stats=draw.random() < 0.5),
        ]
    )


def _unit(channels: int, outputs: int, draw: random.Random) -> nn.Module:
    activation = draw.choice([nn.ReLU(), nn.Hardswish(), nn.PReLU(outputs), nn.Sigmoid(), nn.Identity()])
    layer = _conv(channels, outputs, draw)
    # Channels of a grouped convolution leave every group alike: no whole group of a norm could.
    return nn.Sequential(layer, _norm(outputs, layer.groups == 1, draw), activation)


def _depthwise(channels: int, draw: random.Random) -> tuple[nn.Module, int]:
    outputs = channels * draw.choice([1, 1, 2])
    return nn.Conv2d(channels, outputs, 3, padding=1, groups=channels), outputs


def _concatenated(channels: int, draw: random.Random) -> tuple[nn.Module, int]:
    with_input = draw.random() < 0.5
    block = Concatenated(_unit(channels, 8, draw), _unit(channels, 8, draw), with_input)
    return block, 16 + (channels if with_input else 0)


BLOCKS: list[Callable[[int, random.Random], tuple[nn.Module, int]]] = [
    lambda c, draw: (_unit(c, draw.choice([8, 16, 24]), draw), 0),
    lambda c, draw: (Residual(nn.Sequential(_unit(c, c, draw), _conv(c, c, draw))), c),
    lambda c, draw: (Residual(nn.Sequential(_unit(c, 16, draw), _unit(16, c, draw))), c),
    lambda c, draw: (Fused(_unit(c, 16, draw), _conv(c, 16, draw), draw.random() < 0.5), 16),
    lambda c, draw: (Halves(_unit(c // 2, c // 2, draw)), c),
    lambda c, draw: (Shuffled(draw.choice([2, 4]), draw.random() < 0.5), c),
    lambda c, draw: (nn.PixelUnshuffle(2), 4 * c),
    lambda c, draw: (nn.PixelShuffle(2), c // 4),
    lambda c, draw: (SqueezeExcite(c), c),
    lambda c, draw: (Scaled(c), c),
    _depthwise,
    _concatenated,
]


def _network(draw: random.Random) -> nn.Module:
    """Three to five blocks between a stem and a head; channels stay a multiple of 8, images two pixels wide or more."""
    channels, size = 16, SIZE
    blocks: list[nn.Module] = [_unit(4, channels, draw)]
    for _ in range(draw.randint(3, 5)):
        block, outputs = draw.choice(BLOCKS)(channels, draw)
        if isinstance(block, nn.PixelUnshuffle | nn.PixelShuffle):
            size = size // 2 if isinstance(block, nn.PixelUnshuffle) else size * 2
            if outputs % 8 or outputs > 64 or not 2 <= size <= 2 * SIZE:
                size = size * 2 if isinstance(block, nn.PixelUnshuffle) else size // 2
                continue
        blocks.append(block)
        channels = outputs or block[0].out_channels  # type: ignore[index, assignment]
    head = nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, 5))
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))
    model = nn.Sequential(*blocks, draw.choice([head, pooled])).double().eval()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not name.endswith("_mask") and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5) if name.endswith("running_var") else tensor.normal_()
    return model


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("seed", range(NETWORKS))
def test_pruned_network_is_the_original_that_does_not_read_what_is_gone(seed: int) -> None:
    draw = random.Random(f"{seed} {torch.initial_seed()}")
    model, x = _network(draw), torch.randn(2, 4, SIZE, SIZE, dtype=torch.float64)
    scope, round_to = draw.choice(["local", "global"]), draw.choice([1, 2])
    ratio = 0.25
    try:
        pruned = compress.prune_channels(model, x, ratio=ratio, scope=scope, round_to=round_to)
    except ValueError as refusal:
        # Groups, shuffles and concatenations may tie nearly everything together.
        possible = re.match(r"ratio: expected at most (0\.\d+)", str(refusal))
        if possible is None:
            raise
        ratio = 0.9 * float(possible[1])
        pruned = compress.prune_channels(model, x, ratio=ratio, scope=scope, round_to=round_to)
    record = compress.record_of(pruned)[0]
    assert record.layers
    assert record.flops_removed >= ratio
    x = torch.randn(3, 4, SIZE, SIZE, dtype=torch.float64)
    torch.testing.assert_close(pruned(x), without_lost_inputs(model, pruned, x)(x), rtol=1e-7, atol=1e-7)
