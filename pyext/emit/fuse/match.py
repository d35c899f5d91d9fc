"""`Match`: one kernelpress layer that fits somewhere on a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

__all__ = ["Match"]


@dataclass(frozen=True)
class Match:
    """One kernelpress layer that can stand for `nodes`, of which only `output` is read by the rest of the graph.

    `arguments` are the op's by name; graph nodes among them are its inputs. `parts` counts the layers fused into one:
    1 for a convolution with its epilogue, 2 for a separable convolution, 3 for an inverted residual. The arguments
    `flattened` are [N, C, 1, 1] in the graph, [N, C] in the op. Of a sparse layer `density` is the fraction of its
    weights that are not zero, `pattern` the blocks that it takes them in.
    """

    op: str
    nodes: frozenset[Node]
    output: Node
    arguments: dict[str, Any]
    parts: int = 1
    flattened: tuple[str, ...] = ()
    pattern: str = ""
    density: float = 1.0
