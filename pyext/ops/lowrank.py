"""Layers of low rank in one call: `lowrank_conv2d` (1×1 → k×k → 1×1) and `lowrank_linear` (two products)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from kernelpress.kernels import reference
from kernelpress.ops import registry
from kernelpress.ops.backends.cuda import cuda_implementation
from kernelpress.ops.backends.kernel import ROWS_OF_CHANNELS, Kernel, float_vector, tf32_reason, window
from kernelpress.ops.backends.triton import triton_implementation
from kernelpress.ops.calls import packing
from kernelpress.ops.calls.dispatch import op
from kernelpress.ops.checks import TensorSpec, check_epilogue, check_input, check_weight, convolved, describe
from kernelpress.ops.dense import conv2d, linear, pointwise_conv2d
from kernelpress.ops.layout import PIXELS, ROWS
from kernelpress.ops.registry import Implementation, Problem, Run, Tensors
from kernelpress.ops.signature import IntOrPair

__all__ = ["lowrank_conv2d", "lowrank_linear"]

_LARGEST_IMAGE, _MOST_ELEMENTS = 2**15, 2**31
_MOST_RANKS = 128
"""Of the CUDA kernel."""


def _conv2d_shape(
    options: Any,
    x: TensorSpec,
    first_weight: TensorSpec,
    core_weight: TensorSpec,
    last_weight: TensorSpec,
    bias: TensorSpec | None,
    residual: TensorSpec | None,
) -> tuple[int, ...]:
    check_input(x)
    because = f"C_in = {x.shape[1]} channels of x"
    check_weight("first_weight", first_weight, "[R_in, C_in, 1, 1]", (None, x.shape[1], 1, 1), because)
    because = f"R_in = {first_weight.shape[0]} channels of first_weight"
    form, expected = "[R_out, R_in, KH, KW]", (None, first_weight.shape[0], None, None)
    check_weight("core_weight", core_weight, form, expected, because)
    because = f"R_out = {core_weight.shape[0]} channels of core_weight"
    check_weight("last_weight", last_weight, "[C_out, R_out, 1, 1]", (None, core_weight.shape[0], 1, 1), because)
    batch, _, *size = convolved(x, core_weight, options)
    c_out = last_weight.shape[0]
    return check_epilogue(options, (batch, c_out, *size), c_out, bias, None, residual)


def _conv2d_macs(
    options: Any, shape: Sequence[int], x: Any, first_weight: Any, core_weight: Any, last_weight: Any, *_: Any
) -> int:
    first = x[0] * math.prod(x[2:]) * math.prod(first_weight)
    return int(first + shape[0] * math.prod(shape[2:]) * (math.prod(core_weight) + math.prod(last_weight)))


def _conv2d_in_turn(problem: Problem, tensors: Tensors) -> Run:
    options = problem.options
    window: Any = {"stride": options.stride, "padding": options.padding, "dilation": options.dilation}
    last: Any = {"activation": options.activation, "backend": "cpu"}

    def compute(tensors: Tensors) -> Tensor:
        x, first_weight, core_weight, last_weight, bias, residual = tensors
        hidden = pointwise_conv2d(x, first_weight, backend="cpu")  # type: ignore[arg-type]
        hidden = conv2d(hidden, core_weight, **window, backend="cpu")  # type: ignore[arg-type]
        return pointwise_conv2d(hidden, last_weight, bias, None, residual, **last)  # type: ignore[arg-type]

    return compute


def _in_turn(op: str, prepare: Callable[[Problem, Tensors], Run]) -> Implementation:
    """The entry of calls of an op's CPU kernel in turn, where that kernel runs."""
    entry = registry.operator(op).on("cpu")
    assert entry is not None
    return replace(entry, prepare=prepare, kernel=None)


def _rank_reason(rank: int, problem: Problem) -> str | None:
    if rank > _MOST_RANKS:
        return f"it keeps at most {_MOST_RANKS} channels on the chip, got {rank}"
    return tf32_reason(problem)


def _conv2d_reason(problem: Problem) -> str | None:
    x, core = problem["x"], problem["core_weight"]
    largest = max(*x.shape[2:], *problem.shape[2:], *(2 * size for size in problem.options.padding))
    hidden = x.shape[0] * core.shape[1] * math.prod(x.shape[2:])
    if largest >= _LARGEST_IMAGE or max(hidden, math.prod(problem.shape)) >= _MOST_ELEMENTS:
        return f"it takes sides below {_LARGEST_IMAGE} and tensors of less than {_MOST_ELEMENTS} elements"
    return _rank_reason(core.shape[0], problem)


def _conv2d_sizes(problem: Problem, spacing: Mapping[str, int]) -> tuple[int, ...]:
    batch, c_in, in_h, in_w = problem["x"].shape
    _, c_out, out_h, out_w = problem.shape
    rank_out, rank_in, *kernel = problem["core_weight"].shape
    return (
        *(batch, in_h, in_w, c_in, rank_in, rank_out, out_h, out_w, c_out),
        *(spacing["x"], spacing["residual"], spacing["y"]),
        *window(kernel, problem.options),
    )


_CONV2D_CUDA = Kernel(
    "lowrank_conv2d",
    lambda options, x, first_weight, core_weight, last_weight, bias, residual: (
        *(x, packing.contiguous(first_weight), packing.channels_last(core_weight), packing.contiguous(last_weight)),
        *(float_vector(bias), residual),
    ),
    _conv2d_sizes,
    supports=_conv2d_reason,
    workspace=lambda problem, device: (
        problem["x"].dtype.itemsize
        * problem.shape[0]
        * problem["core_weight"].shape[1]
        * math.prod(problem["x"].shape[2:])
    ),
)


@op(
    out=PIXELS,
    shape=_conv2d_shape,
    reference=reference.lowrank_conv2d,
    macs=_conv2d_macs,
    implementations=(
        cuda_implementation(_CONV2D_CUDA),
        triton_implementation("lowrank", _CONV2D_CUDA),
        _in_turn("pointwise_conv2d", _conv2d_in_turn),
    ),
)
def lowrank_conv2d(
    x: Tensor,
    first_weight: Tensor,
    core_weight: Tensor,
    last_weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    activation: str = "identity",
    backend: str = "auto",
) -> Tensor:
    """A convolution as Tucker-2 factors it, `activation(last · (core ∗ (first · x)) + bias + residual)` (Kim et al.
    2016, arXiv:1511.06530, eq. 5 to 7).

    On the CPU these are three calls, the core by the direct kernel; emitted models have them as layers of their own,
    the core by Winograd's where that is faster. A kernel that streamed all three by rows was measured and gained
    nothing: out of the caches, each of them runs at the register tile's rate already.

    Args:
        x: `[N, C_in, H, W]`; channels_last, or a channel slice of it, is read without a copy.
        first_weight: `[R_in, C_in, 1, 1]`; core_weight: `[R_out, R_in, KH, KW]`; last_weight: `[C_out, R_out, 1, 1]`.
        bias: `[C_out]`.
        residual: of the output's shape.
        stride, padding, dilation: of the core.

    Returns: `[N, C_out, H_out, W_out]`, channels_last. Other options and errors as of `conv2d`.
    """


def _linear_shape(
    options: Any,
    x: TensorSpec,
    first_weight: TensorSpec,
    last_weight: TensorSpec,
    bias: TensorSpec | None,
    residual: TensorSpec | None,
) -> tuple[int, ...]:
    if not x.shape or x.shape[-1] == 0:
        raise ValueError(f"x: expected [..., C_in] with at least one channel, got {describe(x.shape)}")
    channels, rank = x.shape[-1], first_weight.shape[0] if first_weight.shape else 0
    check_weight("first_weight", first_weight, "[R, C_in]", (None, channels), f"C_in = {channels} channels of x")
    check_weight("last_weight", last_weight, "[C_out, R]", (None, rank), f"R = {rank} rows of first_weight")
    c_out = last_weight.shape[0]
    return check_epilogue(options, (*x.shape[:-1], c_out), c_out, bias, None, residual)


def _linear_in_turn(problem: Problem, tensors: Tensors) -> Run:
    last: Any = {"activation": problem.options.activation, "backend": "cpu"}

    def compute(tensors: Tensors) -> Tensor:
        x, first_weight, last_weight, bias, residual = tensors
        hidden = linear(x, first_weight, backend="cpu")  # type: ignore[arg-type]
        return linear(hidden, last_weight, bias, None, residual, **last)  # type: ignore[arg-type]

    return compute


def _linear_sizes(problem: Problem, spacing: Mapping[str, int]) -> tuple[int, ...]:
    *rows, c_in = problem["x"].shape
    c_out, rank = problem["last_weight"].shape
    return (math.prod(rows), c_in, rank, c_out, spacing["x"], spacing["residual"], spacing["y"])


_LINEAR_CUDA = Kernel(
    "lowrank_linear",
    lambda options, x, first_weight, last_weight, bias, residual: (
        *(x, packing.contiguous(first_weight), packing.contiguous(last_weight), float_vector(bias), residual),
    ),
    _linear_sizes,
    layouts=ROWS_OF_CHANNELS,
    supports=lambda problem: _rank_reason(problem["first_weight"].shape[0], problem),
)


@op(
    out=ROWS,
    shape=_linear_shape,
    reference=reference.lowrank_linear,
    macs=lambda options, shape, x, first_weight, last_weight, *_: (
        math.prod(x[:-1]) * (math.prod(first_weight) + math.prod(last_weight))
    ),
    implementations=(
        cuda_implementation(_LINEAR_CUDA),
        triton_implementation("lowrank", _LINEAR_CUDA),
        _in_turn("linear", _linear_in_turn),
    ),
)
def lowrank_linear(
    x: Tensor,
    first_weight: Tensor,
    last_weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str = "identity",
    backend: str = "auto",
) -> Tensor:
    """A linear layer in two factors: `activation(x · (last_weight · first_weight)ᵀ + bias + residual)` (Denton et al.
    2014, arXiv:1404.0736, sec. 3.3).

    On the CPU these are two products: measured, one that keeps rows of the intermediate in the cache gained nothing.

    Args:
        x: `[..., C_in]`.
        first_weight: `[R, C_in]`; last_weight: `[C_out, R]`.
        bias: `[C_out]`.
        residual: `[..., C_out]`.

    Returns: `[..., C_out]`, contiguous. Options and errors as of `linear`.
    """
