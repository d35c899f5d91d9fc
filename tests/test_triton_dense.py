"""The dense family's Triton kernels on Triton's interpreter, against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreting import run_triton
from support import assert_close, channel_slice, channels_last, expected_output
from torch import Tensor

from kernelpress.kernels.reference import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("interpreted_triton")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(
    op: str,
    tensors: list[Tensor | None],
    options: dict[str, Any],
    *tile: int,
    dtype: torch.dtype,
    allow_tf32: bool = True,
) -> None:
    given = [None if t is None else t.to(dtype) for t in tensors]
    assert_close(run_triton(op, given, options, *tile, allow_tf32=allow_tf32), expected_output(op, given, **options))


def pointwise(n: int, c_in: int, c_out: int, h: int, w: int) -> list[Tensor | None]:
    """All six tensors."""
    weight = torch.randn(c_out, c_in, 1, 1) / c_in**0.5
    vectors = [torch.randn(c_out), torch.rand(c_out) + 0.5]
    return [channels_last(n, c_in, h, w), weight, *vectors, channels_last(n, c_out, h, w), torch.rand(n, c_in) + 0.5]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "tile"),
    [((2, 19, 21, 5, 7), (16, 16, 16)), ((1, 1, 1, 1, 1), (16, 16, 16)), ((3, 33, 17, 1, 11), (32, 16, 32))],
    ids=["ragged on every side", "one value", "images in one tile"],
)
def test_pointwise(shape: tuple[int, ...], tile: tuple[int, ...], dtype: torch.dtype) -> None:
    check("pointwise_conv2d", pointwise(*shape), {"activation": "relu6"}, *tile, dtype=dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str) -> None:
    check("pointwise_conv2d", pointwise(1, 8, 16, 4, 4), {"activation": activation}, dtype=torch.float32)


@pytest.mark.parametrize("absent", [2, 3, 4, 5], ids=["bias", "scale", "residual", "input_scale"])
def test_without(absent: int) -> None:
    tensors = pointwise(2, 9, 10, 3, 5)
    tensors[absent] = None
    check("pointwise_conv2d", tensors, {}, dtype=torch.float32)


def test_channel_slices_are_read_in_place() -> None:
    tensors = pointwise(2, 9, 10, 3, 5)
    tensors[0], tensors[4] = channel_slice(2, 9, 3, 5), channel_slice(2, 10, 3, 5)
    check("pointwise_conv2d", tensors, {}, dtype=torch.float32)


def test_nan_and_infinity_come_through() -> None:
    x = channels_last(1, 16, 2, 2)
    x[0, :, 0, 0], x[0, :, 1, 1] = torch.nan, torch.inf
    tensors = [x, torch.eye(16)[:, :, None, None].contiguous()]
    out = run_triton("pointwise_conv2d", tensors, {"activation": "relu6"})
    assert out[0, :, 0, 0].isnan().all()
    assert not out[0, :, 0, 1].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [(1,), (37,), (3, 5), ()], ids=str)
def test_linear(rows: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = [torch.randn(*rows, 40), torch.randn(9, 40) / 6, torch.randn(9), torch.rand(9), torch.randn(*rows, 9)]
    check("linear", tensors, {"activation": "gelu"}, dtype=dtype)


def test_the_grouping_of_programs_reaches_every_tile() -> None:
    check("linear", [torch.randn(16 * 19 - 3, 16), torch.randn(40, 16)], {}, 16, 16, 16, dtype=torch.float32)
