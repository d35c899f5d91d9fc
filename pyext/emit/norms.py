"""InstanceNorm, in the form whose gradients hold in every memory format."""

from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule, Node

from kernelpress.emit.graph import arguments, shape

__all__ = ["settle_instance_norms"]

aten = torch.ops.aten


def settle_instance_norms(graph_module: GraphModule) -> GraphModule:
    """Rewrites, in place, InstanceNorm as GroupNorm of single channels, or as BatchNorm where it reads running
    statistics; returns the module.

    PyTorch's own gradient of InstanceNorm is wrong for one image where what comes back lies in channels_last: a graph
    that hands images on so would meet that where the original does not.
    """
    for part in [module for module in graph_module.modules() if isinstance(module, GraphModule)]:
        for node in part.graph.find_nodes(op="call_function", target=aten.instance_norm.default):
            _settle(part.graph, node)
        part.recompile()
    return graph_module


def _settle(graph: Graph, node: Node) -> None:
    given, sizes = arguments(node), shape(node)
    names = ("input", "weight", "bias", "running_mean", "running_var", "eps")
    x, weight, bias, mean, var, eps = (given[name] for name in names)
    with graph.inserting_before(node):
        if not given["use_input_stats"]:
            whole = graph.call_function(
                aten.batch_norm.default, (x, weight, bias, mean, var, False, given["momentum"], eps, False)
            )
        elif mean is None and sizes is not None and isinstance(sizes[1], int):
            dense = graph.call_function(aten.contiguous.default, (x,))
            dense.meta = dict(x.meta)
            whole = graph.call_function(aten.group_norm.default, (dense, sizes[1], weight, bias, eps))
        else:
            return
    whole.meta = dict(node.meta)
    node.replace_all_uses_with(whole)
    graph.erase_node(node)
