"""The Triton kernels of grouped convolution and of channel shuffles on Triton's interpreter, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreting import H200, run_triton
from support import assert_close, channel_slice, channels_last, expected_output
from torch import Tensor

from kernelpress import ops
from kernelpress.kernels import reference
from kernelpress.kernels.triton.grouped import channel_shuffle_configurations, grouped_conv2d
from kernelpress.kernels.triton.launch import Configuration, launching_with, unit
from kernelpress.ops.grouped_windows import grouping_of, windowed_weight

pytestmark = pytest.mark.usefixtures("interpreted_triton")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# groups, input and output channels of a group, kernel, images and size, other options, tile
CONVOLUTIONS: dict[str, tuple[Any, ...]] = {
    "a shuffle": (3, 40, 20, (1, 1), (1, 3, 5), {"shuffle": 3, "activation": "relu"}, (16, 32, 16)),
    "windows that straddle vectors": (8, 11, 16, (1, 1), (2, 3, 5), {}, (32, 16, 32)),
    "narrow groups, merged": (8, 4, 4, (3, 3), (1, 5, 4), {"padding": (1, 1)}, (32, 16, 16)),
    "merged groups that leave a rest": (8, 3, 3, (1, 1), (2, 4, 4), {"shuffle": 4}, (32, 16, 16)),
    "several tiles a group": (
        *(2, 16, 24, (3, 3), (1, 7, 5)),
        {"padding": (1, 1), "stride": (2, 2), "shuffle": 2, "activation": "hardswish"},
        (16, 16, 32),
    ),
    "a dilated rectangle": (
        *(2, 24, 8, (2, 3), (1, 7, 8)),
        {"padding": (2, 0), "dilation": (2, 1), "stride": (1, 2), "shuffle": 4},
        (32, 16, 16),
    ),
    "odd channels": (3, 5, 7, (3, 3), (1, 4, 5), {"padding": (1, 1), "shuffle": 7}, (32, 16, 16)),
    "one group": (1, 16, 24, (1, 1), (1, 4, 4), {"shuffle": 3}, (16, 32, 16)),
    "one pixel of one channel": (1, 1, 1, (1, 1), (1, 1, 1), {}, (16, 16, 16)),
}


def draw(
    case: tuple[Any, ...], make: Any = channels_last
) -> tuple[list[Tensor | None], dict[str, Any], tuple[int, ...]]:
    """All five tensors, the options and the tile."""
    groups, group_in, group_out, kernel, (batch, *size), options, tile = case
    c_out = groups * group_out
    weight = torch.randn(c_out, group_in, *kernel) / (group_in * kernel[0] * kernel[1]) ** 0.5
    tensors = [make(batch, groups * group_in, *size), weight, torch.randn(c_out), torch.rand(c_out) + 0.5]
    options = {"groups": groups, **options}
    return [*tensors, make(*ops.allocate("grouped_conv2d", [*tensors, None], options).shape)], options, tile


def check(
    tensors: list[Tensor | None],
    options: dict[str, Any],
    *tile: int,
    dtype: torch.dtype = torch.float32,
    allow_tf32: bool = True,
) -> None:
    given = [None if t is None else t.to(dtype) for t in tensors]
    out = run_triton("grouped_conv2d", given, options, *tile, allow_tf32=allow_tf32)
    assert_close(out, expected_output("grouped_conv2d", given, **options))


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_reference(name: str, dtype: torch.dtype) -> None:
    tensors, options, tile = draw(CONVOLUTIONS[name])
    check(tensors, options, *tile, dtype=dtype)


def test_two_cases_are_what_they_are_called() -> None:
    straddling, merged = grouping_of(8, 11, 16, 2), grouping_of(8, 3, 3, 2)
    assert straddling.start(7) < 7 * 11 // 8 * 8, "the last window would reach past x"
    assert merged.groups * merged.group_out > 8 * 3


@pytest.mark.parametrize("shuffle", [1, 3])
def test_a_program_writes_its_own_group_only(shuffle: int) -> None:
    def first_program(kernel: Any, grid: Any, arguments: Any, constants: Any, configuration: Any) -> None:
        kernel[(1,)](*arguments, **constants)

    x, weight, y = channels_last(1, 24, 2, 2), torch.randn(60, 8, 1, 1), channels_last(1, 60, 2, 2)
    with launching_with(first_program):
        grouped_conv2d(
            *(y.fill_(torch.nan), x, windowed_weight(weight, 3), None, None, None),
            **grouping_of(3, 8, 20, 4)._asdict(),
            stride=(1, 1),
            padding=(0, 0),
            dilation=(1, 1),
            shuffle=shuffle,
            activation="identity",
            allow_tf32=True,
            configuration=Configuration((16, 32, 16), 4, 2),
        )
    own = torch.arange(60) % 3 == 0 if shuffle == 3 else torch.arange(60) < 20
    assert not y[:, own].isnan().any()
    assert y[:, ~own].isnan().all()


@pytest.mark.parametrize("absent", [(2,), (3,), (4,), (2, 3, 4)], ids=["bias", "scale", "residual", "all three"])
@pytest.mark.parametrize("shuffle", [1, 3])
def test_without(absent: tuple[int, ...], shuffle: int) -> None:
    tensors, options, _ = draw((3, 8, 16, (1, 1), (1, 4, 4), {"shuffle": shuffle}, ()))
    for at in absent:
        tensors[at] = None
    check(tensors, options, 16, 16, 16)


@pytest.mark.parametrize("name", ["a shuffle", "narrow groups, merged"])
def test_slices_in_the_tiles_of_the_heuristic(name: str) -> None:
    tensors, options, _ = draw(CONVOLUTIONS[name], channel_slice)
    check(tensors, options)


def test_float32_without_tf32() -> None:
    tensors, options, _ = draw(CONVOLUTIONS["several tiles a group"])
    check(tensors, options, allow_tf32=False)


def test_a_channel_that_is_not_finite_stays_in_its_window() -> None:
    x = channels_last(2, 64, 2, 2)
    x[0, 1], x[0, 40] = torch.nan, torch.inf
    tensors, options = [x, torch.rand(64, 32, 3, 3) + 0.1], {"groups": 2, "shuffle": 2, "padding": (1, 1)}
    out = run_triton("grouped_conv2d", tensors, options, 16, 32, 32)
    expected = expected_output("grouped_conv2d", tensors, **options)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())


# channels of a and b, groups, tile
SHUFFLED: dict[str, tuple[int, int, int, tuple[int, int, int]]] = {
    "halves": (16, 16, 2, (8, 2, 16)),
    "halves of several tiles": (24, 24, 2, (16, 2, 16)),
    "three groups": (48, 24, 3, (16, 4, 32)),
    "a border within a group": (12, 24, 4, (16, 4, 8)),
    "eight groups": (24, 40, 8, (4, 8, 8)),
    "odd channels": (7, 5, 3, (32, 4, 4)),
    "several tiles of groups": (20, 2, 11, (16, 4, 2)),
    "one tensor": (48, 0, 2, (8, 2, 32)),
    "one tensor, four groups": (24, 0, 4, (8, 4, 4)),
    "one odd tensor": (15, 0, 5, (16, 4, 2)),
    "one group": (5, 0, 1, (16, 2, 8)),
}


def shuffled(c_a: int, c_b: int, dtype: torch.dtype, make: Any = channels_last) -> tuple[str, list[Tensor]]:
    """The op and its tensors: one, or two."""
    tensors = [make(2, channels, 3, 5).to(dtype) for channels in (c_a, c_b) if channels]
    return ("shuffle_concat" if c_b else "channel_shuffle"), tensors


@pytest.mark.parametrize("name", SHUFFLED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shuffles_move_every_value(name: str, dtype: torch.dtype) -> None:
    c_a, c_b, groups, tile = SHUFFLED[name]
    op, tensors = shuffled(c_a, c_b, dtype)
    out = run_triton(op, tensors, {"groups": groups}, *tile)
    assert torch.equal(out, getattr(reference, op)(*tensors, groups=groups))


@pytest.mark.parametrize("name", ["halves", "three groups", "one tensor, four groups"])
def test_slices_are_shuffled_in_the_tiles_of_the_heuristic(name: str) -> None:
    c_a, c_b, groups, _ = SHUFFLED[name]
    op, tensors = shuffled(c_a, c_b, torch.float32, channel_slice)
    out = run_triton(op, tensors, {"groups": groups})
    assert torch.equal(out, getattr(reference, op)(*tensors, groups=groups))


def test_not_a_number_keeps_its_bits() -> None:
    x = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x.view(1, 8, 64, 128).contiguous(memory_format=torch.channels_last)[:, :, 62:]
    out = run_triton("channel_shuffle", [x], {"groups": 2}, 256, 2, 4)
    assert torch.equal(out.view(torch.int16), reference.channel_shuffle(x, groups=2).view(torch.int16))


@pytest.mark.parametrize(("sizes", "expected"), [((58,), 2), ((16, 0), 16), ((240, 24), 8), ((64, 3), 1), ((), 16)])
def test_a_unit_divides_all_sizes(sizes: tuple[int, ...], expected: int) -> None:
    assert unit(*sizes) == expected


def test_no_shuffle_is_without_a_tile() -> None:
    for groups in (1, 2, 3, 7, 40, 5000):
        y = torch.empty(1, 2 * groups, 1, 1, device="meta")
        assert channel_shuffle_configurations(H200, y, y, groups=groups)


def test_calls_reach_the_kernels() -> None:
    x, weight = channels_last(1, 8, 2, 2), torch.randn(12, 4, 1, 1)
    out = ops.channel_shuffle(ops.grouped_conv2d(x, weight, groups=2, backend="triton"), groups=2, backend="triton")
    assert_close(out, expected_output("grouped_conv2d", [x, weight], groups=2, shuffle=2))
    assert torch.equal(ops.shuffle_concat(x, x, backend="triton"), reference.shuffle_concat(x, x))
