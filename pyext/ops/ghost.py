"""Ghost convolution: `ghost_conv2d`, a convolution and a depthwise one on its result, both into one output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from kernelpress.kernels import reference
from kernelpress.ops.backends.cuda import CudaKernel, cuda_implementation, float_vector, tf32_reason
from kernelpress.ops.backends.reference import reference_implementation
from kernelpress.ops.backends.triton import TritonKernel, triton_implementation
from kernelpress.ops.calls import packing
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
from kernelpress.ops.layout import PIXELS
from kernelpress.ops.registry import Operator, Problem, Tensors
from kernelpress.ops.signature import IntOrPair

__all__ = ["ghost_conv2d"]


class GhostOptions(NamedTuple):
    """Keyword arguments of `ghost_conv2d`."""

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    activation: str = "identity"
    cheap_activation: str = "identity"
    out_channels: int | None = None


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


def _shape(tensors: tuple[TensorSpec | None, ...], options: GhostOptions) -> tuple[int, ...]:
    x, primary_weight, primary_bias, cheap_weight, cheap_bias, residual = tensors
    assert x is not None
    assert primary_weight is not None
    assert cheap_weight is not None
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


def _macs(shapes: Sequence[Any], options: GhostOptions, shape: Sequence[int]) -> int:
    batch, c_out, out_h, out_w = shape
    primary = shapes[1][0]
    per_pixel = math.prod(shapes[1]) + (c_out - primary) * math.prod(shapes[3][2:])
    return int(batch * out_h * out_w * per_pixel)


def _multiplier(tensors: Sequence[Any]) -> int:
    return int(tensors[3].shape[0] // tensors[1].shape[0])


def _unsupported(problem: Problem) -> str | None:
    x, primary_weight, *_ = problem.tensors
    assert x is not None
    assert primary_weight is not None
    kept, multiplier = problem.shape[1] - primary_weight.shape[0], _multiplier(problem.tensors)
    if kept % multiplier != 0:
        return (
            f"out_channels: the kernel keeps all {multiplier} filters of a primary channel or none, got {kept} in all"
        )
    largest = max(*x.shape[2:], *problem.shape[2:], *(2 * size for size in problem.options.padding))
    if largest >= _LARGEST_IMAGE or max(math.prod(x.shape), math.prod(problem.shape)) >= _MOST_ELEMENTS:
        return f"it takes sides below {_LARGEST_IMAGE} and tensors of less than {_MOST_ELEMENTS} elements"
    return tf32_reason(problem)


def _operands(tensors: Tensors, options: GhostOptions) -> tuple[Tensor | None, ...]:
    x, primary_weight, primary_bias, cheap_weight, cheap_bias, residual = tensors
    assert primary_weight is not None
    assert cheap_weight is not None
    primary, cheap = primary_weight.shape[0], cheap_weight.shape[0]
    kept = _kept_channels(options.out_channels, primary, cheap) - primary
    return (
        x,
        packing.packed(primary_weight, None, "channels last", lambda w: w.permute(0, 2, 3, 1).contiguous()),
        float_vector(primary_bias),
        packing.packed(cheap_weight, None, ("ghost", kept), lambda w: w[:kept, 0].permute(1, 2, 0).contiguous()),
        float_vector(cheap_bias),
        residual,
    )


def _sizes(problem: Problem, spacings: tuple[int, ...], y_spacing: int) -> tuple[int, ...]:
    x, primary_weight, _, cheap_weight, *_ = problem.tensors
    assert x is not None
    assert primary_weight is not None
    assert cheap_weight is not None
    options = problem.options
    batch, c_in, in_h, in_w = x.shape
    _, c_out, out_h, out_w = problem.shape
    primary = primary_weight.shape[0]
    return (
        *(batch, in_h, in_w, c_in, out_h, out_w),
        *(primary, c_out - primary, _multiplier(problem.tensors)),
        *(spacings[0], spacings[5], y_spacing),
        *(*primary_weight.shape[2:], *options.stride, *options.padding, 1, 1),
        *cheap_weight.shape[2:],
        reference.ACTIVATIONS.index(options.cheap_activation),
    )


_LARGEST_IMAGE = 2**15
_MOST_ELEMENTS = 2**31

_CUDA = CudaKernel(
    name="ghost_conv2d",
    layouts=(PIXELS, None, None, None, None, PIXELS),
    supports=_unsupported,
    operands=_operands,
    sizes=_sizes,
)


def _triton_options(problem: Problem) -> dict[str, Any]:
    options = problem.options._asdict()
    del options["out_channels"]  # the operands tell
    return {**options, "multiplier": _multiplier(problem.tensors)}


_TRITON = TritonKernel(
    family="ghost", name="ghost_conv2d", layouts=_CUDA.layouts, operands=_operands, options=_triton_options
)

_GHOST = publish(
    Operator(
        name="ghost_conv2d",
        schema=(
            "(Tensor x, Tensor primary_weight, Tensor? primary_bias, Tensor cheap_weight, Tensor? cheap_bias=None, "
            "Tensor? residual=None, *, SymInt[2] stride=[1,1], SymInt[2] padding=[0,0], "
            'str activation="identity", str cheap_activation="identity", int? out_channels=None, '
            'str backend="auto") -> Tensor'
        ),
        tensors=("x", "primary_weight", "primary_bias", "cheap_weight", "cheap_bias", "residual"),
        options=GhostOptions,
        out=PIXELS,
        shape=_shape,
        reference=reference.ghost_conv2d,
        macs=_macs,
        implementations=(
            cuda_implementation("ghost_conv2d", _CUDA),
            triton_implementation("ghost_conv2d", _TRITON),
            reference_implementation("ghost_conv2d", reference.ghost_conv2d),
        ),
        native=None,
    )
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
    options = (stride, padding, activation, cheap_activation, out_channels)
    tensors = (x, primary_weight, primary_bias, cheap_weight, cheap_bias, residual)
    return call(_GHOST, tensors, options, backend)
