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
    known: dict[tuple[Node, str], tuple[float, list[dict[str, Any]]]] = {}
    for stage in stages:
        if stage.input_scale is not None or stage.kind not in ("linear", "pointwise_conv2d", "conv2d"):
            continue
        op = "sparse_matmul" if stage.kind == "linear" else "sparse_conv2d"
        geometry = dict(stage.geometry)
        if geometry.pop("groups", 1) != 1:
            continue
        key = (stage.weight, stage.kind)
        if key not in known:
            density = _density(graph_module, stage)
            known[key] = density, list(_block_weights(graph_module, stage, op, density))
        density, weights = known[key]
        size: dict[str, Any] = {"out_features": int(shape(stage.weight)[0])}  # type: ignore[index]
        if stage.kind != "linear":
            size = {"out_channels": size["out_features"], "kernel_size": list(shape(stage.weight)[2:])}  # type: ignore[index]
        for weight in weights:
            given = {"x": stage.x, **weight, "bias": stage.bias, "residual": stage.residual, **geometry, **size}
            r, c = weight["blocks"].meta["val"].shape[1:]
            found = given | {"activation": stage.activation}
            yield Match(op, stage.nodes, stage.output, found, pattern=f"{r}×{c}", density=density)


def _worth_trying(op: str, device: str) -> dict[tuple[int, int], float]:
    """Blocks that our kernels of an op like on devices of that type, with the largest density that any of them likes
    at."""
    found: dict[tuple[int, int], float] = {}
    for entry in registry.operator(op).implementations:
        if entry.kernel is None or (entry.backend in registry.NATIVE_BACKENDS) != (device == "cpu"):
            continue
        for block in entry.kernel.likes.blocks:
            found[block] = max(entry.kernel.likes.density, found.get(block, 0.0))
    return found


def _weight(graph_module: GraphModule, stage: Stage) -> torch.Tensor:
    weight: torch.Tensor = attribute(graph_module, str(stage.weight.target))
    return weight.detach()


def _density(graph_module: GraphModule, stage: Stage) -> float:
    """The fraction of weights that are not zero."""
    weight = _weight(graph_module, stage)
    return int(weight.count_nonzero()) / max(weight.numel(), 1)


def _block_weights(graph_module: GraphModule, stage: Stage, op: str, density: float) -> Iterator[dict[str, Any]]:
    """The arguments of the op that are the weight, as constants of the graph."""
    weight = _weight(graph_module, stage)
    for block, limit in _worth_trying(op, weight.device.type).items():
        if density > limit:
            continue
        matrix = weight if weight.dim() == 2 else conv_matrix(weight, block[1])
        blocks = BlockCsr.from_dense(matrix, block)
        if blocks.density > limit:
            continue
        parts = {"row_offsets": blocks.row_offsets, "columns": blocks.columns, "blocks": blocks.blocks}
        yield {
            name: constant_node(graph_module, f"{stage.weight.target}_{name}_{block[0]}x{block[1]}", part, stage.weight)
            for name, part in parts.items()
        }
