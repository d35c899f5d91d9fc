"""`Match`: one kernelpress layer that fits somewhere on a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

__all__ = ["Match", "RowScales"]


@dataclass(frozen=True)
class RowScales:
    """How a floating input becomes int8 at each call: each row by a scale of its own, or the `whole` tensor by one;
    `symmetric` without zero points."""

    symmetric: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Match:
    """One kernelpress layer that can stand for `nodes`, of which only `output` is read by the rest of the graph.

    `arguments` are the op's by name; graph nodes among them are its inputs. `parts` counts the layers fused into one:
    1 for a convolution with its epilogue, 2 for a separable convolution, 3 for an inverted residual. The arguments
    `flattened` are [N, C, 1, 1] in the graph, [N, C] in the op. With `row_scales` the argument `x` is floating in the
    graph, and the op takes its rows in int8. Of a sparse layer `density` is the fraction of its
    weights that are not zero, `pattern` the blocks that it takes them in.
    """

    op: str
    nodes: frozenset[Node]
    output: Node
    arguments: dict[str, Any]
    parts: int = 1
    flattened: tuple[str, ...] = ()
    row_scales: RowScales | None = None
    pattern: str = ""
    density: float = 1.0
