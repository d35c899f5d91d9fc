"""How the int8 ops become launches of `_cuda`: packed weights, sums of weights for zero points, argument structs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernelpress.ops.backends.cuda import FLOATING, CudaDevice, CudaKernel, data_type, device_of, float_vector
from kernelpress.ops.calls import packing
from kernelpress.ops.checks import TensorSpec
from kernelpress.ops.layout import IMAGES_OR_ROWS, PIXELS, ROWS
from kernelpress.ops.registry import Problem, Tensors

__all__ = ["ADD", "CONV2D", "DEPTHWISE", "DEQUANTIZE", "MATMUL", "QUANTIZE"]

_LARGEST_TILE = (256, 128)
_LEAST_SPLIT_BYTES = 512
_MOST_SPLITS = 16
_LARGEST_SIDE = 2**15
_MOST_PIXELS = 2**31


def _specs(problem: Problem, count: int) -> tuple[TensorSpec, ...]:
    found = problem.tensors[:count]
    assert all(t is not None for t in found)
    return found  # type: ignore[return-value]


def _depth(weight: TensorSpec) -> int:
    return math.prod(weight.shape[1:])


def _weight_stride(weight: TensorSpec) -> int:
    return -(-_depth(weight) // 16) * 16


def _rows_of_weight(weight: Tensor) -> Tensor:
    """`[C_out, C_in(, KH, KW)]` → `[C_out, KH · KW · C_in]`, rows padded with zeros to whole vectors of 16."""
    rows = weight.flatten(1) if weight.dim() == 2 else weight.permute(0, 2, 3, 1).flatten(1)
    return pad(rows, (0, -rows.shape[1] % 16)).contiguous()


def _sums(weight: Tensor) -> Tensor:
    return weight.flatten(1).sum(1, dtype=torch.int64).to(torch.int32)


def _scale(weight_scale: Tensor, input_scale: float) -> Tensor:
    """`weight_scale · input_scale`, rounded to float32 as in the reference."""
    return packing.packed(
        weight_scale, None, ("int8 scale", input_scale), lambda scale: (scale * input_scale).contiguous()
    )


def _constants(tensors: Tensors, options: Any) -> tuple[Tensor | None, ...]:
    """weight, corrections for the zero point, scale and bias, as both structs begin after x."""
    _, weight, weight_scale, bias = tensors[:4]
    assert weight is not None
    assert weight_scale is not None
    zero_point = options.input_zero_point
    corrections = None
    if zero_point != 0:
        corrections = packing.packed(weight, None, ("int8 corrections", zero_point), lambda w: -zero_point * _sums(w))
    return (
        packing.packed(weight, None, "int8 rows", _rows_of_weight),
        corrections,
        _scale(weight_scale, options.input_scale),
        float_vector(bias),
    )


def _scalars(problem: Problem) -> tuple[float, ...]:
    options = problem.options
    return (
        *(1.0 if options.output_scale is None else float(options.output_scale), float(options.output_zero_point)),
        *(float(options.residual_scale), float(options.residual_zero_point)),
    )


def _workspace(problem: Problem, device: CudaDevice) -> int:
    """Partial sums of as many parts of K as multiprocessors could share, where the largest tiles leave some idle."""
    _, weight = _specs(problem, 2)
    c_out = weight.shape[0]
    rows = math.prod(problem.shape) // c_out
    tiles = -(-rows // _LARGEST_TILE[0]) * -(-c_out // _LARGEST_TILE[1])
    splits = min(device.multiprocessors // tiles, _depth(weight) // _LEAST_SPLIT_BYTES, _MOST_SPLITS)
    return splits * rows * -(-c_out // 4) * 16 if splits > 1 else 0


def _is_contiguous(t: TensorSpec) -> bool:
    step = 1
    for size, stride in zip(reversed(t.shape), reversed(t.stride), strict=True):
        if size > 1 and stride != step:
            return False
        step *= size
    return True


def _matmul_reason(problem: Problem) -> str | None:
    for name, t in zip(("row_scale", "row_zero_point"), problem.tensors[5:], strict=True):
        if t is not None and not _is_contiguous(t):
            return f"{name}: the kernel reads it contiguous, got strides {list(t.stride)}"
    return None


def _matmul_operands(tensors: Tensors, options: Any) -> tuple[Tensor | None, ...]:
    x, weight, _, _, residual, row_scale, row_zero_point = tensors
    assert weight is not None
    weight_sums = None if row_zero_point is None else packing.packed(weight, None, "int8 sums", _sums)
    return (x, *_constants(tensors, options), residual, row_scale, row_zero_point, weight_sums)


def _matmul_sizes(problem: Problem, spacings: tuple[int, ...], y_spacing: int) -> tuple[int, ...]:
    x, weight = _specs(problem, 2)
    return (
        *(math.prod(x.shape[:-1]), x.shape[-1], weight.shape[0]),
        *(_weight_stride(weight), spacings[0], spacings[4], y_spacing),
        *(_workspace(problem, device_of(problem)), data_type(problem.dtype)),
    )


MATMUL = CudaKernel(
    name="int8_matmul",
    layouts=(ROWS, None, None, None, ROWS, None, None),
    supports=_matmul_reason,
    operands=_matmul_operands,
    sizes=_matmul_sizes,
    scalars=_scalars,
    dtypes=(torch.int8,),
    workspace=_workspace,
    has_workspace=True,
)


def _conv_reason(problem: Problem) -> str | None:
    x = problem.tensors[0]
    assert x is not None
    options = problem.options
    reach = [
        size + 2 * padding + abs(step)
        for size, padding, step in zip(x.shape[2:], options.padding, options.dilation, strict=True)
    ]
    pixels = max(math.prod(x.shape) // x.shape[1], math.prod(problem.shape) // problem.shape[1])
    if max(*reach, *problem.shape[2:]) >= _LARGEST_SIDE or pixels >= _MOST_PIXELS:
        return f"the kernel takes sides below {_LARGEST_SIDE}, padding included, and less than {_MOST_PIXELS} pixels"
    return None


def _conv_operands(tensors: Tensors, options: Any) -> tuple[Tensor | None, ...]:
    return (tensors[0], *_constants(tensors, options), tensors[4])


def _conv_sizes(problem: Problem, spacings: tuple[int, ...], y_spacing: int) -> tuple[int, ...]:
    x, weight = _specs(problem, 2)
    options = problem.options
    batch, c_in, in_h, in_w = x.shape
    _, c_out, out_h, out_w = problem.shape
    return (
        *(batch, in_h, in_w, c_in, out_h, out_w, c_out),
        *(_weight_stride(weight), spacings[0], spacings[4], y_spacing),
        *(*weight.shape[2:], *options.stride, *options.padding, *options.dilation),
        *(options.input_zero_point, _workspace(problem, device_of(problem)), data_type(problem.dtype)),
    )


CONV2D = CudaKernel(
    name="int8_conv2d",
    layouts=(PIXELS, None, None, None, PIXELS),
    supports=_conv_reason,
    operands=_conv_operands,
    sizes=_conv_sizes,
    scalars=_scalars,
    dtypes=(torch.int8,),
    workspace=_workspace,
    has_workspace=True,
)


def _depthwise_operands(tensors: Tensors, options: Any) -> tuple[Tensor | None, ...]:
    x, weight, weight_scale, bias, residual = tensors
    assert weight is not None
    assert weight_scale is not None
    return (
        x,
        packing.depthwise(weight, None),
        _scale(weight_scale, options.input_scale),
        float_vector(bias),
        residual,
    )


def _depthwise_sizes(problem: Problem, spacings: tuple[int, ...], y_spacing: int) -> tuple[int, ...]:
    x, weight = _specs(problem, 2)
    options = problem.options
    batch, channels, in_h, in_w = x.shape
    return (
        *(batch, in_h, in_w, channels, weight.shape[0] // channels, *problem.shape[2:]),
        *(spacings[0], spacings[4], y_spacing),
        *(*weight.shape[2:], *options.stride, *options.padding, *options.dilation),
        *(options.input_zero_point, data_type(problem.dtype)),
    )


DEPTHWISE = CudaKernel(
    name="int8_depthwise_conv2d",
    layouts=(PIXELS, None, None, None, PIXELS),
    supports=lambda problem: None,
    operands=_depthwise_operands,
    sizes=_depthwise_sizes,
    scalars=_scalars,
    dtypes=(torch.int8,),
)


def _rows_and_channels(shape: Sequence[int]) -> tuple[int, int]:
    """What an elementwise kernel sees: pixels of `[N, C, H, W]`, rows of any other shape."""
    channels = shape[1] if len(shape) == 4 else shape[-1]
    return math.prod(shape) // channels, channels


def _activations(tensors: Tensors, options: Any) -> tuple[Tensor | None, ...]:
    return tuple(tensors)


QUANTIZE = CudaKernel(
    name="quantize",
    layouts=(IMAGES_OR_ROWS,),
    supports=lambda problem: None,
    operands=_activations,
    sizes=lambda problem, spacings, y_spacing: (*_rows_and_channels(problem.shape), spacings[0], y_spacing),
    scalars=lambda problem: (float(problem.options.scale), float(problem.options.zero_point)),
    dtypes=FLOATING,
)

DEQUANTIZE = CudaKernel(
    name="dequantize",
    layouts=(IMAGES_OR_ROWS,),
    supports=lambda problem: None,
    operands=_activations,
    sizes=lambda problem, spacings, y_spacing: (
        *(*_rows_and_channels(problem.shape), spacings[0], y_spacing),
        data_type(problem.dtype),
    ),
    scalars=lambda problem: (float(problem.options.scale), float(problem.options.zero_point)),
    dtypes=(torch.int8,),
)


def _add_scalars(problem: Problem) -> tuple[float, ...]:
    options = problem.options
    return (
        *(float(options.input_scale), float(options.input_zero_point)),
        *(float(options.other_scale), float(options.other_zero_point)),
        *(1.0 if options.output_scale is None else float(options.output_scale), float(options.output_zero_point)),
    )


ADD = CudaKernel(
    name="int8_add",
    layouts=(IMAGES_OR_ROWS, IMAGES_OR_ROWS),
    supports=lambda problem: None,
    operands=_activations,
    sizes=lambda problem, spacings, y_spacing: (
        *(*_rows_and_channels(problem.shape), *spacings, y_spacing),
        data_type(problem.dtype),
    ),
    scalars=_add_scalars,
    dtypes=(torch.int8,),
)
