"""The depthwise family's Triton kernels on Triton's interpreter, against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreting import run_triton
from support import assert_close, channel_slice, channels_last, expected_output
from torch import Tensor

pytestmark = pytest.mark.usefixtures("interpreted_triton")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def depthwise(n: int, c: int, h: int, w: int, kernel: tuple[int, int], multiplier: int = 1) -> list[Tensor | None]:
    """x, weight, bias and scale."""
    c_out = c * multiplier
    weight = torch.randn(c_out, 1, *kernel) / (kernel[0] * kernel[1]) ** 0.5
    return [channels_last(n, c, h, w), weight, torch.randn(c_out), torch.rand(c_out) + 0.5]


def check(tensors: list[Tensor | None], options: dict[str, Any], *tile: int, dtype: torch.dtype) -> None:
    given = [None if t is None else t.to(dtype) for t in tensors]
    expected = expected_output("depthwise_conv2d", given, **options)
    assert_close(run_triton("depthwise_conv2d", given, options, *tile), expected)


CASES: dict[str, tuple[list[Any], dict[str, Any], tuple[int, ...]]] = {
    "3x3 ragged": ([2, 19, 5, 9, (3, 3)], {"padding": (1, 1), "activation": "relu6"}, (4, 8, 16)),
    "3x3, stride 2": ([1, 16, 10, 7, (3, 3)], {"stride": (2, 2), "padding": (1, 1)}, (2, 4, 16)),
    "5x5": ([1, 8, 6, 6, (5, 5)], {"padding": (2, 2), "activation": "silu"}, (4, 8, 8)),
    "7x7, stride 2": ([1, 8, 9, 9, (7, 7)], {"stride": (2, 2), "padding": (3, 3)}, (4, 8, 8)),
    "2x5 of two strides": ([1, 9, 8, 12, (2, 5)], {"stride": (1, 3), "padding": (0, 2)}, (8, 4, 16)),
    "multiplier 3": ([1, 7, 6, 5, (3, 3), 3], {"padding": (1, 1)}, (8, 8, 32)),
    "dilated": ([1, 8, 7, 8, (3, 3)], {"padding": (2, 2), "dilation": (2, 3)}, (1, 8, 8)),
    "9x1": ([1, 8, 10, 3, (9, 1)], {"padding": (4, 0)}, (1, 4, 8)),
    "one pixel": ([1, 1, 1, 1, (3, 3)], {"padding": (1, 1)}, (2, 4, 16)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_reference(name: str, dtype: torch.dtype) -> None:
    shape, options, tile = CASES[name]
    check(depthwise(*shape), options, *tile, dtype=dtype)


def test_slices_and_a_residual_in_the_tiles_of_the_heuristic() -> None:
    tensors = depthwise(2, 6, 5, 4, (3, 3))
    tensors[0] = channel_slice(2, 6, 5, 4)
    check([*tensors, channel_slice(2, 6, 5, 4)], {"padding": (1, 1)}, dtype=torch.float32)


def test_padding_does_not_read_nan_around_the_image() -> None:
    tensors = depthwise(2, 4, 3, 3, (3, 3))
    tensors[0][0] = torch.nan
    out = run_triton("depthwise_conv2d", tensors, {"padding": (1, 1)})
    assert not out[1].isnan().any()
