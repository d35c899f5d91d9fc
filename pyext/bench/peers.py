"""A layer as others run it inside PyTorch: its stages eager in either memory format, oneDNN prepacked, Inductor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernelpress.bench.calls import Call
from kernelpress.bench.int8_peers import int8_peers
from kernelpress.ops import registry
from kernelpress.ops.registry import Tensors
from kernelpress.ops.sparse_blocks import BlockCsr, conv_weight

__all__ = ["Step", "contiguous", "eager", "frozen", "inductor", "onednn_prepacked", "peers", "steps_of"]

MOVES = frozenset({"channel_shuffle", "shuffle_concat"})
"""Ops that compute nothing."""

_EAGER_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda y: y,
    "relu": torch.relu_,
    "relu6": lambda y: F.hardtanh_(y, 0.0, 6.0),
    "hardswish": lambda y: F.hardswish(y, inplace=True),
    "hardsigmoid": lambda y: F.hardsigmoid(y, inplace=True),
}

# Post-op name and scalars, as torch's mkldnn operators take them.
_ONEDNN_ACTIVATIONS: dict[str, tuple[str, list[Any]]] = {
    "identity": ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
    "hardswish": ("hardswish", []),
    "hardsigmoid": ("hardsigmoid", []),
}


@dataclass(frozen=True)
class Step:
    """A convolution, or a product of matrices, and its activation."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    activation: str


Steps = Sequence[tuple[Step, Tensor, Tensor | None]]
"""Each with its weight and bias."""

Run = Callable[[Tensor, Steps, Tensor | None], Tensor]
"""Runs steps in turn, the last one with a residual."""


def contiguous(tensors: Sequence[Tensor | None]) -> Tensors:
    """The same values in PyTorch's default memory format."""
    return [None if t is None else t.contiguous() for t in tensors]


def steps_of(op: str, tensors: Tensors, options: Mapping[str, Any]) -> tuple[Tensor, Steps, Tensor | None]:
    """What an op with weights is made of: x, steps in turn, and a residual that the last one adds before its
    activation. int8 is in bfloat16 and lacks the scales, blocks are the dense weight that they are of."""
    entry = registry.operator(op)
    bound, given, _ = entry.signature.bind(tensors, options)
    named = {name: t for name, t in zip(entry.tensors, bound, strict=True) if t is not None}
    if named["x"].dtype == torch.int8:
        named = {name: t.to(torch.bfloat16) for name, t in named.items()}
    if "blocks" in named:
        named["weight"] = _dense(named, given)
    x, steps = named["x"], []
    channels = x.shape[1]
    for part in [name.removesuffix("weight") for name in named if name.endswith("weight")]:
        weight, of_window = named[part + "weight"], given if part in ("", "depthwise_", "primary_") else None
        step = Step(
            getattr(of_window, "stride", (1, 1)),
            getattr(of_window, "padding", tuple(side // 2 for side in weight.shape[2:])),
            getattr(of_window, "dilation", (1, 1)),
            groups=channels // weight.shape[1],
            activation=getattr(given, part + "activation", given.activation),
        )
        steps.append((step, weight, named.get(part + "bias")))
        channels = weight.shape[0]
    return x, steps, named.get("residual")


def _dense(named: Mapping[str, Tensor], options: Any) -> Tensor:
    """The weight of a sparse layer, in the memory format of x."""
    x, offsets, columns, blocks = (named[name] for name in ("x", "row_offsets", "columns", "blocks"))
    window = getattr(options, "kernel_size", (1, 1))
    shape = ((len(offsets) - 1) * blocks.shape[1], window[0] * window[1] * x.shape[1])
    matrix = BlockCsr(offsets, columns, blocks, shape).to_dense()
    if x.dim() == 2:
        return matrix
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    return conv_weight(matrix, x.shape[1], window).contiguous(memory_format=layout)


def eager(op: str, tensors: Tensors, options: Mapping[str, Any]) -> Call:
    """PyTorch's operations one by one, activations in place; the memory format is that of `tensors`."""
    images, steps, residual = _parts(op, tensors, options)
    return lambda: _layer(op, images, steps, residual, options, _run)


def _parts(op: str, tensors: Tensors, options: Mapping[str, Any]) -> tuple[list[Tensor], Steps, Tensor | None]:
    """The images that a layer takes, and its steps and residual as `steps_of` gives them."""
    if op in MOVES:
        return [t for t in tensors if t is not None], [], None
    x, steps, residual = steps_of(op, tensors, options)
    return [x], steps, residual


def _layer(
    op: str, images: list[Tensor], steps: Steps, residual: Tensor | None, options: Mapping[str, Any], run: Run
) -> Tensor:
    """The layer, its steps run by `run` and what lies between them by PyTorch."""
    x = images[0] if len(images) == 1 else torch.cat(images, 1)
    if op in MOVES:
        return _shuffled(x, options["groups"])
    if op == "ghost_conv2d":
        primary = run(x, steps[:1], None)
        return torch.cat([primary, run(primary, steps[1:], None)], 1)
    if op == "squeeze_excite":
        x = x.mean((2, 3), keepdim=True)
    y = run(x, steps, residual)
    return _shuffled(y, options["shuffle"]) if options.get("shuffle", 1) > 1 else y


def _run(x: Tensor, steps: Steps, residual: Tensor | None) -> Tensor:
    y = x
    for index, (step, weight, bias) in enumerate(steps):
        if weight.dim() == 2:
            y = F.linear(y, weight, bias)
        else:
            y = F.conv2d(y, weight, bias, step.stride, step.padding, step.dilation, step.groups)
        if index == len(steps) - 1 and residual is not None:
            y += residual
        y = _EAGER_ACTIVATIONS[step.activation](y)
    return y


def _shuffled(x: Tensor, groups: int) -> Tensor:
    """The shuffle as networks write it; a copy."""
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def onednn_prepacked(op: str, tensors: Tensors, options: Mapping[str, Any]) -> Call:
    """oneDNN's own primitives, one a step, with weights packed beforehand and bias, residual and activation fused."""
    images, steps, residual = _parts(op, tensors, options)
    if op == "linear":
        ((x,), ((_, weight, bias),)) = images, steps
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
        return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    made: dict[int, Callable[[Tensor], Tensor]] = {}

    def run(y: Tensor, some: Steps, added: Tensor | None) -> Tensor:
        for index, (step, weight, bias) in enumerate(some):
            if id(step) not in made:
                made[id(step)] = _primitive(step, weight, bias, y.shape, added if index == len(some) - 1 else None)
            y = made[id(step)](y)
        return y

    _layer(op, images, steps, residual, options, run)
    return lambda: _layer(op, images, steps, residual, options, run)


def _primitive(
    step: Step, weight: Tensor, bias: Tensor | None, shape: Sequence[int], added: Tensor | None
) -> Callable[[Tensor], Tensor]:
    geometry = (step.padding, step.stride, step.dilation, step.groups)
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, shape)
    name, scalars = _ONEDNN_ACTIVATIONS[step.activation]
    if added is None:
        return lambda y: torch.ops.mkldnn._convolution_pointwise(y, packed, bias, *geometry, name, scalars, "")
    end = ("add", 1.0, None if name == "none" else name, scalars, "")
    return lambda y: torch.ops.mkldnn._convolution_pointwise.binary(y, added, packed, bias, *geometry, *end)


def inductor(op: str, tensors: Tensors, options: Mapping[str, Any]) -> Call:
    """`torch.compile` with freezing, in channels_last; compiles at the first call, which takes seconds."""
    images, steps, residual = _parts(op, tensors, options)
    compiled = frozen(_Chain(op, steps, options).eval())
    return lambda: compiled(images, residual)


def frozen(module: nn.Module) -> Callable[..., Tensor]:
    """`module` compiled with freezing, whatever was compiled before: torch leaves to eager what was too often."""
    torch.compiler.reset()
    compiled: Callable[..., Tensor] = torch.compile(module, options={"freezing": True})
    return compiled


class _Chain(nn.Module):
    """The layer as a module, for the compiler to see weights as parameters that it may freeze."""

    def __init__(self, op: str, steps: Steps, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.op, self.options = op, options
        self.steps = [step for step, _, _ in steps]
        self.weights = nn.ParameterList([weight for _, weight, _ in steps])
        self.biases = nn.ParameterList([bias for _, _, bias in steps])

    def forward(self, images: list[Tensor], residual: Tensor | None) -> Tensor:
        steps = list(zip(self.steps, self.weights, self.biases, strict=True))
        return _layer(self.op, images, steps, residual, self.options, _run)


def peers(op: str, tensors: Tensors, options: Mapping[str, Any], *, with_inductor: bool = False) -> dict[str, Call]:
    """Every peer by name, ready to be called. Inductor calls for an int8 layer what oneDNN's peer does."""
    if tensors[0] is not None and tensors[0].dtype == torch.int8:
        return int8_peers(op, tensors, options)
    contestants = {
        "eager": eager(op, contiguous(tensors), options),
        "eager channels_last": eager(op, tensors, options),
    }
    if torch.backends.mkldnn.is_available() and op not in MOVES:
        contestants["oneDNN prepacked"] = onednn_prepacked(op, tensors, options)
    if with_inductor:
        contestants["Inductor"] = inductor(op, tensors, options)
    return contestants
