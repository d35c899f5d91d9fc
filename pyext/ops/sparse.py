"""Products with block-sparse weights: `sparse_matmul` and `sparse_conv2d`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelpress.kernels import reference
from kernelpress.ops.backends.cuda import FLOATING, cuda_implementation, float_vector
from kernelpress.ops.backends.reference import reference_implementation
from kernelpress.ops.backends.triton import TritonKernel, triton_implementation
from kernelpress.ops.calls import packing
from kernelpress.ops.calls.dispatch import call, publish
from kernelpress.ops.checks import (
    TensorSpec,
    check_activation,
    check_dtype,
    check_input,
    check_pair,
    check_same_shape,
    check_vector,
    conv_output_size,
    describe,
    one_floating_dtype,
)
from kernelpress.ops.layout import PIXELS, ROWS
from kernelpress.ops.registry import Implementation, Operator, Problem, Run, Tensors
from kernelpress.ops.signature import IntOrPair
from kernelpress.ops.sparse_blocks import check_structure
from kernelpress.ops.sparse_cuda import block_reason, sparse_cuda_kernel

__all__ = ["sparse_conv2d", "sparse_matmul"]

Specs = tuple[TensorSpec | None, ...]

_FLOAT_OUTPUTS = (torch.float32, torch.float16, torch.bfloat16)
_NAMES = ("x", "row_offsets", "columns", "blocks", "bias", "scale", "residual")
_TENSORS = (
    "Tensor x, Tensor row_offsets, Tensor columns, Tensor blocks, Tensor? bias=None, Tensor? scale=None, "
    "Tensor? residual=None"
)


class MatmulOptions(NamedTuple):
    """Keyword arguments of `sparse_matmul`."""

    out_features: int | None = None
    activation: str = "identity"
    output_dtype: torch.dtype | None = None


class ConvOptions(NamedTuple):
    """Keyword arguments of `sparse_conv2d`."""

    kernel_size: tuple[int, ...] = (1, 1)
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    out_channels: int | None = None
    activation: str = "identity"
    output_dtype: torch.dtype | None = None


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
    if output not in _FLOAT_OUTPUTS:
        raise TypeError(f"output_dtype: expected {' or '.join(map(str, _FLOAT_OUTPUTS))}, got {output}")
    check_dtype("blocks", blocks, (torch.int8,))
    check_dtype("bias", bias, (torch.float32,))
    check_dtype("scale", scale, (torch.float32,))
    check_dtype("residual", residual, (output,))
    return output


def _check_forms(tensors: Specs) -> None:
    _, row_offsets, columns, blocks, *_ = tensors
    assert row_offsets is not None
    assert columns is not None
    assert blocks is not None
    if len(blocks.shape) != 3 or blocks.shape[1] == 0 or blocks.shape[2] == 0:
        raise ValueError(f"blocks: expected [nnz, r, c] with r, c ≥ 1, got {describe(blocks.shape)}")
    if len(columns.shape) != 1 or columns.shape[0] != blocks.shape[0]:
        because = f"nnz = {blocks.shape[0]} blocks"
        raise ValueError(f"columns: expected [nnz] with {because}, got {describe(columns.shape)}")
    if len(row_offsets.shape) != 1 or row_offsets.shape[0] < 2:
        raise ValueError(f"row_offsets: expected [rows + 1] with at least one row, got {describe(row_offsets.shape)}")


def _outputs(name: str, wanted: Any, tensors: Specs) -> int:
    """C_out: all rows, or the `wanted` ones of them, which end in the last block row."""
    row_offsets, blocks = tensors[1], tensors[3]
    assert row_offsets is not None
    assert blocks is not None
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


def _check_epilogue(tensors: Specs, c_out: int, shape: tuple[int, ...], activation: str) -> tuple[int, ...]:
    *_, bias, scale, residual = tensors
    check_activation("activation", activation)
    check_vector("bias", bias, c_out)
    check_vector("scale", scale, c_out)
    check_same_shape("residual", residual, shape)
    return shape


def _matmul_shape(tensors: Specs, options: MatmulOptions) -> tuple[int, ...]:
    x = tensors[0]
    assert x is not None
    if not x.shape or x.shape[-1] == 0:
        raise ValueError(f"x: expected [..., C_in] with at least one channel, got {describe(x.shape)}")
    _check_forms(tensors)
    c_out = _outputs("out_features", options.out_features, tensors)
    return _check_epilogue(tensors, c_out, (*x.shape[:-1], c_out), options.activation)


def _conv_shape(tensors: Specs, options: ConvOptions) -> tuple[int, ...]:
    x = tensors[0]
    assert x is not None
    check_input(x)
    _check_forms(tensors)
    check_pair("kernel_size", options.kernel_size, 1)
    c_out = _outputs("out_channels", options.out_channels, tensors)
    size = conv_output_size(x, options.kernel_size, options.stride, options.padding, options.dilation)
    return _check_epilogue(tensors, c_out, (x.shape[0], c_out, *size), options.activation)


def _block_columns(problem: Problem) -> int:
    x, _, _, blocks, *_ = problem.tensors
    assert x is not None
    assert blocks is not None
    if problem.op == "sparse_matmul":
        return -(-x.shape[-1] // blocks.shape[2])
    return math.prod(problem.options.kernel_size) * -(-x.shape[1] // blocks.shape[2])


def _check_indices(problem: Problem, tensors: Tensors) -> None:
    """That the values of the indices fit the problem. Raises `ValueError`."""
    _, row_offsets, columns, blocks, *_ = tensors
    assert row_offsets is not None
    assert columns is not None
    assert blocks is not None
    check_structure(row_offsets, columns, len(blocks), len(row_offsets) - 1, _block_columns(problem))


def _checked(plain: Implementation) -> Implementation:
    """That implementation, which looks at the values of the indices before it runs on them first."""

    def prepare(problem: Problem, tensors: Tensors) -> Run:
        _check_indices(problem, tensors)
        return plain.prepare(problem, tensors)

    return replace(plain, prepare=prepare)


def _triton_operands(tensors: Tensors, options: Any) -> tuple[Tensor | None, ...]:
    x, row_offsets, columns, blocks, bias, scale, residual = tensors
    parts = (packing.contiguous(part) for part in (row_offsets, columns, blocks) if part is not None)
    return (x, *parts, float_vector(bias), float_vector(scale), residual)


def _triton_kernel(op: str) -> TritonKernel:
    layout = ROWS if op == "sparse_matmul" else PIXELS
    return TritonKernel(
        family="sparse",
        name=op,
        layouts=(layout, None, None, None, None, None, layout),
        operands=_triton_operands,
        supports=block_reason,
        dtypes=(*FLOATING, torch.int8),
    )


_MATMUL = publish(
    Operator(
        name="sparse_matmul",
        schema=(
            f'({_TENSORS}, *, int? out_features=None, str activation="identity", ScalarType? output_dtype=None, '
            'str backend="auto") -> Tensor'
        ),
        tensors=_NAMES,
        options=MatmulOptions,
        out=ROWS,
        shape=_matmul_shape,
        reference=reference.sparse_matmul,
        macs=lambda shapes, options, shape: math.prod(shape[:-1]) * math.prod(shapes[3]),
        implementations=(
            _checked(cuda_implementation("sparse_matmul", sparse_cuda_kernel("sparse_matmul"))),
            _checked(triton_implementation("sparse_matmul", _triton_kernel("sparse_matmul"))),
            _checked(reference_implementation("sparse_matmul", reference.sparse_matmul)),
        ),
        native=None,
        dtypes=_dtypes,
    )
)

_CONV2D = publish(
    Operator(
        name="sparse_conv2d",
        schema=(
            f"({_TENSORS}, *, SymInt[2] kernel_size=[1,1], SymInt[2] stride=[1,1], SymInt[2] padding=[0,0], "
            'SymInt[2] dilation=[1,1], int? out_channels=None, str activation="identity", '
            'ScalarType? output_dtype=None, str backend="auto") -> Tensor'
        ),
        tensors=_NAMES,
        options=ConvOptions,
        out=PIXELS,
        shape=_conv_shape,
        reference=reference.sparse_conv2d,
        macs=lambda shapes, options, shape: shape[0] * math.prod(shape[2:]) * math.prod(shapes[3]),
        implementations=(
            _checked(cuda_implementation("sparse_conv2d", sparse_cuda_kernel("sparse_conv2d"))),
            _checked(triton_implementation("sparse_conv2d", _triton_kernel("sparse_conv2d"))),
            _checked(reference_implementation("sparse_conv2d", reference.sparse_conv2d)),
        ),
        native=None,
        dtypes=_dtypes,
    )
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
    options = (out_features, activation, output_dtype)
    return call(_MATMUL, (x, row_offsets, columns, blocks, bias, scale, residual), options, backend)


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

    Returns: `[N, C_out, H_out, W_out]`, channels_last. Other options and errors as of `conv2d`.
    """
    options = (kernel_size, stride, padding, dilation, out_channels, activation, output_dtype)
    return call(_CONV2D, (x, row_offsets, columns, blocks, bias, scale, residual), options, backend)
