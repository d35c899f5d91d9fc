"""Quantization by scales that are found at each call, as PyTorch's graphs say it: of every row by its own range, or of
a whole tensor.

    x ──▶ choose_qparams_per_token_asymmetric ──▶ scales, zero_points
    x ──▶ quantize_per_token(·, scales, zero_points) ──▶ dequantize_per_token(·, scales, zero_points) ──▶ linear

PyTorch lets no scale fall below a bound (2⁻²³ for rows, often 2⁻¹² for whole tensors). `quantize_rows` has none: what
is smaller is rounded more finely there than the graph says, so that inputs differ by less than one of its steps.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from kernelpress.emit.graph import arguments
from kernelpress.emit.quantized import NAMESPACE, register_quantization

__all__ = ["QuantizedRows", "dynamically_quantized", "is_dynamic_dequantize", "own_ranges", "quantized_rows"]

_WAYS = {
    "choose_qparams_per_token_asymmetric.default": "per_token.default",
    "choose_qparams_per_token.default": "per_token.default",
    "choose_qparams.tensor": "per_tensor.tensor",
}
"""What finds a range → what quantizes and dequantizes by it."""

_LIMITS = {torch.int8: (-128, 127), torch.uint8: (0, 255)}


@dataclass(frozen=True)
class QuantizedRows:
    """A floating tensor `x` rounded to int8 by `nodes`, from the range that is found to the floats that come back: each
    row by a scale of its own, or the `whole` tensor by one; `symmetric` with zero points 0."""

    x: Node
    nodes: tuple[Node, ...]
    symmetric: bool
    whole: bool


def _name(node: object) -> str:
    is_call = isinstance(node, Node) and node.op == "call_function"
    space, _, name = str(node.target).partition(".") if is_call else ("", "", "")  # type: ignore[attr-defined]
    return name if space == NAMESPACE else ""


def is_dynamic_dequantize(node: Node) -> bool:
    """Whether `node` may be what comes back from int8 by scales that are found at each call."""
    return _name(node) in {f"dequantize_{way}" for way in _WAYS.values()}


def quantized_rows(node: Node) -> QuantizedRows | None:
    """What `node` gives back from int8 of the whole range, if its scales are found from what is rounded."""
    if not is_dynamic_dequantize(node):
        return None
    back = arguments(node)
    names = ("scale", "zero_point") if "scale" in back else ("scales", "zero_points")
    scale, zero_point, quantize = (back[name] for name in (*names, "input"))
    found = scale.args[0] if _is_output(scale, 0) else None
    if found is None or not _is_output(zero_point, 1) or zero_point.args[0] is not found:
        return None
    way = _WAYS.get(_name(found))
    if way is None or _name(quantize) != f"quantize_{way}" or _name(node) != f"dequantize_{way}":
        return None
    given, there = arguments(found), arguments(quantize)
    if any(back[name] != there[name] for name in ("dtype", "quant_min", "quant_max", *names)):
        return None
    if given["input"] is not there["input"] or given["dtype"] != there["dtype"]:
        return None
    symmetric, whole = _name(found) == "choose_qparams_per_token.default", way.startswith("per_tensor")
    allowed = {_LIMITS.get(there["dtype"]), *([(-127, 127)] if symmetric else [])}
    limits = [(call["quant_min"], call["quant_max"]) for call in ((given, there) if whole else (there,))]
    if not allowed.issuperset(limits) or (not whole and there["dtype"] != torch.int8):
        return None
    return QuantizedRows(given["input"], (found, scale, zero_point, quantize, node), symmetric, whole)


def _is_output(node: object, index: int) -> bool:
    return isinstance(node, Node) and node.target is operator.getitem and node.args[1:] == (index,)


def own_ranges(graph: Graph) -> None:
    """Gives each reader of a tensor that was rounded so a rounding of its own, which its layer may take over."""
    for node in [node for node in graph.nodes if is_dynamic_dequantize(node)]:
        rows = quantized_rows(node)
        if rows is None or (len(node.users) == 1 and _is_private(rows)):
            continue
        for reader in list(node.users):
            own: dict[Node, Node] = {}
            for part in rows.nodes:
                with graph.inserting_before(reader):
                    own[part] = graph.node_copy(part, lambda source, own=own: own.get(source, source))  # type: ignore[misc]
                own[part].meta = _of_layer(reader, part)
            reader.replace_input_with(node, own[node])


def _is_private(rows: QuantizedRows) -> bool:
    return all(user in rows.nodes for part in rows.nodes[:-1] for user in part.users)


def dynamically_quantized(graph: Graph, x: Node, before: Node) -> Node:
    """New nodes before `before` that round each row of `x` to int8 by its own range, and back; the last of them."""
    register_quantization()
    operations = getattr(torch.ops, NAMESPACE)
    limits = (*_LIMITS[torch.int8], torch.int8)
    with graph.inserting_before(before):
        found = graph.call_function(operations.choose_qparams_per_token_asymmetric.default, (x, torch.int8))
        scale, zero_point = (graph.call_function(operator.getitem, (found, i)) for i in range(2))
        values = graph.call_function(operations.quantize_per_token.default, (x, scale, zero_point, *limits))
        back = graph.call_function(
            operations.dequantize_per_token.default, (values, scale, zero_point, *limits, torch.float32)
        )
    if (known := x.meta.get("val")) is not None:
        fake = operations.choose_qparams_per_token_asymmetric.default(known, torch.int8)
        for node, val in ((found, fake), (scale, fake[0]), (zero_point, fake[1])):
            node.meta["val"] = val
        values.meta["val"], back.meta["val"] = known.to(torch.int8), known
    for node in (found, scale, zero_point, values, back):
        node.meta = _of_layer(before, node)
    return back


def _of_layer(layer: Node, node: Node) -> dict[str, Any]:
    """What is noted on `node`, which belongs to the module of `layer`."""
    return {**layer.meta, "val": node.meta.get("val")}
