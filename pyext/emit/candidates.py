"""The ways to execute each place: kernelpress layers on every backend, and the original operations in both forms.

A candidate carries a fragment, a small graph that computes its output from its inputs: the same fragment is timed and,
if chosen, copied into the emitted graph. The form of a value is the `Layout` of its memory: images between operations
lie as whoever computes them gives them, and are turned where somebody reads them otherwise.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from kernelpress.emit.fuse import Match
from kernelpress.emit.fuse.match import RowScales
from kernelpress.emit.graph import attribute, channels_last_if_image, value
from kernelpress.ops import registry
from kernelpress.ops.backends.kernel import Kernel
from kernelpress.ops.layout import DENSE, PIXELS, Layout
from kernelpress.trace.regions import is_written

__all__ = [
    "FORMS",
    "ORIGINAL",
    "Candidate",
    "candidates_for",
    "constant",
    "conversion",
    "form_of",
    "mark_channels_last",
    "original",
    "turned",
]

aten = torch.ops.aten

ORIGINAL = "aten"
"""Name of the candidates that are the original operations."""

FORMS = (PIXELS, DENSE)
"""Those that images may lie in: as our layers take and give them, and as torch makes them."""

MEMORY_FORMATS = {PIXELS: torch.channels_last, DENSE: torch.contiguous_format}

CHANNELS_LAST_CONSTANT = "kernelpress_channels_last"


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to compute `output` from `inputs`, in place of the graph's `nodes`.

    `name` is the op and `variant` its backend; for the original operations they are "aten" and the memory format.
    The placeholders of `fragment` stand for `inputs`, in their order, which come in the forms `reads`. `gives` is the
    form of the output. None is the form of what is no image between operations, and of graph inputs: they lie as they
    lie. `kernel` is ours, where one of ours runs; `pattern` and `density` are a sparse layer's (`Match`).
    """

    name: str
    variant: str
    nodes: frozenset[Node]
    output: Node
    inputs: tuple[Node, ...]
    reads: tuple[Layout | None, ...]
    gives: Layout | None
    fragment: Graph
    parts: int = 1
    kernel: Kernel | None = None
    pattern: str = ""
    density: float = 1.0

    @property
    def label(self) -> str:
        """What records and tables call it, as in `conv2d[cpu]` or `sparse_conv2d 4×1[cpu]`."""
        return f"{self.name} {self.pattern}[{self.variant}]" if self.pattern else f"{self.name}[{self.variant}]"

    @property
    def placeholders(self) -> list[Node]:
        """The nodes of `fragment` that stand for `inputs`, in their order."""
        return [node for node in self.fragment.nodes if node.op == "placeholder"]

    @property
    def is_original(self) -> bool:
        """Whether it runs the operations that the model came with."""
        return self.name == ORIGINAL

    @property
    def mixes_inputs(self) -> bool:
        """Whether values that are not finite spread to outputs that do not depend on them."""
        return self.kernel is not None and self.kernel.input_limit is not None


def candidates_for(match: Match, order: Mapping[Node, int]) -> list[Candidate]:
    """Every way to execute the nodes of `match`; `order` is the position of each node in the graph."""
    nodes = sorted(match.nodes, key=order.__getitem__)
    layers = [_layer(match, entry) for entry in registry.operator(match.op).implementations if _serves(entry, match)]
    return [*layers, *(original(nodes, form) for form in FORMS)]


def _serves(entry: registry.Implementation, match: Match) -> bool:
    """Kernels that like blocks skip zeros: they are for weights that have enough of them, and the others for all."""
    return entry.kernel is None or bool(entry.kernel.likes.blocks) == bool(match.pattern)


def constant(graph_module: GraphModule, node: Node) -> Any:
    """The constant of one `get_attr` node, in the memory format the node wants it."""
    found = attribute(graph_module, str(node.target))
    is_wanted = node.meta.get(CHANNELS_LAST_CONSTANT) and isinstance(found, Tensor) and not is_written(node)
    return channels_last_if_image(found) if is_wanted else found


def mark_channels_last(node: Node) -> None:
    """Makes the `get_attr` node `node` read its constant in channels_last memory."""
    node.meta[CHANNELS_LAST_CONSTANT] = True


class _Fragment:
    """A graph under construction that turns foreign nodes into its own: constants as such, all others as inputs."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.inputs: list[Node] = []
        self._own: dict[Node, Node] = {}

    def own(self, node: Node) -> Node:
        if node not in self._own:
            if node.op == "get_attr":
                self._own[node] = self.graph.get_attr(str(node.target))
            else:
                self.inputs.append(node)
                self._own[node] = self.graph.placeholder(f"input_{len(self.inputs)}")
            self._own[node].meta = dict(node.meta)
        return self._own[node]

    def replace(self, node: Node, own: Node) -> None:
        self._own[node] = own

    def declare(self, nodes: Iterable[Node]) -> None:
        """Makes the inputs and constants first: placeholders must stand before calls."""
        for node in nodes:
            self.own(node)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        return self.graph.call_function(target, args, kwargs)

    def candidate(
        self, name: str, variant: str, nodes: frozenset[Node], output: Node, result: Node, form: Layout, **fields: Any
    ) -> Candidate:
        """The finished graph, which computes `result` for `output`, as a candidate whose images lie in `form`."""
        self.graph.output(result)
        reads = tuple(form_of(node, form) for node in self.inputs)
        gives = form_of(output, form)
        return Candidate(name, variant, nodes, output, tuple(self.inputs), reads, gives, self.graph, **fields)


def _layer(match: Match, entry: registry.Implementation) -> Candidate:
    fragment = _Fragment()
    op = registry.operator(match.op)
    fragment.declare(given for given in match.arguments.values() if isinstance(given, Node))
    given = {name: fragment.own(a) if isinstance(a, Node) else a for name, a in match.arguments.items()}
    for name in match.flattened:
        given[name] = fragment.call(aten.flatten.using_ints, given[name], 1)
    if match.row_scales is not None:
        given |= _in_int8(fragment, given["x"], match.row_scales, entry.backend)
    tensors = [given.pop(name, None) for name in op.tensors]
    while tensors and tensors[-1] is None:
        tensors.pop()
    result = fragment.call(getattr(torch.ops.kernelpress, match.op).default, *tensors, **given, backend=entry.backend)
    form = PIXELS if entry.kernel is None or entry.kernel.out is None else entry.kernel.out
    fields = {"parts": match.parts, "kernel": entry.kernel, "pattern": match.pattern, "density": match.density}
    return fragment.candidate(match.op, entry.backend, match.nodes, match.output, result, form, **fields)


def _in_int8(fragment: _Fragment, x: Node, scales: RowScales, backend: str) -> dict[str, Node]:
    """The arguments of a product of `x`, whose rows are quantized before it."""
    flat = fragment.call(aten.reshape.default, x, [1, -1]) if scales.whole else x
    rows = fragment.call(torch.ops.kernelpress.quantize_rows.default, flat, symmetric=scales.symmetric, backend=backend)
    values, row_scale, zero_point = (fragment.call(operator.getitem, rows, i) for i in range(3))
    given = {"row_scale": row_scale} | ({} if scales.symmetric else {"row_zero_point": zero_point})
    if scales.whole:
        like = fragment.call(aten.select.int, x, -1, 0)
        given = {
            name: fragment.call(aten.contiguous.default, fragment.call(aten.expand_as.default, scale, like))
            for name, scale in given.items()
        }
        values = fragment.call(aten.reshape_as.default, values, x)
    return {"x": values, **given}


def original(nodes: list[Node], form: Layout) -> Candidate:
    """The operations `nodes`, in execution order, as they came, on images in `form`; the last one computes the
    output."""
    fragment = _Fragment()
    inner = set(nodes)
    outer = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in inner)
    fragment.declare(outer)
    for source in outer:
        if source.op == "get_attr" and form is PIXELS:
            mark_channels_last(fragment.own(source))
        elif source.op == "placeholder" and form is DENSE and _is_image(source):
            fragment.replace(source, fragment.call(aten.contiguous.default, fragment.own(source)))
    for node in nodes:
        fragment.replace(node, fragment.graph.node_copy(node, fragment.own))
    return fragment.candidate(ORIGINAL, form.name, frozenset(nodes), nodes[-1], fragment.own(nodes[-1]), form)


def conversion(node: Node, given: Layout, wanted: Layout) -> Candidate:
    """`node`, an image that lies as `given`, turned into the form `wanted`; nothing is computed."""
    fragment = _Fragment()
    result = turned(fragment.graph, fragment.own(node), wanted)
    fragment.graph.output(result)
    return Candidate("conversion", wanted.name, frozenset(), node, (node,), (given,), wanted, fragment.graph)


def turned(graph: Graph, node: Node, form: Layout) -> Node:
    """A call in `graph` that turns the image `node` into `form`."""
    result = graph.call_function(aten.contiguous.default, (node,), {"memory_format": MEMORY_FORMATS[form]})
    result.meta = dict(node.meta)
    return result


def form_of(node: Node, form: Layout) -> Layout | None:
    """`form` if `node` is an image that an operation computes, else None."""
    return form if node.op == "call_function" and _is_image(node) else None


def _is_image(node: Node) -> bool:
    tensor = value(node)
    return isinstance(tensor, Tensor) and tensor.dim() == 4 and tensor.is_floating_point()
