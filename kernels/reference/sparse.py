"""Products with block-sparse weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelpress.kernels.reference.activation import Pair
from kernelpress.kernels.reference.dense import conv2d, linear
from kernelpress.kernels.reference.int8_quantize import int8_epilogue

__all__ = ["block_csr_to_dense", "sparse_conv2d", "sparse_matmul"]


def block_csr_to_dense(row_offsets: Tensor, columns: Tensor, blocks: Tensor, shape: Pair) -> Tensor:
    """The matrix `[C_out, C_in]` whose blocks `blocks: [nnz, r, c]` stand row by row at block columns `columns: [nnz]`.

    Block row `i` has the blocks `row_offsets[i] … row_offsets[i + 1] - 1`; what reaches past `shape` is cut off.
    """
    count, r, c = blocks.shape
    rows, block_columns = row_offsets.shape[0] - 1, -(-shape[1] // c)
    at = torch.arange(rows, device=blocks.device)
    row = torch.repeat_interleave(at, row_offsets.diff(), output_size=count)
    dense = blocks.new_zeros(rows * block_columns, r, c).index_add(0, row * block_columns + columns, blocks)
    dense = dense.view(rows, block_columns, r, c).transpose(1, 2).reshape(rows * r, block_columns * c)
    return dense[: shape[0], : shape[1]]


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
) -> Tensor:
    """`linear` of `x: [..., C_in]` by the block-CSR weight `[C_out, C_in]`; C_out is `out_features` or all rows.

    int8 `x` and `blocks` are summed exactly and end in `int8_epilogue`, in `output_dtype`.
    """
    rows = (row_offsets.shape[0] - 1) * blocks.shape[1]
    shape = (rows if out_features is None else out_features, x.shape[-1])
    weight = block_csr_to_dense(row_offsets, columns, blocks, shape)
    if blocks.dtype != torch.int8:
        return linear(x, weight, bias, scale, residual, activation=activation)
    assert scale is not None
    accumulator = F.linear(x.double(), weight.double())
    return int8_epilogue(accumulator, scale, bias, residual, activation=activation, output_dtype=output_dtype)


def sparse_conv2d(
    x: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    blocks: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    kernel_size: Pair = (1, 1),
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    out_channels: int | None = None,
    activation: str = "identity",
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """`conv2d` of `x: [N, C_in, H, W]` by the block-CSR weight `[C_out, KH · KW · C]`, C_in rounded up to whole blocks.

    Column `(kh · KW + kw) · C + i` is input channel `i` at kernel position `(kh, kw)`, so no block spans two positions.
    int8 as in `sparse_matmul`.
    """
    r, c = blocks.shape[1:]
    padded = -(-x.shape[1] // c) * c
    c_out = (row_offsets.shape[0] - 1) * r if out_channels is None else out_channels
    matrix = block_csr_to_dense(row_offsets, columns, blocks, (c_out, kernel_size[0] * kernel_size[1] * padded))
    weight = matrix.view(c_out, *kernel_size, padded)[..., : x.shape[1]].permute(0, 3, 1, 2)
    if blocks.dtype != torch.int8:
        return conv2d(
            x, weight, bias, scale, residual, stride=stride, padding=padding, dilation=dilation, activation=activation
        )
    assert scale is not None
    accumulator = F.conv2d(x.double(), weight.double(), None, stride, padding, dilation)
    scale, bias = scale[:, None, None], None if bias is None else bias[:, None, None]
    return int8_epilogue(accumulator, scale, bias, residual, activation=activation, output_dtype=output_dtype)
