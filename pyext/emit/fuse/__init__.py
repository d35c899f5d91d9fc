"""Finds where kernelpress layers fit on a folded graph: which nodes each could replace, and with which arguments."""

from __future__ import annotations

from torch.fx import GraphModule

from kernelpress.emit.fuse.chains import chains
from kernelpress.emit.fuse.ghost import ghosts
from kernelpress.emit.fuse.grouped import grouped_stages, shuffles
from kernelpress.emit.fuse.int8 import int8_gates, int8_layers, int8_pools, int8_sums, quantizers
from kernelpress.emit.fuse.lowrank import lowrank_layers, whole_depthwise
from kernelpress.emit.fuse.match import Match
from kernelpress.emit.fuse.pools import pools
from kernelpress.emit.fuse.sparse import sparse_layers
from kernelpress.emit.fuse.squeeze_excite import squeeze_excites
from kernelpress.emit.fuse.stages import stages_at

__all__ = ["Match", "find_matches"]


def find_matches(graph_module: GraphModule) -> list[Match]:
    """Every place where a kernelpress layer could stand, overlapping ones included; values that others read stay.

    Weights in a form of their own (block-sparse, int8) become constants of `graph_module`, which nothing reads yet.
    """
    nodes = list(graph_module.graph.nodes)
    stages = [stage for node in nodes for stage in stages_at(graph_module, node)]
    stages += list(whole_depthwise(graph_module, stages))
    matches = [stage.match() for node in nodes for stage in grouped_stages(graph_module, node)]
    matches += [stage.match() for stage in stages]
    matches += chains(stages)
    matches += ghosts(stages)
    matches += lowrank_layers(stages)
    matches += squeeze_excites(stages)
    matches += sparse_layers(graph_module, stages)
    matches += int8_layers(graph_module, stages)
    for node in nodes:
        matches += [*pools(node), *shuffles(node), *quantizers(node), *int8_sums(node)]
        matches += [*int8_gates(node), *int8_pools(node)]
    return matches
