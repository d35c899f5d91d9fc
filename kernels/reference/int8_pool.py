"""The mean of int8 images."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelpress.kernels.reference.int8_quantize import int8_output

__all__ = ["int8_global_avg_pool2d"]


def int8_global_avg_pool2d(
    x: Tensor,
    *,
    input_scale: float,
    input_zero_point: int = 0,
    keepdim: bool = False,
    output_scale: float | None = None,
    output_zero_point: int = 0,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Mean over the positions of every channel of int8 `x: [N, C, H, W]`, summed exactly → `[N, C]`, with `keepdim`
    `[N, C, 1, 1]`.

    The sum of `x − zero_point` is rounded to float32 and multiplied by `input_scale / (H · W)` rounded to float32; then
    the last step of `int8_epilogue`.
    """
    total = (x.double() - input_zero_point).sum((2, 3), keepdim=keepdim).float()
    value = total * (input_scale / (x.shape[2] * x.shape[3]))
    return int8_output(value, output_scale, output_zero_point, output_dtype)
