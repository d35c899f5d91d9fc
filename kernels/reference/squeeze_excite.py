"""Squeeze-and-excitation."""

from __future__ import annotations

from torch import Tensor

from kernelpress.kernels.reference.dense import conv2d

__all__ = ["squeeze_excite"]


def squeeze_excite(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None = None,
    *,
    reduce_activation: str = "relu",
    activation: str = "sigmoid",
) -> Tensor:
    """How much each channel counts, from the means of all (SENet, arXiv:1709.01507, eq. 2 and 3): `[N, C_out, 1, 1]`.

    `reduce_weight: [R, C, 1, 1]`, `expand_weight: [C_out, R, 1, 1]`; the result is
    `activation(expand · reduce_activation(reduce · mean(x)))`.
    """
    reduced = conv2d(x.mean((2, 3), keepdim=True), reduce_weight, reduce_bias, activation=reduce_activation)
    return conv2d(reduced, expand_weight, expand_bias, activation=activation)
