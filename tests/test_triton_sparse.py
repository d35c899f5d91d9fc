"""The sparse family's Triton kernels on Triton's interpreter, against the reference: in float64, int8 exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreting import H200, run_triton
from support import assert_close, assert_matches, channel_slice, channels_last, expected_output
from torch import Tensor

from kernelpress import ops
from kernelpress.kernels import reference
from kernelpress.kernels.triton.launch import Configuration
from kernelpress.kernels.triton.sparse import sparse_matmul_configurations
from kernelpress.ops.checks import TensorSpec
from kernelpress.ops.sparse_blocks import BlockCsr

pytestmark = pytest.mark.usefixtures("interpreted_triton")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = (16, 32, 64)


def weight_of(mask: Tensor, r: int, c: int, dtype: torch.dtype) -> list[Tensor]:
    """A weight with random blocks where `mask: [rows, columns]` says so."""
    pattern = BlockCsr.from_dense(mask.float(), 1, mask=mask)
    shape = (len(pattern.columns), r, c)
    blocks = torch.randint(-128, 128, shape) if dtype == torch.int8 else torch.randn(shape)
    return [pattern.row_offsets, pattern.columns, blocks.to(dtype)]


def pattern(rows: int, columns: int) -> Tensor:
    """Random, with an empty row where there are two, and the first and the last block of the last row."""
    mask = torch.rand(rows, columns) < 0.5
    mask[0] = rows == 1
    mask[-1, 0] = mask[-1, -1] = True
    return mask


def epilogue_of(c_out: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(c_out).to(dtype), (torch.rand(c_out) + 0.5).to(dtype), torch.randn(shape).to(dtype)]


@pytest.mark.parametrize("r", SIZES)
@pytest.mark.parametrize("c", SIZES)
@pytest.mark.parametrize("depth", [16, 32, 64])
def test_blocks_of_every_size_in_steps_of_every_size(r: int, c: int, depth: int) -> None:
    dtype = DTYPES[(SIZES.index(r) + SIZES.index(c) + SIZES.index(depth)) % 3]
    pixels, c_in, c_out = 19, 5 * c - 7, 2 * r - 3  # the last blocks reach past the weight's edges
    x = torch.randn(pixels, c_in).to(dtype)
    tensors = [x, *weight_of(pattern(2, 5), r, c, dtype), *epilogue_of(c_out, (pixels, c_out), dtype)]
    options = {"out_features": c_out, "activation": "relu6"}
    assert_matches("sparse_matmul", tensors, options, run_triton("sparse_matmul", tensors, options, 32, depth))


PATTERNS = {
    "all zero": torch.zeros(3, 4, dtype=torch.bool),
    "full": torch.ones(2, 3, dtype=torch.bool),
    "the last block": torch.arange(12).view(3, 4) == 11,
    "one row": torch.tensor([[True, False, True, True, False, True, True]]),
}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("parts", range(4), ids=["plain", "bias", "scale", "residual"])
def test_patterns_and_parts_of_the_epilogue(name: str, parts: int) -> None:
    mask = PATTERNS[name]
    rows, columns = mask.shape
    every = epilogue_of(16 * rows, (2, 5, 16 * rows), torch.float32)
    tensors = [
        torch.randn(2, 5, 16 * columns),
        *weight_of(mask, 16, 16, torch.float32),
        *[t if part == parts - 1 else None for part, t in enumerate(every)],
    ]
    assert_matches("sparse_matmul", tensors, {}, run_triton("sparse_matmul", tensors, {}, 16, 64))


def test_more_tiles_than_one_band_of_them() -> None:
    tensors = [torch.randn(150, 32), *weight_of(torch.ones(2, 1, dtype=torch.bool), 16, 32, torch.float32)]
    assert_matches("sparse_matmul", tensors, {}, run_triton("sparse_matmul", tensors, {}, 16, 32))


def test_nan_beside_the_listed_channels_is_not_read() -> None:
    listed = torch.tensor([[False, True, False, True, True]])
    wide = torch.full((6, 80), torch.nan)
    x = wide[:, 3:75]
    x[:, 16:32], x[:, 48:] = torch.randn(6, 16), torch.randn(6, 24)
    tensors = [x, *weight_of(listed, 16, 16, torch.float32)]
    out = run_triton("sparse_matmul", tensors, {}, 16, 64)
    assert_close(out, expected_output("sparse_matmul", [x.nan_to_num(0.0), *tensors[1:]]))


CONVOLUTIONS: dict[str, tuple[tuple[int, int], tuple[int, int], int, int, dict[str, Any]]] = {
    "1x1": ((1, 1), (3, 5), 40, 30, {}),
    "1x1 with a stride": ((1, 1), (5, 6), 40, 32, {"stride": (2, 3)}),
    "1x1 in a frame": ((1, 1), (2, 3), 20, 20, {"padding": (1, 0)}),
    "3x3": ((3, 3), (4, 5), 40, 48, {"padding": (1, 1)}),
    "3x3, stride 2": ((3, 3), (7, 6), 24, 30, {"padding": (1, 1), "stride": (2, 2)}),
    "dilated rectangle": ((2, 3), (6, 7), 32, 32, {"padding": (1, 4), "dilation": (2, 3), "stride": (1, 2)}),
    "odd channels": ((3, 2), (3, 4), 37, 33, {"padding": (2, 1)}),
}


def convolution(name: str, r: int, c: int, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    kernel, size, c_in, c_out, options = CONVOLUTIONS[name]
    mask = pattern(-(-c_out // r), kernel[0] * kernel[1] * -(-c_in // c))
    tensors = [channels_last(2, c_in, *size).to(dtype), *weight_of(mask, r, c, dtype)]
    options = {"kernel_size": kernel, "out_channels": c_out, "activation": "silu", **options}
    shape = ops.allocate("sparse_conv2d", tensors, options).shape
    return [*tensors, *epilogue_of(c_out, tuple(shape), dtype)], options


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_convolutions(name: str, dtype: torch.dtype) -> None:
    index = list(CONVOLUTIONS).index(name) + DTYPES.index(dtype)
    r, c = (16, 32)[index % 2], SIZES[index // 2 % 3]
    tensors, options = convolution(name, r, c, dtype)
    out = run_triton("sparse_conv2d", tensors, options, 32, (16, 32, 64)[index % 3])
    assert_matches("sparse_conv2d", tensors, options, out)


def test_channels_of_wider_tensors_in_the_tiles_of_the_heuristic() -> None:
    tensors, options = convolution("3x3", 16, 32, torch.float32)
    tensors[0], tensors[6] = channel_slice(*tensors[0].shape), channel_slice(*tensors[6].shape)
    assert_matches("sparse_conv2d", tensors, options, run_triton("sparse_conv2d", tensors, options))


def test_padding_does_not_read_another_image() -> None:
    tensors, options = convolution("3x3", 16, 16, torch.float32)
    tensors[0][0] = torch.nan
    out = run_triton("sparse_conv2d", tensors, options, 64, 64)
    assert not out[1].isnan().any()


@pytest.mark.parametrize("output", DTYPES, ids=str)
@pytest.mark.parametrize("parts", [(0, 1, 1), (1, 1, 0), (1, 1, 1)], ids=["no bias", "no residual", "all"])
def test_int8_sums_and_the_epilogue_are_exact(output: torch.dtype, parts: tuple[int, ...]) -> None:
    bias, scale, residual = torch.randn(60), torch.rand(60) * 1e-3, torch.randn(18, 60).to(output)
    every = [t if part else None for t, part in zip((bias, scale, residual), parts, strict=True)]
    x = torch.randint(-128, 128, (18, 83), dtype=torch.int8)
    tensors = [x, *weight_of(pattern(2, 6), 32, 16, torch.int8), *every]
    options = {"out_features": 60, "activation": "relu", "output_dtype": output}
    out = run_triton("sparse_matmul", tensors, options, 32, 64)
    assert torch.equal(out, reference.sparse_matmul(*tensors, **options))


@pytest.mark.parametrize("name", ["3x3, stride 2", "odd channels"])
def test_int8_convolutions_are_exact(name: str) -> None:
    (_, row_offsets, columns, _, *parts), options = convolution(name, 16, 32, torch.float32)
    _, size, c_in, _, _ = CONVOLUTIONS[name]
    x = torch.randint(-128, 128, (2, *size, c_in), dtype=torch.int8).permute(0, 3, 1, 2)
    blocks = torch.randint(-128, 128, (len(columns), 16, 32), dtype=torch.int8)
    tensors, options = [x, row_offsets, columns, blocks, *parts], {**options, "activation": "relu6"}
    out = run_triton("sparse_conv2d", tensors, options, 32, 64)
    assert torch.equal(out, reference.sparse_conv2d(*tensors, **options))


def test_rows_and_blocks_of_other_strides_are_packed() -> None:
    row_offsets, columns, blocks = weight_of(pattern(2, 3), 16, 16, torch.float32)
    strided = [t.repeat_interleave(2, -1)[..., ::2] for t in (row_offsets, columns, blocks)]
    tensors = [torch.randn(9, 48), *strided]
    assert_matches("sparse_matmul", tensors, {}, run_triton("sparse_matmul", tensors, {}, 16, 32))


def test_the_registry_runs_it_on_checked_indices() -> None:
    tensors = [torch.randn(5, 48), *weight_of(pattern(2, 3), 16, 16, torch.float32)]
    assert_matches("sparse_matmul", tensors, {}, ops.sparse_matmul(*tensors, backend="triton"))
    with pytest.raises(ValueError, match="columns: expected block columns from 0 to 1, got 0 to 2"):
        ops.sparse_matmul(tensors[0][:, :32], *tensors[1:], backend="triton")
    with pytest.raises(RuntimeError, match="the kernel takes blocks of 16, 32 or 64 rows and columns, got 8×16"):
        ops.sparse_matmul(tensors[0], *tensors[1:3], tensors[3][:, :8], backend="triton")


def guess(pixels: int, features: int, r: int, density: float, dtype: torch.dtype, allow_tf32: bool) -> Configuration:
    """The first configuration of a square weight with blocks r × r."""
    rows = features // r

    def spec(*shape: int) -> TensorSpec:
        return TensorSpec(shape, (shape[-1], 1), dtype)

    blocks = spec(round(density * rows * rows), r, r)
    y, offsets, columns = spec(pixels, features), spec(rows + 1), spec(blocks.shape[0])
    found = sparse_matmul_configurations(H200, y, y, offsets, columns, blocks, None, None, None, allow_tf32=allow_tf32)
    assert len(found) == len(set(found))
    assert all((tile[0] + r) * tile[1] * dtype.itemsize * stages <= H200.shared_bytes for tile, _, stages in found)
    return found[0]


def test_the_heuristic_takes_tiles_that_fit_the_problem() -> None:
    assert guess(4096, 4096, 64, 0.4, torch.bfloat16, True).tile == (256, 64)
    assert guess(1, 4096, 64, 0.1, torch.bfloat16, True).tile == (16, 64)
    assert guess(40, 512, 16, 0.1, torch.int8, True).tile[0] <= 64
    assert guess(4096, 4096, 64, 0.4, torch.float32, True).tile[1] == 32
    assert guess(4096, 4096, 64, 0.4, torch.float32, False).tile == (64, 16)
