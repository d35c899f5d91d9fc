"""What the record says of zeros that no layer of ours could skip."""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule, Node

from kernelpress.emit.choose import Choice
from kernelpress.emit.graph import attribute

__all__ = ["zeros_note"]

WORTH_SAYING = 0.3
"""From what share of zeros on somebody will have pruned on purpose."""


def zeros_note(graph_module: GraphModule, choice: Choice) -> str:
    """That a weight of the place is full of zeros and why nobody skips them; `""` where it is not, or where a sparse
    layer was timed, of which `choice.reason` tells."""
    sources = dict.fromkeys(source for node in choice.chosen.nodes for source in node.all_input_nodes)
    zeros = max((_zeros(graph_module, node) for node in sources if node.op == "get_attr"), default=0.0)
    sparse = [e for e in choice.considered if e.candidate.pattern]
    if zeros < WORTH_SAYING or choice.chosen.pattern or any(e.milliseconds is not None for e in sparse):
        return ""
    refusal = next((f": {e.refusal}" for e in sparse if e.refusal), "")
    why = f"no sparse kernel runs it{refusal}" if sparse else "no sparse kernel gains from so few, or takes this layer"
    return f"{zeros:.0%} of its weight is zero, but {why}; dense takes {choice.milliseconds:.4f} ms"


def _zeros(graph_module: GraphModule, node: Node) -> float:
    found = attribute(graph_module, str(node.target))
    if not isinstance(found, Tensor) or found.dim() < 2 or not found.numel() or not found.is_floating_point():
        return 0.0
    return 1 - int(found.count_nonzero()) / found.numel()
