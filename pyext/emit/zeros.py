"""What the record says of zeros in weights: what they are worth where a layer that skips them was timed, else why none
was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.fx import GraphModule, Node

from kernelpress.emit.evaluate import Evaluation
from kernelpress.emit.graph import attribute

if TYPE_CHECKING:
    from kernelpress.emit.choose import Choice

__all__ = ["shares_of_zeros", "unskipped_zeros", "worth_of_zeros"]

WORTH_SAYING = 0.3
"""From what share of zeros on somebody will have pruned on purpose."""


def worth_of_zeros(best: Evaluation, inside: Sequence[Evaluation]) -> str:
    """Of the layers `inside` that skip zeros, the fastest beside the fastest other; `""` where none was timed."""
    sparse = [(e.milliseconds, e) for e in inside if e.candidate.pattern and e.milliseconds is not None]
    if not sparse:
        return ""
    milliseconds, fastest = min(sparse, key=lambda timed: timed[0])
    dense = [e for e in inside if not e.candidate.pattern and e.candidate.nodes == fastest.candidate.nodes]
    times = [e.milliseconds for e in dense if e.milliseconds is not None]
    told = f"{1 - fastest.candidate.density:.0%} of the weights are zero: {milliseconds:.4f} ms in blocks of "
    told += fastest.candidate.pattern + (f", {min(times):.4f} ms dense" if times else "")
    return told if best.candidate.pattern else f"{told}: no gain"


def shares_of_zeros(graph_module: GraphModule) -> dict[Node, float]:
    """Of each floating weight that a node reads, the fraction that is zero."""
    found: dict[Node, float] = {}
    for node in graph_module.graph.nodes:
        weight = attribute(graph_module, str(node.target)) if node.op == "get_attr" else None
        if isinstance(weight, Tensor) and weight.dim() >= 2 and weight.numel() and weight.is_floating_point():
            found[node] = 1 - int(weight.count_nonzero()) / weight.numel()
    return found


def unskipped_zeros(shares: Mapping[Node, float], choice: Choice) -> str:
    """That a weight of the place is full of zeros and why nobody skips them; `""` where it is not, or where a sparse
    layer was timed."""
    zeros = max((shares.get(source, 0.0) for node in choice.chosen.nodes for source in node.all_input_nodes), default=0)
    sparse = [e for e in choice.considered if e.candidate.pattern]
    if zeros < WORTH_SAYING or choice.chosen.pattern or any(e.milliseconds is not None for e in sparse):
        return ""
    refusal = next((f": {e.refusal}" for e in sparse if e.refusal), "")
    why = f"no sparse kernel runs it{refusal}" if sparse else "no sparse kernel gains from so few, or takes this layer"
    return f"{zeros:.0%} of its weight is zero, but {why}; dense takes {choice.milliseconds:.4f} ms"
