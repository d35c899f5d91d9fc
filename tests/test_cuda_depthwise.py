"""The CUDA kernels of depthwise convolution, on the host emulator, against the float64 reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from emulating import run_configured
from simt.fixtures import Simt
from support import RELATIVE_ERROR, assert_matches, channel_slice, channels_last, cropped, relative_error
from torch import Tensor

import kernelpress
from kernelpress import ops
from kernelpress.kernels import reference
from kernelpress.kernels.reference import ACTIVATIONS
from kernelpress.ops.backends import cuda

pytestmark = pytest.mark.usefixtures("emulated_cuda")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RING = ("ring of rows, 128", "ring of rows, 64", "ring of rows, 32")

# kernel, stride, input size, channels: ragged against patches of 2 × 4 or 8 outputs, steps and vectors of channels.
WINDOWS = {
    "3x3": (3, 1, (13, 19), 24),
    "3x3 stride 2": (3, 2, (21, 17), 40),
    "5x5": (5, 1, (9, 18), 16),
    "5x5 stride 2": (5, 2, (15, 20), 24),
    "7x7": (7, 1, (11, 9), 16),
    "7x7 stride 2": (7, 2, (13, 14), 8),
}


def tensors_of(x: Tensor, kernel: tuple[int, int], dtype: torch.dtype, multiplier: int = 1) -> list[Tensor | None]:
    c_out = x.shape[1] * multiplier
    weight = torch.randn(c_out, 1, *kernel)
    return [t.to(dtype) for t in (x, weight, torch.randn(c_out), torch.rand(c_out) + 0.5)] + [None]


def check(tensors: list[Tensor | None], options: dict[str, Any], out: Tensor) -> None:
    assert_matches("depthwise_conv2d", tensors, options, out)


@pytest.mark.parametrize("index", range(len(WINDOWS) * len(RING)))
def test_the_ring_of_every_window_and_configuration(index: int) -> None:
    kernel, stride, size, channels = list(WINDOWS.values())[index % len(WINDOWS)]
    dtype = DTYPES[(index + index // len(WINDOWS)) % len(DTYPES)]
    x = channels_last(2 if index % 2 else 1, channels, *size)
    tensors = tensors_of(x, (kernel, kernel), dtype)
    options = {"stride": (stride, stride), "padding": (kernel // 2, kernel // 2), "activation": ACTIVATIONS[index % 8]}
    out = run_configured("depthwise_conv2d", tensors, options, RING[index // len(WINDOWS)])
    check(tensors, options, out)


# kernel, batch, input size, channels, padding: parts of patches and blocks, one patch, walks of steps, no padding.
TENSOR = {
    "5x5": (5, 2, (13, 19), 24, (2, 2)),
    "7x7": (7, 1, (14, 14), 40, (3, 3)),
    "5x5 wider than a block": (5, 1, (6, 70), 16, (2, 2)),
    "7x7 wider than a block": (7, 1, (5, 83), 12, (3, 3)),
    "5x5 walking": (5, 600, (9, 3), 4, (2, 2)),
    "7x7 walking": (7, 1, (41, 9), 8, (3, 3)),
    "5x5 without padding": (5, 1, (9, 12), 20, (0, 0)),
    "7x7 in more padding than image": (7, 1, (2, 3), 8, (6, 6)),
}


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("case", TENSOR.values(), ids=TENSOR)
def test_tensor_cores(case: tuple, dtype: torch.dtype) -> None:
    kernel, batch, size, channels, padding = case
    tensors = tensors_of(channels_last(batch, channels, *size), (kernel, kernel), dtype)
    options = {"stride": (1, 1), "padding": padding, "activation": ACTIVATIONS[(channels + kernel) % 8]}
    if kernel == 7:
        tensors[4] = torch.randn_like(reference.depthwise_conv2d(*tensors[:2], padding=padding))
    check(tensors, options, run_configured("depthwise_conv2d", tensors, options, "tensor cores"))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_tensor_cores_are_chosen_where_their_fragments_fill(dtype: torch.dtype) -> None:
    tensors = tensors_of(channels_last(1, 16, 12, 17), (7, 7), dtype)
    options = {"padding": (3, 3)}
    with kernelpress.use_backend("cuda"):
        out = ops.depthwise_conv2d(*tensors, **options)
    assert torch.equal(out, run_configured("depthwise_conv2d", tensors, {"stride": (1, 1), **options}, "tensor cores"))


def test_tensor_cores_walk_round_the_ring(simt: Simt) -> None:
    def launch(name: str, tensors: Sequence[Tensor], fields: Sequence[int | float], index: int) -> None:
        simt.run(name, tensors, fields, outputs=tensors[:1], device=1)

    tensors = tensors_of(channels_last(32, 4, 37, 34), (5, 5), torch.float16)
    options = {"padding": (2, 2)}
    with cuda.TARGET.changed(launch=launch):
        check(tensors, options, run_configured("depthwise_conv2d", tensors, options, "tensor cores"))


def test_tensor_cores_on_slices() -> None:
    wide, options = torch.full((1, 9, 17, 40), torch.nan).half().permute(0, 3, 1, 2), {"padding": (2, 2)}
    wide[:, 8:32] = torch.randn(1, 24, 9, 17).half()
    tensors = tensors_of(wide[:, 8:32], (5, 5), torch.float16)
    tensors[4] = channel_slice(1, 24, 9, 17).half()
    check(tensors, options, run_configured("depthwise_conv2d", tensors, options, "tensor cores"))


def test_tensor_cores_spread_infinity_over_its_patch_and_no_farther() -> None:
    tensors = tensors_of(channels_last(1, 8, 12, 24), (7, 7), torch.float16)
    options = {"padding": (3, 3)}
    expected = ops.depthwise_conv2d(*tensors, **options, backend="reference")
    tensors[0][0, 2, 0, 0] = torch.inf
    out = run_configured("depthwise_conv2d", tensors, options, "tensor cores")
    assert out[0, 2, :4, 4:8].isnan().any()
    out[0, 2, :4, :8] = expected[0, 2, :4, :8]
    assert relative_error(out, expected) < RELATIVE_ERROR[torch.float16]


@pytest.mark.parametrize("kernel", [5, 7])
def test_tensor_cores_meet_no_bank_twice(kernel: int, simt: Simt) -> None:
    def launch(name: str, tensors: Sequence[Tensor], fields: Sequence[int | float], index: int) -> None:
        simt.run(name, tensors, fields, order="ascending", outputs=tensors[:1], counts_shared=True)

    tensors = tensors_of(channels_last(1, 16, 16, 64), (kernel, kernel), torch.float16)
    options = {"padding": (kernel // 2, kernel // 2)}
    simt.clear_statistics()
    with cuda.TARGET.changed(launch=launch):
        run_configured("depthwise_conv2d", tensors, options, "tensor cores")
    counts = simt.statistics()
    assert counts["shared_conflicts"] <= 0.02 * counts["shared_accesses"], counts


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_walks_down_the_image(dtype: torch.dtype) -> None:
    tensors = tensors_of(channels_last(700, 1, 9, 3), (3, 3), dtype)
    options = {"stride": (1, 1), "padding": (1, 1), "activation": "relu"}
    check(tensors, options, run_configured("depthwise_conv2d", tensors, options, RING[2]))


@pytest.mark.parametrize("channels", [1, 3, 6, 12, 20, 36])
@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_that_fill_no_vector(channels: int, dtype: torch.dtype) -> None:
    x = channels_last(1, channels, 5, 7)
    tensors = tensors_of(x, (3, 3), dtype)
    tensors[4] = channels_last(1, channels, 5, 7).to(dtype)
    options = {"padding": (1, 1), "activation": "relu6"}
    with kernelpress.use_backend("cuda"):
        check(tensors, options, ops.depthwise_conv2d(*tensors, **options))


ANY = {
    "dilation": ((3, 3), {"padding": (2, 1), "dilation": (2, 3)}, 1, 16),
    "rectangle": ((1, 4), {"stride": (1, 2), "padding": (0, 3)}, 1, 24),
    "stride 3": ((5, 5), {"stride": (3, 3), "padding": (4, 4)}, 1, 5),
    "multiplier": ((3, 3), {"padding": (1, 1)}, 3, 8),
    "pointwise": ((1, 1), {}, 2, 3),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ANY.values(), ids=ANY)
def test_any_window(case: tuple, dtype: torch.dtype) -> None:
    kernel, options, multiplier, channels = case
    tensors = tensors_of(channels_last(2, channels, 8, 9), kernel, dtype, multiplier)
    with kernelpress.use_backend("cuda"):
        check(tensors, options, ops.depthwise_conv2d(*tensors, **options))


@pytest.mark.parametrize("make", [channel_slice, cropped])
def test_slices_of_wider_tensors(make: Any) -> None:
    x, options = make(1, 16, 6, 9).half(), {"padding": (1, 1)}
    tensors = tensors_of(x, (3, 3), torch.float16)
    tensors[0], tensors[4] = x, make(1, 16, 6, 9).half()
    with kernelpress.use_backend("cuda"):
        check(tensors, options, ops.depthwise_conv2d(*tensors, **options))


def test_padding_wider_than_the_image() -> None:
    tensors = tensors_of(channels_last(1, 8, 1, 2), (7, 7), torch.float16)
    options = {"padding": (6, 7)}
    with kernelpress.use_backend("cuda"):
        check(tensors, options, ops.depthwise_conv2d(*tensors, **options))


def test_nan_and_infinity_stay_in_their_channel() -> None:
    x = channels_last(1, 20, 6, 6)
    x[0, 1, 0, 0], x[0, 2, 5, 5] = torch.nan, torch.inf
    weight = torch.rand(20, 1, 3, 3) + 0.1
    out = ops.depthwise_conv2d(x, weight, padding=1, activation="relu", backend="cuda")
    expected = ops.depthwise_conv2d(x, weight, padding=1, activation="relu", backend="reference")
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())


INT8: dict[str, tuple[int, tuple[int, int], int, dict[str, Any]]] = {
    "int8 out": (
        32,
        (3, 3),
        1,
        {"padding": (1, 1), "output_scale": 41.0, "output_zero_point": 7, "activation": "relu"},
    ),
    "half out": (16, (5, 5), 1, {"stride": (2, 2), "padding": (2, 2), "output_dtype": torch.float16}),
    "float out": (16, (7, 7), 1, {"padding": (3, 3), "activation": "relu6"}),
    "ragged channels": (19, (3, 3), 1, {"padding": (1, 1), "output_dtype": torch.bfloat16}),
    "channels of four": (20, (3, 3), 1, {"padding": (2, 0), "output_scale": 41.0}),
    "multiplier": (6, (2, 3), 3, {"padding": (0, 2), "dilation": (2, 1), "output_scale": 20.0}),
    "rectangle": (32, (3, 5), 1, {"padding": (1, 2), "output_scale": 60.0, "activation": "hardswish"}),
}


def int8_tensors(channels: int, kernel: tuple[int, int], multiplier: int, size: tuple[int, int]) -> list[Tensor | None]:
    c_out = channels * multiplier
    return [
        torch.randint(-128, 128, (2, channels, *size)).to(torch.int8).contiguous(memory_format=torch.channels_last),
        torch.randint(-127, 128, (c_out, 1, *kernel)).to(torch.int8),
        torch.rand(c_out) * 0.1 + 0.01,
        torch.randn(c_out) * 10,
        None,
    ]


def check_exactly(tensors: list[Tensor | None], options: dict[str, Any], out: Tensor) -> None:
    expected = reference.int8_depthwise_conv2d(*tensors, **options)
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", INT8.values(), ids=INT8)
def test_int8_to_the_last_bit(case: tuple[int, tuple[int, int], int, dict[str, Any]]) -> None:
    channels, kernel, multiplier, options = case
    tensors = int8_tensors(channels, kernel, multiplier, (9, 11))
    options = {**options, "input_scale": 0.5, "input_zero_point": -3}
    check_exactly(tensors, options, ops.int8_depthwise_conv2d(*tensors, **options, backend="cuda"))


OUTPUTS: tuple[dict[str, Any], ...] = (
    {"output_scale": 50.0, "output_zero_point": -9},
    {"output_scale": 20.0, "activation": "relu6"},
    {"output_scale": 33.0, "output_zero_point": 100, "activation": "relu"},
    {"output_scale": 33.0, "activation": "hardswish"},
    {"output_dtype": torch.bfloat16},
)


@pytest.mark.parametrize("index", range(len(WINDOWS) * len(RING)))
def test_the_int8_ring_to_the_last_bit(index: int) -> None:
    kernel, stride, size, channels = list(WINDOWS.values())[index % len(WINDOWS)]
    tensors = int8_tensors(2 * channels, (kernel, kernel), 1, size)
    options = {"stride": (stride, stride), "padding": (kernel // 2, kernel // 2), **OUTPUTS[index % len(OUTPUTS)]}
    options |= {"input_scale": 0.5, "input_zero_point": (index * 37) % 256 - 128}
    if index % len(OUTPUTS) == 0:
        out_shape = reference.int8_depthwise_conv2d(*tensors, **options).shape
        residual = torch.randint(-128, 128, out_shape).to(torch.int8)
        tensors[4] = residual.contiguous(memory_format=torch.channels_last)
        options |= {"residual_scale": 3.0, "residual_zero_point": 4}
    check_exactly(
        tensors, options, run_configured("int8_depthwise_conv2d", tensors, options, RING[index // len(WINDOWS)])
    )


def test_the_int8_ring_walks_down_the_image() -> None:
    tensors = int8_tensors(5, (3, 3), 1, (9, 3))
    x = torch.randint(-128, 128, (700, 5, 9, 3)).to(torch.int8)
    tensors[0] = x.contiguous(memory_format=torch.channels_last)
    options = {"stride": (1, 1), "padding": (1, 1), "input_scale": 0.5, "input_zero_point": 11, "output_scale": 21.0}
    check_exactly(tensors, options, run_configured("int8_depthwise_conv2d", tensors, options, RING[2]))


@pytest.mark.parametrize("make", [channel_slice, cropped])
def test_int8_slices_of_wider_tensors(make: Any) -> None:
    tensors = int8_tensors(16, (3, 3), 1, (6, 9))
    tensors[0] = (make(1, 16, 6, 9) * 40).clamp(-128, 127).to(torch.int8)
    options = {"padding": (1, 1), "input_scale": 0.5, "input_zero_point": 5, "output_scale": 30.0}
    check_exactly(tensors, options, ops.int8_depthwise_conv2d(*tensors, **options, backend="cuda"))
