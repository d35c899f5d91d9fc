"""Depthwise convolution, and the blocks that are built around it."""

from __future__ import annotations

from torch import Tensor

from kernelpress.kernels.reference.activation import Pair
from kernelpress.kernels.reference.dense import conv2d, pointwise_conv2d

__all__ = ["depthwise_conv2d", "inverted_residual", "separable_conv2d", "separable_stem"]


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    activation: str = "identity",
) -> Tensor:
    """Each channel of `x: [N, C, H, W]` by its own filters, `weight: [C · multiplier, 1, KH, KW]`, and the epilogue."""
    return conv2d(
        x,
        weight,
        bias,
        scale,
        residual,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=x.shape[1],
        activation=activation,
    )


def separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    depthwise_activation: str = "identity",
    activation: str = "identity",
) -> Tensor:
    """Depthwise convolution, its activation, then a 1×1 convolution with the epilogue (MobileNet, arXiv:1704.04861)."""
    hidden = depthwise_conv2d(
        x,
        depthwise_weight,
        depthwise_bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        activation=depthwise_activation,
    )
    return pointwise_conv2d(hidden, pointwise_weight, pointwise_bias, None, residual, activation=activation)


def inverted_residual(
    x: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    expand_activation: str = "identity",
    depthwise_activation: str = "identity",
    activation: str = "identity",
) -> Tensor:
    """Expand 1×1, depthwise, project 1×1 with the epilogue (MobileNet V2, arXiv:1801.04381)."""
    hidden = pointwise_conv2d(x, expand_weight, expand_bias, activation=expand_activation)
    return separable_conv2d(
        hidden,
        depthwise_weight,
        depthwise_bias,
        project_weight,
        project_bias,
        residual,
        stride=stride,
        padding=padding,
        dilation=dilation,
        depthwise_activation=depthwise_activation,
        activation=activation,
    )


def separable_stem(
    x: Tensor,
    stem_weight: Tensor,
    stem_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None = None,
    *,
    stem_stride: Pair = (1, 1),
    stem_padding: Pair = (0, 0),
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    stem_activation: str = "identity",
    depthwise_activation: str = "identity",
    activation: str = "identity",
) -> Tensor:
    """Dense convolution, depthwise convolution, 1×1 convolution (MobileNet, arXiv:1704.04861, Table 1, first rows)."""
    hidden = conv2d(x, stem_weight, stem_bias, stride=stem_stride, padding=stem_padding, activation=stem_activation)
    return separable_conv2d(
        hidden,
        depthwise_weight,
        depthwise_bias,
        pointwise_weight,
        pointwise_bias,
        stride=stride,
        padding=padding,
        depthwise_activation=depthwise_activation,
        activation=activation,
    )
