"""Layers with block-sparse weights: `BlockSparseLinear`, `BlockSparseConv2d`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from kernelpress import ops
from kernelpress.kernels import reference
from kernelpress.layers.common import check_padding_mode, check_type, checked_activation, computes_plainly
from kernelpress.layers.dense import explicit_padding
from kernelpress.ops.signature import IntOrPair, pair
from kernelpress.ops.sparse_blocks import (
    BlockCsr,
    block_grid,
    check_structure,
    conv_matrix,
    conv_weight,
    largest_blocks,
)

__all__ = ["BlockSparseConv2d", "BlockSparseLinear"]


class _BlockSparse(nn.Module):
    """A weight matrix in block-CSR: the parameter `blocks`, the buffers `row_offsets` and `columns`, and a bias.

    A state dict with another number of blocks loads: these three take its sizes.
    """

    row_offsets: Tensor
    columns: Tensor
    bias: Tensor | None

    def __init__(
        self,
        shape: tuple[int, int],
        fan_in: int,
        bias: bool,
        block: IntOrPair,
        density: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.block = pair(block)
        self._shape = shape
        grid = block_grid(shape, self.block)
        mask = largest_blocks(torch.rand(*grid, 1, 1), density)
        offsets = torch.cat([torch.zeros(1), mask.sum(1).cumsum(0)]).to(device, torch.int32)
        self.register_buffer("row_offsets", offsets)
        self.register_buffer("columns", mask.nonzero()[:, 1].to(device, torch.int32))
        self.blocks = nn.Parameter(torch.empty(int(mask.sum()), *self.block, device=device, dtype=dtype))
        bound = 1.0 / math.sqrt(max(fan_in * density, 1.0))
        nn.init.uniform_(self.blocks, -bound, bound)
        self.bias = nn.Parameter(torch.empty(shape[0], device=device, dtype=dtype)) if bias else None
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def weight(self) -> BlockCsr:
        """The weight matrix."""
        return BlockCsr(self.row_offsets, self.columns, self.blocks, self._shape)

    @property
    def density(self) -> float:
        """Stored blocks ÷ all blocks."""
        return len(self.blocks) / math.prod(block_grid(self._shape, self.block))

    def _take(self, weight: BlockCsr, module: nn.Linear | nn.Conv2d) -> None:
        self.row_offsets, self.columns = weight.row_offsets, weight.columns
        self.blocks = nn.Parameter(weight.blocks, requires_grad=module.weight.requires_grad)
        if self.bias is not None and module.bias is not None:
            self.bias = nn.Parameter(module.bias.detach().clone(), requires_grad=module.bias.requires_grad)
        self.train(module.training)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        columns, blocks, offsets = (state_dict.get(prefix + name) for name in ("columns", "blocks", "row_offsets"))
        if columns is not None and blocks is not None and offsets is not None:
            try:
                self._resize(offsets, columns, blocks)
            except (TypeError, ValueError) as error:
                error_msgs.append(f"{prefix}{error}")
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _resize(self, row_offsets: Tensor, columns: Tensor, blocks: Tensor) -> None:
        """Make room for the blocks of a state dict; the parameter stays the same object. Raises as `BlockCsr` does."""
        if blocks.dim() != 3 or tuple(blocks.shape[1:]) != self.block:
            raise ValueError(f"blocks: expected [nnz, {self.block[0]}, {self.block[1]}], got {list(blocks.shape)}")
        check_structure(row_offsets, columns, len(blocks), *block_grid(self._shape, self.block))
        if len(blocks) != len(self.blocks):
            self.blocks.grad = None
            self.blocks.data = self.blocks.data.new_empty(blocks.shape)
            self.columns = self.columns.new_empty(columns.shape)

    def _describe(self) -> str:
        r, c = self.block
        return f"block={r}x{c}, density={self.density:.3g}, bias={self.bias is not None}"


class BlockSparseLinear(_BlockSparse):
    """`torch.nn.Linear` whose weight has only some blocks: `activation(linear(x) + residual)`.

    A new layer has random values in the fraction `density` of its blocks, drawn evenly. `block` is (rows, columns) of
    a block, or one integer for both; it need not divide the sizes. On GPUs: 16, 32 or 64 rows and columns.

    x: `[..., C_in]` → `[..., C_out]`; residual: of the output's shape.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        block: IntOrPair = (32, 32),
        density: float = 0.1,
        activation: str = "identity",
    ) -> None:
        super().__init__((out_features, in_features), in_features, bias, block, density, device, dtype)
        self.in_features, self.out_features = in_features, out_features
        self.activation = checked_activation(activation)

    @classmethod
    def from_dense(
        cls,
        module: nn.Linear,
        block: IntOrPair = (32, 32),
        *,
        density: float | None = None,
        mask: Tensor | None = None,
        activation: str = "identity",
    ) -> BlockSparseLinear:
        """The layer that computes `activation(module(x))` with the blocks of `module`'s weight that `mask` names
        (`[⌈C_out / rows⌉, ⌈C_in / columns⌉]`, bool), or the fraction `density` of largest norm, or those not all zero.

        Raises: `ValueError` naming a bad argument.
        """
        check_type(module, nn.Linear)
        weight = BlockCsr.from_dense(module.weight, block, mask=mask, density=density)
        layer = cls(
            module.in_features,
            module.out_features,
            module.bias is not None,
            module.weight.device,
            module.weight.dtype,
            block=block,
            density=0.0,
            activation=activation,
        )
        layer._take(weight, module)
        return layer

    def to_dense(self) -> nn.Linear:
        """The `torch.nn.Linear` with this weight and bias; it leaves out the activation."""
        device, dtype = self.blocks.device, self.blocks.dtype
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device, dtype)
        return _fill(dense, self, self.weight.to_dense())

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        plain = computes_plainly(x, self.blocks, self.bias, residual)
        return (reference.sparse_matmul if plain else ops.sparse_matmul)(
            x,
            self.row_offsets,
            self.columns,
            self.blocks,
            self.bias,
            None,
            residual,
            out_features=self.out_features,
            activation=self.activation,
        )

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, {self._describe()}, activation={self.activation}"


class BlockSparseConv2d(_BlockSparse):
    """`torch.nn.Conv2d` whose weight has only some blocks: `activation(conv(x) + residual)`.

    Takes the arguments of `torch.nn.Conv2d` but groups. The weight is the matrix `[C_out, KH · KW · C]` of
    `conv_matrix`; blocks, a new layer's values and `density` are as in `BlockSparseLinear`. `padding_mode` must be
    `"zeros"`.

    x: `[N, C_in, H, W]` → `[N, C_out, H_out, W_out]`; residual: of the output's shape.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: str | IntOrPair = 0,
        dilation: IntOrPair = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        block: IntOrPair = (32, 32),
        density: float = 0.1,
        activation: str = "identity",
    ) -> None:
        check_padding_mode(padding_mode)
        window = pair(kernel_size)
        positions = math.prod(window)
        c = pair(block)[-1]
        shape = (out_channels, positions * (-(-in_channels // c) * c if c > 0 else in_channels))
        super().__init__(shape, in_channels * positions, bias, block, density, device, dtype)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, window
        self.stride, self.dilation = pair(stride), pair(dilation)
        self.padding = padding if isinstance(padding, str) else pair(padding)
        self.activation = checked_activation(activation)

    @classmethod
    def from_dense(
        cls,
        module: nn.Conv2d,
        block: IntOrPair = (32, 32),
        *,
        density: float | None = None,
        mask: Tensor | None = None,
        activation: str = "identity",
    ) -> BlockSparseConv2d:
        """The layer that computes `activation(module(x))` with the blocks of `conv_matrix(module.weight)` that `mask`
        names (bool), or the fraction `density` of largest norm, or those not all zero.

        Raises: `ValueError` naming a bad argument, `groups` other than 1 too.
        """
        check_type(module, nn.Conv2d)
        if module.groups != 1:
            raise ValueError(f"module: expected groups = 1, got {module}")
        block = pair(block)
        matrix = conv_matrix(module.weight.detach(), block[-1])
        weight = BlockCsr.from_dense(matrix, block, mask=mask, density=density)
        layer = cls(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            module.bias is not None,
            module.padding_mode,
            module.weight.device,
            module.weight.dtype,
            block=block,
            density=0.0,
            activation=activation,
        )
        layer._take(weight, module)
        return layer

    def to_dense(self) -> nn.Conv2d:
        """The `torch.nn.Conv2d` with this weight and bias; it leaves out the activation."""
        same = ("kernel_size", "stride", "padding", "dilation")
        like: dict[str, Any] = {name: getattr(self, name) for name in same}
        like.update(bias=self.bias is not None, device=self.blocks.device, dtype=self.blocks.dtype)
        dense = nn.Conv2d(self.in_channels, self.out_channels, **like)
        return _fill(dense, self, conv_weight(self.weight.to_dense(), self.in_channels, self.kernel_size))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        padding = self.padding
        if isinstance(padding, str):
            x, padding = explicit_padding(self, x)
        plain = computes_plainly(x, self.blocks, self.bias, residual)
        return (reference.sparse_conv2d if plain else ops.sparse_conv2d)(
            x,
            self.row_offsets,
            self.columns,
            self.blocks,
            self.bias,
            None,
            residual,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            out_channels=self.out_channels,
            activation=self.activation,
        )

    def extra_repr(self) -> str:
        sizes = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        window = f"padding={self.padding}, dilation={self.dilation}"
        return f"{sizes}, {window}, {self._describe()}, activation={self.activation}"


def _fill(dense: Any, layer: _BlockSparse, weight: Tensor) -> Any:
    with torch.no_grad():
        dense.weight.copy_(weight)
        if layer.bias is not None:
            dense.bias.copy_(layer.bias)
    dense.weight.requires_grad_(layer.blocks.requires_grad)
    if layer.bias is not None:
        dense.bias.requires_grad_(layer.bias.requires_grad)
    return dense.train(layer.training)
