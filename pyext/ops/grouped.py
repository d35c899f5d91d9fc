"""Grouped convolution and the channel shuffle: `grouped_conv2d`, `channel_shuffle`, `shuffle_concat`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernelpress.kernels import reference
from kernelpress.ops.backends.cpu import cpu_implementation
from kernelpress.ops.backends.cuda import cuda_implementation
from kernelpress.ops.backends.kernel import Kernel, float_vector, int8_kernel, tf32_reason, window
from kernelpress.ops.backends.onednn import ONEDNN
from kernelpress.ops.backends.triton import triton_implementation
from kernelpress.ops.calls import packing
from kernelpress.ops.calls.dispatch import op
from kernelpress.ops.checks import (
    TensorSpec,
    check_epilogue,
    check_grouped_weight,
    check_groups,
    check_input,
    convolved,
    describe,
    floating_or_int8,
)
from kernelpress.ops.grouped_windows import Grouping, grouping_of, windowed_weight
from kernelpress.ops.layout import PIXELS
from kernelpress.ops.registry import Implementation, Problem, Run, Tensors
from kernelpress.ops.signature import IntOrPair
from kernelpress.runtime import native

__all__ = ["channel_shuffle", "grouped_conv2d", "shuffle_concat"]

_LARGEST_SIDE = 2**15
_MOST_PIXELS = 2**31
_LEAST_LANES = 8
"""Of vectors whose lanes the processor permutes in one instruction."""


def _grouped_shape(options: Any, x: TensorSpec, weight: TensorSpec, *epilogue: TensorSpec | None) -> tuple[int, ...]:
    check_input(x)
    check_grouped_weight(x, weight, options.groups)
    check_groups("shuffle", options.shuffle, weight.shape[0], "the output")
    return check_epilogue(options, convolved(x, weight, options), weight.shape[0], *epilogue)


def _onednn() -> Implementation:
    """oneDNN knows no shuffle: it is a pass of its own, after the activation, and no residual can stand between."""

    def supports(problem: Problem) -> str | None:
        if problem.options.shuffle != 1 and problem.tensors[4] is not None:
            return f"oneDNN fuses no residual behind a shuffle, got shuffle = {problem.options.shuffle}"
        return ONEDNN.supports(problem)

    def prepare(problem: Problem, tensors: Tensors) -> Run:
        convolve, shuffle = ONEDNN.prepare(problem, tensors), problem.options.shuffle
        if shuffle == 1:
            return convolve
        return lambda tensors: PIXELS.copy(reference.channel_shuffle(convolve(tensors), groups=shuffle))

    return replace(ONEDNN, supports=supports, prepare=prepare)


def _grouped_reason(problem: Problem) -> str | None:
    shape, kernel, options = problem["x"].shape, problem["weight"].shape[2:], problem.options
    reach = (p + d * k for p, d, k in zip(options.padding, options.dilation, kernel, strict=True))
    if max(*shape[2:], *reach) >= _LARGEST_SIDE or shape[0] * shape[2] * shape[3] >= _MOST_PIXELS:
        return f"it takes sides below {_LARGEST_SIDE} and less than {_MOST_PIXELS} pixels, got {describe(shape)}"
    return tf32_reason(problem)


def _grouping(problem: Problem) -> Grouping:
    weight, groups = problem["weight"], problem.options.groups
    return grouping_of(groups, weight.shape[1], weight.shape[0] // groups, weight.dtype.itemsize)


def _grouped_sizes(problem: Problem, spacing: Mapping[str, int]) -> tuple[int, ...]:
    options, grouping = problem.options, _grouping(problem)
    batch, c_in, in_h, in_w = problem["x"].shape
    _, c_out, out_h, out_w = problem.shape
    return (
        *(batch, in_h, in_w, c_in, out_h, out_w, c_out),
        *(grouping.groups, grouping.group_in, grouping.group_out, grouping.window, grouping.window_step),
        options.shuffle,
        *(spacing["x"], spacing["residual"], spacing["y"]),
        *window(problem["weight"].shape[2:], options),
    )


def _is_narrow(options: Any, shape: Sequence[int]) -> bool:
    """Whether the kernel of narrow groups computes a convolution with a weight of that shape: vectors of at least eight
    channels are whole groups, as wide in as out."""
    lanes = native.cpu().panel_width() // 2
    c_out, width, *kernel = shape
    geometry = (*kernel, *options.dilation, *options.stride)
    return (
        lanes >= _LEAST_LANES
        and 1 < width < lanes
        and lanes % width == 0
        and c_out == width * options.groups
        and options.shuffle in (1, c_out)
        and geometry in ((3, 3, 1, 1, 1, 1), (3, 3, 1, 1, 2, 2))
    )


def _grouped_cpu_operands(options: Any, *tensors: Any) -> tuple[Tensor | None, ...]:
    x, weight, bias, scale, residual = tensors
    pack = packing.narrow_groups if _is_narrow(options, weight.shape) else packing.panels
    return x, pack(weight, scale, options.groups), packing.vector(bias), residual


def _grouped_cpu_sizes(problem: Problem, spacing: Mapping[str, int]) -> tuple[int, ...]:
    options = problem.options
    batch, c_in, in_h, in_w = problem["x"].shape
    _, c_out, out_h, out_w = problem.shape
    return (
        *(batch, in_h, in_w, c_in, out_h, out_w, c_out, options.groups, options.shuffle),
        int(_is_narrow(options, problem["weight"].shape)),
        *(spacing["x"], spacing["residual"], spacing["y"]),
        *window(problem["weight"].shape[2:], options),
    )


_GROUPED_CPU = Kernel(
    "grouped_conv2d",
    _grouped_cpu_operands,
    _grouped_cpu_sizes,
    dtypes=(torch.float32,),
)

_GROUPED_CUDA = Kernel(
    "grouped_conv2d",
    lambda options, x, weight, bias, scale, residual: (
        *(x, windowed_weight(weight, options.groups), float_vector(bias), float_vector(scale), residual),
    ),
    _grouped_sizes,
    supports=_grouped_reason,
)


@op(
    out=PIXELS,
    shape=_grouped_shape,
    reference=reference.grouped_conv2d,
    macs=lambda options, shape, x, weight, *_: math.prod(shape) * math.prod(weight[1:]),
    implementations=(
        cuda_implementation(_GROUPED_CUDA),
        triton_implementation(
            "grouped",
            _GROUPED_CUDA,
            options=lambda problem: {**problem.options._asdict(), **_grouping(problem)._asdict()},
        ),
        cpu_implementation(_GROUPED_CPU),
        _onednn(),
    ),
)
def grouped_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    shuffle: int = 1,
    activation: str = "identity",
    backend: str = "auto",
) -> Tensor:
    """Grouped convolution whose output channels are shuffled as they are stored (ShuffleNet, arXiv:1707.01083):
    `activation(channel_shuffle(conv(x, weight) · scale + bias) + residual)`.

    Args:
        x: `[N, C_in, H, W]`; channels_last, or a channel slice of it, is read without a copy.
        weight: `[C_out, C_in / groups, KH, KW]`.
        bias, scale: `[C_out]`, in the order of the rows of `weight`.
        residual: of the output's shape, in its shuffled order.
        stride, padding, dilation: pixels, one integer or (height, width).
        groups: of the convolution, a divisor of `C_in` and `C_out`.
        shuffle: groups of the shuffle, a divisor of `C_out`; 1 leaves the channels as they are.

    Returns: `[N, C_out, H_out, W_out]`, channels_last. Other options and errors as of `conv2d`.
    """


def _shuffle_shape(options: Any, x: TensorSpec) -> tuple[int, ...]:
    check_input(x)
    check_groups("groups", options.groups, x.shape[1], "x")
    return tuple(x.shape)


def _shuffle_sizes(problem: Problem, spacing: Mapping[str, int]) -> tuple[int, ...]:
    """Of one or two tensors."""
    given = [
        (t.shape[1], spacing[name]) for name, t in zip(problem.operator.tensors, problem.tensors, strict=True) if t
    ]
    channels, spacings = zip(*given, *[(0, 0)] * (2 - len(given)), strict=True)
    batch, _, height, width = problem.shape
    return (batch * height * width, *channels, problem.options.groups, *spacings, spacing["y"])


_CONCAT_CUDA = Kernel(
    "shuffle_concat", lambda options, a, b: (a, b), _shuffle_sizes, layouts={"a": PIXELS, "b": PIXELS}
)
_CONCAT_CPU = replace(_CONCAT_CUDA, dtypes=(torch.float32, torch.int8), specialise=int8_kernel("int8_shuffle_concat"))
_SHUFFLE_CUDA = Kernel("shuffle_concat", lambda options, x: (x, None), _shuffle_sizes)
_SHUFFLE_CPU = replace(_SHUFFLE_CUDA, dtypes=_CONCAT_CPU.dtypes, specialise=_CONCAT_CPU.specialise)


@op(
    out=PIXELS,
    shape=_shuffle_shape,
    reference=reference.channel_shuffle,
    dtypes=floating_or_int8,
    implementations=(
        cuda_implementation(_SHUFFLE_CUDA),
        triton_implementation("grouped", _SHUFFLE_CUDA, name="channel_shuffle", operands=lambda options, x: (x,)),
        cpu_implementation(_SHUFFLE_CPU),
    ),
)
def channel_shuffle(x: Tensor, *, groups: int, backend: str = "auto") -> Tensor:
    """Channel `i · C / groups + k` becomes channel `k · groups + i` (ShuffleNet, arXiv:1707.01083, Fig. 1).

    Args:
        x: `[N, C, H, W]`, floating or int8; channels_last, or a channel slice of it, is read without a copy.
        groups: a divisor of `C`.

    Returns: `[N, C, H, W]`, channels_last. Errors as of `conv2d`.
    """


def _concat_shape(options: Any, a: TensorSpec, b: TensorSpec) -> tuple[int, ...]:
    for name, t in (("a", a), ("b", b)):
        if len(t.shape) != 4 or t.shape[1] == 0:
            raise ValueError(f"{name}: expected [N, C, H, W] with at least one channel, got {describe(t.shape)}")
    batch, channels, height, width = a.shape
    if b.shape[0] != batch or b.shape[2] != height or b.shape[3] != width:
        raise ValueError(f"b: expected [{batch}, C, {height}, {width}] as a has it, got {describe(b.shape)}")
    total = channels + b.shape[1]
    check_groups("groups", options.groups, total, "a and b")
    return (batch, total, height, width)


@op(
    out=PIXELS,
    shape=_concat_shape,
    reference=reference.shuffle_concat,
    dtypes=floating_or_int8,
    implementations=(
        cuda_implementation(_CONCAT_CUDA),
        triton_implementation("grouped", _CONCAT_CUDA),
        cpu_implementation(_CONCAT_CPU),
    ),
)
def shuffle_concat(a: Tensor, b: Tensor, *, groups: int = 2, backend: str = "auto") -> Tensor:
    """The channels of `a` and then of `b`, shuffled in one pass (ShuffleNet V2, arXiv:1807.11164, Fig. 3).

    With two groups and as many channels in `a` as in `b` they alternate: `a[0], b[0], a[1], b[1], …`. The halves that
    the next unit splits off the result are channel slices of it, which every op here reads without a copy.

    Args:
        a: `[N, C_a, H, W]`, floating or int8; channels_last, or a channel slice of it, is read without a copy.
        b: `[N, C_b, H, W]`, likewise.
        groups: a divisor of `C_a + C_b`.

    Returns: `[N, C_a + C_b, H, W]`, channels_last. Errors as of `conv2d`.
    """
