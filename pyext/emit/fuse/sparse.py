"""Block-sparse layers, found by the zeros in their weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from kernelpress.emit.fuse.match import Match
from kernelpress.emit.fuse.stages import Stage
from kernelpress.emit.graph import attribute, constant_node, shape
from kernelpress.ops import registry
from kernelpress.ops.sparse_blocks import BlockCsr, conv_matrix

__all__ = ["sparse_layers"]


def sparse_layers(graph_module: GraphModule, stages: list[Stage]) -> Iterator[Match]:
    """Linear layers and convolutions in one group whose weights have enough blocks of zeros, for each size of block."""
    known: dict[tuple[Node, str], list[dict[str, Any]]] = {}
    for stage in stages:
        if stage.input_scale is not None or stage.kind not in ("linear", "pointwise_conv2d", "conv2d"):
            continue
        op = "sparse_matmul" if stage.kind == "linear" else "sparse_conv2d"
        geometry = dict(stage.geometry)
        if geometry.pop("groups", 1) != 1:
            continue
        key = (stage.weight, stage.kind)
        if key not in known:
            known[key] = list(_block_weights(graph_module, stage, op))
        size: dict[str, Any] = {"out_features": int(shape(stage.weight)[0])}  # type: ignore[index]
        if stage.kind != "linear":
            size = {"out_channels": size["out_features"], "kernel_size": list(shape(stage.weight)[2:])}  # type: ignore[index]
        for weight in known[key]:
            given = {"x": stage.x, **weight, "bias": stage.bias, "residual": stage.residual, **geometry, **size}
            yield Match(op, stage.nodes, stage.output, given | {"activation": stage.activation})


def _worth_trying(op: str) -> dict[tuple[int, int], float]:
    """Blocks that our kernels of an op like, with the largest density that any of them likes at."""
    found: dict[tuple[int, int], float] = {}
    for likes in (kernel.likes for kernel in registry.operator(op).kernels()):
        for block in likes.blocks:
            found[block] = max(likes.density, found.get(block, 0.0))
    return found


def _block_weights(graph_module: GraphModule, stage: Stage, op: str) -> Iterator[dict[str, Any]]:
    """The arguments of the op that are the weight, as constants of the graph."""
    weight: torch.Tensor = attribute(graph_module, str(stage.weight.target)).detach()
    density = int(weight.count_nonzero()) / max(weight.numel(), 1)
    for block, limit in _worth_trying(op).items():
        if density > limit:
            continue
        matrix = weight if weight.dim() == 2 else conv_matrix(weight, block[1])
        blocks = BlockCsr.from_dense(matrix, block)
        if blocks.density > limit:
            continue
        parts = {"row_offsets": blocks.row_offsets, "columns": blocks.columns, "blocks": blocks.blocks}
        yield {
            name: constant_node(graph_module, f"{stage.weight.target}_{name}_{block[0]}", part, stage.weight)
            for name, part in parts.items()
        }
