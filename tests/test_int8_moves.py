"""Pools, shuffles and copies of int8 on every instruction set of the CPU: the reference's integers exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import assert_same, int8, int8_image, run_native, slice_of_wider
from torch import Tensor

from kernelpress import ops
from kernelpress.ops.calls.aten import aten_steps

aten = torch.ops.aten

SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (3, 70, 7, 7), (1, 128, 29, 31)]


@pytest.mark.parametrize("output", [{"output_scale": 0.03, "output_zero_point": -9}, {}, {"keepdim": True}])
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_global_avg_pool2d(shape: tuple[int, ...], output: dict[str, Any], int8_cpu_variant: str) -> None:
    x = int8_image(*shape)
    for zero_point in (-128, 5):
        options = {"input_scale": 0.07, "input_zero_point": zero_point, **output}
        for given in (x, slice_of_wider(x, 9)):
            out = ops.int8_global_avg_pool2d(given, **options, backend="cpu")
            assert_same("int8_global_avg_pool2d", (given,), options, out)
        assert_same("int8_global_avg_pool2d", (x,), options, run_native("int8_global_avg_pool2d", (x,), **options))


def test_the_mean_of_the_largest_values_does_not_overflow(int8_cpu_variant: str) -> None:
    x = torch.full((1, 2, 2048, 1024), 127).to(torch.int8).contiguous(memory_format=torch.channels_last)
    y = ops.int8_global_avg_pool2d(x, input_scale=1.0, input_zero_point=-128, backend="cpu")
    assert y.tolist() == [[255.0, 255.0]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ops.int8_global_avg_pool2d(torch.rand(1, 2, 3, 3), input_scale=1.0),
            TypeError,
            r"x: expected torch\.int8",
        ),
        (
            lambda: ops.int8_global_avg_pool2d(int8(1, 2, 0, 3), input_scale=1.0),
            ValueError,
            "x: .* at least one position",
        ),
        (
            lambda: ops.int8_global_avg_pool2d(int8(1, 2, 3, 3), input_scale=-1.0),
            ValueError,
            "input_scale: expected a pos",
        ),
        (
            lambda: ops.int8_global_avg_pool2d(int8(1, 1, 1, 1).expand(1, 1, 2**12, 2**12), input_scale=1.0),
            ValueError,
            "x: expected at most 8388608 positions, .* got 4096 × 4096",
        ),
        (
            lambda: ops.max_pool2d(torch.ones(1, 2, 3, 3).int(), kernel_size=2),
            TypeError,
            "x: expected a floating dtype or",
        ),
        (
            lambda: ops.shuffle_concat(int8(1, 2, 3, 3), torch.rand(1, 2, 3, 3)),
            TypeError,
            r"a: expected a floating dtype or torch\.int8 of all",
        ),
    ],
)
def test_a_bad_argument_is_named(call: Callable[[], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (2, 2, 0), ((3, 1), (1, 2), (1, 0)), (5, 1, 2)])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 70, 9, 8), (2, 128, 29, 31)])
def test_int8_max_pool2d(shape: tuple[int, ...], kernel: Any, stride: Any, padding: Any, int8_cpu_variant: str) -> None:
    x = int8_image(*shape)
    options = {"kernel_size": kernel, "stride": stride, "padding": padding}
    for given in (x, slice_of_wider(x, 9), x.contiguous()):
        assert_same("max_pool2d", (given,), options, ops.max_pool2d(given, **options, backend="cpu"))
    assert_same("max_pool2d", (x,), options, run_native("max_pool2d", (x,), **options))


@pytest.mark.parametrize(("c_a", "c_b", "groups"), [(29, 29, 2), (58, 58, 2), (4, 8, 3), (5, 7, 4), (8, 8, 4)])
def test_int8_shuffles(c_a: int, c_b: int, groups: int, int8_cpu_variant: str) -> None:
    a, b = int8_image(2, c_a, 9, 7), int8_image(2, c_b, 9, 7)
    whole = torch.cat([a, b], 1).contiguous(memory_format=torch.channels_last)
    options = {"groups": groups}
    for out in (
        ops.shuffle_concat(slice_of_wider(a, 5), b, groups=groups, backend="cpu"),
        ops.channel_shuffle(whole, groups=groups, backend="cpu"),
        run_native("shuffle_concat", (a, b), groups=groups),
        run_native("channel_shuffle", (whole,), groups=groups),
    ):
        assert_same("channel_shuffle", (whole,), options, out)


@pytest.mark.parametrize(
    ("target", "arguments"),
    [
        (aten.clone.default, lambda x: (x.transpose(1, 3),)),
        (aten.contiguous.default, lambda x: (x[:, 3:, ::2],)),
        (aten.flatten.using_ints, lambda x: (x, 1)),
        (aten.cat.default, lambda x: ([x, x[:, :5]], 1)),
        (aten.cat.default, lambda x: ([x, x[:, :, :1]], 2)),
    ],
    ids=["transposed", "sliced", "flattened", "channels", "rows"],
)
@pytest.mark.parametrize("shape", [(2, 13, 5, 7), (1, 64, 33, 31)])
def test_int8_copy(
    shape: tuple[int, ...], target: Any, arguments: Callable[[Tensor], Any], int8_cpu_variant: str
) -> None:
    """Copies and concatenations of int8 are steps of the kernel `"int8_copy"`."""
    given = arguments(int8_image(*shape))
    steps = aten_steps(target, given, {})
    assert steps is not None
    assert torch.equal(steps(), target(*given))


@pytest.mark.parametrize(
    ("op", "kernel", "tensors", "options"),
    [
        ("max_pool2d", "int8_max_pool2d", 1, {"kernel_size": [2, 2], "stride": [2, 2]}),
        ("channel_shuffle", "int8_shuffle_concat", 1, {"groups": 2}),
        ("shuffle_concat", "int8_shuffle_concat", 2, {"groups": 2}),
    ],
)
def test_int8_has_kernels_of_its_own(op: str, kernel: str, tensors: int, options: dict[str, Any]) -> None:
    given = [int8_image(1, 4, 6, 6)] * tensors
    assert ops.native_call(op, given, options, ops.allocate(op, given, options)).name == kernel


def test_what_computes_with_int8_is_no_step() -> None:
    x = int8_image(1, 3, 4, 4)
    assert aten_steps(aten.add.Tensor, (x, x), {}) is None
    assert aten_steps(aten.relu.default, (x,), {}) is None
