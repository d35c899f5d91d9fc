"""The fused separable CUDA kernels on the host emulator, against the float64 reference."""

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
from kernelpress.ops.separable import inverted_residual, separable_conv2d

pytestmark = pytest.mark.usefixtures("emulated_cuda")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TILES = ("fused, 8x8 pixels, 64", "fused, 8x8 pixels, 128", "fused, 8x8 pixels, 256", "one kernel after the other")

# size, options: one patch and parts of others, at each stride and for a window that has no kernel of its own.
WINDOWS = {
    "3x3": ((3, 3), (9, 10), {"padding": (1, 1)}),
    "3x3 stride 2": ((3, 3), (18, 15), {"stride": (2, 2), "padding": (1, 1)}),
    "5x5 dilated": ((5, 5), (11, 12), {"padding": (3, 4), "dilation": (1, 2)}),
    "1x3 stride 1x2": ((1, 3), (5, 19), {"stride": (1, 2), "padding": (0, 1)}),
}

TF32 = 2e-3
"""Largest relative error of float32 in TF32, whose mantissa has 10 bits."""


def close(
    op: str, tensors: list[Tensor | None], options: dict[str, Any], out: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    if out.dtype == torch.float32:
        monkeypatch.setitem(RELATIVE_ERROR, torch.float32, TF32)
    assert_matches(op, tensors, options, out)


def weights(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Random, scaled so that sums of products are of the size of their terms."""
    made = []
    for shape in shapes:
        fan_in = max(1, torch.Size(shape[1:]).numel())
        made.append((torch.randn(*shape) / fan_in**0.5).to(dtype))
    return made


def separable_tensors(x: Tensor, c_out: int, kernel: tuple[int, int]) -> list[Tensor | None]:
    c = x.shape[1]
    return [x, *weights((c, 1, *kernel), (c,), (c_out, c, 1, 1), (c_out,), dtype=x.dtype), None]


def inverted_tensors(x: Tensor, hidden: int, c_out: int, kernel: tuple[int, int]) -> list[Tensor | None]:
    c = x.shape[1]
    shapes = ((hidden, c, 1, 1), (hidden,), (hidden, 1, *kernel), (hidden,), (c_out, hidden, 1, 1), (c_out,))
    return [x, *weights(*shapes, dtype=x.dtype), None]


@pytest.mark.parametrize("index", range(len(WINDOWS) * len(TILES)))
def test_separable_of_every_window_and_configuration(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, size, options = list(WINDOWS.values())[index % len(WINDOWS)]
    dtype = DTYPES[(index + index // len(WINDOWS)) % len(DTYPES)]
    tensors = separable_tensors(channels_last(1, 72, *size).to(dtype), 40 if index % 2 else 72, kernel)
    options = {
        **options,
        "depthwise_activation": ACTIVATIONS[index % 8],
        "activation": ACTIVATIONS[(3 * index + 1) % 8],
    }
    out = run_configured("separable_conv2d", tensors, options, TILES[index // len(WINDOWS)])
    close("separable_conv2d", tensors, options, out, monkeypatch)


@pytest.mark.parametrize("index", range(len(WINDOWS) * len(TILES)))
def test_inverted_residual_of_every_window_and_configuration(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, size, options = list(WINDOWS.values())[index % len(WINDOWS)]
    dtype = DTYPES[(index + index // len(WINDOWS)) % len(DTYPES)]
    tensors = inverted_tensors(channels_last(1, 24, *size).to(dtype), 72, 24, kernel)
    options = {
        **options,
        "expand_activation": ACTIVATIONS[(index + 5) % 8],
        "depthwise_activation": ACTIVATIONS[index % 8],
        "activation": ACTIVATIONS[(3 * index + 1) % 8],
    }
    out = run_configured("inverted_residual", tensors, options, TILES[index // len(WINDOWS)])
    close("inverted_residual", tensors, options, out, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_block_of_a_network_with_its_skip_connection(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    channels = 72 if dtype == torch.float32 else 136
    x = channels_last(2, channels, 7, 7).to(dtype)
    tensors = inverted_tensors(x, 64, channels, (3, 3))
    tensors[-1] = x
    options = {"padding": (1, 1), "expand_activation": "relu6", "depthwise_activation": "relu6"}
    out = run_configured("inverted_residual", tensors, options, TILES[1])
    close("inverted_residual", tensors, options, out, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_and_more_channels_than_a_block_has(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = channels_last(1, 48, 8, 9).to(dtype)
    tensors = separable_tensors(wide[:, 16:40], 80, (3, 3))
    tensors[-1] = channels_last(1, 96, 8, 9).to(dtype)[:, 16:]
    options = {"padding": (1, 1), "activation": "relu"}
    close(
        "separable_conv2d",
        tensors,
        options,
        run_configured("separable_conv2d", tensors, options, TILES[0]),
        monkeypatch,
    )


@pytest.mark.parametrize("op", ["separable_conv2d", "inverted_residual"])
def test_channels_that_are_not_aligned(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = channel_slice(1, 9, 6, 5).half()
    tensors = separable_tensors(x, 7, (3, 3)) if op == "separable_conv2d" else inverted_tensors(x, 13, 7, (3, 3))
    options = {"stride": (2, 1), "padding": (1, 1)}
    with kernelpress.use_backend("cuda"):
        close(op, tensors, options, getattr(ops, op)(*tensors, **options), monkeypatch)


def test_float32_is_refused_where_tf32_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    x = channels_last(1, 8, 4, 4)
    with pytest.raises(RuntimeError, match="allow_tf32"):
        separable_conv2d(*separable_tensors(x, 8, (3, 3)), backend="cuda")
    with pytest.raises(RuntimeError, match="allow_tf32"):
        inverted_residual(*inverted_tensors(x, 16, 8, (3, 3)), backend="cuda")
