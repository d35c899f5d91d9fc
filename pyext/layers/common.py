"""What every layer decides before it computes, and how weights move from the module it replaces."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from kernelpress.ops.checks import check_activation
from kernelpress.runtime.torch_private import is_exporting

__all__ = [
    "check_padding_mode",
    "check_type",
    "checked_activation",
    "computes_plainly",
    "copy_parameters",
    "is_pointwise",
    "make_divisible",
]

M = TypeVar("M", bound=nn.Module)


def computes_plainly(x: Tensor, *others: Tensor | None) -> bool:
    """Whether a layer computes in plain PyTorch instead of calling its op.

    It does where a gradient is wanted (so that it trains at PyTorch's own speed), under autocast, on the meta device,
    and while `torch.export` or `torch.fx` reads the model (so that the graph is portable ATen).
    """
    if not isinstance(x, Tensor) or is_exporting() or x.is_meta:
        return True
    if torch.is_autocast_enabled(x.device.type):
        return True
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(t is not None and t.requires_grad for t in others)


def checked_activation(activation: str) -> str:
    """The name of a known activation. Raises `ValueError`."""
    check_activation("activation", activation)
    return activation


def check_padding_mode(padding_mode: str) -> None:
    """Only zeros. Raises `ValueError`."""
    if padding_mode != "zeros":
        raise ValueError(f"padding_mode: expected 'zeros', got {padding_mode!r}; pad before the layer")


def check_type(module: nn.Module, expected: type[nn.Module]) -> None:
    """Raises `TypeError` where the module to replace is of another type."""
    if not isinstance(module, expected):
        raise TypeError(f"module: expected torch.nn.{expected.__name__}, got {type(module).__name__}")


def is_pointwise(convolution: nn.Conv2d) -> bool:
    """Whether a convolution is 1×1 with stride 1, no padding and one group."""
    geometry = (convolution.kernel_size, convolution.stride, convolution.groups)
    return geometry == ((1, 1), (1, 1), 1) and convolution.padding in ((0, 0), "valid", "same")


def copy_parameters(source: nn.Module, target: M) -> M:
    """Copy weight and bias, whether they are trained, and the training flag; returns `target`."""
    for name in ("weight", "bias"):
        values, parameter = getattr(source, name), getattr(target, name)
        if parameter is not None:
            with torch.no_grad():
                parameter.copy_(values)
            parameter.requires_grad_(values.requires_grad)
    return target.train(source.training)


def make_divisible(channels: float, divisor: int = 8) -> int:
    """The multiple of `divisor` nearest to `channels`, at least `divisor` and never below 90 % of `channels`."""
    nearest = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * channels else nearest
