"""Layers of low rank: products and convolutions through few channels."""

from __future__ import annotations

from torch import Tensor

from kernelpress.kernels.reference.activation import Pair
from kernelpress.kernels.reference.dense import conv2d, linear, pointwise_conv2d

__all__ = ["lowrank_conv2d", "lowrank_linear"]


def lowrank_conv2d(
    x: Tensor,
    first_weight: Tensor,
    core_weight: Tensor,
    last_weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    activation: str = "identity",
) -> Tensor:
    """A convolution as Tucker-2 factors it (arXiv:1511.06530, eq. 5): `first_weight: [R_in, C_in, 1, 1]`,
    `core_weight: [R_out, R_in, KH, KW]`, `last_weight: [C_out, R_out, 1, 1]`, which alone has the epilogue."""
    hidden = conv2d(pointwise_conv2d(x, first_weight), core_weight, stride=stride, padding=padding, dilation=dilation)
    return pointwise_conv2d(hidden, last_weight, bias, None, residual, activation=activation)


def lowrank_linear(
    x: Tensor,
    first_weight: Tensor,
    last_weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str = "identity",
) -> Tensor:
    """A product in two factors, `x · (last_weight · first_weight)ᵀ`, of `[R, C_in]` and `[C_out, R]`, and the
    epilogue."""
    return linear(linear(x, first_weight), last_weight, bias, None, residual, activation=activation)
