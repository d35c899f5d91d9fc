"""What a model costs on paper: floating-point operations and parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kernelpress.preserve import evaluation

__all__ = ["count_flops", "count_parameters", "module_of"]


def module_of(model: Callable[..., Any]) -> nn.Module | None:
    """The module whose mathematics `model` computes, or `None` for a callable that cannot be looked into.

    It is `model` itself, the module that `torch.compile` wrapped, or the one that a plan was captured from.
    """
    original = getattr(model, "_orig_mod", None)
    if isinstance(original, nn.Module):
        return original
    if isinstance(model, nn.Module):
        return model
    captured = getattr(model, "model", None)
    return captured if isinstance(captured, nn.Module) else None


def count_flops(module: nn.Module, *inputs: Any) -> int:
    """FLOPs of one forward pass over `inputs`, a multiplication and its addition counting as two.

    Convolutions and matrix products of torch, and the operations of `torch.ops.kernelpress`, are counted; element-wise
    work is not.
    """
    with evaluation(module, inputs), torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return int(counter.get_total_flops())


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, those shared by several modules counted once."""
    return sum(parameter.numel() for parameter in module.parameters())
