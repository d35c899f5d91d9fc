"""The same layer as others run it inside PyTorch: eager in both memory formats, oneDNN prepacked, Inductor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernelpress.bench.shapes import Case, Stage

__all__ = ["LayerInputs", "eager", "inductor", "onednn_prepacked", "peers", "random_inputs"]

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


@dataclass(frozen=True)
class LayerInputs:
    """What a case computes on: `x`, `residual` in channels_last (2-d for `linear`), a weight and a bias per stage."""

    x: Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    residual: Tensor | None

    def contiguous(self) -> LayerInputs:
        """The same values in PyTorch's default memory format."""
        residual = None if self.residual is None else self.residual.contiguous()
        return LayerInputs(self.x.contiguous(), tuple(w.contiguous() for w in self.weights), self.biases, residual)

    def to(self, dtype: torch.dtype) -> LayerInputs:
        """The same values in another dtype."""
        weights, biases = ([t.to(dtype) for t in tensors] for tensors in (self.weights, self.biases))
        residual = None if self.residual is None else self.residual.to(dtype)
        return LayerInputs(self.x.to(dtype), tuple(weights), tuple(biases), residual)


def random_inputs(case: Case) -> LayerInputs:
    """Fresh random tensors for `case`; weights scaled by their fan-in, so that values keep their size along a chain."""
    channels_last = torch.channels_last
    x = torch.randn(case.x_shape).contiguous(memory_format=channels_last)
    weights = []
    for stage in case.stages:
        weight = torch.randn(stage.weight_shape)
        weights.append((weight * weight[0].numel() ** -0.5).contiguous(memory_format=channels_last))
    residual = None
    if case.residual:
        residual = x if case.residual_is_input else torch.randn(case.y_shape).contiguous(memory_format=channels_last)
    biases = tuple(torch.randn(stage.c_out) for stage in case.stages)
    if case.op == "linear":
        return LayerInputs(x.flatten(1), tuple(w.flatten(1).contiguous() for w in weights), biases, None)
    return LayerInputs(x, tuple(weights), biases, residual)


def eager(case: Case, inputs: LayerInputs) -> Callable[[], Tensor]:
    """PyTorch's operations one by one, activations in place; the memory format is that of `inputs`."""
    if case.op == "linear":
        return lambda: F.linear(inputs.x, inputs.weights[0], inputs.biases[0])
    last = len(case.stages) - 1

    def call() -> Tensor:
        y = inputs.x
        for index, (stage, weight, bias) in enumerate(zip(case.stages, inputs.weights, inputs.biases, strict=True)):
            y = F.conv2d(y, weight, bias, stage.stride, stage.padding, 1, stage.groups)
            if index == last and inputs.residual is not None:
                y += inputs.residual
            y = _EAGER_ACTIVATIONS[stage.activation](y)
        return y

    return call


def onednn_prepacked(case: Case, inputs: LayerInputs) -> Callable[[], Tensor]:
    """oneDNN's own primitives, one a stage, with weights packed beforehand and bias, residual and activation fused."""
    if case.op == "linear":
        packed_linear = torch.ops.mkldnn._reorder_linear_weight(inputs.weights[0], case.batch)
        run_linear = torch.ops.mkldnn._linear_pointwise
        return lambda: run_linear(inputs.x, packed_linear, inputs.biases[0], "none", [], "")

    packed = []
    for stage, weight, size in zip(case.stages, inputs.weights, case.sizes[:-1], strict=True):
        shape = [case.batch, stage.c_in, size, size]
        geometry = ([stage.padding] * 2, [stage.stride] * 2, [1, 1], stage.groups)
        packed.append(torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, shape))
    last = len(case.stages) - 1

    def convolution(stage: Stage, y: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        geometry = ([stage.padding] * 2, [stage.stride] * 2, [1, 1], stage.groups)
        name, scalars = _ONEDNN_ACTIVATIONS[stage.activation]
        if residual is None:
            out: Tensor = torch.ops.mkldnn._convolution_pointwise(y, weight, bias, *geometry, name, scalars, "")
        else:
            unary = None if name == "none" else name
            out = torch.ops.mkldnn._convolution_pointwise.binary(
                y, residual, weight, bias, *geometry, "add", 1.0, unary, scalars, ""
            )
        return out

    def call() -> Tensor:
        y = inputs.x
        for index, (stage, weight) in enumerate(zip(case.stages, packed, strict=True)):
            y = convolution(stage, y, weight, inputs.biases[index], inputs.residual if index == last else None)
        return y

    return call


def inductor(case: Case, inputs: LayerInputs) -> Callable[[], Tensor]:
    """`torch.compile` with freezing, in channels_last; compiles at the first call, which takes seconds."""
    compiled = torch.compile(_Chain(case, inputs).eval(), options={"freezing": True})
    return lambda: compiled(inputs.x, inputs.residual)


class _Chain(nn.Module):
    """The stages as modules, for the compiler to see weights as parameters that it may freeze."""

    def __init__(self, case: Case, inputs: LayerInputs) -> None:
        super().__init__()
        self.case = case
        self.weights = nn.ParameterList(inputs.weights)
        self.biases = nn.ParameterList(inputs.biases)

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return eager(self.case, LayerInputs(x, tuple(self.weights), tuple(self.biases), residual))()


def peers(case: Case, inputs: LayerInputs, *, with_inductor: bool = False) -> dict[str, Callable[[], Tensor]]:
    """Every peer by name, ready to be called."""
    contestants = {
        "eager": eager(case, inputs.contiguous()),
        "eager channels_last": eager(case, inputs),
    }
    if torch.backends.mkldnn.is_available():
        contestants["oneDNN prepacked"] = onednn_prepacked(case, inputs)
    if with_inductor:
        contestants["Inductor"] = inductor(case, inputs)
    return contestants
