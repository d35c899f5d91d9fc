"""Emission of channel shuffles and grouped convolutions, as models of other people's making spell them."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from emitting import (
    FUSED_BACKENDS,
    Apply,
    assert_as_exact_as,
    assert_saving_and_capture_keep,
    emit_fused,
    matches,
    ops_of,
    torch_steps,
)
from support import with_random_norms
from torch import nn

import kernelpress as kp

pytestmark = pytest.mark.usefixtures("own_cache", "every_match_is_exact")


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
    assert not matches(model, x)
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


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_grouped_convolution_takes_norm_residual_and_activation(kernel, tmp_path):
    conv = nn.Conv2d(12, 12, kernel, padding=kernel // 2, groups=3, bias=False)
    model = with_random_norms(Apply(lambda x, conv, norm: F.relu6(norm(conv(x)) + x), conv, nn.BatchNorm2d(12)))
    x = torch.randn(2, 12, 7, 6)
    emitted = emit_fused(model, x)
    assert ops_of(emitted) == ["grouped_conv2d"]
    assert_as_exact_as(emitted, model, torch.randn(3, 12, 7, 6))
    assert_saving_and_capture_keep(emitted, tmp_path, x)


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


@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_shufflenet_v1_runs_on_shuffled_grouped_convolutions(backend, tmp_path):
    model = with_random_norms(
        nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), ShuffleUnitV1(12, 36, 3, 2), ShuffleUnitV1(36, 36, 3, 1))
    )
    x = torch.randn(2, 3, 17, 16)
    emitted = emit_fused(model, x, backend)
    assert ops_of(emitted).count("grouped_conv2d") == 4
    assert not {"channel_shuffle", "aten.transpose.int", "aten.add.Tensor"} & set(ops_of(emitted))
    shuffled = [n for n in emitted.body.graph.nodes if n.kwargs.get("shuffle", 1) > 1]
    assert len(shuffled) == 2
    assert_as_exact_as(emitted, model, torch.randn(3, 3, 17, 16))
    assert_saving_and_capture_keep(emitted, tmp_path, x)
    if backend == "cpu":
        assert not [step for step in torch_steps(emitted, x) if "kernelpress" in step]


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


@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_shufflenet_v2_joins_and_shuffles_in_one_op(backend, tmp_path):
    model = with_random_norms(
        nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), ShuffleBlockV2(8, 16, 2), ShuffleBlockV2(16, 16, 1))
    )
    x = torch.randn(2, 3, 17, 16)
    emitted = emit_fused(model, x, backend)
    names = ops_of(emitted)
    assert names.count("shuffle_concat") == 2
    assert not [name for name in names if "cat." in name or "reshape" in name or "transpose" in name]
    assert_as_exact_as(emitted, model, torch.randn(3, 3, 17, 16))
    assert_saving_and_capture_keep(emitted, tmp_path, x)
    if backend == "cpu":
        assert torch_steps(emitted, x) == []
        plan = kp.capture(emitted, x)
        assert plan.chains == [["native inverted_residual", "native shuffle_concat"]] * 2
        torch.testing.assert_close(pickle.loads(pickle.dumps(plan))(x), plan(x), rtol=0, atol=0)


@pytest.mark.skipif("cpu" not in FUSED_BACKENDS, reason="no native kernels: build them with `make build`")
@pytest.mark.parametrize(
    ("forward", "chained"),
    [
        (lambda x, conv: view_transpose(torch.cat((x[:, :8], conv(x[:, 8:])), 1), 2), True),
        (lambda x, conv: view_transpose(torch.cat((conv(x[:, 8:]), x[:, :8]), 1), 2), False),
        (lambda x, conv: view_transpose(torch.cat((x[:, :8], conv(x[:, 8:])), 1), 4), False),
        (lambda x, conv: view_transpose(torch.cat((x[:, :4], conv(x[:, 8:])), 1), 2), False),
        (lambda x, conv: view_transpose(torch.cat((x[:, :8], y := conv(x[:, 8:])), 1), 2) + y.mean(), False),
        (lambda x, conv: view_transpose(torch.cat((y := conv(x[:, 8:]), conv(y)), 1), 2), True),
    ],
    ids=["passing first", "passing last", "four groups", "unequal", "read again", "made from what passes"],
)
def test_a_layer_stores_between_the_channels_that_pass_where_nobody_else_reads_its_own(forward, chained):
    model = Apply(lambda x, stem, conv: forward(stem(x), conv), nn.Conv2d(3, 16, 3), nn.Conv2d(8, 8, 1)).eval()
    x = torch.randn(2, 3, 7, 6)
    emitted = emit_fused(model, x, "cpu")
    plan = kp.capture(emitted, x)
    assert (["native pointwise_conv2d", "native shuffle_concat"] in plan.chains) == chained
    assert_as_exact_as(plan, model, x)


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
