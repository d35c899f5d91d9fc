"""Emission of weights with blocks of zeros."""

import copy
import re

import pytest
import torch
from emitting import (
    Apply,
    assert_as_exact_as,
    assert_saving_and_capture_keep,
    emit_fused,
    emit_onto,
    matched_ops,
    matches,
    ops_of,
)
from support import relative_error, with_random_norms
from torch import nn

import kernelpress as kp
from kernelpress.emit.fuse.sparse import _worth_trying
from kernelpress.emit.lower import NativeStep
from kernelpress.layers import BlockSparseConv2d
from kernelpress.ops.sparse_blocks import block_grid
from kernelpress.runtime import native

needs_native = pytest.mark.skipif(native.cpu() is None, reason="no native kernels: build them with `make build`")
pytestmark = pytest.mark.usefixtures("own_cache", "every_match_is_exact")


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
    found = [m for m in matches(model, x) if m.op == "sparse_matmul"]
    assert {m.pattern for m in found} == {"4×1", "1×1"}
    emitted = emit_onto(model, x, "sparse_matmul")
    assert ops_of(emitted) == ["sparse_matmul"]
    assert_as_exact_as(emitted, model, torch.randn(5, 200))
    assert_saving_and_capture_keep(emitted, tmp_path, x)


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_convolution_of_zero_blocks_becomes_sparse_with_its_epilogue(kernel, tmp_path):
    conv = nn.Conv2d(64, 64, kernel, padding=kernel // 2, bias=False)
    prune_taps(conv, 16, 0.25)
    model = with_random_norms(Apply(lambda x, conv, norm: (norm(conv(x)) + x).relu(), conv, nn.BatchNorm2d(64)))
    x = torch.randn(2, 64, 6, 5)
    emitted = emit_onto(model, x, "sparse_conv2d")
    assert ops_of(emitted) == ["sparse_conv2d"]
    assert_as_exact_as(emitted, model, torch.randn(3, 64, 6, 5))
    assert_saving_and_capture_keep(emitted, tmp_path, x)


def test_ragged_strided_convolutions_of_zero_blocks_are_exact():
    conv = nn.Conv2d(50, 70, 3, stride=2, padding=1)
    prune_taps(conv, 16, 0.3)
    model = nn.Sequential(conv, nn.Hardswish()).eval()
    x = torch.randn(2, 50, 9, 8)
    emitted = emit_onto(model, x, "sparse_conv2d")
    assert ops_of(emitted) == ["sparse_conv2d"]
    assert_as_exact_as(emitted, model, x)


def test_scattered_zeros_offer_single_weights_and_few_zeros_or_groups_nothing():
    scattered, few = nn.Linear(128, 128), nn.Linear(128, 128)
    with torch.no_grad():
        scattered.weight.mul_(torch.rand(128, 128) < 0.3)
    prune(few.weight, 32, 0.75)
    grouped = nn.Conv2d(64, 64, 1, groups=2)
    nn.init.zeros_(grouped.weight)
    (found,) = [m for m in matches(scattered, torch.randn(2, 128)) if m.op == "sparse_matmul"]
    assert (found.pattern, round(found.density, 1)) == ("1×1", 0.3)
    assert "sparse_matmul" not in matched_ops(few, torch.randn(2, 128))
    assert "sparse_conv2d" not in matched_ops(grouped, torch.randn(2, 64, 3, 3))


def test_zeros_that_no_kernel_skips_are_said_plainly():
    grouped = nn.Conv2d(64, 64, 3, groups=2)
    with torch.no_grad():
        grouped.weight.view(-1)[torch.randperm(grouped.weight.numel())[: grouped.weight.numel() // 2]] = 0
    model = nn.Sequential(grouped, nn.Conv2d(64, 64, 1)).eval()
    emitted = kp.emit(model, torch.randn(1, 64, 14, 14), cost=lambda candidate: 1.25, progress=False)
    first, second = (place.reason for place in emitted.record.places)
    assert re.search(r"50% of its weight is zero, but no sparse kernel .*; dense takes 1.2500 ms$", first)
    assert "zero" not in second


@pytest.mark.parametrize("op", ["sparse_matmul", "sparse_conv2d"])
def test_blocks_of_devices_are_wider_than_those_of_the_cpu(op):
    assert set(_worth_trying(op, "cpu")) == {(4, 1), (1, 1)}
    assert set(_worth_trying(op, "cuda")) == {(64, 64), (32, 32), (16, 16)}


@needs_native
@pytest.mark.parametrize("density", [0.1, 0.5])
def test_the_record_says_what_zeros_are_worth(density):
    """Costs decide here: a sparse layer is worth it up to a third of the weights."""
    conv = nn.Conv2d(64, 64, 1)
    with torch.no_grad():
        conv.weight.mul_(torch.rand_like(conv.weight) < density)
    zeros = f"{1 - int(conv.weight.count_nonzero()) / conv.weight.numel():.0%} of the weights are zero: "

    def cost(candidate):
        if candidate.pattern:
            return 3 * candidate.density if candidate.variant == "cpu" and candidate.pattern == "1×1" else 9.0
        return 1.0 if candidate.label == "pointwise_conv2d[cpu]" else 9.0

    (place,) = kp.emit(conv.eval(), torch.randn(1, 64, 14, 14), cost=cost, progress=False).record.places
    sparse = f"{3 * (int(conv.weight.count_nonzero()) / conv.weight.numel()):.4f} ms in blocks of 1×1, 1.0000 ms dense"
    if density == 0.1:
        assert place.choice == "sparse_conv2d 1×1[cpu]"
        assert place.reason.endswith(zeros + sparse)
    else:
        assert place.choice == "pointwise_conv2d[cpu]"
        assert place.reason.endswith(f"{zeros}{sparse}: no gain")


@needs_native
def test_half_of_the_weights_gain_nothing_and_the_record_says_so():
    conv = nn.Conv2d(64, 64, 1)
    with torch.no_grad():
        conv.weight.view(-1)[torch.randperm(64 * 64)[: 64 * 32]] = 0
    (place,) = kp.emit(conv.eval(), torch.randn(1, 64, 14, 14), progress=False).record.places
    assert "sparse" not in place.choice
    assert re.search(
        r"50% of the weights are zero: [\d.]+ ms in blocks of 1×1, [\d.]+ ms dense: no gain$", place.reason
    )


@pytest.mark.parametrize("block", [(16, 16), (8, 32), (4, 1), (64, 64)], ids=str)
def test_sizes_that_no_block_divides_are_the_masked_layer(block):
    conv = nn.Conv2d(3, 20, 3, padding=1)
    keep = torch.rand(block_grid((20, 27), block)) < 0.5
    mask = keep.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:20, :27]
    with torch.no_grad():
        conv.weight.mul_(mask.view(20, 3, 3, 3))
    x = torch.randn(2, 3, 11, 10)
    expected = copy.deepcopy(conv).double()(x.double())
    assert relative_error(BlockSparseConv2d.from_dense(conv, block)(x), expected) < 1e-6
    model = nn.Sequential(conv, nn.ReLU()).eval()
    emitted = emit_onto(model, x, "sparse_conv2d") if "sparse_conv2d" in matched_ops(model, x) else kp.emit(model, x)
    assert relative_error(emitted(x), expected.relu()) < 1e-6


@needs_native
def test_stretches_of_planes_stay_planes(tmp_path):
    """Layers on contiguous images hand them on as they are; the rest of the network reads them turned."""
    convs = [nn.Conv2d(32, 32, 1), nn.Conv2d(32, 48, 3, stride=2, padding=1), nn.Conv2d(48, 24, 1)]
    for conv in convs:
        nn.init.normal_(conv.weight)
        prune_taps(conv, 1, 0.2)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), convs[0], nn.ReLU(), convs[1], nn.SiLU(), convs[2]).eval()
    x = torch.randn(2, 3, 9, 11)
    emitted = emit_fused(model, x, "planes")
    assert ops_of(emitted).count("sparse_conv2d") == 3
    assert [node.target for node in emitted.body.graph.nodes].count(torch.ops.aten.contiguous.default) <= 2
    assert_as_exact_as(emitted, model, torch.randn(4, 3, 9, 11))
    assert_saving_and_capture_keep(emitted, tmp_path, x)
    steps = [step.op for step in kp.capture(emitted, x)._program.steps if isinstance(step, NativeStep)]
    assert steps.count("sparse_conv2d") == 3


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
