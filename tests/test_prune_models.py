"""Every network of ours loses half of its FLOPs, computes on what is left, trains, and comes back from a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import with_random_norms

from kernelpress import compress, models
from kernelpress.compress import record_of
from kernelpress.layers import GhostModule, PointwiseConv2d


@pytest.mark.slow
@pytest.mark.parametrize("name", models.names())
def test_half_of_the_flops_leave(name: str, tmp_path: Path) -> None:
    options = {"num_classes": 7} | ({} if name in ("resnet8", "resnet20", "resnet56") else {"small_input": True})
    network, x = with_random_norms(models.create(name, **options)), torch.randn(2, 3, 32, 32)
    pruned = compress.prune_channels(network, x, ratio=0.5)
    record = record_of(pruned)[-1]
    assert 0.3 < record.flops_after / record.flops_before <= 0.5
    out = pruned(x)
    assert out.shape == (2, 7)
    compress.save(pruned, tmp_path / "pruned.safetensors")
    with torch.no_grad():
        loaded = compress.load(tmp_path / "pruned.safetensors", models.create(name, **options)).eval()
        torch.testing.assert_close(loaded(x), pruned(x), rtol=0, atol=0)
    pruned.train()(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())


@pytest.mark.parametrize("out_channels", [16, 15])
def test_a_ghost_module_computes_the_same_in_one_op_after_channels_have_left(out_channels: int) -> None:
    layers = [GhostModule(3, out_channels), PointwiseConv2d(out_channels, 16), GhostModule(16, 8, relu=False)]
    network, x = with_random_norms(torch.nn.Sequential(*layers)), torch.randn(2, 3, 9, 9)
    pruned = compress.prune_channels(network, x, ratio=0.3, target="channels", round_to=1)
    assert pruned[1].out_channels < 16
    # Those that are cut off at the end are known by their place.
    assert (pruned[0].out_channels < out_channels) == (out_channels == 16)
    one_by_one = pruned(x)  # with gradients
    with torch.no_grad():
        torch.testing.assert_close(pruned(x), one_by_one)
