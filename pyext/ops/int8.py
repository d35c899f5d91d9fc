"""Matrix product and convolutions of int8 tensors: `int8_matmul`, `int8_conv2d`, `int8_depthwise_conv2d`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernelpress.kernels import reference
from kernelpress.ops.backends.cpu import cpu_implementation
from kernelpress.ops.backends.cuda import CudaDevice, cuda_implementation, data_type, device_of
from kernelpress.ops.backends.kernel import ROWS_OF_CHANNELS, Kernel, float_vector, window
from kernelpress.ops.backends.triton import triton_implementation
from kernelpress.ops.calls import packing
from kernelpress.ops.calls.dispatch import op
from kernelpress.ops.checks import (
    TensorSpec,
    check_activation,
    check_depthwise_weight,
    check_dtype,
    check_grouped_weight,
    check_input,
    check_vector,
    check_weight,
    convolved,
    describe,
)
from kernelpress.ops.dense import split_workspace
from kernelpress.ops.depthwise import depthwise_sizes
from kernelpress.ops.int8_checks import (
    check_depth,
    check_output,
    check_residual,
    check_scale,
    check_zero_point,
    half_reason,
    output_dtype,
)
from kernelpress.ops.int8_sparse import LIKES, cells_reason, with_cells
from kernelpress.ops.layout import PIXELS, ROWS
from kernelpress.ops.registry import Problem
from kernelpress.ops.signature import IntOrPair

__all__ = ["int8_conv2d", "int8_depthwise_conv2d", "int8_matmul"]

_INT8 = (torch.int8,)
_LARGEST_SIDE = 2**15
_MOST_PIXELS = 2**31

_ALLOWED = {
    "x": torch.int8,
    "weight": torch.int8,
    "weight_scale": torch.float32,
    "bias": torch.float32,
    "row_scale": torch.float32,
    "row_zero_point": torch.int32,
}


def _dtypes(names: Sequence[str], tensors: Sequence[TensorSpec | None], options: Any) -> torch.dtype:
    out = output_dtype(options)
    for name, t in zip(names, tensors, strict=True):
        check_dtype(name, t, (_ALLOWED.get(name, out),))
    return out


def _check_epilogue(
    options: Any,
    shape: tuple[int, ...],
    weight: TensorSpec,
    weight_scale: TensorSpec,
    bias: TensorSpec | None,
    residual: TensorSpec | None,
) -> tuple[int, ...]:
    check_depth(weight)
    check_vector("weight_scale", weight_scale, weight.shape[0])
    check_vector("bias", bias, weight.shape[0])
    check_activation("activation", options.activation)
    check_scale("input_scale", options.input_scale)
    check_zero_point("input_zero_point", options.input_zero_point)
    check_output(options)
    check_residual(residual, shape, options)
    return shape


def _check_rows(name: str, vector: TensorSpec | None, rows: tuple[int, ...]) -> None:
    if vector is not None and (
        len(vector.shape) != len(rows) or any(a != b for a, b in zip(vector.shape, rows, strict=True))
    ):
        raise ValueError(f"{name}: expected {describe(rows)}, one value per row of x, got {describe(vector.shape)}")


def _matmul_shape(options: Any, *tensors: Any) -> tuple[int, ...]:
    x, weight, weight_scale, bias, residual, row_scale, row_zero_point = tensors
    if not x.shape or x.shape[-1] == 0:
        raise ValueError(f"x: expected [..., C_in] with at least one channel, got {describe(x.shape)}")
    channels, rows = x.shape[-1], tuple(x.shape[:-1])
    check_weight("weight", weight, "[C_out, C_in]", (None, channels), f"C_in = {channels} channels of x")
    _check_rows("row_scale", row_scale, rows)
    _check_rows("row_zero_point", row_zero_point, rows)
    if row_scale is not None and options.input_scale != 1.0:
        raise ValueError(f"input_scale: expected 1.0 beside row_scale, got {options.input_scale}")
    if row_zero_point is not None and options.input_zero_point != 0:
        raise ValueError(f"input_zero_point: expected 0 beside row_zero_point, got {options.input_zero_point}")
    return _check_epilogue(options, (*rows, weight.shape[0]), weight, weight_scale, bias, residual)


def _conv_shape(options: Any, x: TensorSpec, weight: TensorSpec, *epilogue: Any) -> tuple[int, ...]:
    check_input(x)
    check_grouped_weight(x, weight, options.groups)
    return _check_epilogue(options, convolved(x, weight, options), weight, *epilogue)


def _depthwise_shape(options: Any, x: TensorSpec, weight: TensorSpec, *epilogue: Any) -> tuple[int, ...]:
    check_input(x)
    check_depthwise_weight("weight", weight, x.shape[1])
    return _check_epilogue(options, convolved(x, weight, options), weight, *epilogue)


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


def _constants(
    options: Any, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """weight, corrections for the zero point, scale and bias, as the structs begin after x."""
    zero_point = options.input_zero_point
    corrections = None
    if zero_point != 0:
        corrections = packing.packed(weight, None, ("int8 corrections", zero_point), lambda w: -zero_point * _sums(w))
    rows = packing.packed(weight, None, "int8 rows", _rows_of_weight)
    return rows, corrections, _scale(weight_scale, options.input_scale), float_vector(bias)


def _scalars(problem: Problem) -> tuple[float, ...]:
    options = problem.options
    return (
        *(1.0 if options.output_scale is None else float(options.output_scale), float(options.output_zero_point)),
        *(float(options.residual_scale), float(options.residual_zero_point)),
    )


def _workspace(problem: Problem, device: CudaDevice) -> int:
    weight = problem["weight"]
    rows = math.prod(problem.shape) // weight.shape[0]
    return split_workspace(rows, weight.shape[0], _depth(weight), device)


def _triton_options(*names: str) -> Any:
    """Those of an int8 epilogue, and the op's options of these names."""
    chosen = (*names, "activation", "residual_scale", "residual_zero_point", "output_zero_point")

    def options(problem: Problem) -> dict[str, Any]:
        scale = problem.options.output_scale
        named = {name: getattr(problem.options, name) for name in chosen}
        return {"output_scale": 1.0 if scale is None else scale, **named}

    return options


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


def _matmul_operands(options: Any, *tensors: Any) -> tuple[Tensor | None, ...]:
    x, weight, weight_scale, bias, residual, row_scale, row_zero_point = tensors
    weight_sums = None if row_zero_point is None else packing.packed(weight, None, "int8 sums", _sums)
    constants = _constants(options, weight, weight_scale, bias)
    return (x, *constants, residual, row_scale, row_zero_point, weight_sums)


def _matmul_sizes(problem: Problem, spacing: Mapping[str, int]) -> tuple[int, ...]:
    x, weight = problem["x"], problem["weight"]
    return (
        *(math.prod(x.shape[:-1]), x.shape[-1], weight.shape[0]),
        *(_weight_stride(weight), spacing["x"], spacing["residual"], spacing["y"]),
        *(_workspace(problem, device_of(problem)), data_type(problem.dtype)),
    )


_MATMUL_CUDA = Kernel(
    "int8_matmul",
    _matmul_operands,
    _matmul_sizes,
    layouts=ROWS_OF_CHANNELS,
    supports=_matmul_reason,
    dtypes=_INT8,
    scalars=_scalars,
    workspace=_workspace,
)


def _cpu_reason(problem: Problem) -> str | None:
    if problem.dtype not in (torch.int8, torch.float32):
        return f"the kernel gives torch.int8 or torch.float32, not {problem.dtype}"
    return None


def _cpu_constants(
    options: Any, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, *layout: int
) -> tuple[Any, ...]:
    """weight, its sums, scale and bias, as the structs of the CPU begin after x."""
    return packing.int8_panels(weight, *layout), *_cpu_vectors(options, weight, weight_scale, bias)


def _cpu_vectors(options: Any, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    sums = packing.packed(weight, None, "int8 sums", _sums)
    return sums, _scale(weight_scale, options.input_scale), packing.vector(bias)


def _cpu_matmul_operands(options: Any, *tensors: Any) -> tuple[Tensor | None, ...]:
    x, weight, weight_scale, bias, residual, row_scale, row_zero_point = tensors
    return (x, *_cpu_constants(options, weight, weight_scale, bias), residual, row_scale, row_zero_point)


_MATMUL_CPU = Kernel(
    "int8_matmul",
    _cpu_matmul_operands,
    lambda problem, spacing: (
        *(math.prod(problem["x"].shape[:-1]), problem["x"].shape[-1], problem["weight"].shape[0]),
        *(spacing["x"], spacing["residual"], spacing["y"]),
        *(problem.options.input_zero_point, int(problem.dtype == torch.int8)),
    ),
    layouts=ROWS_OF_CHANNELS,
    supports=lambda problem: _cpu_reason(problem) or _matmul_reason(problem),
    dtypes=_INT8,
    scalars=_scalars,
)


@op(
    out=ROWS,
    shape=_matmul_shape,
    reference=reference.int8_matmul,
    macs=lambda options, shape, x, weight, *_: math.prod(shape) * weight[1],
    dtypes=_dtypes,
    implementations=(
        cuda_implementation(_MATMUL_CUDA),
        triton_implementation("int8", _MATMUL_CUDA, supports=_matmul_reason, options=_triton_options()),
        cpu_implementation(_MATMUL_CPU),
    ),
)
def int8_matmul(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    row_scale: Tensor | None = None,
    row_zero_point: Tensor | None = None,
    *,
    input_scale: float = 1.0,
    input_zero_point: int = 0,
    residual_scale: float = 1.0,
    residual_zero_point: int = 0,
    activation: str = "identity",
    output_scale: float | None = None,
    output_zero_point: int = 0,
    output_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Linear layer of int8 tensors, summed exactly: `activation((x − zero_point) · weightᵀ · scale + bias + residual)`.

    Args:
        x: `[..., C_in]` int8, affine: it stands for `(x − zero_point) · scale`.
        weight: `[C_out, C_in]` int8; weight_scale: `[C_out]` float32.
        bias: `[C_out]` float32.
        residual: `[..., C_out]` of the output's dtype.
        row_scale, row_zero_point: `[...]` float32 and int32, a scale and a zero point for each row of `x` (as
            `quantize_rows` gives them) in place of `input_scale` and `input_zero_point`.
        residual_scale, residual_zero_point: of an int8 residual.
        output_scale, output_zero_point: with a scale, the output is int8: rounded half to even, saturated.
        output_dtype: float32 (where None), float16 or bfloat16 of an output without `output_scale`.

    Returns: `[..., C_out]`, contiguous; `kernels.reference.int8_epilogue` tells where it is rounded. An int8 output has
        no gradient.
    Raises: `ValueError` or `TypeError` naming a bad argument; `RuntimeError` where the backend asked for cannot run.
    """


def _groups_reason(problem: Problem) -> str | None:
    groups = problem.options.groups
    return None if groups == 1 else f"the kernel has groups = 1, got {groups}"


def _conv_reason(problem: Problem) -> str | None:
    shape, options = problem["x"].shape, problem.options
    if options.groups != 1:
        return _groups_reason(problem)
    reach = [
        size + 2 * padding + abs(step)
        for size, padding, step in zip(shape[2:], options.padding, options.dilation, strict=True)
    ]
    pixels = max(math.prod(shape) // shape[1], math.prod(problem.shape) // problem.shape[1])
    if max(*reach, *problem.shape[2:]) >= _LARGEST_SIDE or pixels >= _MOST_PIXELS:
        return f"the kernel takes sides below {_LARGEST_SIDE}, padding included, and less than {_MOST_PIXELS} pixels"
    return None


def _conv_sizes(problem: Problem, spacing: Mapping[str, int]) -> tuple[int, ...]:
    weight, options = problem["weight"], problem.options
    batch, c_in, in_h, in_w = problem["x"].shape
    _, c_out, out_h, out_w = problem.shape
    return (
        *(batch, in_h, in_w, c_in, out_h, out_w, c_out),
        *(_weight_stride(weight), spacing["x"], spacing["residual"], spacing["y"]),
        *window(weight.shape[2:], options),
        *(options.input_zero_point, _workspace(problem, device_of(problem)), data_type(problem.dtype)),
    )


_CONV2D_CUDA = Kernel(
    "int8_conv2d",
    lambda options, x, weight, weight_scale, bias, residual: (
        *(x, *_constants(options, weight, weight_scale, bias), residual),
    ),
    _conv_sizes,
    supports=_conv_reason,
    dtypes=_INT8,
    scalars=_scalars,
    workspace=_workspace,
)


def _cpu_conv_operands(options: Any, x: Any, weight: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
    weight_scale, bias, residual = others
    height, width = weight.shape[2:]
    runs = height if options.dilation[1] == 1 else height * width  # what lies side by side in a row of pixels
    return (x, *_cpu_constants(options, weight, weight_scale, bias, runs, options.groups), residual)


def _cpu_conv_sizes(problem: Problem, spacing: Mapping[str, int]) -> tuple[int, ...]:
    weight, options = problem["weight"], problem.options
    batch, c_in, in_h, in_w = problem["x"].shape
    _, c_out, out_h, out_w = problem.shape
    return (
        *(batch, in_h, in_w, c_in, out_h, out_w, c_out, options.groups),
        *(spacing["x"], spacing["residual"], spacing["y"]),
        *(options.input_zero_point, int(problem.dtype == torch.int8)),
        *window(weight.shape[2:], options),
    )


_CONV2D_CPU = Kernel(
    "int8_conv2d", _cpu_conv_operands, _cpu_conv_sizes, supports=_cpu_reason, dtypes=_INT8, scalars=_scalars
)

_CONV2D_SPARSE = replace(
    _CONV2D_CPU,
    name="int8_sparse_conv2d",
    operands=lambda options, x, weight, weight_scale, bias, residual: (
        *(x, *_cpu_vectors(options, weight, weight_scale, bias), residual),
    ),
    supports=lambda problem: _cpu_reason(problem) or cells_reason(problem),
    specialise=with_cells,
    likes=LIKES,
)


def _padded_operands(options: Any, x: Tensor | None, weight: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
    """With the values of padding, as the Triton kernel reads them."""
    zero_point = options.input_zero_point

    def padding(weight: Tensor) -> Tensor:
        return weight.new_full((weight.shape[3] * weight.shape[1],), zero_point)

    _, rows, *rest = _CONV2D_CUDA.operands(options, x, weight, *others)
    return (x, rows, packing.packed(weight, None, ("int8 padding", zero_point), padding), *rest)


def _windowed_options(problem: Problem) -> dict[str, Any]:
    kernel = {"kernel": tuple(problem["weight"].shape[2:])}
    return {**kernel, **_triton_options("stride", "padding", "dilation")(problem)}


@op(
    out=PIXELS,
    shape=_conv_shape,
    reference=reference.int8_conv2d,
    macs=lambda options, shape, x, weight, *_: math.prod(shape) * math.prod(weight[1:]),
    dtypes=_dtypes,
    implementations=(
        cuda_implementation(_CONV2D_CUDA),
        triton_implementation(
            "int8", _CONV2D_CUDA, operands=_padded_operands, options=_windowed_options, supports=_groups_reason
        ),
        cpu_implementation(_CONV2D_CPU),
        cpu_implementation(_CONV2D_SPARSE, "sparse"),
    ),
)
def int8_conv2d(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    input_scale: float = 1.0,
    input_zero_point: int = 0,
    residual_scale: float = 1.0,
    residual_zero_point: int = 0,
    activation: str = "identity",
    output_scale: float | None = None,
    output_zero_point: int = 0,
    output_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """2-D convolution of int8 tensors, summed exactly, with its epilogue; padding stands for 0.

    Args:
        x: `[N, C_in, H, W]` int8; channels_last, or a channel slice of it, is read without a copy.
        weight: `[C_out, C_in / groups, KH, KW]` int8; weight_scale: `[C_out]` float32.
        bias: `[C_out]` float32.
        residual: of the output's shape and dtype.
        stride, padding, dilation: pixels, one integer or (height, width).
        groups: the kernels for devices have one alone.

    Backend `"sparse"` is a CPU kernel that skips zeros of the weight, four input channels of an output channel at a
    time.

    Returns: `[N, C_out, H_out, W_out]`, channels_last. Other options and errors as of `int8_matmul`.
    """


_DEPTHWISE_CUDA = Kernel(
    "int8_depthwise_conv2d",
    lambda options, x, weight, weight_scale, bias, residual: (
        *(x, packing.depthwise(weight, None), _scale(weight_scale, options.input_scale), float_vector(bias), residual),
    ),
    lambda problem, spacing: (
        *depthwise_sizes(problem, spacing),
        *(problem.options.input_zero_point, data_type(problem.dtype)),
    ),
    dtypes=_INT8,
    scalars=_scalars,
)


_DEPTHWISE_CPU = replace(
    _DEPTHWISE_CUDA,
    operands=lambda options, x, weight, weight_scale, bias, residual: (
        *(x, packing.int8_depthwise(weight), packing.packed(weight, None, "int8 sums", _sums)),
        *(_scale(weight_scale, options.input_scale), packing.vector(bias), residual),
    ),
    sizes=lambda problem, spacing: (
        *depthwise_sizes(problem, spacing),
        *(problem.options.input_zero_point, int(problem.dtype == torch.int8)),
    ),
    supports=half_reason,
)


@op(
    out=PIXELS,
    shape=_depthwise_shape,
    reference=reference.int8_depthwise_conv2d,
    macs=lambda options, shape, x, weight, *_: math.prod(shape) * math.prod(weight[2:]),
    dtypes=_dtypes,
    implementations=(
        cuda_implementation(_DEPTHWISE_CUDA),
        triton_implementation(
            "int8_depthwise",
            _DEPTHWISE_CUDA,
            options=_triton_options("stride", "padding", "dilation", "input_zero_point"),
        ),
        cpu_implementation(_DEPTHWISE_CPU),
    ),
)
def int8_depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    input_scale: float = 1.0,
    input_zero_point: int = 0,
    residual_scale: float = 1.0,
    residual_zero_point: int = 0,
    activation: str = "identity",
    output_scale: float | None = None,
    output_zero_point: int = 0,
    output_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Depthwise convolution of int8 tensors, summed exactly, with its epilogue; padding stands for 0.

    Args:
        x: `[N, C, H, W]` int8.
        weight: `[C · multiplier, 1, KH, KW]` int8; output channel `o` reads input channel `o // multiplier`.
        weight_scale: `[C · multiplier]` float32.

    Returns: `[N, C · multiplier, H_out, W_out]`, channels_last. Other arguments and errors as of `int8_conv2d`.
    """
