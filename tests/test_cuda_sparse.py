"""The block-sparse CUDA kernels on the host emulator, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulating import run_configured
from support import assert_matches, channels_last, tf32
from torch import Tensor

import kernelpress
from kernelpress import ops
from kernelpress.kernels import reference
from kernelpress.kernels.reference import ACTIVATIONS
from kernelpress.ops.sparse_blocks import BlockCsr
from kernelpress.ops.sparse_schedule import longest_segment, make_schedule

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SIZES = (16, 32, 64)
TILES = ("128 pixels", "64 pixels, 4 stages", "64 pixels, 3 stages, any alignment")


def weight_of(mask: Tensor, r: int, c: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A weight with random blocks where `mask: [rows, columns]` says so."""
    pattern = BlockCsr.from_dense(mask.float(), 1, mask=mask)
    blocks = tf32(torch.randn(len(pattern.columns), r, c)).to(dtype)
    return pattern.row_offsets, pattern.columns, blocks


def epilogue_of(c_out: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    vectors = [torch.randn(c_out), torch.rand(c_out) + 0.5]
    return [*[t.to(dtype) for t in vectors], torch.randn(shape).to(dtype)]


PATTERNS = {
    "a third": lambda rows, columns: torch.rand(rows, columns) < 0.34,
    "empty rows": lambda rows, columns: (torch.arange(rows) % 2 == 1)[:, None].expand(rows, columns).contiguous(),
    "all zero": lambda rows, columns: torch.zeros(rows, columns, dtype=torch.bool),
    "the last block": lambda rows, columns: torch.arange(rows * columns).view(rows, columns) == rows * columns - 1,
}


@pytest.mark.usefixtures("emulated_cuda")
class TestMatmul:
    @pytest.mark.parametrize("tile", TILES)
    @pytest.mark.parametrize("r", SIZES)
    @pytest.mark.parametrize("c", SIZES)
    def test_every_block_in_every_tile(self, tile: str, r: int, c: int) -> None:
        index = TILES.index(tile) + SIZES.index(r) + SIZES.index(c)
        dtype, pixels = DTYPES[(index + SIZES.index(c)) % 3], (70, 129, 17)[index % 3]
        weight = weight_of(PATTERNS[list(PATTERNS)[index % 2]](3, 5), r, c, dtype)
        # The last blocks reach past the edges of the weight.
        c_in, c_out = 5 * c - 8, 3 * r - 4
        x = tf32(torch.randn(pixels, c_in)).to(dtype)
        options = {"out_features": c_out, "activation": ACTIVATIONS[index % len(ACTIVATIONS)]}
        tensors = [x, *weight, *epilogue_of(c_out, (pixels, c_out), dtype)]
        assert_matches("sparse_matmul", tensors, options, run_configured("sparse_matmul", tensors, options, tile))

    @pytest.mark.parametrize("name", PATTERNS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_patterns(self, name: str, dtype: torch.dtype) -> None:
        weight = weight_of(PATTERNS[name](4, 6), 16, 32, dtype)
        tensors = [tf32(torch.randn(2, 5, 192)).to(dtype), *weight, *epilogue_of(64, (2, 5, 64), dtype)[:1]]
        with kernelpress.use_backend("cuda"):
            assert_matches("sparse_matmul", tensors, {}, ops.sparse_matmul(*tensors))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("pixels", [1, 65])
    def test_one_very_long_row_is_split_and_added_up(self, dtype: torch.dtype, pixels: int) -> None:
        mask = torch.zeros(3, 130, dtype=torch.bool)
        mask[1], mask[2, ::40] = True, True
        row_offsets, columns, blocks = weight_of(mask, 32, 32, dtype)
        assert (
            make_schedule(row_offsets, longest_segment(len(blocks), 32 * blocks.element_size(), pixels, 132)).slots > 1
        )
        x = tf32(torch.randn(pixels, 130 * 32)).to(dtype)
        tensors = [x, row_offsets, columns, blocks, *epilogue_of(90, (pixels, 90), dtype)]
        options = {"out_features": 90, "activation": "silu"}
        with kernelpress.use_backend("cuda"):
            assert_matches("sparse_matmul", tensors, options, ops.sparse_matmul(*tensors, **options))

    @pytest.mark.parametrize("tile", TILES)
    def test_slices_of_wider_rows(self, tile: str) -> None:
        wide = torch.full((40, 144), torch.nan).half()
        x = wide[:, 8:136].copy_(torch.randn(40, 128))
        tensors = [x, *weight_of(torch.rand(2, 4) < 0.7, 32, 32, torch.float16), None, None, None]
        assert_matches("sparse_matmul", tensors, {}, run_configured("sparse_matmul", tensors, {}, tile))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_odd_channels_are_copied_one_by_one(self, dtype: torch.dtype) -> None:
        wide = tf32(torch.randn(9, 83)).to(dtype)
        tensors = [wide[:, 1:72], *weight_of(torch.rand(3, 5) < 0.6, 32, 16, dtype)]
        options = {"out_features": 77}
        with kernelpress.use_backend("cuda"):
            assert_matches("sparse_matmul", tensors, options, ops.sparse_matmul(*tensors, **options))

    def test_many_items_for_each_block(self, emulated_cuda: Any) -> None:
        multiprocessors = emulated_cuda.module.device(0)["multiprocessors"]
        rows = 3 * multiprocessors + 5
        weight = weight_of(torch.rand(rows, 4) < 0.5, 16, 16, torch.float16)
        tensors = [torch.randn(3, 64).half(), *weight, None, None, None]
        assert_matches("sparse_matmul", tensors, {}, run_configured("sparse_matmul", tensors, {}, "64 pixels, 4"))


# kernel, size, channels in and out, other options
CONVOLUTIONS: dict[str, tuple[tuple[int, int], tuple[int, int], int, int, dict[str, Any]]] = {
    "1x1": ((1, 1), (7, 11), 64, 48, {}),
    "1x1 with a stride": ((1, 1), (9, 8), 40, 64, {"stride": (2, 2)}),
    "3x3": ((3, 3), (6, 13), 48, 64, {"padding": (1, 1)}),
    "3x3, stride 2, blocks past the last channel": ((3, 3), (9, 9), 24, 40, {"padding": (1, 1), "stride": (2, 2)}),
    "dilated rectangle": ((2, 3), (8, 9), 32, 32, {"padding": (1, 4), "dilation": (2, 3), "stride": (1, 2)}),
    "odd channels": ((3, 2), (5, 6), 37, 33, {"padding": (2, 1)}),
}


def convolution(name: str, r: int, c: int, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    kernel, size, c_in, c_out, options = CONVOLUTIONS[name]
    mask = torch.rand(-(-c_out // r), kernel[0] * kernel[1] * -(-c_in // c)) < 0.5
    tensors = [tf32(channels_last(2, c_in, *size)).to(dtype), *weight_of(mask, r, c, dtype)]
    options = {"kernel_size": kernel, "out_channels": c_out, **options}
    shape = ops.allocate("sparse_conv2d", tensors, options).shape
    return [*tensors, *epilogue_of(c_out, tuple(shape), dtype)], options


@pytest.mark.usefixtures("emulated_cuda")
class TestConvolution:
    @pytest.mark.parametrize("tile", TILES)
    @pytest.mark.parametrize("name", CONVOLUTIONS)
    def test_every_convolution_in_every_tile(self, name: str, tile: str) -> None:
        index = TILES.index(tile) + list(CONVOLUTIONS).index(name)
        r, c = SIZES[index % 3], SIZES[(index // 2) % 3]
        tensors, options = convolution(name, r, c, DTYPES[index % 3 if tile != TILES[0] else index % 2])
        options["activation"] = ACTIVATIONS[index % len(ACTIVATIONS)]
        assert_matches("sparse_conv2d", tensors, options, run_configured("sparse_conv2d", tensors, options, tile))

    @pytest.mark.parametrize("first", [8, 3], ids=["aligned", "unaligned"])
    def test_channels_of_a_wider_tensor(self, first: int) -> None:
        tensors, options = convolution("3x3", 16, 32, torch.bfloat16)
        x = tensors[0]
        wide = torch.full((2, *x.shape[2:], 64), torch.nan, dtype=x.dtype).permute(0, 3, 1, 2)
        tensors[0] = wide[:, first : first + x.shape[1]].copy_(x)
        with kernelpress.use_backend("cuda"):
            assert_matches("sparse_conv2d", tensors, options, ops.sparse_conv2d(*tensors, **options))

    def test_any_format_of_x_and_no_pixel(self) -> None:
        tensors, options = convolution("3x3", 32, 16, torch.float16)
        tensors[0] = tensors[0].contiguous()
        with kernelpress.use_backend("cuda"):
            assert_matches("sparse_conv2d", tensors, options, ops.sparse_conv2d(*tensors, **options))
            empty = ops.sparse_conv2d(tensors[0][:0], *tensors[1:6], **options)
            assert empty.shape == (0, 64, 6, 13)


@pytest.mark.usefixtures("emulated_cuda")
@pytest.mark.parametrize("output_dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("r", "c"), [(16, 16), (32, 64), (64, 32)])
def test_int8_is_summed_exactly(r: int, c: int, output_dtype: torch.dtype | None) -> None:
    mask = torch.rand(3, 6) < 0.5
    row_offsets, columns, blocks = weight_of(mask, r, c, torch.float32)
    blocks = torch.randint(-128, 128, blocks.shape, dtype=torch.int8)
    c_out = 3 * r - 5
    scale, bias = torch.rand(c_out) * 2.0**-10, torch.randn(c_out)
    for c_in in (6 * c, 6 * c - 3):
        x = torch.randint(-128, 128, (19, c_in), dtype=torch.int8)
        tensors = (x, row_offsets, columns, blocks, bias, scale)
        options = {"out_features": c_out, "activation": "relu", "output_dtype": output_dtype}
        out = ops.sparse_matmul(*tensors, **options, backend="cuda")
        assert torch.equal(out, reference.sparse_matmul(*tensors, **options))


@pytest.mark.usefixtures("emulated_cuda")
def test_int8_segments_are_summed_exactly() -> None:
    row_offsets, columns, blocks = weight_of(torch.ones(1, 150, dtype=torch.bool), 16, 64, torch.float32)
    blocks = torch.randint(-128, 128, blocks.shape, dtype=torch.int8)
    assert make_schedule(row_offsets, longest_segment(150, 64, 3, 132)).slots > 1
    x = torch.randint(-128, 128, (3, 150 * 64), dtype=torch.int8)
    tensors = (x, row_offsets, columns, blocks, None, torch.rand(16) * 2.0**-12)
    out = ops.sparse_matmul(*tensors, backend="cuda")
    assert torch.equal(out, reference.sparse_matmul(*tensors))


@pytest.mark.usefixtures("emulated_cuda")
def test_what_the_kernel_does_not_take_is_told() -> None:
    tensors = (torch.randn(2, 64), *weight_of(torch.ones(2, 8, dtype=torch.bool), 16, 8, torch.float32))
    reason = ops.why_not("sparse_matmul", *tensors)["cuda"]
    assert reason == "the kernel takes blocks of 16, 32 or 64 rows and columns, got 16×8"
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run this call: the kernel takes blocks of 16"):
        ops.sparse_matmul(*tensors, backend="cuda")
    large = torch.zeros(1, 1, 1, 1).expand(1, 16, 1, 40000)
    weight = weight_of(torch.ones(1, 1, dtype=torch.bool), 16, 16, torch.float32)
    assert "below 2¹⁵" in (ops.why_not("sparse_conv2d", large, *weight)["cuda"] or "")


@pytest.mark.usefixtures("emulated_cuda")
def test_indices_are_checked_before_a_kernel_runs() -> None:
    row_offsets, columns, blocks = weight_of(torch.ones(2, 2, dtype=torch.bool), 16, 16, torch.float16)
    with pytest.raises(ValueError, match="columns: expected block columns from 0 to 0, got 0 to 1"):
        ops.sparse_matmul(torch.zeros(1, 16).half(), row_offsets, columns, blocks, backend="cuda")


class TestSchedule:
    @pytest.mark.parametrize("longest", [1, 3, 100])
    def test_every_block_is_in_one_item(self, longest: int) -> None:
        counts = torch.tensor([0, 7, 1, 0, 20, 3])
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
        schedule = make_schedule(offsets, longest)
        rows = torch.zeros(int(counts.sum()), dtype=torch.int64) - 1
        for row, first, count, _ in schedule.items.tolist():
            assert count <= longest
            assert (rows[first : first + count] == -1).all()
            rows[first : first + count] = row
        assert torch.equal(rows, torch.repeat_interleave(torch.arange(6), counts))
        assert {row for row, *_ in schedule.items.tolist()} == set(range(6))

    def test_longest_come_first_and_slots_of_a_row_follow_each_other(self) -> None:
        schedule = make_schedule(torch.tensor([0, 2, 12, 12, 21], dtype=torch.int32), 4)
        assert [item[2] for item in schedule.items.tolist()] == [4, 3, 3, 3, 3, 3, 2, 0]
        assert schedule.splits.tolist() == [[1, 0, 3, 0], [3, 3, 3, 0]]
        assert schedule.slots == 6
        slots = {(row, first): slot for row, first, _, slot in schedule.items.tolist()}
        assert [slots[key] for key in sorted(slots)] == [-1, 0, 1, 2, -1, 3, 4, 5]

    def test_rows_are_split_only_where_blocks_would_wait_for_one(self) -> None:
        assert longest_segment(410, 128, 4096, 132) == 17
        assert longest_segment(410, 128, 2**20, 132) > 4000
        assert longest_segment(410, 128, 1, 132) == 16
        assert longest_segment(0, 128, 1, 132) == 16
