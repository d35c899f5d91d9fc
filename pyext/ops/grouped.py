"""Grouped convolution and the channel shuffle: `grouped_conv2d`, `channel_shuffle`, `shuffle_concat`."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from kernelpress.kernels import reference
from kernelpress.ops.backends.cuda import CudaKernel, cuda_implementation, float_vector, tf32_reason
from kernelpress.ops.backends.onednn import onednn_implementation
from kernelpress.ops.backends.reference import reference_implementation
from kernelpress.ops.backends.triton import TritonKernel, triton_implementation
from kernelpress.ops.calls.dispatch import call, publish
from kernelpress.ops.checks import (
    TensorSpec,
    check_activation,
    check_input,
    check_same_shape,
    check_vector,
    check_weight,
    conv_output_size,
    describe,
)
from kernelpress.ops.grouped_windows import Grouping, grouping_of, windowed_weight
from kernelpress.ops.layout import PIXELS
from kernelpress.ops.registry import Implementation, Operator, Problem, Run, Tensors
from kernelpress.ops.signature import IntOrPair

__all__ = ["channel_shuffle", "grouped_conv2d", "shuffle_concat"]

Specs = tuple[TensorSpec | None, ...]


class GroupedOptions(NamedTuple):
    """Keyword arguments of `grouped_conv2d`."""

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    shuffle: int = 1
    activation: str = "identity"


class ShuffleOptions(NamedTuple):
    """Keyword arguments of `channel_shuffle`."""

    groups: int


class ConcatOptions(NamedTuple):
    """Keyword arguments of `shuffle_concat`."""

    groups: int = 2


def _check_groups(name: str, groups: int, channels: int, whose: str) -> None:
    if not groups >= 1 or channels % groups != 0:
        raise ValueError(f"{name}: expected a divisor of the {channels} channels of {whose}, got {groups}")


def _grouped_shape(tensors: Specs, options: GroupedOptions) -> tuple[int, ...]:
    x, weight, bias, scale, residual = tensors
    assert x is not None
    assert weight is not None
    check_input(x)
    check_activation("activation", options.activation)
    channels, groups = x.shape[1], options.groups
    _check_groups("groups", groups, channels, "x")
    because = f"{channels} channels of x in {groups} groups"
    check_weight("weight", weight, "[C_out, C_in / groups, KH, KW]", (None, channels // groups, None, None), because)
    c_out = weight.shape[0]
    if c_out % groups != 0:
        raise ValueError(f"weight: expected C_out divisible by groups = {groups}, got {describe(weight.shape)}")
    _check_groups("shuffle", options.shuffle, c_out, "the output")
    check_vector("bias", bias, c_out)
    check_vector("scale", scale, c_out)
    size = conv_output_size(x, weight.shape[2:], options.stride, options.padding, options.dilation)
    shape = (x.shape[0], c_out, *size)
    check_same_shape("residual", residual, shape)
    return shape


def _onednn() -> Implementation:
    """oneDNN knows no shuffle: it is a pass of its own, after the activation, and no residual can stand between."""
    plain = onednn_implementation("grouped_conv2d")

    def supports(problem: Problem) -> str | None:
        if problem.options.shuffle != 1 and problem.tensors[4] is not None:
            return f"oneDNN fuses no residual behind a shuffle, got shuffle = {problem.options.shuffle}"
        return plain.supports(problem)

    def prepare(problem: Problem, tensors: Tensors) -> Run:
        convolve, shuffle = plain.prepare(problem, tensors), problem.options.shuffle
        if shuffle == 1:
            return convolve
        return lambda tensors: PIXELS.copy(reference.channel_shuffle(convolve(tensors), groups=shuffle))

    return replace(plain, supports=supports, prepare=prepare)


_LARGEST_SIDE = 2**15
_MOST_PIXELS = 2**31


def _grouped_reason(problem: Problem) -> str | None:
    x, weight, *_ = problem.tensors
    assert x is not None
    assert weight is not None
    options = problem.options
    reach = (p + d * k for p, d, k in zip(options.padding, options.dilation, weight.shape[2:], strict=True))
    if max(*x.shape[2:], *reach) >= _LARGEST_SIDE or x.shape[0] * x.shape[2] * x.shape[3] >= _MOST_PIXELS:
        return f"it takes sides below {_LARGEST_SIDE} and less than {_MOST_PIXELS} pixels, got {describe(x.shape)}"
    return tf32_reason(problem)


def _grouped_operands(tensors: Tensors, options: GroupedOptions) -> tuple[Tensor | None, ...]:
    x, weight, bias, scale, residual = tensors
    assert weight is not None
    return (x, windowed_weight(weight, options.groups), float_vector(bias), float_vector(scale), residual)


def _grouping(problem: Problem) -> Grouping:
    weight, groups = problem.tensors[1], problem.options.groups
    assert weight is not None
    return grouping_of(groups, weight.shape[1], weight.shape[0] // groups, weight.dtype.itemsize)


def _grouped_sizes(problem: Problem, spacings: tuple[int, ...], y_spacing: int) -> tuple[int, ...]:
    x, weight, *_ = problem.tensors
    assert x is not None
    assert weight is not None
    options, grouping = problem.options, _grouping(problem)
    batch, c_in, in_h, in_w = x.shape
    _, c_out, out_h, out_w = problem.shape
    return (
        *(batch, in_h, in_w, c_in, out_h, out_w, c_out),
        *(grouping.groups, grouping.group_in, grouping.group_out, grouping.window, grouping.window_step),
        options.shuffle,
        *(spacings[0], spacings[4], y_spacing),
        *(*weight.shape[2:], *options.stride, *options.padding, *options.dilation),
    )


_GROUPED_CUDA = CudaKernel(
    name="grouped_conv2d",
    layouts=(PIXELS, None, None, None, PIXELS),
    supports=_grouped_reason,
    operands=_grouped_operands,
    sizes=_grouped_sizes,
)

_GROUPED_TRITON = TritonKernel(
    family="grouped",
    name="grouped_conv2d",
    layouts=_GROUPED_CUDA.layouts,
    operands=_grouped_operands,
    options=lambda problem: {**problem.options._asdict(), **_grouping(problem)._asdict()},
)

_GROUPED = publish(
    Operator(
        name="grouped_conv2d",
        schema=(
            "(Tensor x, Tensor weight, Tensor? bias=None, Tensor? scale=None, Tensor? residual=None, *, "
            "SymInt[2] stride=[1,1], SymInt[2] padding=[0,0], SymInt[2] dilation=[1,1], SymInt groups=1, "
            'SymInt shuffle=1, str activation="identity", str backend="auto") -> Tensor'
        ),
        tensors=("x", "weight", "bias", "scale", "residual"),
        options=GroupedOptions,
        out=PIXELS,
        shape=_grouped_shape,
        reference=reference.grouped_conv2d,
        macs=lambda shapes, options, shape: math.prod(shape) * math.prod(shapes[1][1:]),
        implementations=(
            cuda_implementation("grouped_conv2d", _GROUPED_CUDA),
            triton_implementation("grouped_conv2d", _GROUPED_TRITON),
            _onednn(),
            reference_implementation("grouped_conv2d", reference.grouped_conv2d),
        ),
        native=None,
    )
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
    options = (stride, padding, dilation, groups, shuffle, activation)
    return call(_GROUPED, (x, weight, bias, scale, residual), options, backend)


def _shuffle_shape(tensors: Specs, options: ShuffleOptions) -> tuple[int, ...]:
    x = tensors[0]
    assert x is not None
    check_input(x)
    _check_groups("groups", options.groups, x.shape[1], "x")
    return tuple(x.shape)


def _shuffle_sizes(problem: Problem, spacings: tuple[int, ...], y_spacing: int) -> tuple[int, ...]:
    channels = [0 if t is None else t.shape[1] for t in (*problem.tensors, None)][:2]
    batch, _, height, width = problem.shape
    return (batch * height * width, *channels, problem.options.groups, *(*spacings, 0)[:2], y_spacing)


_SHUFFLE_CUDA = CudaKernel(
    name="shuffle_concat",
    layouts=(PIXELS,),
    supports=lambda problem: None,
    operands=lambda tensors, options: (tensors[0], None),
    sizes=_shuffle_sizes,
)

_SHUFFLE_TRITON = TritonKernel(
    family="grouped",
    name="channel_shuffle",
    layouts=_SHUFFLE_CUDA.layouts,
    operands=lambda tensors, options: (tensors[0],),
)

_SHUFFLE = publish(
    Operator(
        name="channel_shuffle",
        schema='(Tensor x, *, SymInt groups, str backend="auto") -> Tensor',
        tensors=("x",),
        options=ShuffleOptions,
        out=PIXELS,
        shape=_shuffle_shape,
        reference=reference.channel_shuffle,
        macs=lambda shapes, options, shape: 0,
        implementations=(
            cuda_implementation("channel_shuffle", _SHUFFLE_CUDA),
            triton_implementation("channel_shuffle", _SHUFFLE_TRITON),
            reference_implementation("channel_shuffle", reference.channel_shuffle),
        ),
        native=None,
    )
)


def channel_shuffle(x: Tensor, *, groups: int, backend: str = "auto") -> Tensor:
    """Channel `i · C / groups + k` becomes channel `k · groups + i` (ShuffleNet, arXiv:1707.01083, Fig. 1).

    Args:
        x: `[N, C, H, W]`; channels_last, or a channel slice of it, is read without a copy.
        groups: a divisor of `C`.

    Returns: `[N, C, H, W]`, channels_last. Errors as of `conv2d`.
    """
    return call(_SHUFFLE, (x,), (groups,), backend)


def _concat_shape(tensors: Specs, options: ConcatOptions) -> tuple[int, ...]:
    a, b = tensors
    assert a is not None
    assert b is not None
    for name, t in (("a", a), ("b", b)):
        if len(t.shape) != 4 or t.shape[1] == 0:
            raise ValueError(f"{name}: expected [N, C, H, W] with at least one channel, got {describe(t.shape)}")
    batch, channels, height, width = a.shape
    if b.shape[0] != batch or b.shape[2] != height or b.shape[3] != width:
        raise ValueError(f"b: expected [{batch}, C, {height}, {width}] as a has it, got {describe(b.shape)}")
    total = channels + b.shape[1]
    _check_groups("groups", options.groups, total, "a and b")
    return (batch, total, height, width)


_CONCAT_CUDA = CudaKernel(
    name="shuffle_concat",
    layouts=(PIXELS, PIXELS),
    supports=lambda problem: None,
    operands=lambda tensors, options: (tensors[0], tensors[1]),
    sizes=_shuffle_sizes,
)

_CONCAT_TRITON = TritonKernel(
    family="grouped", name="shuffle_concat", layouts=_CONCAT_CUDA.layouts, operands=_CONCAT_CUDA.operands
)

_CONCAT = publish(
    Operator(
        name="shuffle_concat",
        schema='(Tensor a, Tensor b, *, SymInt groups=2, str backend="auto") -> Tensor',
        tensors=("a", "b"),
        options=ConcatOptions,
        out=PIXELS,
        shape=_concat_shape,
        reference=reference.shuffle_concat,
        macs=lambda shapes, options, shape: 0,
        implementations=(
            cuda_implementation("shuffle_concat", _CONCAT_CUDA),
            triton_implementation("shuffle_concat", _CONCAT_TRITON),
            reference_implementation("shuffle_concat", reference.shuffle_concat),
        ),
        native=None,
    )
)


def shuffle_concat(a: Tensor, b: Tensor, *, groups: int = 2, backend: str = "auto") -> Tensor:
    """The channels of `a` and then of `b`, shuffled in one pass (ShuffleNet V2, arXiv:1807.11164, Fig. 3).

    With two groups and as many channels in `a` as in `b` they alternate: `a[0], b[0], a[1], b[1], …`. The halves that
    the next unit splits off the result are channel slices of it, which every op here reads without a copy.

    Args:
        a: `[N, C_a, H, W]`; channels_last, or a channel slice of it, is read without a copy.
        b: `[N, C_b, H, W]`, likewise.
        groups: a divisor of `C_a + C_b`.

    Returns: `[N, C_a + C_b, H, W]`, channels_last. Errors as of `conv2d`.
    """
    return call(_CONCAT, (a, b), (groups,), backend)
