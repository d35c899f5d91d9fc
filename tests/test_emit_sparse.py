"""Emission of weights with blocks of zeros."""

import re

import pytest
import torch
from emitting import Apply, assert_as_exact_as, assert_saving_and_capture_keep, emit_onto, matched_ops, matches, ops_of
from support import with_random_norms
from torch import nn

import kernelpress

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
    assert max(m.arguments["blocks"].meta["val"].shape[1] for m in found) == block
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


def test_zeros_that_fill_no_blocks_and_few_zero_blocks_offer_nothing():
    scattered, few = nn.Linear(128, 128), nn.Linear(128, 128)
    with torch.no_grad():
        scattered.weight.mul_(torch.rand(128, 128) < 0.2)
    prune(few.weight, 32, 0.75)
    grouped = nn.Conv2d(64, 64, 1, groups=2)
    nn.init.zeros_(grouped.weight)
    assert "sparse_matmul" not in matched_ops(nn.Sequential(scattered, few), torch.randn(2, 128))
    assert "sparse_conv2d" not in matched_ops(grouped, torch.randn(2, 64, 3, 3))


def test_zeros_without_gain_are_said_plainly():
    """The case "No gain is said plainly": the dense layer stays, and the record has the sparsity and both times."""
    scattered = nn.Conv2d(64, 64, 1)
    where = torch.randperm(scattered.weight.numel())[: scattered.weight.numel() // 2]
    blocks = nn.Conv2d(64, 64, 1)
    prune(blocks.weight.data.view(64, 64), 16, 0.25)
    with torch.no_grad():
        scattered.weight.view(-1)[where] = 0
    model = nn.Sequential(scattered, blocks, nn.Conv2d(64, 64, 1)).eval()
    costs = {"sparse_conv2d": 3.0, "aten": 2.0}
    emitted = kernelpress.emit(model, torch.randn(1, 64, 14, 14), cost=lambda c: costs.get(c.name, 1.25))
    first, second, third = (place.reason for place in emitted.record.places)
    assert not any("sparse" in place.choice for place in emitted.record.places)
    assert "50% of its weight is zero, but no sparse kernel" in first
    assert "dense takes 1.2500 ms" in first
    assert re.search(
        r"75% of its weight is zero: sparse_conv2d\[\w+\] skips zeros in 3.0000 ms, dense takes 1.25", second
    )
    assert "zero" not in third
    emitted = kernelpress.emit(model, torch.randn(1, 64, 14, 14), cost=lambda c: 1.0 / costs.get(c.name, 1.25))
    assert [("sparse" in place.choice, "zero" in place.reason) for place in emitted.record.places] == [
        (False, True),
        (True, False),
        (False, False),
    ]


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
