"""Ghost convolution: `ghost_conv2d`, a convolution and a depthwise one on its result, both into one output."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kernelpress.kernels import reference
from kernelpress.ops.backends.cpu import cpu_implementation
from kernelpress.ops.backends.cuda import cuda_implementation
from kernelpress.ops.backends.kernel import Kernel, activation_index, float_vector, tf32_reason, window
from kernelpress.ops.backends.triton import triton_implementation
from kernelpress.ops.calls import packing
from kernelpress.ops.calls.dispatch import op
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
from kernelpress.ops.layout import PIXELS
from kernelpress.ops.registry import Problem
from kernelpress.ops.signature import IntOrPair

__all__ = ["ghost_conv2d"]

_LARGEST_IMAGE = 2**15
_MOST_ELEMENTS = 2**31


def _check_cheap_weight(weight: TensorSpec, primary: int) -> None:
    form, because = "[C_primary · multiplier, 1, DH, DW]", f"C_primary = {primary} channels of primary_weight"
    check_weight("cheap_weight", weight, form, (None, 1, None, None), because)
    if weight.shape[0] % primary != 0:
        raise ValueError(f"cheap_weight: expected {form} with {because}, got {describe(weight.shape)}")
    if any(size % 2 == 0 for size in weight.shape[2:]):
        raise ValueError(f"cheap_weight: expected an odd DH and DW, which keep the size, got {describe(weight.shape)}")


def _kept_channels(out_channels: int | None, primary: int, cheap: int) -> int:
    """Channels of the output. Raises `TypeError` or `ValueError` where `out_channels` is no such number."""
    if out_channels is None:
        return primary + cheap
    if not isinstance(out_channels, int) or isinstance(out_channels, bool):
        raise TypeError(f"out_channels: expected an integer or None, got {out_channels!r}")
    if not primary <= out_channels <= primary + cheap:
        raise ValueError(
            f"out_channels: expected {primary} to {primary + cheap}, at least the primary channels and at most all of "
            f"them, got {out_channels}"
        )
    return out_channels


def _shape(options: Any, *tensors: Any) -> tuple[int, ...]:
    x, primary_weight, primary_bias, cheap_weight, cheap_bias, residual = tensors
    check_input(x)
    check_activation("activation", options.activation)
    check_activation("cheap_activation", options.cheap_activation)
    channels = x.shape[1]
    because = f"C_in = {channels} channels of x"
    check_weight("primary_weight", primary_weight, "[C_primary, C_in, KH, KW]", (None, channels, None, None), because)
    primary = primary_weight.shape[0]
    check_vector("primary_bias", primary_bias, primary)
    _check_cheap_weight(cheap_weight, primary)
    cheap = cheap_weight.shape[0]
    check_vector("cheap_bias", cheap_bias, cheap)
    size = conv_output_size(x, primary_weight.shape[2:], options.stride, options.padding, (1, 1))
    shape = (x.shape[0], _kept_channels(options.out_channels, primary, cheap), *size)
    check_same_shape("residual", residual, shape)
    return shape


def _macs(
    options: Any, shape: Sequence[int], x: Any, primary_weight: Any, _: Any, cheap_weight: Any, *others: Any
) -> int:
    batch, c_out, out_h, out_w = shape
    per_pixel = math.prod(primary_weight) + (c_out - primary_weight[0]) * math.prod(cheap_weight[2:])
    return int(batch * out_h * out_w * per_pixel)


def _multiplier(problem: Problem) -> int:
    return problem["cheap_weight"].shape[0] // problem["primary_weight"].shape[0]


def _reason(problem: Problem) -> str | None:
    x, multiplier = problem["x"], _multiplier(problem)
    kept = problem.shape[1] - problem["primary_weight"].shape[0]
    if kept % multiplier != 0:
        return (
            f"out_channels: the kernel keeps all {multiplier} filters of a primary channel or none, got {kept} in all"
        )
    largest = max(*x.shape[2:], *problem.shape[2:], *(2 * size for size in problem.options.padding))
    if largest >= _LARGEST_IMAGE or max(math.prod(x.shape), math.prod(problem.shape)) >= _MOST_ELEMENTS:
        return f"it takes sides below {_LARGEST_IMAGE} and tensors of less than {_MOST_ELEMENTS} elements"
    return tf32_reason(problem)


def _kept_filters(options: Any, primary_weight: Tensor, cheap_weight: Tensor) -> Tensor:
    """`[DH, DW, channels]`, of the cheap channels that are kept."""
    primary, cheap = primary_weight.shape[0], cheap_weight.shape[0]
    kept = _kept_channels(options.out_channels, primary, cheap) - primary
    return packing.packed(cheap_weight, None, ("ghost", kept), lambda w: packing.depthwise_copy(w[:kept]))


def _operands(options: Any, *tensors: Any) -> tuple[Tensor | None, ...]:
    x, primary_weight, primary_bias, cheap_weight, cheap_bias, residual = tensors
    return (
        x,
        packing.channels_last(primary_weight),
        float_vector(primary_bias),
        _kept_filters(options, primary_weight, cheap_weight),
        float_vector(cheap_bias),
        residual,
    )


def _sizes(problem: Problem, spacing: Mapping[str, int]) -> tuple[int, ...]:
    primary_weight, options = problem["primary_weight"], problem.options
    batch, c_in, in_h, in_w = problem["x"].shape
    _, c_out, out_h, out_w = problem.shape
    primary = primary_weight.shape[0]
    return (
        *(batch, in_h, in_w, c_in, out_h, out_w),
        *(primary, c_out - primary, _multiplier(problem)),
        *(spacing["x"], spacing["residual"], spacing["y"]),
        *window(primary_weight.shape[2:], options),
        *problem["cheap_weight"].shape[2:],
        activation_index(options.cheap_activation),
    )


def _triton_options(problem: Problem) -> dict[str, Any]:
    options = problem.options._asdict()
    del options["out_channels"]  # the operands tell
    return {**options, "multiplier": _multiplier(problem)}


def _cpu_operands(options: Any, *tensors: Any) -> tuple[Tensor | None, ...]:
    x, primary_weight, primary_bias, cheap_weight, cheap_bias, residual = tensors
    return (
        *(x, packing.panels(primary_weight, None), packing.vector(primary_bias)),
        *(_kept_filters(options, primary_weight, cheap_weight), packing.vector(cheap_bias), residual),
    )


_CPU = Kernel("ghost_conv2d", _cpu_operands, _sizes, dtypes=(torch.float32,))
_CUDA = Kernel("ghost_conv2d", _operands, _sizes, supports=_reason)


@op(
    out=PIXELS,
    shape=_shape,
    reference=reference.ghost_conv2d,
    macs=_macs,
    implementations=(
        cuda_implementation(_CUDA),
        triton_implementation("ghost", _CUDA, options=_triton_options),
        cpu_implementation(_CPU),
    ),
)
def ghost_conv2d(
    x: Tensor,
    primary_weight: Tensor,
    primary_bias: Tensor | None,
    cheap_weight: Tensor,
    cheap_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    activation: str = "identity",
    cheap_activation: str = "identity",
    out_channels: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Few channels from a convolution, the others from those by a depthwise one (GhostNet, arXiv:1911.11907, eq. 3).

    `primary = activation(conv(x))`, `cheap = cheap_activation(depthwise(primary))`; the result is
    `concat(primary, cheap) + residual`.

    Args:
        x: `[N, C_in, H, W]`; channels_last, or a channel slice of it, is read without a copy.
        primary_weight: `[C_primary, C_in, KH, KW]`; `primary_bias: [C_primary]`.
        cheap_weight: `[C_primary · multiplier, 1, DH, DW]` with odd sizes, padded to keep the size;
            `cheap_bias: [C_primary · multiplier]`.
        residual: of the output's shape; the shortcut of a ghost bottleneck.
        stride, padding: of the primary convolution.
        activation, cheap_activation: after the primary convolution and after the cheap one.
        out_channels: how many of the channels, the first ones, are kept; at least the primary ones. None: all.

    Returns: `[N, out_channels, H_out, W_out]`, channels_last. Errors as of `conv2d`.
    """
