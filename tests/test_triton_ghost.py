"""The ghost convolution's Triton kernels on Triton's interpreter, against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreting import H200, run_triton
from support import assert_close, channel_slice, channels_last, expected_output
from torch import Tensor

from kernelpress.kernels.triton.ghost import ghost_conv2d_configurations
from kernelpress.kernels.triton.launch import Configuration, InTurn
from kernelpress.ops.checks import TensorSpec

pytestmark = pytest.mark.usefixtures("interpreted_triton")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ONE = Configuration((6, 6, 16, 16), 4, 2)
TWO = InTurn((Configuration((32, 16, 16), 4, 2), Configuration((2, 8, 16), 4, 1)))
RELUS = {"activation": "relu6", "cheap_activation": "hardswish"}


def ghost(
    n: int,
    c_in: int,
    primary: int,
    h: int,
    w: int,
    kernel: tuple[int, int] = (1, 1),
    cheap: tuple[int, int] = (3, 3),
    multiplier: int = 1,
) -> list[Tensor | None]:
    """All but the residual."""
    weight = torch.randn(primary, c_in, *kernel) / (c_in * kernel[0] * kernel[1]) ** 0.5
    cheap_weight = torch.randn(primary * multiplier, 1, *cheap) / (cheap[0] * cheap[1]) ** 0.5
    bias, cheap_bias = torch.randn(primary), torch.randn(primary * multiplier)
    return [channels_last(n, c_in, h, w), weight, bias, cheap_weight, cheap_bias]


def check(
    tensors: list[Tensor | None], options: dict[str, Any], configuration: Any, dtype: torch.dtype = torch.float32
) -> None:
    given = [None if t is None else t.to(dtype) for t in tensors]
    out = run_triton("ghost_conv2d", given, options, configuration=configuration)
    assert_close(out, expected_output("ghost_conv2d", given, **options))


CASES: dict[str, tuple[list[Tensor | None], dict[str, Any]]] = {
    "ragged on every side": (ghost(1, 19, 21, 7, 5), {}),
    "two images": (ghost(2, 8, 16, 4, 3), {}),
    "3x3, stride 2": (ghost(1, 5, 8, 9, 8, (3, 3)), {"stride": (2, 2), "padding": (1, 1)}),
    "2x5 of two strides": (ghost(1, 4, 9, 6, 12, (2, 5)), {"stride": (1, 3), "padding": (0, 2)}),
    "cheap 5x3": (ghost(1, 8, 16, 6, 7, cheap=(5, 3)), {}),
    "cheap 1x1": (ghost(1, 8, 16, 3, 4, cheap=(1, 1)), {}),
    "padding wider than the window": (ghost(1, 3, 8, 2, 2), {"padding": (1, 2)}),
    "channels cut off": (ghost(1, 8, 12, 4, 4), {"out_channels": 19}),
    "patches around patches": (ghost(1, 4, 8, 13, 13), {}),
    "one value": (ghost(1, 1, 1, 1, 1), {}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("configuration", [ONE, TWO], ids=["one kernel", "two kernels"])
def test_matches_the_reference(name: str, configuration: Configuration | InTurn) -> None:
    tensors, options = CASES[name]
    check(tensors, options | RELUS, configuration)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("configuration", [ONE, TWO], ids=["one kernel", "two kernels"])
def test_slices_and_a_residual_after_the_activations(configuration: Configuration | InTurn, dtype: torch.dtype) -> None:
    tensors = ghost(2, 6, 10, 5, 4)
    tensors[0] = channel_slice(2, 6, 5, 4)
    check([*tensors, channel_slice(2, 20, 5, 4)], RELUS, configuration, dtype)


@pytest.mark.parametrize("out_channels", [None, 19, 8], ids=["all", "some", "primary alone"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_multiplier(out_channels: int | None, residual: bool) -> None:
    tensors = ghost(1, 5, 8, 4, 5, multiplier=2)
    if residual:
        tensors.append(channels_last(1, out_channels or 24, 4, 5))
    check(tensors, {"out_channels": out_channels} | RELUS, None)


def test_without_biases_in_the_configuration_of_the_heuristic() -> None:
    tensors = ghost(1, 8, 8, 3, 3)
    tensors[2] = tensors[4] = None
    check(tensors, {}, None)


def test_a_cheap_window_too_large_to_be_unrolled() -> None:
    in_turn = InTurn((TWO.steps[0], Configuration((1, 4, 16), 4, 1)))
    check(ghost(1, 4, 8, 5, 3, cheap=(9, 1)), {}, in_turn)


@pytest.mark.parametrize("configuration", [ONE, TWO], ids=["one kernel", "two kernels"])
def test_nan_stays_in_its_image(configuration: Configuration | InTurn) -> None:
    tensors = ghost(2, 4, 8, 3, 3)
    tensors[0][0] = torch.nan
    out = run_triton("ghost_conv2d", tensors, {}, configuration=configuration)
    assert out[0].isnan().all()
    assert not out[1].isnan().any()


def guesses(shape: tuple[int, ...], primary: int, multiplier: int = 1) -> tuple[Configuration | InTurn, ...]:
    n, c, h, w = shape
    x, y = (TensorSpec((n, channels, h, w), (), torch.float16) for channels in (c, primary * (1 + multiplier)))
    weight = TensorSpec((primary, 1, 1, c), (), torch.float16)
    cheap = TensorSpec((3, 3, primary * multiplier), (), torch.float16)
    return ghost_conv2d_configurations(H200, y, x, weight, None, cheap, multiplier=multiplier, allow_tf32=True)


def test_small_images_take_one_kernel_and_large_batches_two() -> None:
    assert isinstance(guesses((1, 24, 28, 28), 36)[0], Configuration)
    assert isinstance(guesses((256, 24, 56, 56), 36)[0], InTurn)


def test_both_ways_can_be_measured_but_for_several_filters_a_channel() -> None:
    assert {type(found) for found in guesses((8, 16, 14, 14), 40)} == {Configuration, InTurn}
    assert {type(found) for found in guesses((8, 16, 14, 14), 40, multiplier=2)} == {InTurn}
