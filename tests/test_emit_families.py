"""Emission of the grouped, ghost, sparse and int8 families: what is recognised in models of other people's making."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from emitting import assert_as_exact_as, emit_fused, ops_of, randomize
from torch import nn

import kernelpress as kp
from kernelpress.emit import pipeline
from kernelpress.emit.canonical import canonicalize
from kernelpress.emit.evaluate import INT8_TOLERANCE, evaluate, relative_error
from kernelpress.emit.fold import fold
from kernelpress.emit.fuse import find_matches
from kernelpress.runtime.torch_private import define_quantized_ops
from kernelpress.trace import trace

define_quantized_ops()
quantized = torch.ops.quantized_decomposed


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KERNELPRESS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _every_match_is_exact(monkeypatch):
    """A layer that computes something else is refused, and so would pass unnoticed."""

    def checked(*arguments):
        evaluations = evaluate(*arguments)
        wrong = [(e.candidate.label, e.error) for e in evaluations if e.error is not None and e.refusal is not None]
        assert not wrong
        return evaluations

    monkeypatch.setattr(pipeline, "evaluate", checked)


class Apply(nn.Module):
    """Any function of the input and of these layers."""

    def __init__(self, function, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.function = function

    def forward(self, x):
        return self.function(x, *self.layers)


def survives_saving_and_capture(emitted, path, x):
    """Saved and loaded, at another batch, and as a plan, the model computes the same."""
    emitted.save(path / "model.pt2")
    loaded = kp.load(path / "model.pt2")
    assert ops_of(loaded) == ops_of(emitted)
    assert emitted.dynamic_batch
    for inputs in (x, torch.cat([x, x[:1]])):
        torch.testing.assert_close(loaded(inputs), emitted(inputs), rtol=0, atol=0)
    torch.testing.assert_close(kp.capture(emitted, x)(x), emitted(x), rtol=1e-5, atol=1e-5)


def matched(model, x):
    return {match.op for match in find_matches(fold(canonicalize(trace(model.eval(), x))))}


def prefer_op(*names):
    """A cost under which layers of these ops win, on the reference backend."""

    def cost(candidate):
        return 1.0 if candidate.name in names and candidate.variant == "reference" else 10.0 * len(candidate.nodes)

    return cost


def emit_onto(model, x, *names):
    """`model` emitted onto layers of these ops wherever they fit."""
    emitted = kp.emit(model, x, cost=prefer_op(*names), progress=False)
    assert not emitted.record.kept_original, emitted.record.reason
    return emitted


# Channel shuffles


def view_transpose(x, groups):
    n, c, h, w = x.size()
    x = x.view(n, groups, c // groups, h, w)
    return torch.transpose(x, 1, 2).contiguous().view(n, c, h, w)


def reshape_permute(x, groups):
    n, c, h, w = x.shape
    return x.reshape(n, groups, c // groups, h, w).permute(0, 2, 1, 3, 4).reshape(n, c, h, w)


def unflatten_flatten(x, groups):
    return x.unflatten(1, (groups, -1)).swapaxes(-3, -4).flatten(1, 2)


def flat_pixels(x, groups):
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h * w).transpose(2, 1).reshape(-1, c, h, w)


SPELLINGS = [view_transpose, reshape_permute, unflatten_flatten, flat_pixels, F.channel_shuffle]


@pytest.mark.parametrize("spelled", SPELLINGS, ids=lambda spelled: spelled.__name__)
def test_a_channel_shuffle_however_spelled_is_one_op(spelled):
    model = Apply(lambda x: spelled(x.relu(), 3)).eval()
    x = torch.randn(2, 12, 5, 4)
    emitted = emit_fused(model, x)
    assert ops_of(emitted) == ["aten.relu", "channel_shuffle"]
    for inputs in (x, torch.randn(5, 12, 5, 4)):
        assert torch.equal(emitted(inputs), model(inputs))


def transposes_pixels(x):
    n, c, h, w = x.shape
    return x.reshape(n, 3, 4, h, w).transpose(2, 3).reshape(n, c, h, w)


def splits_wrongly(x):
    n, c, h, w = x.shape
    return x.reshape(n, 3, 2, h * 2, w).transpose(1, 2).reshape(n, c, h, w)


def exchanges_three(x):
    n, c, h, w = x.shape
    return x.reshape(n, 2, 2, 3, h, w).permute(0, 3, 2, 1, 4, 5).reshape(n, c, h, w)


def mixes_the_batch(x):
    n, c, h, w = x.shape
    return x.reshape(n * 3, c // 3, h, w).transpose(0, 1).reshape(n, c, h, w)


def rows_as_images(x):
    n, c, h, w = x.shape
    return x.reshape(n * h, 3, c // 3, w).transpose(1, 2).reshape(n, c, h, w)


def halves_as_images(x):
    n, c, h, w = x.shape
    return x.reshape(n * 2, 3, 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def ends_elsewhere(x):
    n, c, h, w = x.shape
    return x.reshape(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, w, h)


@pytest.mark.parametrize(
    "almost",
    [
        transposes_pixels,
        splits_wrongly,
        exchanges_three,
        mixes_the_batch,
        rows_as_images,
        halves_as_images,
        ends_elsewhere,
    ],
    ids=lambda almost: almost.__name__,
)
def test_what_is_almost_a_shuffle_is_left_alone(almost):
    model = Apply(lambda x: almost(x.relu())).eval()
    x = torch.randn(2, 12, 4, 6)
    assert not matched(model, x)
    assert torch.equal(emit_fused(model, x)(x), model(x))


def test_a_value_read_inside_a_shuffle_stays():
    def forward(x):
        n, c, h, w = x.shape
        inner = x.relu().reshape(n, 3, c // 3, h, w).transpose(1, 2)
        return inner.reshape(n, c, h, w), inner.sum(1)

    model = Apply(forward).eval()
    x = torch.randn(2, 12, 4, 6)
    for ours, theirs in zip(emit_fused(model, x)(x), model(x), strict=True):
        torch.testing.assert_close(ours, theirs)


# Grouped convolutions


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_grouped_convolution_takes_norm_residual_and_activation(kernel, tmp_path):
    conv = nn.Conv2d(12, 12, kernel, padding=kernel // 2, groups=3, bias=False)
    model = randomize(Apply(lambda x, conv, norm: F.relu6(norm(conv(x)) + x), conv, nn.BatchNorm2d(12)))
    x = torch.randn(2, 12, 7, 6)
    emitted = emit_fused(model, x)
    assert ops_of(emitted) == ["grouped_conv2d"]
    assert_as_exact_as(emitted, model, torch.randn(3, 12, 7, 6))
    survives_saving_and_capture(emitted, tmp_path, x)


@pytest.mark.parametrize(
    ("forward", "count"),
    [
        (lambda x, conv: view_transpose(conv(x).relu(), 3), 1),
        (lambda x, conv: view_transpose(conv(x), 3).relu(), 1),
        (lambda x, conv: (view_transpose(conv(x), 3) + x).relu(), 1),
        (lambda x, conv: view_transpose((conv(x) + x).relu(), 3), 2),
        (lambda x, conv: view_transpose(conv(x).relu(), 3) + x, 2),
    ],
    ids=["after the activation", "before it", "before a sum", "after a sum", "activation, shuffle, sum"],
)
def test_a_shuffle_behind_a_grouped_convolution_is_part_of_it_where_the_op_can_express_it(forward, count):
    model = Apply(forward, nn.Conv2d(12, 12, 3, padding=1, groups=4)).eval()
    x = torch.randn(2, 12, 7, 6)
    emitted = emit_fused(model, x)
    assert len(ops_of(emitted)) == count
    assert "grouped_conv2d" in ops_of(emitted)
    assert_as_exact_as(emitted, model, x)


def test_a_shuffle_behind_a_convolution_in_one_group_is_part_of_it():
    model = Apply(lambda x, conv: view_transpose(conv(x).relu(), 3), nn.Conv2d(8, 12, 1)).eval()
    emitted = emit_fused(model, torch.randn(2, 8, 7, 6))
    assert ops_of(emitted) == ["grouped_conv2d"]
    assert_as_exact_as(emitted, model, torch.randn(2, 8, 7, 6))


class ShuffleUnitV1(nn.Module):
    """ShuffleNet V1's unit in plain PyTorch."""

    def __init__(self, channels, out, groups, stride):
        super().__init__()
        made, hidden = (out - channels, out // 4) if stride == 2 else (out, out // 4)
        self.groups, self.stride = groups, stride
        self.compress = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, groups=groups, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(inplace=True)
        )
        self.depthwise = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden)
        )
        self.expand = nn.Sequential(nn.Conv2d(hidden, made, 1, groups=groups, bias=False), nn.BatchNorm2d(made))

    def forward(self, x):
        y = self.expand(self.depthwise(view_transpose(self.compress(x), self.groups)))
        if self.stride == 1:
            return F.relu(x + y, inplace=True)
        return F.relu(torch.cat([F.avg_pool2d(x, 3, 2, 1), y], 1), inplace=True)


def test_shufflenet_v1_runs_on_shuffled_grouped_convolutions(tmp_path):
    model = randomize(
        nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), ShuffleUnitV1(12, 36, 3, 2), ShuffleUnitV1(36, 36, 3, 1))
    )
    x = torch.randn(2, 3, 17, 16)
    emitted = emit_fused(model, x)
    assert ops_of(emitted).count("grouped_conv2d") == 4
    assert not {"channel_shuffle", "aten.transpose.int", "aten.add.Tensor"} & set(ops_of(emitted))
    shuffled = [n for n in emitted.body.graph.nodes if n.kwargs.get("shuffle", 1) > 1]
    assert len(shuffled) == 2
    assert_as_exact_as(emitted, model, torch.randn(3, 3, 17, 16))
    survives_saving_and_capture(emitted, tmp_path, x)


class ShuffleBlockV2(nn.Module):
    """ShuffleNet V2's block in the manner of torchvision."""

    def __init__(self, channels, out, stride):
        super().__init__()
        half = out // 2
        self.stride = stride
        self.branch1 = nn.Sequential()
        if stride > 1:
            self.branch1 = nn.Sequential(
                nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
                nn.BatchNorm2d(channels),
                nn.Conv2d(channels, half, 1, bias=False),
                nn.BatchNorm2d(half),
                nn.ReLU(inplace=True),
            )
        self.branch2 = nn.Sequential(
            nn.Conv2d(channels if stride > 1 else half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
            nn.Conv2d(half, half, 3, stride, 1, groups=half, bias=False),
            nn.BatchNorm2d(half),
            nn.Conv2d(half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
        )

    def forward(self, x):
        if self.stride == 1:
            passing, working = x.chunk(2, dim=1)
            out = torch.cat((passing, self.branch2(working)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return view_transpose(out, 2)


def test_shufflenet_v2_joins_and_shuffles_in_one_op(tmp_path):
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), ShuffleBlockV2(8, 16, 2), ShuffleBlockV2(16, 16, 1)))
    x = torch.randn(2, 3, 17, 16)
    emitted = emit_fused(model, x)
    names = ops_of(emitted)
    assert names.count("shuffle_concat") == 2
    assert not [name for name in names if "cat." in name or "reshape" in name or "transpose" in name]
    assert_as_exact_as(emitted, model, torch.randn(3, 3, 17, 16))
    survives_saving_and_capture(emitted, tmp_path, x)


@pytest.mark.parametrize(
    "join",
    [
        lambda x: torch.cat([x, x * 2, x], 1),
        lambda x: torch.cat([x[:, :, :3], x[:, :, 3:]], 2),
        lambda x: torch.cat([x, x.relu()], 0),
    ],
    ids=["three parts", "rows", "images"],
)
def test_other_concatenations_before_a_shuffle_stay(join):
    model = Apply(lambda x: view_transpose(join(x), 3)).eval()
    x = torch.randn(2, 6, 5, 4)
    emitted = emit_fused(model, x)
    assert "shuffle_concat" not in ops_of(emitted)
    assert "channel_shuffle" in ops_of(emitted)
    assert torch.equal(emitted(x), model(x))


# Ghost modules


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
    model = randomize(GhostModule(6, out, kernel, ratio))
    x = torch.randn(2, 6, 9, 8)
    emitted = emit_fused(model, x)
    assert ops_of(emitted) == ["ghost_conv2d"]
    assert_as_exact_as(emitted, model, torch.randn(3, 6, 9, 8))
    survives_saving_and_capture(emitted, tmp_path, x)


def test_ghost_bottlenecks_add_their_shortcut_in_the_op(tmp_path):
    model = randomize(
        nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), GhostBottleneck(8, 16, 8), GhostBottleneck(8, 24, 12, stride=2))
    )
    x = torch.randn(2, 3, 17, 16)
    emitted = emit_fused(model, x)
    names = ops_of(emitted)
    assert names.count("ghost_conv2d") == 4
    assert not {"aten.add.Tensor", "aten.cat", "aten.slice.Tensor"} & set(names)
    assert_as_exact_as(emitted, model, torch.randn(3, 3, 17, 16))
    survives_saving_and_capture(emitted, tmp_path, x)


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
    assert "ghost_conv2d" not in matched(model, x)
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
    assert "ghost_conv2d" not in matched(model, torch.randn(2, 6, 9, 8))


# Block-sparse weights


def prune(weight, block, density):
    """Zeros in all but some of the blocks of a weight matrix `[C_out, C_in]`, in place."""
    sizes = [-(-size // block) for size in weight.shape]
    keep = torch.zeros(sizes).flatten()
    keep[torch.randperm(keep.numel())[: round(density * keep.numel())]] = 1
    mask = keep.view(sizes).repeat_interleave(block, 0).repeat_interleave(block, 1)
    with torch.no_grad():
        weight.mul_(mask[: weight.shape[0], : weight.shape[1]])


def prune_taps(conv, block, density):
    """The same at every position of a convolution's kernel."""
    for kh in range(conv.kernel_size[0]):
        for kw in range(conv.kernel_size[1]):
            prune(conv.weight.data[:, :, kh, kw], block, density)


@pytest.mark.parametrize("block", [16, 32, 64])
def test_a_linear_layer_of_zero_blocks_becomes_sparse(block, tmp_path):
    layer = nn.Linear(200, 150)
    prune(layer.weight, block, 0.3)
    model = nn.Sequential(layer, nn.ReLU()).eval()
    x = torch.randn(3, 200)
    found = [m for m in find_matches(fold(canonicalize(trace(model, x)))) if m.op == "sparse_matmul"]
    assert max(m.arguments["blocks"].meta["val"].shape[1] for m in found) == block
    emitted = emit_onto(model, x, "sparse_matmul")
    assert ops_of(emitted) == ["sparse_matmul"]
    assert_as_exact_as(emitted, model, torch.randn(5, 200))
    survives_saving_and_capture(emitted, tmp_path, x)


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_convolution_of_zero_blocks_becomes_sparse_with_its_epilogue(kernel, tmp_path):
    conv = nn.Conv2d(64, 64, kernel, padding=kernel // 2, bias=False)
    prune_taps(conv, 16, 0.25)
    model = randomize(Apply(lambda x, conv, norm: (norm(conv(x)) + x).relu(), conv, nn.BatchNorm2d(64)))
    x = torch.randn(2, 64, 6, 5)
    emitted = emit_onto(model, x, "sparse_conv2d")
    assert ops_of(emitted) == ["sparse_conv2d"]
    assert_as_exact_as(emitted, model, torch.randn(3, 64, 6, 5))
    survives_saving_and_capture(emitted, tmp_path, x)


def test_ragged_strided_convolutions_of_zero_blocks_are_exact():
    conv = nn.Conv2d(50, 70, 3, stride=2, padding=1)
    prune_taps(conv, 16, 0.3)
    model = nn.Sequential(conv, nn.Hardswish()).eval()
    x = torch.randn(2, 50, 9, 8)
    emitted = emit_onto(model, x, "sparse_conv2d")
    assert ops_of(emitted) == ["sparse_conv2d"]
    assert_as_exact_as(emitted, model, x)


def test_zeros_that_fill_no_blocks_and_few_zero_blocks_offer_nothing():
    scattered, few = nn.Linear(128, 128), nn.Linear(128, 128)
    with torch.no_grad():
        scattered.weight.mul_(torch.rand(128, 128) < 0.2)
    prune(few.weight, 32, 0.75)
    grouped = nn.Conv2d(64, 64, 1, groups=2)
    nn.init.zeros_(grouped.weight)
    assert "sparse_matmul" not in matched(nn.Sequential(scattered, few), torch.randn(2, 128))
    assert "sparse_conv2d" not in matched(grouped, torch.randn(2, 64, 3, 3))


def test_a_weight_of_zeros_only_is_exact():
    layer = nn.Linear(64, 32)
    nn.init.zeros_(layer.weight)
    x = torch.randn(2, 64)
    emitted = emit_onto(layer.eval(), x, "sparse_matmul")
    assert ops_of(emitted) == ["sparse_matmul"]
    assert torch.equal(emitted(x), layer(x))


def test_constants_of_candidates_not_taken_are_not_kept():
    layer = nn.Linear(128, 128)
    prune(layer.weight, 32, 0.1)
    emitted = emit_onto(layer.eval(), torch.randn(2, 128), "linear")
    assert [name for name, _ in emitted.named_parameters()] == ["body.weight", "body.bias"]
    assert not list(emitted.named_buffers())


# int8


INT8 = ("int8_conv2d", "int8_depthwise_conv2d", "int8_matmul", "int8_add", "quantize", "dequantize")


class Quantized(nn.Module):
    """A tensor rounded to int8, or uint8, and back."""

    def __init__(self, scale, zero_point=0, dtype=torch.int8, limits=None):
        super().__init__()
        low, high = limits or ((-128, 127) if dtype == torch.int8 else (0, 255))
        self.arguments = (scale, zero_point, low, high, dtype)

    def forward(self, x):
        return quantized.dequantize_per_tensor(quantized.quantize_per_tensor(x, *self.arguments), *self.arguments)


class QuantizedWeight(nn.Module):
    """A convolution or linear layer whose weight is int8 per output channel."""

    def __init__(self, layer, values=None):
        super().__init__()
        weight = layer.weight.detach()
        scale = weight.flatten(1).abs().amax(1) / 127
        zero_point = torch.zeros(len(scale), dtype=torch.int64)
        self.layer, self.arguments = layer, (0, -128, 127, torch.int8)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("values", quantized.quantize_per_channel(weight, scale, zero_point, *self.arguments))
        layer.weight = None

    def forward(self, x):
        weight = quantized.dequantize_per_channel(self.values, self.scale, self.zero_point, *self.arguments)
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.layer.bias)
        return self.layer._conv_forward(x, weight, self.layer.bias)


def emit_int8(model, x):
    return emit_onto(model.eval(), x, *INT8)


def assert_as_rounded(emitted, model, x):
    """Float outputs agree as closely as a few values, rounded to the other of two neighbours, allow."""
    with torch.no_grad():
        assert relative_error(emitted(x), model(x)) <= INT8_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize(
    ("layer", "op", "sizes"),
    [
        (lambda: nn.Conv2d(6, 8, 3, 2, 1), "int8_conv2d", (6, 9, 8)),
        (lambda: nn.Conv2d(6, 8, 1, bias=False), "int8_conv2d", (6, 9, 8)),
        (lambda: nn.Conv2d(6, 12, 3, padding=2, dilation=2, groups=6), "int8_depthwise_conv2d", (6, 9, 8)),
        (lambda: nn.Linear(20, 8), "int8_matmul", (20,)),
        (lambda: nn.Linear(20, 8), "int8_matmul", (3, 20)),
    ],
    ids=["3x3", "1x1", "depthwise", "linear", "linear of rows"],
)
def test_layers_between_quantizations_compute_in_int8(layer, op, sizes, dtype, tmp_path):
    zero_point = 3 if dtype == torch.int8 else 131
    model = nn.Sequential(Quantized(0.03, zero_point, dtype), QuantizedWeight(layer()), nn.ReLU()).eval()
    x = torch.randn(2, *sizes)
    emitted = emit_int8(model, x)
    assert ops_of(emitted) == ["quantize", op]
    for inputs in (x, torch.randn(5, *sizes)):
        torch.testing.assert_close(emitted(inputs), model(inputs), rtol=1e-5, atol=1e-5)
    survives_saving_and_capture(emitted, tmp_path, x)


def test_int8_stays_int8_between_layers(tmp_path):
    model = nn.Sequential(
        *(Quantized(0.03, 120, torch.uint8), QuantizedWeight(nn.Conv2d(6, 8, 3, padding=1)), nn.ReLU()),
        *(Quantized(0.01, 0, torch.uint8), QuantizedWeight(nn.Conv2d(8, 8, 3, padding=1, groups=8)), nn.ReLU6()),
        *(Quantized(0.005, 0, torch.uint8), QuantizedWeight(nn.Conv2d(8, 12, 1)), Quantized(0.01, 99, torch.uint8)),
    ).eval()
    x = torch.randn(2, 6, 9, 8)
    emitted = emit_int8(model, x)
    assert ops_of(emitted) == ["quantize", "int8_conv2d", "int8_depthwise_conv2d", "int8_conv2d", "dequantize"]
    assert_as_rounded(emitted, model, torch.randn(3, 6, 9, 8))
    survives_saving_and_capture(emitted, tmp_path, x)


def test_an_int8_residual_is_added_in_the_layer_and_two_branches_in_a_sum(tmp_path):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.other = (QuantizedWeight(nn.Conv2d(8, 8, 3, padding=1)) for _ in range(2))
            self.first, self.second, self.third = Quantized(0.03), Quantized(0.04, -5), Quantized(0.05, 7)

        def forward(self, x):
            x = self.first(x)
            x = self.second(F.relu(self.inner(x) + x))
            return self.third(self.third(self.other(x)) + x)

    model = Block().eval()
    x = torch.randn(2, 8, 6, 5)
    emitted = emit_int8(model, x)
    assert ops_of(emitted) == ["quantize", "int8_conv2d", "int8_conv2d", "int8_add", "dequantize"]
    assert_as_rounded(emitted, model, torch.randn(3, 8, 6, 5))
    survives_saving_and_capture(emitted, tmp_path, x)


def test_a_float_residual_comes_with_a_float_output():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.quantized, self.conv = Quantized(0.03), QuantizedWeight(nn.Conv2d(8, 8, 3, padding=1))

        def forward(self, x):
            return self.quantized(F.relu(self.conv(self.quantized(x)) + x))

    model = Block().eval()
    x = torch.randn(2, 8, 6, 5)
    emitted = emit_int8(model, x)
    assert ops_of(emitted) == ["quantize", "int8_conv2d", "quantize", "dequantize"]
    assert_as_rounded(emitted, model, x)


def test_a_batch_norm_behind_a_quantized_weight_goes_into_its_scale():
    model = nn.Sequential(Quantized(0.03), QuantizedWeight(nn.Conv2d(6, 8, 3, bias=False)), nn.BatchNorm2d(8))
    with torch.no_grad():
        randomize(model)[2].weight[0] = -0.7
    x = torch.randn(2, 6, 9, 8)
    emitted = emit_int8(model, x)
    assert ops_of(emitted) == ["quantize", "int8_conv2d"]
    torch.testing.assert_close(emitted(x), model(x), rtol=1e-5, atol=1e-5)


def test_scales_in_tensors_are_read():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = QuantizedWeight(nn.Conv2d(6, 8, 3))
            self.register_buffer("scale", torch.tensor(0.03))
            self.register_buffer("zero_point", torch.tensor(4))

        def forward(self, x):
            limits = (self.scale, self.zero_point, -128, 127, torch.int8)
            x = quantized.quantize_per_tensor.tensor(x, *limits)
            return self.conv(quantized.dequantize_per_tensor.tensor(x, *limits))

    model = Scaled().eval()
    x = torch.randn(2, 6, 9, 8)
    emitted = emit_int8(model, x)
    assert ops_of(emitted) == ["quantize", "int8_conv2d"]
    torch.testing.assert_close(emitted(x), model(x), rtol=1e-5, atol=1e-5)


def test_values_that_are_only_moved_between_equal_quantizations_stay_int8():
    quantizer = Quantized(0.01, 0, torch.uint8)
    model = nn.Sequential(
        *(Quantized(0.03), QuantizedWeight(nn.Conv2d(6, 8, 3)), nn.ReLU(), quantizer, nn.Flatten(), quantizer),
        QuantizedWeight(nn.Linear(8 * 4 * 3, 5)),
    ).eval()
    x = torch.randn(2, 6, 6, 5)
    emitted = emit_int8(model, x)
    assert ops_of(emitted) == ["quantize", "int8_conv2d", "aten.flatten.using_ints", "int8_matmul"]
    assert_as_rounded(emitted, model, torch.randn(3, 6, 6, 5))


@pytest.mark.parametrize(
    "between",
    [
        nn.Sequential(Quantized(0.01), nn.Flatten(), Quantized(0.02)),
        nn.Sequential(Quantized(0.01), nn.MaxPool2d(2), nn.Flatten(), Quantized(0.01)),
    ],
    ids=["another scale", "a pool"],
)
def test_between_other_quantizations_values_are_floats(between):
    model = nn.Sequential(QuantizedWeight(nn.Conv2d(6, 8, 3)), between)
    emitted = emit_int8(model, torch.randn(2, 6, 6, 6))
    assert ops_of(emitted).count("quantize") == 2
    assert_as_rounded(emitted, model, torch.randn(3, 6, 6, 6))


def test_a_dequantized_tensor_that_is_also_returned_feeds_an_int8_layer():
    def forward(x, quantizer, conv):
        x = quantizer(x)
        return conv(x), x

    model = Apply(forward, Quantized(0.03), QuantizedWeight(nn.Conv2d(6, 8, 3))).eval()
    x = torch.randn(2, 6, 9, 8)
    emitted = emit_int8(model, x)
    assert sorted(ops_of(emitted)) == ["dequantize", "int8_conv2d", "quantize"]
    for ours, theirs in zip(emitted(x), model(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_int8_values_that_are_returned_are_int8():
    class Returned(nn.Module):
        def __init__(self):
            super().__init__()
            self.quantized, self.conv = Quantized(0.03, 2), QuantizedWeight(nn.Conv2d(6, 8, 3))

        def forward(self, x):
            return quantized.quantize_per_tensor(self.conv(self.quantized(x)), 0.02, -3, -128, 127, torch.int8)

    model = Returned().eval()
    x = torch.randn(2, 6, 9, 8)
    emitted = emit_int8(model, x)
    assert ops_of(emitted) == ["quantize", "int8_conv2d"]
    assert emitted(x).dtype == torch.int8
    assert_as_rounded(emitted, model, x)


@pytest.mark.parametrize(
    "quantizer",
    [Quantized(0.03, 0, torch.uint8, (0, 127)), Quantized(0.03, 0, limits=(-127, 127)), nn.Identity()],
    ids=["uint8 of 7 bits", "symmetric limits", "float input"],
)
def test_other_ranges_and_float_inputs_stay_as_they_are(quantizer):
    model = nn.Sequential(quantizer, QuantizedWeight(nn.Conv2d(6, 8, 3))).eval()
    x = 5 * torch.randn(2, 6, 9, 8)
    emitted = kp.emit(model, x, cost=prefer_op(*INT8), progress=False)
    assert "quantize" not in ops_of(emitted)
    torch.testing.assert_close(emitted(x), model(x), rtol=1e-5, atol=1e-5)


def test_asymmetric_weights_and_grouped_convolutions_in_int8_stay_in_float():
    shifted = QuantizedWeight(nn.Conv2d(6, 8, 3))
    shifted.zero_point += 9
    for layer in (shifted, QuantizedWeight(nn.Conv2d(6, 8, 3, groups=2))):
        model = nn.Sequential(Quantized(0.03), layer).eval()
        x = torch.randn(2, 6, 9, 8)
        emitted = emit_int8(model, x)
        assert not [name for name in ops_of(emitted) if name.startswith("int8")]
        torch.testing.assert_close(emitted(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_dequantization_read_by_several_layers_left_in_float_is_computed_once():
    def forward(x, quantizer, a, b):
        x = quantizer(x)
        return a(x), b(x)

    model = Apply(forward, Quantized(0.03), nn.Conv2d(6, 8, 3), nn.Conv2d(6, 8, 1)).eval()
    emitted = emit_int8(model, torch.randn(2, 6, 9, 8))
    assert ops_of(emitted).count("dequantize") == 1


def test_steps_of_int8_are_told_apart_from_errors():
    expected = torch.randint(-100, 100, (1000,), dtype=torch.int8)
    one_off, two_off, all_off = expected.clone(), expected.clone(), expected + 1
    one_off[3] += 1
    two_off[3] += 2
    assert 0 < relative_error(one_off, expected) <= INT8_TOLERANCE
    assert relative_error(two_off, expected) == float("inf")
    assert relative_error(all_off, expected) > INT8_TOLERANCE


def test_a_model_with_quantizations_left_in_it_loads_where_nobody_has_registered_them(tmp_path):
    model = nn.Sequential(Quantized(0.03), QuantizedWeight(nn.Conv2d(6, 8, 3))).eval()
    x = torch.ones(2, 6, 9, 8)
    kp.emit(model, x, cost=prefer_op(), progress=False).save(tmp_path / "m.pt2")
    script = (
        "import sys, torch, kernelpress as kp\n"
        "assert not hasattr(torch.ops.quantized_decomposed, 'quantize_per_tensor')\n"
        "print(float(kp.load(sys.argv[1])(torch.ones(2, 6, 9, 8)).sum()))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "m.pt2")], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) == pytest.approx(model(x).sum().item(), rel=1e-4)


def test_a_model_quantized_by_torchao_runs_in_int8(tmp_path):
    pytest.importorskip("torchao", reason="needs torchao: pip install torchao")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
            self.depthwise, self.project = nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Conv2d(8, 8, 1)
            self.classify = nn.Linear(8, 4)

        def forward(self, x):
            x = self.stem(x)
            y = F.relu(self.project(F.relu(self.depthwise(x))) + x)
            return self.classify(y.mean((2, 3)))

    x = torch.randn(4, 3, 12, 12)
    dynamic = ({0: torch.export.Dim.AUTO},)
    # Before torch 2.12 a quantizer knows the modules of strictly exported graphs alone.
    exported = torch.export.export(randomize(Net()), (x,), dynamic_shapes=dynamic, strict=True).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported, quantizer)
    prepared(x)
    model = convert_pt2e(prepared)
    emitted = kp.emit(model, x, cost=prefer_op(*INT8), progress=False)
    assert not emitted.record.kept_original, emitted.record.reason
    names = ops_of(emitted)
    layers = [name for name in names if name.startswith("int8")]
    assert layers == ["int8_conv2d", "int8_depthwise_conv2d", "int8_conv2d", "int8_matmul"]
    assert not [name for name in names if name.startswith(("aten.conv", "aten.linear", "quantized_decomposed"))]
    assert relative_error(emitted(x[:3]), model(x[:3])) <= 10 * INT8_TOLERANCE
    survives_saving_and_capture(emitted, tmp_path, x)
