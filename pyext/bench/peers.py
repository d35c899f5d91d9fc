"""The same layer as others run it inside PyTorch: eager in both memory formats, oneDNN prepacked, Inductor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernelpress.bench.shapes import Call, Case, Stage
from kernelpress.ops.registry import Tensors

__all__ = ["contiguous", "eager", "inductor", "onednn_prepacked", "peers"]

_EAGER_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda y: y,
    "relu": torch.relu_,
    "relu6": lambda y: F.hardtanh_(y, 0.0, 6.0),
    "hardswish": lambda y: F.hardswish(y, inplace=True),
}

# Post-op name and scalars, as torch's mkldnn operators take them.
_ONEDNN_ACTIVATIONS: dict[str, tuple[str, list[Any]]] = {
    "identity": ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
    "hardswish": ("hardswish", []),
}


def contiguous(tensors: Sequence[Tensor | None]) -> Tensors:
    """The same values in PyTorch's default memory format."""
    return [None if t is None else t.contiguous() for t in tensors]


def eager(case: Case, tensors: Sequence[Tensor | None]) -> Call:
    """PyTorch's operations one by one, activations in place; the memory format is that of `tensors`."""
    x, layers, residual = case.split(tensors)
    if case.op == "linear":
        return lambda: F.linear(x, *layers[0][1:])

    def call() -> Tensor:
        y = x
        for index, (stage, weight, bias) in enumerate(layers):
            y = F.conv2d(y, weight, bias, stage.stride, stage.padding, 1, stage.groups)
            if index == len(layers) - 1 and residual is not None:
                y += residual
            y = _EAGER_ACTIVATIONS[stage.activation](y)
        return y

    return call


def onednn_prepacked(case: Case, tensors: Sequence[Tensor | None]) -> Call:
    """oneDNN's own primitives, one a stage, with weights packed beforehand and bias, residual and activation fused."""
    x, layers, residual = case.split(tensors)
    if case.op == "linear":
        packed = torch.ops.mkldnn._reorder_linear_weight(layers[0][1], case.batch)
        return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, layers[0][2], "none", [], "")

    def step(stage: Stage, weight: Tensor, bias: Tensor, size: int, added: Tensor | None) -> Callable[[Tensor], Tensor]:
        geometry = ([stage.padding] * 2, [stage.stride] * 2, [1, 1], stage.groups)
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, [case.batch, stage.c_in, size, size])
        name, scalars = _ONEDNN_ACTIVATIONS[stage.activation]
        if added is None:
            end = (name, scalars, "")
            return lambda y: torch.ops.mkldnn._convolution_pointwise(y, packed, bias, *geometry, *end)
        sum_end = ("add", 1.0, None if name == "none" else name, scalars, "")
        return lambda y: torch.ops.mkldnn._convolution_pointwise.binary(y, added, packed, bias, *geometry, *sum_end)

    steps = [
        step(*layer, size, residual if index == len(layers) - 1 else None)
        for index, (layer, size) in enumerate(zip(layers, case.sizes, strict=False))
    ]

    def call() -> Tensor:
        y = x
        for run in steps:
            y = run(y)
        return y

    return call


def inductor(case: Case, tensors: Sequence[Tensor | None]) -> Call:
    """`torch.compile` with freezing, in channels_last; compiles at the first call, which takes seconds."""
    compiled = torch.compile(_Chain(case, tensors).eval(), options={"freezing": True})
    return lambda: compiled(tensors[0], tensors[-1])


class _Chain(nn.Module):
    """The stages as modules, for the compiler to see weights as parameters that it may freeze."""

    def __init__(self, case: Case, tensors: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.case = case
        self.weights = nn.ParameterList([t for t in tensors[1:-1] if t is not None])

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return eager(self.case, [x, *self.weights, residual])()


def peers(case: Case, tensors: Sequence[Tensor | None], *, with_inductor: bool = False) -> dict[str, Call]:
    """Every peer by name, ready to be called."""
    contestants = {"eager": eager(case, contiguous(tensors)), "eager channels_last": eager(case, tensors)}
    if torch.backends.mkldnn.is_available():
        contestants["oneDNN prepacked"] = onednn_prepacked(case, tensors)
    if with_inductor:
        contestants["Inductor"] = inductor(case, tensors)
    return contestants
