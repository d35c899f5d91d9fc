"""The activations, and the epilogue that every op ends in."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "Pair", "activate", "epilogue"]

Pair = tuple[int, ...]

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
}

ACTIVATIONS: tuple[str, ...] = tuple(_FUNCTIONS)
"""Activation names; the position of a name is the integer the native kernels take."""


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply the activation of that name. Raises `ValueError` for an unknown one."""
    try:
        function = _FUNCTIONS[activation]
    except KeyError:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}") from None
    return function(x)


def epilogue(
    accumulator: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "identity",
) -> Tensor:
    """`activation(accumulator * scale + bias + residual)` with `scale` and `bias` per channel of `[N, C, H, W]`."""
    if scale is not None:
        accumulator = accumulator * scale[:, None, None]
    if bias is not None:
        accumulator = accumulator + bias[:, None, None]
    if residual is not None:
        accumulator = accumulator + residual
    return activate(accumulator, activation)
