"""The `cudnn` backend: torch's own convolution on CUDA, with the epilogue fused where torch has an op for that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelpress.ops.calls import packing
from kernelpress.ops.registry import Implementation, Problem, Run, Tensors

__all__ = ["CUDNN"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda y: y,
    "relu": torch.relu_,
    "relu6": lambda y: F.relu6(y, inplace=True),
    "silu": lambda y: F.silu(y, inplace=True),
    "hardswish": lambda y: F.hardswish(y, inplace=True),
    "hardsigmoid": lambda y: F.hardsigmoid(y, inplace=True),
    "sigmoid": torch.sigmoid_,
    "gelu": F.gelu,
}


def _available() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if not torch.backends.cudnn.is_available():
        return "this build of torch has no cuDNN"
    return None


def _supports(problem: Problem) -> str | None:
    x = problem.first
    if torch.device(problem.device).type != "cuda":
        return f"x is on {problem.device}"
    if x.dtype not in _DTYPES:
        return f"it is used in {', '.join(map(str, _DTYPES))}, got {x.dtype}"
    if not torch.backends.cudnn.enabled:
        return "torch.backends.cudnn.enabled is False"
    return None


def _prepare(problem: Problem, tensors: Tensors) -> Run:
    shape, stride, dtype, device = problem.shape, problem.stride, problem.dtype, torch.device(problem.device)
    if 0 in shape:
        return lambda tensors: torch.empty_strided(shape, stride, dtype=dtype, device=device)
    options = problem.options
    geometry: tuple[Any, ...] = (options.stride, options.padding, options.dilation, options.groups)
    weight, bias, scale = tensors[1:4]
    assert weight is not None
    weight = packing.packed(weight, scale, "cudnn", _to_channels_last)
    activate = _IN_PLACE[options.activation]
    fused = options.activation == "relu" and options.groups == 1

    def compute(tensors: Tensors) -> Tensor:
        nonlocal fused
        image, residual = tensors[0], tensors[4]
        assert image is not None
        image = _to_channels_last(image)
        if fused:
            try:
                return _to_channels_last(_convolution_relu(image, weight, bias, residual, geometry))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # cuDNN has no engine that fuses this one
                fused = False
        y = F.conv2d(image, weight, bias, *geometry)
        if residual is not None:
            y.add_(residual)
        return _to_channels_last(activate(y))

    return compute


def _convolution_relu(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, geometry: tuple[Any, ...]
) -> Tensor:
    """`relu(conv(x, weight) + bias + residual)` in one kernel of cuDNN. Raises `RuntimeError` where it has none."""
    if residual is None:
        return torch.ops.aten.cudnn_convolution_relu(x, weight, bias, *geometry)
    return torch.ops.aten.cudnn_convolution_add_relu(x, weight, _to_channels_last(residual), 1.0, bias, *geometry)


def _to_channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


CUDNN = Implementation("cudnn", _available, _supports, _prepare)
"""The entry of `conv2d`; `scale` is multiplied into the weights."""
