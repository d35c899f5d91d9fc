"""The separable family's Triton kernels on Triton's interpreter, against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreting import H200, run_triton
from support import assert_close, channel_slice, channels_last, expected_output
from torch import Tensor

from kernelpress.kernels.triton.launch import Configuration, InTurn
from kernelpress.kernels.triton.separable import (
    inverted_residual_configurations,
    separable_conv2d_configurations,
)
from kernelpress.ops.checks import TensorSpec

pytestmark = pytest.mark.usefixtures("interpreted_triton")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SAME = {"padding": (1, 1)}
RELUS = {"depthwise_activation": "relu6", "activation": "silu"}

DEPTHWISE = Configuration((2, 8, 16), 4, 1)
PRODUCT = Configuration((64, 32, 32), 4, 2)
FUSED = Configuration((4, 8, 32, 16), 4, 2)
UNFUSED = InTurn((DEPTHWISE, PRODUCT))


def separable(n: int, c: int, c_out: int, h: int, w: int, kernel: tuple[int, int]) -> list[Tensor | None]:
    """All but the residual."""
    depthwise = torch.randn(c, 1, *kernel) / (kernel[0] * kernel[1]) ** 0.5
    pointwise = torch.randn(c_out, c, 1, 1) / c**0.5
    return [channels_last(n, c, h, w), depthwise, torch.randn(c), pointwise, torch.randn(c_out)]


def inverted(n: int, c: int, hidden: int, c_out: int, h: int, w: int) -> list[Tensor | None]:
    """All but the residual."""
    _, *rest = separable(1, hidden, c_out, 1, 1, (3, 3))
    expand = torch.randn(hidden, c, 1, 1) / c**0.5
    return [channels_last(n, c, h, w), expand, torch.randn(hidden), *rest]


def check(
    op: str, tensors: list[Tensor | None], options: dict[str, Any], configuration: Any, dtype: torch.dtype
) -> None:
    given = [None if t is None else t.to(dtype) for t in tensors]
    out = run_triton(op, given, options, configuration=configuration)
    assert_close(out, expected_output(op, given, **options))


CASES: dict[str, tuple[list[Any], dict[str, Any], Configuration]] = {
    "3x3 ragged": ([2, 19, 21, 5, 8, (3, 3)], SAME | RELUS, FUSED),
    "3x3, stride 2": ([1, 16, 24, 10, 7, (3, 3)], {"stride": (2, 2), "padding": (1, 1)}, FUSED),
    "several tiles of channels": (
        [1, 23, 40, 3, 4, (3, 3)],
        SAME | {"depthwise_activation": "sigmoid"},  # not zero where there is no channel
        Configuration((4, 4, 16, 16), 4, 2),
    ),
    "2x5 of two strides": ([1, 9, 8, 8, 12, (2, 5)], {"stride": (1, 3), "padding": (0, 2)}, FUSED),
    "dilated": ([1, 8, 16, 7, 8, (3, 3)], {"padding": (2, 2), "dilation": (2, 3)}, FUSED),
    "one pixel, one channel": ([1, 1, 1, 1, 1, (3, 3)], SAME, FUSED),
}


@pytest.mark.parametrize("name", CASES)
def test_fused(name: str) -> None:
    shape, options, configuration = CASES[name]
    check("separable_conv2d", separable(*shape), options, configuration, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("configuration", [FUSED, UNFUSED], ids=["fused", "two kernels"])
def test_slices_and_a_residual(configuration: Configuration | InTurn, dtype: torch.dtype) -> None:
    tensors = separable(2, 6, 10, 4, 5, (3, 3))
    tensors[0] = channel_slice(2, 6, 4, 5)
    check("separable_conv2d", [*tensors, channel_slice(2, 10, 4, 5)], SAME | RELUS, configuration, dtype)


def test_without_biases() -> None:
    tensors = separable(1, 8, 8, 4, 4, (3, 3))
    tensors[2] = tensors[4] = None
    check("separable_conv2d", tensors, SAME, None, torch.float32)


@pytest.mark.parametrize("options", [{}, {"stride": (2, 2)}, {"dilation": (2, 2)}], ids=str)
def test_inverted_residual_expands_first(options: dict[str, Any]) -> None:
    tensors = inverted(2, 6, 20, 7, 7, 5)
    check("inverted_residual", tensors, options | SAME | RELUS, InTurn((PRODUCT, FUSED)), torch.float32)


@pytest.mark.parametrize("rest", [FUSED, UNFUSED], ids=["expansion, then the rest", "three kernels"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_inverted_residual_with_its_input_added(rest: Configuration | InTurn, dtype: torch.dtype) -> None:
    tensors = inverted(1, 6, 20, 6, 4, 5)
    options = SAME | RELUS | {"expand_activation": "hardswish"}
    check("inverted_residual", [*tensors, tensors[0]], options, InTurn((PRODUCT, rest)), dtype)


def test_the_expansion_s_bias_does_not_leak_into_the_padding() -> None:
    tensors = inverted(1, 4, 16, 8, 3, 3)
    tensors[2] = torch.full((16,), 100.0)
    check("inverted_residual", tensors, SAME, None, torch.float32)


def test_padding_does_not_read_nan_around_the_image() -> None:
    tensors = separable(2, 4, 8, 3, 3, (3, 3))
    tensors[0][0] = torch.nan
    out = run_triton("separable_conv2d", tensors, SAME)
    assert out[0].isnan().all()
    assert not out[1].isnan().any()


def guess(shape: tuple[int, ...], c_out: int) -> Configuration | InTurn:
    n, c, h, w = shape
    x = TensorSpec(shape, (c * h * w, 1, w * c, c), torch.float16)
    y = TensorSpec((n, c_out, h, w), (c_out * h * w, 1, w * c_out, c_out), torch.float16)
    weight = TensorSpec((3, 3, c), (3 * c, c, 1), torch.float16)
    return separable_conv2d_configurations(H200, y, x, weight, stride=(1, 1), dilation=(1, 1), allow_tf32=True)[0]


def test_large_images_are_fused_and_many_output_channels_are_not() -> None:
    assert isinstance(guess((64, 64, 112, 112), 128), Configuration)
    assert isinstance(guess((64, 512, 28, 28), 2048), InTurn)


def test_an_inverted_residual_expands_first() -> None:
    x, y = TensorSpec((64, 24, 56, 56), (), torch.float16), TensorSpec((64, 24, 56, 56), (), torch.float16)
    expand, depthwise = TensorSpec((144, 24, 1, 1), (), torch.float16), TensorSpec((3, 3, 144), (), torch.float16)
    found = inverted_residual_configurations(
        *(H200, y, x, expand, None, depthwise), stride=(1, 1), dilation=(1, 1), allow_tf32=True
    )
    assert len(set(map(str, found))) == len(found)
    assert isinstance(found[0].steps[1], Configuration)
