"""`prune_channels` on blocks of efficient networks: each computes what it did without the channels that are gone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pruning import X, conv3x3, without_lost_inputs
from support import with_random_norms
from torch import Tensor, nn

from kernelpress import compress, layers

PACKAGES = Path(__file__).resolve().parent.parent / "build" / "zoo"


class DenseLayer(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, 16, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            conv3x3(16, 8, bias=False),
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.body(torch.cat(features, 1))


class DenseBlock(nn.Module):
    """DenseNet: every layer reads what all before it have made."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DenseLayer(16 + 8 * i) for i in range(3))
        self.transition = nn.Sequential(nn.BatchNorm2d(40), nn.ReLU(), nn.Conv2d(40, 16, 1), nn.AvgPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return self.transition(torch.cat(features, 1))


class Res2Block(nn.Module):
    """Res2Net: equal parts of the channels, each convolution also reads what the one before it made."""

    def __init__(self, scale: int = 4, width: int = 6) -> None:
        super().__init__()
        self.width = width
        self.reduce, self.norm = nn.Conv2d(16, width * scale, 1), nn.BatchNorm2d(width * scale)
        self.convs = nn.ModuleList(conv3x3(width, width) for _ in range(scale - 1))
        self.expand = nn.Conv2d(width * scale, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(F.relu(self.norm(self.reduce(x))), self.width, 1)
        made = [parts[0]]
        for i, conv in enumerate(self.convs):
            made.append(F.relu(conv(parts[i + 1] + made[-1] if i else parts[1])))
        return F.relu(x + self.expand(torch.cat(made, 1)))


class ResNeXtBlock(nn.Module):
    """Grouped, with squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(16, 32, 1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            conv3x3(32, 32, groups=4),
            nn.BatchNorm2d(32),
            nn.ReLU(),
        )
        self.squeeze, self.excite, self.expand = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1), nn.Conv2d(32, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        y = y * self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))).sigmoid()
        return F.relu(x + self.expand(y))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "DenseNet": DenseBlock,
    "Res2Net": Res2Block,
    "SE-ResNeXt": ResNeXtBlock,
    "ShuffleNet V1": lambda: layers.ShuffleUnit(16, 16, groups=2),
    "ShuffleNet V2": lambda: layers.ShuffleUnitV2(16, 16),
    "GhostNet": lambda: layers.GhostBottleneck(16, 24, 16, se_ratio=0.25),
}


def _network(name: str) -> nn.Module:
    model = nn.Sequential(conv3x3(3, 16), nn.BatchNorm2d(16), nn.ReLU(), BLOCKS[name](), nn.Conv2d(16, 4, 1))
    model = with_random_norms(model).double()
    with torch.no_grad():
        for parameter in model.parameters():
            # Drawn in float64, values tell columns apart.
            parameter += torch.randn_like(parameter) * 1e-3
    return model


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("criterion", ["l1", "taylor", "pca"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_pruned_inside_and_computes_the_same_without_what_is_gone(name: str, criterion: str) -> None:
    model = _network(name)
    data = [torch.randn(3, 3, 8, 8, dtype=torch.float64)]
    pruned = compress.prune_channels(
        model, X, ratio=0.3, round_to=1, criterion=criterion, data=data, loss=lambda output, _: output.square().mean()
    )
    assert any(layer.startswith("3.") for layer, _ in compress.record_of(pruned)[0].layers())
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(pruned(x), without_lost_inputs(model, pruned, x)(x), rtol=1e-9, atol=1e-9)


def test_parts_of_res2net_become_narrower_alike_and_come_back_from_a_file(tmp_path: Path) -> None:
    model = _network("Res2Net")
    pruned = compress.prune_channels(model, X, ratio=0.5, target="channels", round_to=1, ignore=["0"])
    block = pruned[3]
    assert block.width < 6
    assert block.reduce.out_channels == 4 * block.width
    assert [conv.in_channels for conv in block.convs] == [block.width] * 3
    compress.save(pruned, tmp_path / "pruned.safetensors")
    loaded = compress.load(tmp_path / "pruned.safetensors", _network("Res2Net"))
    assert loaded[3].width == block.width
    torch.testing.assert_close(loaded(X), pruned(X), rtol=0, atol=0)


def test_a_split_at_places_that_no_attribute_states_keeps_its_channels() -> None:
    class Literal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = conv3x3(3, 16), conv3x3(8, 16), conv3x3(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            first, second = torch.split(self.a(x), 8, 1)
            return self.c(self.b(first + second))

    pruned = compress.prune_channels(Literal().double(), X, ratio=0.2)
    assert (pruned.a.out_channels, pruned.b.out_channels) == (16, 8)


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_what_leaves_together_is_what_torch_pruning_takes_together(
    ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle prunes the same share of every group by the same norm: as many channels are left in every layer."""
    if PACKAGES.is_dir():
        monkeypatch.setattr(sys, "path", [*sys.path, str(PACKAGES)])
    reason = "torch-pruning is not installed: `make zoo`, or pip install --no-deps torch-pruning, runs this test"
    oracle = pytest.importorskip("torch_pruning", reason=reason)
    for name in ("DenseNet", "SE-ResNeXt"):
        model = _network(name)
        ours = compress.prune_channels(model, X, ratio=ratio, target="channels", round_to=1, ignore=["4"])
        theirs = _network(name)
        oracle.pruner.MagnitudePruner(
            theirs,
            X,
            importance=oracle.importance.MagnitudeImportance(p=1),
            pruning_ratio=ratio,
            ignored_layers=[theirs[4]],
        ).step()
        counts = [
            [layer.out_channels for layer in network.modules() if isinstance(layer, nn.Conv2d)]
            for network in (ours, theirs)
        ]
        assert counts[0] == counts[1]
