"""The `onednn` backend: torch's oneDNN convolution on prepacked weights, with the epilogue as fused post-operations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelpress.ops.calls import packing
from kernelpress.ops.registry import Implementation, Problem, Run, Tensors

__all__ = ["ONEDNN"]

_INT32_LIMIT = 2**31


class _PostOperation(NamedTuple):
    """An activation as oneDNN names it."""

    attribute: str
    scalars: tuple[float, ...] = ()
    algorithm: str | None = None


_ACTIVATIONS = {
    "identity": _PostOperation("none"),
    "relu": _PostOperation("relu"),
    "relu6": _PostOperation("hardtanh", (0.0, 6.0)),
    "silu": _PostOperation("swish"),
    "hardswish": _PostOperation("hardswish"),
    "hardsigmoid": _PostOperation("hardsigmoid"),
    "sigmoid": _PostOperation("sigmoid"),
    "gelu": _PostOperation("gelu", (), "none"),
}
_WITH_RESIDUAL = {"identity": None, "relu": "relu"}


class _Geometry(NamedTuple):
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def _geometry(problem: Problem) -> _Geometry:
    options = problem.options
    x = problem.first
    if problem.operator.name == "pointwise_conv2d":
        return _Geometry((1, 1), (0, 0), (1, 1), 1)
    groups = x.shape[1] if problem.operator.name == "depthwise_conv2d" else options.groups
    return _Geometry(options.stride, options.padding, options.dilation, groups)


def _available() -> str | None:
    if not torch.backends.mkldnn.is_available():
        return "this build of torch has no oneDNN"
    if not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return "this build of torch has no fused oneDNN convolution"
    return None


def _supports(problem: Problem) -> str | None:
    x, *_, residual = problem.tensors[:5]
    assert x is not None
    if problem.device != "cpu":
        return f"x is on {problem.device}"
    if x.dtype != torch.float32:
        return f"it is used in float32 only, got {x.dtype}"
    if len(problem.tensors) > 5 and problem.tensors[5] is not None:
        return "oneDNN fuses no input_scale"
    if residual is not None and problem.options.activation not in _WITH_RESIDUAL:
        return f"oneDNN fuses a residual with identity or relu only, got {problem.options.activation}"
    if x.shape[1] == problem.shape[3] == 1 < problem.shape[2] and _geometry(problem).stride[1] > 1:
        return "oneDNN computes wrongly on prepacked weights of one channel for one column of outputs, strided"
    for shape in (x.shape, problem.shape):
        if shape[0] * shape[1] * shape[2] * shape[3] >= _INT32_LIMIT:
            return f"oneDNN is used below 2³¹ elements, got {list(shape)}"
    return None


def _prepare(problem: Problem, tensors: Tensors) -> Run:
    x = problem.first
    shape, stride = problem.shape, problem.stride
    if 0 in shape:
        return lambda tensors: torch.empty_strided(shape, stride, dtype=torch.float32)
    geometry = _geometry(problem)
    input_size = list(x.shape)
    layout = ("onednn", geometry, x.shape)
    unary = _ACTIVATIONS[problem.options.activation]
    after_residual = _WITH_RESIDUAL.get(problem.options.activation)
    # torch 2.10 and 2.11 find no memory format for a residual of one channel or one pixel: it is added afterwards.
    is_flat = shape[1] == 1 or shape[2] * shape[3] == 1

    def pack(weight: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_convolution_weight(
            weight.contiguous(), geometry.padding, geometry.stride, geometry.dilation, geometry.groups, input_size
        )

    weight, bias, scale = tensors[1:4]
    assert weight is not None
    weight, bias = packing.packed(weight, scale, layout, pack), packing.vector(bias)

    def compute(tensors: Tensors) -> Tensor:
        image, residual = tensors[0], tensors[4]
        assert image is not None
        image = image.contiguous(memory_format=torch.channels_last)
        fixed: tuple[Any, ...] = (geometry.padding, geometry.stride, geometry.dilation, geometry.groups)
        if residual is None:
            y = torch.ops.mkldnn._convolution_pointwise(
                image, weight, bias, *fixed, unary.attribute, unary.scalars, unary.algorithm
            )
        elif is_flat:
            y = torch.ops.mkldnn._convolution_pointwise(image, weight, bias, *fixed, "none", (), None).add_(residual)
            y = y if after_residual is None else y.relu_()
        else:
            residual = residual.contiguous(memory_format=torch.channels_last)
            y = torch.ops.mkldnn._convolution_pointwise.binary(
                image, residual, weight, bias, *fixed, "add", 1.0, after_residual, (), None
            )
        return y.contiguous(memory_format=torch.channels_last)

    return compute


ONEDNN = Implementation("onednn", _available, _supports, _prepare)
"""The entry of a convolution: `conv2d`, `pointwise_conv2d`, `depthwise_conv2d`, `grouped_conv2d`."""
