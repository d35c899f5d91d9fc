"""The Triton kernels of low rank on Triton's interpreter, against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreting import H200, run_triton
from support import assert_close, channel_slice, channels_last, expected_output
from torch import Tensor

from kernelpress.kernels.triton.launch import Configuration, InTurn
from kernelpress.kernels.triton.lowrank import lowrank_conv2d_configurations, lowrank_linear_configurations
from kernelpress.ops.checks import TensorSpec

pytestmark = pytest.mark.usefixtures("interpreted_triton")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALL = Configuration((16, 16, 16, 16), 4, 2)


def tucker(n: int, c_in: int, inner: int, outer: int, c_out: int, h: int, w: int, kernel: tuple[int, int]) -> list[Any]:
    """All but the residual."""
    shapes = ((inner, c_in, 1, 1), (outer, inner, *kernel), (c_out, outer, 1, 1))
    weights = [torch.randn(*shape) / torch.Size(shape[1:]).numel() ** 0.5 for shape in shapes]
    return [channels_last(n, c_in, h, w), *weights, torch.randn(c_out)]


CASES: dict[str, tuple[list[Tensor | None], dict[str, Any]]] = {
    "ragged on every side": (tucker(1, 19, 17, 21, 23, 7, 5, (3, 3)), {"padding": (1, 1)}),
    "stride 2": (tucker(2, 8, 5, 6, 16, 9, 8, (3, 3)), {"stride": (2, 2), "padding": (1, 1)}),
    "2x5 of two strides and dilations": (
        tucker(1, 4, 3, 9, 8, 8, 12, (2, 5)),
        {"stride": (1, 3), "padding": (0, 2), "dilation": (3, 1)},
    ),
    "a core of one tap": (tucker(1, 8, 4, 4, 16, 3, 4, (1, 1)), {}),
    "padding wider than the window": (tucker(1, 3, 2, 2, 8, 2, 2, (1, 1)), {"padding": (1, 2)}),
    "one value": (tucker(1, 1, 1, 1, 1, 1, 1, (1, 1)), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_tucker_matches_the_reference(name: str) -> None:
    tensors, options = CASES[name]
    out = run_triton(
        "lowrank_conv2d", tensors, options, configuration=InTurn((Configuration((16, 16, 16), 4, 2), SMALL))
    )
    assert_close(out, expected_output("lowrank_conv2d", tensors, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_a_residual_and_the_activation(dtype: torch.dtype) -> None:
    tensors = tucker(2, 6, 4, 5, 10, 5, 4, (3, 3))
    tensors[0] = channel_slice(2, 6, 5, 4)
    given = [t.to(dtype) for t in (*tensors, channel_slice(2, 10, 5, 4))]
    options = {"padding": (1, 1), "activation": "hardswish"}
    assert_close(run_triton("lowrank_conv2d", given, options), expected_output("lowrank_conv2d", given, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(5, 19, 7, 21), (33, 40, 33, 17), (1, 1, 1, 1)], ids=str)
def test_two_products_match_the_reference(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    rows, c_in, rank, c_out = sizes
    wide, weights = torch.full((rows, c_in + 3), torch.nan), [torch.randn(rank, c_in), torch.randn(c_out, rank)]
    x = wide[:, 2:-1].copy_(torch.randn(rows, c_in))
    given = [t.to(dtype) for t in (*weights, torch.randn(c_out), torch.randn(rows, c_out))]
    given = [wide.to(dtype)[:, 2:-1], given[0] / c_in**0.5, given[1] / rank**0.5, *given[2:]]
    assert x.isfinite().all()
    options = {"activation": "silu"}
    for configuration in (SMALL, None):
        out = run_triton("lowrank_linear", given, options, configuration=configuration)
        assert_close(out, expected_output("lowrank_linear", given, **options))


def test_an_empty_batch_gives_an_empty_output() -> None:
    tensors = tucker(0, 8, 4, 4, 16, 5, 5, (3, 3))
    assert run_triton("lowrank_conv2d", tensors, {}).shape == (0, 16, 3, 3)
    given = [torch.empty(0, 8), torch.randn(4, 8), torch.randn(6, 4)]
    assert run_triton("lowrank_linear", given, {}).shape == (0, 6)


def spec(*shape: int, dtype: torch.dtype = torch.bfloat16) -> TensorSpec:
    return TensorSpec(shape, torch.empty(shape, device="meta").stride(), dtype)


def test_large_problems_take_large_tiles_and_small_ones_small() -> None:
    sizes = (spec(50000, 512), spec(50000, 512), spec(64, 512), spec(512, 64))
    best, *_ = lowrank_linear_configurations(H200, *sizes, allow_tf32=True)
    assert best.tile[:2] == (128, 64)
    images = (spec(1, 64, 7, 7), spec(1, 64, 7, 7), spec(16, 64, 1, 1), spec(16, 3, 3, 16), spec(64, 16, 1, 1))
    (_, core), *_ = (found.steps for found in lowrank_conv2d_configurations(H200, *images, allow_tf32=True))
    assert core.tile[0] <= 32
