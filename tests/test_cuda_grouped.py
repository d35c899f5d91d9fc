"""The CUDA kernels of grouped convolution and of channel shuffles, on the host emulator, against the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from emulating import run_configured
from simt.fixtures import ORDERS, Simt
from support import assert_close, assert_matches, channel_slice, channels_last, expected_output, tf32
from torch import Tensor

import kernelpress
from kernelpress import ops
from kernelpress.kernels import reference
from kernelpress.kernels.reference import ACTIVATIONS
from kernelpress.ops.backends import cuda
from kernelpress.ops.grouped_windows import grouping_of, windowed_weight

pytestmark = pytest.mark.usefixtures("emulated_cuda")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TILES = ("64 pixels x 16", "64 pixels x 32", "128 pixels x 64", "64 whole pixels")
SHUFFLES = ("pairs of lanes", "through shared memory", "value by value")

# groups, input and output channels of a group, kernel, size, other options
CONVOLUTIONS: dict[str, tuple[int, int, int, int, tuple[int, int], dict[str, Any]]] = {
    "ShuffleNet's compression": (3, 40, 20, 1, (7, 11), {"shuffle": 3}),
    "ShuffleNet's expansion, windows that straddle vectors": (4, 12, 48, 1, (5, 9), {}),
    "ResNeXt's narrow groups": (8, 4, 4, 3, (9, 9), {"padding": (1, 1)}),
    "several tiles a group": (2, 16, 72, 3, (11, 7), {"padding": (1, 1), "stride": (2, 2), "shuffle": 2}),
    "merged groups that leave a rest": (5, 8, 8, 1, (8, 10), {"shuffle": 5}),
    "dilated rectangle": (2, 24, 8, 3, (9, 8), {"padding": (2, 0), "dilation": (2, 1), "stride": (1, 2), "shuffle": 4}),
    "one group": (1, 16, 24, 1, (6, 6), {"shuffle": 3}),
}


def draw(case: tuple, dtype: torch.dtype, batch: int = 1, make: Any = channels_last) -> tuple[list, dict[str, Any]]:
    groups, group_in, group_out, kernel, size, options = case
    x = tf32(make(batch, groups * group_in, *size))
    weight, c_out = tf32(torch.randn(groups * group_out, group_in, kernel, kernel)), groups * group_out
    if make is channel_slice:
        x = channel_slice(*x.shape).copy_(x)
    tensors: list[Tensor | None] = [t.to(dtype) for t in (x, weight, torch.randn(c_out), torch.rand(c_out) + 0.5)]
    options = {"groups": groups, **options}
    tensors.append(make(*ops.allocate("grouped_conv2d", tensors, options).shape).to(dtype))
    return tensors, options


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_every_convolution_in_every_tile(name: str, tile: str) -> None:
    index = TILES.index(tile) + list(CONVOLUTIONS).index(name)
    tensors, options = draw(CONVOLUTIONS[name], DTYPES[index % 3], batch=1 + index % 2)
    options["activation"] = ACTIVATIONS[index % len(ACTIVATIONS)]
    if index % 3 == 1:
        tensors[2:] = [None] * 3
    for _ in ORDERS:
        assert_matches("grouped_conv2d", tensors, options, run_configured("grouped_conv2d", tensors, options, tile))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shuffle", [1, 7])
def test_odd_channels_are_copied_value_by_value(dtype: torch.dtype, shuffle: int) -> None:
    tensors, options = draw((3, 5, 7, 3, (5, 6), {"padding": (1, 1), "shuffle": shuffle}), dtype)
    with kernelpress.use_backend("cuda"):
        assert_matches("grouped_conv2d", tensors, options, ops.grouped_conv2d(*tensors, **options))


@pytest.mark.parametrize("tile", TILES)
def test_slices_of_wider_tensors(tile: str) -> None:
    tensors, options = draw(CONVOLUTIONS["ShuffleNet's compression"], torch.float16, make=channel_slice)
    assert_matches("grouped_conv2d", tensors, options, run_configured("grouped_conv2d", tensors, options, tile))


@pytest.mark.parametrize(
    ("size", "shuffle", "blocks"),
    [((5, 5), 3, 3), ((17, 17), 3, 5), ((17, 17), 1, 3 * 5)],
    ids=["small map: a tile a block", "large map: whole pixels", "no shuffle: a tile a block"],
)
def test_the_heuristic_takes_whole_pixels_where_they_occupy_the_device(
    emulated_cuda: Simt, size: tuple[int, int], shuffle: int, blocks: int
) -> None:
    def launch(name: str, tensors: Sequence[Tensor], fields: Sequence[int | float], index: int) -> None:
        emulated_cuda.run(name, tensors, fields, device=1)  # of two multiprocessors

    x, weight = channels_last(1, 24, *size).half(), torch.randn(48, 8, 1, 1).half()
    options = {"groups": 3, "shuffle": shuffle}
    emulated_cuda.clear_statistics()
    with cuda.TARGET.changed(launch=launch):
        out = ops.grouped_conv2d(x, weight, **options, backend="cuda")
    assert_matches("grouped_conv2d", [x, weight, None, None, None], options, out)
    assert emulated_cuda.statistics()["blocks"] == blocks


def test_fragments_meet_no_bank_twice(emulated_cuda: Simt) -> None:
    tensors, options = draw(CONVOLUTIONS["several tiles a group"], torch.float16)
    for tile in TILES:
        emulated_cuda.clear_statistics()
        run_configured("grouped_conv2d", tensors, options, tile)
        found = emulated_cuda.statistics()
        assert found["ldmatrix_accesses"] > 0
        assert found["ldmatrix_conflicts"] == 0


def test_a_channel_that_is_not_finite_stays_in_its_window() -> None:
    x = channels_last(1, 64, 3, 3).half()
    x[0, 1], x[0, 40] = torch.nan, torch.inf
    weight = torch.rand(64, 32, 1, 1).half() + 0.1
    out = ops.grouped_conv2d(x, weight, groups=2, shuffle=2, backend="cuda")
    expected = ops.grouped_conv2d(x, weight, groups=2, shuffle=2, backend="reference")
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())


def test_float32_is_refused_where_tf32_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    x, weight = torch.randn(1, 8, 3, 3), torch.randn(8, 4, 1, 1)
    assert "TF32" in str(ops.why_not("grouped_conv2d", x, weight, groups=2)["cuda"])
    assert ops.why_not("grouped_conv2d", x.half(), weight.half(), groups=2)["cuda"] is None


@pytest.mark.parametrize(
    ("groups", "group_in", "group_out"),
    [(32, 4, 4), (3, 40, 20), (8, 12, 48), (5, 8, 8), (7, 3, 5), (64, 1, 1), (1, 9, 4)],
)
def test_windows_hold_every_group_and_lie_inside_of_x(groups: int, group_in: int, group_out: int) -> None:
    x = torch.randn(2, groups * group_in, dtype=torch.float64)
    weight = torch.randn(groups * group_out, group_in, 1, 1, dtype=torch.float64)
    expected = reference.grouped_conv2d(x[:, :, None, None], weight, groups=groups)[:, :, 0, 0]
    grouping, windows = grouping_of(groups, group_in, group_out, 8), windowed_weight(weight, groups)[:, 0, 0]
    for group in range(grouping.groups):
        start = grouping.start(group)
        assert start % grouping.window_step == 0
        assert 0 <= start <= start + grouping.window <= x.shape[1]
        rows = slice(group * grouping.group_out, (group + 1) * grouping.group_out)
        assert_close(x[:, start : start + grouping.window] @ windows[rows].T, expected[:, rows])


def test_narrow_groups_are_merged_and_wide_ones_are_not() -> None:
    assert grouping_of(32, 4, 4, 2).groups == 8
    assert grouping_of(3, 80, 32, 2).groups == 3
    assert grouping_of(64, 64, 64, 2).groups == 64


SHUFFLED = {
    "halves": (16, 16, 2),
    "more than a block": (48, 48, 2),
    "three groups": (48, 24, 3),
    "eight groups": (24, 40, 8),
    "odd channels": (7, 5, 3),
    "one tensor": (48, 0, 2),
    "one tensor, four groups": (24, 0, 4),
    "one odd tensor": (15, 0, 5),
    "quarter vectors": (4, 12, 2),
}


@pytest.mark.parametrize("how", SHUFFLES)
@pytest.mark.parametrize("name", SHUFFLED)
def test_shuffles_move_every_value(name: str, how: str) -> None:
    c_a, c_b, groups = SHUFFLED[name]
    index = SHUFFLES.index(how) + list(SHUFFLED).index(name)
    shape = (2, 17, 23) if name == "more than a block" else (1 + index % 2, 5, 7)
    a, b = (channels_last(shape[0], c, *shape[1:]).to(DTYPES[index % 3]) for c in (c_a, max(c_b, 1)))
    op, tensors = ("shuffle_concat", (a, b)) if c_b else ("channel_shuffle", (a,))
    if how == "pairs of lanes" and not (groups == 2 and c_b in (c_a, 0)):
        with pytest.raises(RuntimeError, match="shuffle_concat"):
            run_configured(op, tensors, {"groups": groups}, how)
        return
    for _ in ORDERS:
        out = run_configured(op, tensors, {"groups": groups}, how)
        assert torch.equal(out, getattr(reference, op)(*tensors, groups=groups))


@pytest.mark.parametrize("start", [0, 8, 3], ids=["aligned", "a vector in", "unaligned"])
def test_the_halves_of_a_wider_tensor_are_shuffled_in_place(start: int) -> None:
    wide = channels_last(1, 48, 5, 6).half()
    a, b = wide[:, start : start + 16], wide[:, start + 16 : start + 32]
    with kernelpress.use_backend("cuda"):
        assert torch.equal(ops.shuffle_concat(a, b), reference.shuffle_concat(a, b))
        assert torch.equal(ops.channel_shuffle(a, groups=4), reference.channel_shuffle(a, groups=4))


def test_pixels_too_wide_for_shared_memory_are_gathered() -> None:
    x = channels_last(1, 42_000, 1, 2)
    assert x[0, :, 0, 0].nbytes > cuda.TARGET.describe(0).shared_bytes
    assert torch.equal(ops.channel_shuffle(x, groups=7, backend="cuda"), reference.channel_shuffle(x, groups=7))


def test_whole_pixels_too_wide_for_shared_memory_are_refused() -> None:
    tensors = [channels_last(1, 32, 2, 2), torch.randn(1024, 16, 1, 1), None, None, None]
    options = {"groups": 2, "shuffle": 2}
    with pytest.raises(RuntimeError, match=r"grouped_conv2d.*64 whole pixels"):
        run_configured("grouped_conv2d", tensors, options, "64 whole pixels")


def test_layers_reach_the_kernels() -> None:
    x = channels_last(1, 16, 4, 4).half()
    layer = kernelpress.layers.GroupedConv2d(16, 24, 1, groups=2, shuffle=2, activation="relu").half()
    with torch.no_grad(), kernelpress.use_backend("cuda"):
        expected = expected_output(
            "grouped_conv2d", (x, layer.weight, layer.bias), groups=2, shuffle=2, activation="relu"
        )
        assert_close(layer(x), expected)
        assert torch.equal(kernelpress.layers.ChannelShuffle(4)(x), torch.nn.ChannelShuffle(4)(x))
