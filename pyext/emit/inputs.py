"""What every plan asks of the tensors it is called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["check_tensor", "own_copy"]


def check_tensor(given: Any, position: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`inputs[position]`, detached. Raises `ValueError` unless it is a tensor of this shape, dtype and device."""
    if not isinstance(given, Tensor):
        raise ValueError(f"inputs[{position}]: expected a Tensor, got {type(given).__name__}")
    if given.layout != torch.strided:
        raise ValueError(f"inputs[{position}]: expected a dense tensor, got {given.layout}")
    if tuple(given.shape) != shape:
        raise ValueError(f"inputs[{position}]: expected shape {list(shape)} as captured, got {list(given.shape)}")
    if given.dtype != dtype:
        raise ValueError(f"inputs[{position}]: expected dtype {dtype} as captured, got {given.dtype}")
    if given.device != device:
        where = "the CPU" if device.type == "cpu" else str(device)
        raise ValueError(f"inputs[{position}]: expected a tensor on {where}, got {given.device}")
    return given.detach()


def own_copy(x: Tensor) -> Tensor:
    """`x` in memory of its own, dense, in the memory format it has."""
    return torch.empty_like(x.detach(), memory_format=torch.preserve_format).copy_(x.detach())
