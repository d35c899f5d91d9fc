"""The CUDA kernels of low rank on the host emulator, against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulating import run_configured
from support import RELATIVE_ERROR, assert_matches, channel_slice, channels_last
from torch import Tensor

import kernelpress
from kernelpress import ops
from kernelpress.kernels.reference import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("emulated_cuda")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TILES = ("64 pixels, rank 64", "64 pixels, rank 128")
TF32 = 2e-3
"""Largest relative error of float32 in TF32, whose mantissa has 10 bits."""

CASES: dict[str, tuple[tuple[int, ...], tuple[int, int], dict[str, Any]]] = {
    "3x3": ((24, 16, 24, 72), (3, 3), {"padding": (1, 1)}),
    "3x3 stride 2, more ranks than a step": ((16, 40, 64, 16), (3, 3), {"stride": (2, 2), "padding": (1, 1)}),
    "2x5 dilated, ragged": ((9, 7, 13, 11), (2, 5), {"padding": (0, 4), "dilation": (3, 2)}),
    "1x1": ((8, 8, 8, 136), (1, 1), {}),
}


def close(op: str, tensors: list[Any], options: dict[str, Any], out: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    if out.dtype == torch.float32:
        monkeypatch.setitem(RELATIVE_ERROR, torch.float32, TF32)
    assert_matches(op, tensors, options, out)


def weights(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Random, scaled so that sums of products are of the size of their terms."""
    return [torch.randn(*shape) / torch.Size(shape[1:]).numel() ** 0.5 for shape in shapes]


def tucker_tensors(x: Tensor, channels: tuple[int, ...], kernel: tuple[int, int]) -> list[Any]:
    c_in, inner, outer, c_out = channels
    made = weights((inner, c_in, 1, 1), (outer, inner, *kernel), (c_out, outer, 1, 1))
    return [x, *(t.to(x.dtype) for t in (*made, torch.randn(c_out))), None]


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("name", CASES)
def test_tucker_of_every_window_and_configuration(name: str, tile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    channels, kernel, options = CASES[name]
    index = list(CASES).index(name) + 4 * TILES.index(tile)
    options = options | {"activation": ACTIVATIONS[index]}
    x = channels_last(1, channels[0], 10, 9).to(DTYPES[index % 3])
    tensors = tucker_tensors(x, channels, kernel)
    close("lowrank_conv2d", tensors, options, run_configured("lowrank_conv2d", tensors, options, tile), monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_with_a_residual(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = channel_slice(2, 6, 5, 7).to(dtype)
    tensors = tucker_tensors(x, (6, 5, 70, 9), (3, 3))
    tensors[5] = channel_slice(2, 9, 5, 7).to(dtype)
    options = {"padding": (1, 1), "activation": "hardswish"}
    with kernelpress.use_backend("cuda"):
        close("lowrank_conv2d", tensors, options, ops.lowrank_conv2d(*tensors, **options), monkeypatch)


@pytest.mark.parametrize("sizes", [(70, 24, 16, 72), (5, 136, 128, 8), (130, 33, 7, 5), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_products_of_any_size(sizes: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, c_in, rank, c_out = sizes
    wide = torch.full((rows, c_in + 8), torch.nan)
    wide[:, :c_in] = torch.randn(rows, c_in)
    made = (*weights((rank, c_in), (c_out, rank)), torch.randn(c_out), torch.randn(rows, c_out))
    tensors = [wide.to(dtype)[:, :c_in], *(t.to(dtype) for t in made)]
    options = {"activation": "relu"}
    with kernelpress.use_backend("cuda"):
        close("lowrank_linear", tensors, options, ops.lowrank_linear(*tensors, **options), monkeypatch)


def test_infinity_stays_in_its_row() -> None:
    x = torch.randn(3, 8).half()
    x[1, 2] = torch.inf
    first, last = (t.half().abs() for t in weights((5, 8), (8, 5)))
    with kernelpress.use_backend("cuda"):
        out = ops.lowrank_linear(x, first, last)
    assert out[[0, 2]].isfinite().all()
    assert out[1].isposinf().all()


def test_what_it_cannot_keep_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x, first, last = torch.randn(2, 200), torch.randn(129, 200), torch.randn(8, 129)
    with pytest.raises(RuntimeError, match="at most 128 channels on the chip, got 129"):
        ops.lowrank_linear(x, first, last, backend="cuda")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with pytest.raises(RuntimeError, match="allow_tf32"):
        ops.lowrank_linear(x, first[:8], last[:, :8], backend="cuda")
