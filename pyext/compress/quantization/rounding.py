"""Adaptive rounding (Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization, ICML 2020,
arXiv:2004.10568): each weight goes to the neighbour that keeps its layer's result, not to the nearer one.

    min over V  ‖f(x) − f_W̃(x̃)‖² + λ Σ 1 − |2h(V) − 1|^β
    W̃ = s · clip(⌊W / s⌋ + h(V)),  h = clip(1.2 · sigmoid(V) − 0.1)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from kernelpress.compress.quantization.errors import results_of
from kernelpress.compress.quantization.places import Layer
from kernelpress.compress.quantization.ranges import WEIGHT_LIMIT
from kernelpress.emit.graph import arguments, attribute, only_user

__all__ = ["round_adaptively"]

STEPS, LEARNING_RATE = 200, 5e-2
STRENGTH = 1e-2
"""λ, where rounding to the nearest has the error 1."""
BETAS = 20.0, 2.0
"""From the first step on to the last."""
WARMUP = 0.2
"""Share of the steps without the regulariser."""
MOST_BATCHES = 4


def round_adaptively(
    module: GraphModule,
    quantized: GraphModule,
    layers: Sequence[Layer],
    batches: Sequence[tuple[Any, ...]],
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[str, ...]:
    """Rounds the int8 weights of `quantized` anew, in place, layer after layer; `module` is the float network.

    Returns the layers that are nearer to their float results so; others keep weights rounded to the nearest.
    """
    changed = []
    own = {node.name: node for node in quantized.graph.nodes}
    for layer in layers:
        advance(1)
        if only_user(layer.weight) is None:
            continue
        node = own[layer.node.name]
        source: Node = arguments(node)["input"]
        pairs = [
            (
                results_of(quantized, batch, [source.name])[source.name],
                results_of(module, batch, [layer.node.name])[layer.node.name],
            )
            for batch in batches[:MOST_BATCHES]
        ]
        values, scale = (attribute(quantized, str(n.target)) for n in arguments(node)["weight"].args[:2])
        rest = [attribute(quantized, str(a.target)) if isinstance(a, Node) else a for a in node.args[2:]]
        weight = attribute(module, str(layer.weight.target)).detach()
        shape = [1] * weight.dim()
        shape[layer.axis] = -1

        def run(w: Tensor, x: Tensor, target: Any = node.target, rest: Any = rest) -> Tensor:
            return target(x, w, *rest)

        if _round_layer(run, values.data, scale.reshape(shape), weight, pairs):
            changed.append(layer.name)
    return tuple(changed)


def _round_layer(
    run: Callable[[Tensor, Tensor], Tensor],
    values: Tensor,
    scale: Tensor,
    weight: Tensor,
    pairs: Sequence[tuple[Tensor, Tensor]],
) -> bool:
    def error(whole: Tensor) -> Tensor:
        return torch.stack([(run(whole * scale, x) - y).square().mean() for x, y in pairs]).mean()

    steps = (weight / scale).clamp(-WEIGHT_LIMIT, WEIGHT_LIMIT)
    low = steps.floor()
    nearest = float(error(values.float()))
    if nearest == 0:
        return False
    with torch.enable_grad():
        # h(V) begins at the fraction that each weight has.
        v = torch.logit(((steps - low + 0.1) / 1.2).clamp(1e-4, 1 - 1e-4)).requires_grad_()
        optimizer = torch.optim.Adam([v], lr=LEARNING_RATE)
        for step in range(STEPS):
            h = (1.2 * torch.sigmoid(v) - 0.1).clamp(0, 1)
            loss = error((low + h).clamp(-WEIGHT_LIMIT, WEIGHT_LIMIT)) / nearest
            if (done := step / STEPS) >= WARMUP:
                beta = BETAS[0] + (BETAS[1] - BETAS[0]) * (done - WARMUP) / (1 - WARMUP)
                loss = loss + STRENGTH * (1 - (2 * h - 1).abs() ** beta).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    rounded = (low + (torch.sigmoid(v.detach()) >= 0.5)).clamp(-WEIGHT_LIMIT, WEIGHT_LIMIT)
    if not float(error(rounded)) < nearest:
        return False
    values.copy_(rounded.to(values.dtype))
    return True
