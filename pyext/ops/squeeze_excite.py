"""Squeeze-and-excitation: `squeeze_excite`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kernelpress.kernels import reference
from kernelpress.ops.backends.cpu import cpu_implementation
from kernelpress.ops.backends.kernel import Kernel, activation_index
from kernelpress.ops.calls import packing
from kernelpress.ops.calls.dispatch import op
from kernelpress.ops.checks import TensorSpec, check_activation, check_image, check_vector, check_weight
from kernelpress.ops.layout import PIXELS
from kernelpress.ops.registry import Problem

__all__ = ["squeeze_excite"]


def _shape(
    options: Any,
    x: TensorSpec,
    reduce_weight: TensorSpec,
    reduce_bias: TensorSpec | None,
    expand_weight: TensorSpec,
    expand_bias: TensorSpec | None,
) -> tuple[int, ...]:
    check_image(x)
    check_activation("reduce_activation", options.reduce_activation)
    check_activation("activation", options.activation)
    channels, hidden = x.shape[1], reduce_weight.shape[0]
    because = f"C = {channels} channels of x"
    check_weight("reduce_weight", reduce_weight, "[R, C, 1, 1]", (None, channels, 1, 1), because)
    check_vector("reduce_bias", reduce_bias, hidden)
    because = f"R = {hidden} channels of reduce_weight"
    check_weight("expand_weight", expand_weight, "[C_out, R, 1, 1]", (None, hidden, 1, 1), because)
    check_vector("expand_bias", expand_bias, expand_weight.shape[0])
    return (x.shape[0], expand_weight.shape[0], 1, 1)


def _sizes(problem: Problem, spacing: Mapping[str, int]) -> tuple[int, ...]:
    batch, channels, height, width = problem["x"].shape
    return (
        *(batch, height * width, channels, problem["reduce_weight"].shape[0], problem.shape[1]),
        *(spacing["x"], spacing["y"], activation_index(problem.options.reduce_activation)),
    )


_CPU = Kernel(
    "squeeze_excite",
    lambda options, x, reduce_weight, reduce_bias, expand_weight, expand_bias: (
        x,
        *(packing.panels(reduce_weight, None), packing.vector(reduce_bias)),
        *(packing.panels(expand_weight, None), packing.vector(expand_bias)),
    ),
    _sizes,
    dtypes=(torch.float32,),
)


@op(
    out=PIXELS,
    shape=_shape,
    reference=reference.squeeze_excite,
    macs=lambda options, shape, x, reduce_weight, reduce_bias, expand_weight, *_: (
        x[0] * reduce_weight[0] * (x[1] + expand_weight[0])
    ),
    implementations=(cpu_implementation(_CPU),),
)
def squeeze_excite(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None = None,
    *,
    reduce_activation: str = "relu",
    activation: str = "sigmoid",
    backend: str = "auto",
) -> Tensor:
    """How much each channel counts: `activation(expand · reduce_activation(reduce · mean(x)))` (SENet,
    arXiv:1709.01507, eq. 2 and 3), by which `pointwise_conv2d` takes its input as `input_scale`.

    Args:
        x: `[N, C, H, W]`; channels_last, or a channel slice of it, is read without a copy.
        reduce_weight: `[R, C, 1, 1]`, with `reduce_bias: [R]`.
        expand_weight: `[C_out, R, 1, 1]`, with `expand_bias: [C_out]`.
        reduce_activation, activation: names of `kernelpress.kernels.reference.ACTIVATIONS`.

    Returns: `[N, C_out, 1, 1]`. Errors as of `conv2d`.
    """
