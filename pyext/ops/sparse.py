"""Products with block-sparse weights: `sparse_matmul` and `sparse_conv2d`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernelpress.kernels import reference
from kernelpress.ops.backends.cpu import cpu_implementation
from kernelpress.ops.backends.cuda import cuda_implementation, data_type
from kernelpress.ops.backends.kernel import (
    FLOATING,
    PLANES,
    ROWS_OF_CHANNELS,
    Kernel,
    Likes,
    float_vector,
    tf32_reason,
)
from kernelpress.ops.backends.triton import triton_implementation
from kernelpress.ops.calls import packing
from kernelpress.ops.calls.dispatch import op
from kernelpress.ops.checks import (
    TensorSpec,
    check_dtype,
    check_epilogue,
    check_input,
    check_pair,
    conv_output_size,
    describe,
    one_floating_dtype,
)
from kernelpress.ops.layout import DENSE, PIXELS, ROWS
from kernelpress.ops.registry import Problem, Tensors
from kernelpress.ops.signature import IntOrPair
from kernelpress.ops.sparse_blocks import check_structure
from kernelpress.ops.sparse_schedule import longest_segment, make_schedule
from kernelpress.ops.sparse_walk import channel_dim, images, walk_reason, with_walk

__all__ = ["sparse_conv2d", "sparse_matmul"]

_BLOCK_SIZES = (16, 32, 64)
_SMALL, _LARGE = 2**15, 2**31


def _dtypes(names: Sequence[str], tensors: Sequence[TensorSpec | None], options: Any) -> torch.dtype:
    """One floating dtype, or int8 `x` and `blocks` with float32 `scale` and `bias`; the indices are int32."""
    x, row_offsets, columns, blocks, bias, scale, residual = tensors
    assert x is not None
    check_dtype("row_offsets", row_offsets, (torch.int32,))
    check_dtype("columns", columns, (torch.int32,))
    chosen: torch.dtype | None = options.output_dtype
    if x.dtype != torch.int8:
        if chosen not in (None, x.dtype):
            raise TypeError(f"output_dtype: expected None or the dtype of x, {x.dtype}, got {chosen}")
        floats = [index for index, name in enumerate(names) if name not in ("row_offsets", "columns")]
        return one_floating_dtype([names[index] for index in floats], [tensors[index] for index in floats], options)
    if scale is None:
        raise ValueError("scale: expected [C_out], input scale times weight scale, for int8 x, got None")
    output = torch.float32 if chosen is None else chosen
    if output not in FLOATING:
        raise TypeError(f"output_dtype: expected {' or '.join(map(str, FLOATING))}, got {output}")
    check_dtype("blocks", blocks, (torch.int8,))
    check_dtype("bias", bias, (torch.float32,))
    check_dtype("scale", scale, (torch.float32,))
    check_dtype("residual", residual, (output,))
    return output


def _check_forms(row_offsets: TensorSpec, columns: TensorSpec, blocks: TensorSpec) -> None:
    if len(blocks.shape) != 3 or blocks.shape[1] == 0 or blocks.shape[2] == 0:
        raise ValueError(f"blocks: expected [nnz, r, c] with r, c ≥ 1, got {describe(blocks.shape)}")
    if len(columns.shape) != 1 or columns.shape[0] != blocks.shape[0]:
        because = f"nnz = {blocks.shape[0]} blocks"
        raise ValueError(f"columns: expected [nnz] with {because}, got {describe(columns.shape)}")
    if len(row_offsets.shape) != 1 or row_offsets.shape[0] < 2:
        raise ValueError(f"row_offsets: expected [rows + 1] with at least one row, got {describe(row_offsets.shape)}")


def _outputs(name: str, wanted: Any, row_offsets: TensorSpec, blocks: TensorSpec) -> int:
    """C_out: all rows, or the `wanted` ones of them, which end in the last block row."""
    rows, r = row_offsets.shape[0] - 1, blocks.shape[1]
    if wanted is None:
        return rows * r
    if not isinstance(wanted, int) or isinstance(wanted, bool):
        raise TypeError(f"{name}: expected an integer or None, got {wanted!r}")
    if not (rows - 1) * r < wanted <= rows * r:
        raise ValueError(
            f"{name}: expected {(rows - 1) * r + 1} to {rows * r} for {rows} rows of blocks of {r}, got {wanted}"
        )
    return wanted


def _matmul_shape(options: Any, *tensors: Any) -> tuple[int, ...]:
    x, row_offsets, columns, blocks, *epilogue = tensors
    if not x.shape or x.shape[-1] == 0:
        raise ValueError(f"x: expected [..., C_in] with at least one channel, got {describe(x.shape)}")
    _check_forms(row_offsets, columns, blocks)
    c_out = _outputs("out_features", options.out_features, row_offsets, blocks)
    return check_epilogue(options, (*x.shape[:-1], c_out), c_out, *epilogue)


def _conv_shape(options: Any, *tensors: Any) -> tuple[int, ...]:
    x, row_offsets, columns, blocks, *epilogue = tensors
    check_input(x)
    _check_forms(row_offsets, columns, blocks)
    check_pair("kernel_size", options.kernel_size, 1)
    c_out = _outputs("out_channels", options.out_channels, row_offsets, blocks)
    size = conv_output_size(x, options.kernel_size, options.stride, options.padding, options.dilation)
    return check_epilogue(options, (x.shape[0], c_out, *size), c_out, *epilogue)


def _is_matmul(problem: Problem) -> bool:
    return problem.layout is ROWS


def _check_indices(problem: Problem, tensors: Tensors) -> None:
    """That the values of the indices fit the problem. Raises `ValueError`."""
    _, row_offsets, columns, blocks, *_ = tensors
    assert row_offsets is not None
    assert columns is not None
    assert blocks is not None
    channels = -(-problem["x"].shape[channel_dim(problem)] // blocks.shape[2])
    block_columns = channels if _is_matmul(problem) else math.prod(problem.options.kernel_size) * channels
    check_structure(row_offsets, columns, len(blocks), len(row_offsets) - 1, block_columns)


def _pixels(problem: Problem) -> int:
    """Rows of the product."""
    return math.prod(problem.shape) // problem.shape[channel_dim(problem)]


def _block_reason(problem: Problem) -> str | None:
    r, c = problem["blocks"].shape[1:]
    if r not in _BLOCK_SIZES or c not in _BLOCK_SIZES:
        return f"the kernel takes blocks of 16, 32 or 64 rows and columns, got {r}×{c}"
    return None


def _cuda_reason(problem: Problem) -> str | None:
    reason = _block_reason(problem)
    if reason is not None:
        return reason
    image, _, (kernel_h, kernel_w, *stride, pad_h, pad_w, dilation_h, dilation_w) = images(problem)
    reach = (dilation_h * (kernel_h - 1) + 1 + pad_h, dilation_w * (kernel_w - 1) + 1 + pad_w)
    if max(*image, *reach, *stride) >= _SMALL:
        return "the kernel takes heights, widths, strides and reaches of the window below 2¹⁵"
    pixels, most = _pixels(problem), problem["row_offsets"].shape[0] + problem["blocks"].shape[0]
    if max(pixels, problem["x"].shape[0] * math.prod(image)) >= _LARGE or -(-pixels // 64) * most >= _LARGE:
        return "the kernel takes fewer than 2³¹ pixels and tiles of the output"
    return tf32_reason(problem)


def _contiguous(t: Tensor) -> Tensor:
    t = t.detach().contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _scheduled(kernel: Kernel, problem: Problem, tensors: Tensors, device: Any) -> Kernel:
    """The kernel with the schedule of this weight."""
    _, row_offsets, _, blocks, *_ = tensors
    assert row_offsets is not None
    assert blocks is not None
    (count, r, c), pixels = blocks.shape, _pixels(problem)
    longest = longest_segment(count, c * blocks.element_size(), pixels, device.multiprocessors)
    schedule = make_schedule(row_offsets, longest)
    items, splits = schedule.items.to(blocks.device), schedule.splits.to(blocks.device)

    def sizes(problem: Problem, spacing: Mapping[str, int]) -> tuple[int, ...]:
        (image, out, of_window), channels = images(problem), channel_dim(problem)
        return (
            *(pixels // math.prod(out), *image, problem["x"].shape[channels], *out, problem.shape[channels]),
            *(r, c, len(items), len(splits)),
            *(spacing["x"], spacing["residual"], spacing["y"]),
            *(*of_window, data_type(problem.dtype)),
        )

    return replace(
        kernel,
        operands=lambda options, x, _, columns, blocks, bias, scale, residual: (
            *(x, _contiguous(columns), _contiguous(blocks)),
            *(float_vector(bias), float_vector(scale), residual, items, splits),
        ),
        sizes=sizes,
        workspace=lambda problem, device: 4 * schedule.slots * pixels * r,
    )


def _unscheduled(*_: Any) -> Any:
    raise AssertionError("a schedule comes first: see specialise")


_CONV2D_CUDA = Kernel(
    "sparse_conv2d",
    _unscheduled,
    _unscheduled,
    supports=_cuda_reason,
    dtypes=(*FLOATING, torch.int8),
    workspace=_unscheduled,
    specialise=_scheduled,
    likes=Likes(blocks=((64, 64), (32, 32), (16, 16)), density=0.5),
)

_CONV2D_TRITON = replace(
    _CONV2D_CUDA,
    operands=lambda options, x, row_offsets, columns, blocks, bias, scale, residual: (
        *(x, packing.contiguous(row_offsets), packing.contiguous(columns), packing.contiguous(blocks)),
        *(float_vector(bias), float_vector(scale), residual),
    ),
)


_CPU = Kernel(
    "sparse_conv2d",
    _unscheduled,
    _unscheduled,
    supports=walk_reason,
    dtypes=(torch.float32,),
    specialise=with_walk,
    likes=Likes(blocks=((4, 1), (1, 1)), density=0.6, single=0.4),
)


@op(
    out=ROWS,
    shape=_matmul_shape,
    reference=reference.sparse_matmul,
    macs=lambda options, shape, x, row_offsets, columns, blocks, *_: math.prod(shape[:-1]) * math.prod(blocks),
    dtypes=_dtypes,
    check_values=_check_indices,
    implementations=(
        cuda_implementation(replace(_CONV2D_CUDA, layouts=ROWS_OF_CHANNELS)),
        triton_implementation(
            "sparse", _CONV2D_TRITON, name="sparse_matmul", layouts=ROWS_OF_CHANNELS, supports=_block_reason
        ),
        cpu_implementation(replace(_CPU, layouts=ROWS_OF_CHANNELS)),
    ),
)
def sparse_matmul(
    x: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    blocks: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    out_features: int | None = None,
    activation: str = "identity",
    output_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Linear layer with a block-sparse weight: `activation((x · weightᵀ) · scale + bias + residual)`.

    Args:
        x: `[..., C_in]`.
        row_offsets, columns, blocks: the weight `[C_out, C_in]` as `BlockCsr` has it, `blocks: [nnz, r, c]`; at the
            edges blocks may reach past it.
        bias, scale: `[C_out]`.
        residual: `[..., C_out]`.
        out_features: C_out, where it is not rows · r.
        output_dtype: float32 (where None), float16 or bfloat16, of int8 `x` and `blocks`; `scale` is then required,
            input scale times weight scale, and it and `bias` are float32.

    Returns: `[..., C_out]`, contiguous. Other options and errors as of `conv2d`.
    """


@op(
    out=PIXELS,
    shape=_conv_shape,
    reference=reference.sparse_conv2d,
    macs=lambda options, shape, x, row_offsets, columns, blocks, *_: (
        shape[0] * math.prod(shape[2:]) * math.prod(blocks)
    ),
    dtypes=_dtypes,
    check_values=_check_indices,
    implementations=(
        cuda_implementation(_CONV2D_CUDA),
        triton_implementation("sparse", _CONV2D_TRITON, supports=_block_reason),
        cpu_implementation(_CPU),
        cpu_implementation(replace(_CPU, layouts=PLANES, out=DENSE), "planes"),
    ),
)
def sparse_conv2d(
    x: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    blocks: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    kernel_size: IntOrPair = 1,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    out_channels: int | None = None,
    activation: str = "identity",
    output_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Convolution with a block-sparse weight and its epilogue.

    Args:
        x: `[N, C_in, H, W]`; channels_last, or a channel slice of it, is read without a copy.
        row_offsets, columns, blocks: the weight `[C_out, KH · KW · C]` as `conv_matrix` lays it out, in block-CSR; C is
            C_in rounded up to a multiple of the blocks' columns.
        bias, scale: `[C_out]`.
        residual: of the output's shape.
        kernel_size, stride, padding, dilation: pixels, one integer or (height, width).
        out_channels: C_out, where it is not rows · r.
        output_dtype: as of `sparse_matmul`.

    Backend `"planes"` is the CPU kernel on contiguous x and residual, and gives contiguous memory.

    Returns: `[N, C_out, H_out, W_out]`, channels_last. Other options and errors as of `conv2d`.
    """
