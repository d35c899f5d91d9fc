"""Cross-layer equalization (Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV
2019, arXiv:1906.04721, section 4.1): the channels between two layers get like ranges, and the network computes what it
did.

    W₁ᵢ ← W₁ᵢ / sᵢ,  b₁ᵢ ← b₁ᵢ / sᵢ,  W₂·ᵢ ← W₂·ᵢ · sᵢ      sᵢ = √(r₁ᵢ · r₂ᵢ) / r₂ᵢ,  r the largest |w| of channel i

Between the two may lie what keeps positive factors of channels: ReLU, padding with zeros, pooling.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from kernelpress.compress.quantization.places import Layer, Places
from kernelpress.emit.graph import arguments, attribute, number, only_user

__all__ = ["equalize"]

aten = torch.ops.aten

ROUNDS = 20
CLOSE = 1e-3
"""Rounds end when no channel changes by more."""
MOST = 1e4
"""Of a factor."""

_KEEP_FACTORS = frozenset({
    aten.relu.default, aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default,
    aten.adaptive_max_pool2d.default, aten.clone.default, aten.contiguous.default,
})  # fmt: skip


def equalize(graph_module: GraphModule, places: Places) -> tuple[tuple[str, str], ...]:
    """Equalizes the weights of a folded graph in place; returns the pairs of layers that were."""
    pairs = _pairs(places)
    for _ in range(ROUNDS):
        changes = [_equalize_pair(graph_module, first, second) for first, second in pairs]
        if max(changes, default=0.0) <= CLOSE:
            break
    return tuple((first.name, second.name) for first, second in pairs)


def _pairs(places: Places) -> list[tuple[Layer, Layer]]:
    """Each layer with the one that alone reads its channels."""
    by_node = {layer.node: layer for layer in places.layers if only_user(layer.weight) is not None and not layer.axis}
    found = []
    for first in by_node.values():
        bias, node = arguments(first.node)["bias"], first.node
        if isinstance(bias, Node) and only_user(bias) is None:
            continue
        while (user := only_user(node)) is not None and _keeps_factors(user):
            node = user
        if user in by_node and arguments(user)["input"] is node:
            found.append((first, by_node[user]))
    return found


def _keeps_factors(node: Node) -> bool:
    if node.target in (aten.pad.default, aten.constant_pad_nd.default):
        given = arguments(node)
        return given.get("mode", "constant") == "constant" and number(given.get("value") or 0) == 0
    return node.target in _KEEP_FACTORS


def _equalize_pair(graph_module: GraphModule, first: Layer, second: Layer) -> float:
    """The largest change of a factor, as |log s|."""
    one, two = (attribute(graph_module, str(layer.weight.target)).data for layer in (first, second))
    groups = arguments(second.node).get("groups", 1)
    # [groups, C_in / groups, …]: the channels that `second` reads, whichever of its outputs reads them.
    read = two.unflatten(0, (groups, -1)).transpose(1, 2)
    if read.shape[0] * read.shape[1] != len(one):
        return 0.0
    r1, r2 = one.flatten(1).abs().amax(1).double(), read.flatten(2).abs().amax(2).flatten().double()
    factor = (r1 / r2).sqrt()
    factor = torch.where((r1 > 0) & (r2 > 0), factor, torch.ones_like(factor)).clamp(1 / MOST, MOST)
    own = factor.to(one.dtype)
    one.div_(own.reshape(-1, *(1,) * (one.dim() - 1)))
    read.mul_(own.reshape(groups, -1, *(1,) * (read.dim() - 2)))
    bias = arguments(first.node)["bias"]
    if isinstance(bias, Node):
        attribute(graph_module, str(bias.target)).data.div_(own)
    return float(factor.log().abs().max())
