"""Dense convolution, linear layer, pooling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelpress.kernels.reference.activation import Pair, activate, epilogue

__all__ = ["conv2d", "global_avg_pool2d", "linear", "max_pool2d", "pointwise_conv2d"]


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    activation: str = "identity",
) -> Tensor:
    """Convolution of `x: [N, C_in, H, W]` by `weight: [C_out, C_in / groups, KH, KW]` with the epilogue."""
    if scale is None:
        return epilogue(F.conv2d(x, weight, bias, stride, padding, dilation, groups), None, None, residual, activation)
    accumulator = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    return epilogue(accumulator, bias, scale, residual, activation)


def pointwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    input_scale: Tensor | None = None,
    *,
    activation: str = "identity",
) -> Tensor:
    """1×1 convolution of `x · input_scale` (`[N, C_in]`, squeeze-and-excitation) with the epilogue."""
    if input_scale is not None:
        x = x * input_scale[:, :, None, None]
    return conv2d(x, weight, bias, scale, residual, activation=activation)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str = "identity",
) -> Tensor:
    """`x: [..., C_in]` times `weight: [C_out, C_in]` transposed, with the epilogue over the last dimension."""
    if scale is None:
        y = F.linear(x, weight, bias)
    else:
        y = F.linear(x, weight) * scale
        if bias is not None:
            y = y + bias
    if residual is not None:
        y = y + residual
    return activate(y, activation)


def global_avg_pool2d(x: Tensor) -> Tensor:
    """Mean over the positions of every channel: `[N, C, H, W]` → `[N, C]`."""
    return x.mean((2, 3))


def max_pool2d(x: Tensor, *, kernel_size: Pair, stride: Pair, padding: Pair = (0, 0)) -> Tensor:
    """Largest value under every window, float or int8; padding counts as −∞, NaN wins."""
    if x.dtype == torch.int8:  # torch's own kernel takes small images alone
        return F.max_pool2d(x.float(), kernel_size, stride, padding).to(torch.int8)
    return F.max_pool2d(x, kernel_size, stride, padding)
