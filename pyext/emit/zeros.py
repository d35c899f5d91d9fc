"""What the record says of a weight whose zeros nobody skips: how many there are, and the times that decided."""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule, Node

from kernelpress.emit.choose import Choice
from kernelpress.emit.graph import attribute

__all__ = ["zeros_note"]

WORTH_SAYING = 0.3
"""From what share of zeros on somebody will have pruned on purpose."""


def zeros_note(graph_module: GraphModule, choice: Choice) -> str:
    """Why a place with zeros in its weight runs dense, `""` where it does not or has few."""
    chosen = choice.chosen
    sources = dict.fromkeys(source for node in chosen.nodes for source in node.all_input_nodes)
    zeros = max((_zeros(graph_module, node) for node in sources if node.op == "get_attr"), default=0.0)
    if zeros < WORTH_SAYING or chosen.name.startswith("sparse_"):
        return ""
    sparse = [e for e in choice.considered if e.candidate.name.startswith("sparse_")]
    timed = [(e.milliseconds, e.candidate.label) for e in sparse if e.milliseconds is not None]
    dense = f"{choice.milliseconds:.4f} ms"
    if timed:
        milliseconds, label = min(timed)
        return f"{zeros:.0%} of its weight is zero: {label} skips zeros in {milliseconds:.4f} ms, dense takes {dense}"
    refusal = next((f": {e.refusal}" for e in sparse if e.refusal), "")
    why = f"no sparse kernel runs it{refusal}" if sparse else "no sparse kernel skips zeros that fill too few blocks"
    return f"{zeros:.0%} of its weight is zero, but {why}; dense takes {dense}"


def _zeros(graph_module: GraphModule, node: Node) -> float:
    found = attribute(graph_module, str(node.target))
    if not isinstance(found, Tensor) or found.dim() < 2 or not found.numel() or not found.is_floating_point():
        return 0.0
    return 1 - int(found.count_nonzero()) / found.numel()
