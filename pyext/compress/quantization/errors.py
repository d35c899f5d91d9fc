"""What int8 costs each layer: its result beside that of the float network, measured on calibration data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from kernelpress.compress.quantization.places import Layer
from kernelpress.compress.record import LayerError
from kernelpress.emit.graph import attribute
from kernelpress.emit.quantized import is_dequantize, is_quantize
from kernelpress.runtime.torch_private import pytree

__all__ = ["bias_shifts", "layer_errors", "output_error", "results_of"]


class _Results(Interpreter):
    """Runs a graph and keeps the values of some nodes, by name."""

    def __init__(self, module: GraphModule, names: Sequence[str]) -> None:
        super().__init__(module)
        self.names, self.kept = frozenset(names), dict[str, Tensor]()

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.name in self.names:
            self.kept[n.name] = result
        return result


def results_of(module: GraphModule, batch: tuple[Any, ...], names: Sequence[str]) -> dict[str, Tensor]:
    """The values that nodes of these names have at `batch`."""
    run = _Results(module, names)
    with torch.no_grad():
        run.run(*batch)
    return run.kept


class _Both(_Results):
    """Runs a quantized graph, and each layer of it once more with its float weight on the same inputs."""

    def __init__(self, module: GraphModule, layers: Sequence[Layer], weights: Mapping[str, Tensor]) -> None:
        super().__init__(module, [layer.end.name for layer in layers])
        self.chains = {node.name: layer.node.name for layer in layers for node in layer.chain}
        self.weights, self.floats = weights, dict[str, Tensor]()
        self.ends = {layer.end.name for layer in layers}
        self.made = dict[str, Tensor]()
        """Each node of a layer in the quantized network, before any rounding of its result."""

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.name in self.chains:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            layer = self.chains[n.name]
            inside = [
                self.floats[a.name] if isinstance(a, Node) and self.chains.get(a.name) == layer else value
                for a, value in zip(n.args, args, strict=True)
            ]
            if n.name in self.weights:
                inside[1] = self.weights[n.name]
            self.floats[n.name], self.made[n.name] = n.target(*inside, **kwargs), result  # type: ignore[operator]
        if is_dequantize(n) and is_quantize(n.args[0]) and n.args[0].args[0].name in self.ends:  # type: ignore
            self.kept[n.args[0].args[0].name] = result  # type: ignore[union-attr]
        return result


def layer_errors(
    module: GraphModule,
    quantized: GraphModule,
    layers: Mapping[Layer, bool],
    batches: Sequence[tuple[Any, ...]],
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[LayerError, ...]:
    """How far each layer's result is off, in the quantized network, from that of the float network `module`, and how
    far it would be if this layer alone computed in float. `layers`: whether each is int8.
    """
    names = [layer.end.name for layer in layers]
    weights = {
        layer.node.name: attribute(module, str(layer.weight.target)).detach()
        for layer, is_int8 in layers.items()
        if is_int8
    }
    sums: dict[tuple[str, str], float] = defaultdict(float)
    for batch in batches:
        expected = results_of(module, batch, names)
        both = _Both(quantized, list(layers), weights)
        with torch.no_grad():
            both.run(*batch)
        for name in names:
            reference = expected[name].double()
            sums[name, "power"] += float(reference.square().sum())
            sums[name, "int8"] += float((both.kept[name].double() - reference).square().sum())
            sums[name, "float"] += float((both.floats[name].double() - reference).square().sum())
        advance(1)

    def error(name: str, kind: str) -> float:
        power = sums[name, "power"]
        return (sums[name, kind] / power if power else sums[name, kind]) ** 0.5

    return tuple(
        LayerError(layer.name, is_int8, error(layer.end.name, "int8"), error(layer.end.name, "float"))
        for layer, is_int8 in layers.items()
    )


def bias_shifts(
    module: GraphModule, quantized: GraphModule, layers: Sequence[Layer], batches: Sequence[tuple[Any, ...]]
) -> dict[str, Tensor]:
    """What the rounding of a layer's weight takes from the mean of each output channel, by the layer's node: to be
    added to its bias (Nagel et al. 2019, arXiv:1906.04721, section 4.2, from calibration data instead of BatchNorm)."""
    weights = {layer.node.name: attribute(module, str(layer.weight.target)).detach() for layer in layers}
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = defaultdict(int)
    for batch in batches:
        both = _Both(quantized, layers, weights)
        with torch.no_grad():
            both.run(*batch)
        for layer in layers:
            name = layer.node.name
            lost = (both.floats[name] - both.made[name]).double()
            lost = lost.movedim(lost.dim() - 1 if layer.node.target is torch.ops.aten.linear.default else 1, 0).flatten(
                1
            )
            sums[name] = sums.get(name, 0) + lost.sum(1)
            counts[name] += lost.shape[1]
    return {name: total / max(counts[name], 1) for name, total in sums.items()}


def output_error(module: GraphModule, quantized: GraphModule, batches: Sequence[tuple[Any, ...]]) -> float:
    """‖y − y₀‖ / ‖y₀‖ of all floating outputs over all batches."""
    error = power = 0.0
    for batch in batches:
        with torch.no_grad():
            pairs = zip(pytree.tree_leaves(quantized(*batch)), pytree.tree_leaves(module(*batch)), strict=True)
        for ours, theirs in pairs:
            if isinstance(theirs, Tensor) and theirs.is_floating_point():
                error += float((ours.double() - theirs.double()).square().sum())
                power += float(theirs.double().square().sum())
    return (error / power if power else error) ** 0.5
