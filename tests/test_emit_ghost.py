"""Emission of ghost modules, as models of other people's making have them."""

import pytest
import torch
import torch.nn.functional as F
from emitting import (
    FUSED_BACKENDS,
    Apply,
    assert_as_exact_as,
    assert_saving_and_capture_keep,
    emit_fused,
    matched_ops,
    ops_of,
    torch_steps,
)
from support import with_random_norms
from torch import nn

pytestmark = pytest.mark.usefixtures("own_cache", "every_match_is_exact")


class GhostModule(nn.Module):
    """GhostNet's module in the manner of timm."""

    def __init__(self, channels, out, kernel=1, ratio=2, relu=True):
        super().__init__()
        self.out_chs = out
        primary = -(-out // ratio)
        cheap = primary * (ratio - 1)
        self.primary_conv = nn.Sequential(
            nn.Conv2d(channels, primary, kernel, 1, kernel // 2, bias=False),
            nn.BatchNorm2d(primary),
            nn.ReLU(inplace=True) if relu else nn.Identity(),
        )
        self.cheap_operation = nn.Sequential(
            nn.Conv2d(primary, cheap, 3, 1, 1, groups=primary, bias=False),
            nn.BatchNorm2d(cheap),
            nn.ReLU(inplace=True) if relu else nn.Identity(),
        )

    def forward(self, x):
        x1 = self.primary_conv(x)
        x2 = self.cheap_operation(x1)
        return torch.cat([x1, x2], dim=1)[:, : self.out_chs, :, :]


class GhostBottleneck(nn.Module):
    """GhostNet's bottleneck in the manner of timm."""

    def __init__(self, channels, mid, out, stride=1):
        super().__init__()
        self.ghost1 = GhostModule(channels, mid)
        self.stride = stride
        if stride > 1:
            self.conv_dw = nn.Conv2d(mid, mid, 3, stride, 1, groups=mid, bias=False)
            self.bn_dw = nn.BatchNorm2d(mid)
        self.ghost2 = GhostModule(mid, out, relu=False)
        self.shortcut = nn.Sequential()
        if stride > 1 or channels != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
                nn.BatchNorm2d(channels),
                nn.Conv2d(channels, out, 1, bias=False),
                nn.BatchNorm2d(out),
            )

    def forward(self, x):
        shortcut = x
        x = self.ghost1(x)
        if self.stride > 1:
            x = self.bn_dw(self.conv_dw(x))
        x = self.ghost2(x)
        x += self.shortcut(shortcut)
        return x


@pytest.mark.parametrize(
    ("out", "kernel", "ratio"), [(8, 1, 2), (7, 1, 2), (8, 3, 2), (10, 1, 3)], ids=["even", "cut", "3x3", "ratio 3"]
)
def test_a_ghost_module_is_one_op(out, kernel, ratio, tmp_path):
    model = with_random_norms(GhostModule(6, out, kernel, ratio))
    x = torch.randn(2, 6, 9, 8)
    emitted = emit_fused(model, x)
    assert ops_of(emitted) == ["ghost_conv2d"]
    assert_as_exact_as(emitted, model, torch.randn(3, 6, 9, 8))
    assert_saving_and_capture_keep(emitted, tmp_path, x)


@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_ghost_bottlenecks_add_their_shortcut_in_the_op(backend, tmp_path):
    model = with_random_norms(
        nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), GhostBottleneck(8, 16, 8), GhostBottleneck(8, 24, 12, stride=2))
    )
    x = torch.randn(2, 3, 17, 16)
    emitted = emit_fused(model, x, backend)
    names = ops_of(emitted)
    assert names.count("ghost_conv2d") == 4
    assert not {"aten.add.Tensor", "aten.cat", "aten.slice.Tensor"} & set(names)
    assert_as_exact_as(emitted, model, torch.randn(3, 3, 17, 16))
    assert_saving_and_capture_keep(emitted, tmp_path, x)
    if backend == "cpu":
        assert torch_steps(emitted, x) == []


@pytest.mark.parametrize(
    "forward",
    [
        lambda x, conv, cheap: torch.cat([cheap(y := conv(x)), y], 1),
        lambda x, conv, cheap: torch.cat([y := conv(x), cheap(y)], 1) + y.mean(),
        lambda x, conv, cheap: torch.cat([y := conv(x), cheap(y), y], 1),
        lambda x, conv, cheap: torch.cat([y := conv(x), cheap(y.relu())], 1),
        lambda x, conv, cheap: torch.cat([y := conv(x), cheap(y)], 2),
    ],
    ids=["cheap first", "primary read again", "three parts", "activation between", "rows"],
)
def test_what_is_almost_a_ghost_module_is_left_alone(forward):
    model = Apply(forward, nn.Conv2d(6, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4)).eval()
    x = torch.randn(2, 6, 9, 8)
    assert "ghost_conv2d" not in matched_ops(model, x)
    assert_as_exact_as(emit_fused(model, x), model, x)


@pytest.mark.parametrize("kept", [slice(1, None), slice(0, 3), slice(None, None, 2)], ids=str)
def test_a_cut_that_the_op_cannot_make_stays_behind_the_ghost_module(kept):
    def forward(x, conv, cheap):
        y = conv(x)
        return torch.cat([y, cheap(y)], 1)[:, kept]

    model = Apply(forward, nn.Conv2d(6, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4)).eval()
    x = torch.randn(2, 6, 9, 8)
    emitted = emit_fused(model, x)
    assert ops_of(emitted) == ["ghost_conv2d", "aten.slice.Tensor"]
    assert_as_exact_as(emitted, model, x)


@pytest.mark.parametrize("geometry", [{"stride": 2}, {"padding": 0}, {"dilation": 2, "padding": 2}], ids=str)
def test_a_cheap_operation_of_another_geometry_is_no_ghost(geometry):
    cheap = nn.Conv2d(4, 4, 3, **{"padding": 1, "groups": 4} | geometry)

    def forward(x, conv, cheap):
        y = conv(x)
        z = cheap(y)
        return torch.cat([y, F.interpolate(z, y.shape[2:]) if z.shape != y.shape else z], 1)

    model = Apply(forward, nn.Conv2d(6, 4, 1), cheap).eval()
    assert "ghost_conv2d" not in matched_ops(model, torch.randn(2, 6, 9, 8))
