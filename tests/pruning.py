"""Helpers of the tests of pruning: silent channels in float64, so that what is cut away changes nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernelpress import compress

__all__ = ["X", "assert_same_function", "conv3x3", "cut_channels"]

X = torch.randn(2, 3, 8, 8, dtype=torch.float64)


def conv3x3(inputs: int, outputs: int, **arguments: Any) -> nn.Conv2d:
    """A convolution that keeps the size of the map."""
    return nn.Conv2d(inputs, outputs, 3, padding=1, **arguments)


def cut_channels(model: nn.Module, ratio: float, **arguments: Any) -> nn.Module:
    """`model` without this part of its channels, in no groups."""
    return compress.prune_channels(model, X, ratio=ratio, target="channels", round_to=1, **arguments)


def assert_same_function(pruned: nn.Module, model: nn.Module) -> None:
    """Both compute the same of a fresh input."""
    x: Tensor = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(pruned(x), model(x), rtol=1e-10, atol=1e-10)
