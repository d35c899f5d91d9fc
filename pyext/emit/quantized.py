"""Quantize/dequantize pairs in graphs, as PyTorch's quantizers leave them: what they say, and one way to write them."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from kernelpress.emit.graph import arguments, constant_tensor, number, value
from kernelpress.runtime.torch_private import define_quantized_ops as register_quantization

__all__ = [
    "NAMESPACE",
    "Affine",
    "QuantizedWeight",
    "affine_of",
    "canonicalize_quantization",
    "dequantized",
    "hand_on_quantized",
    "is_dequantize",
    "is_quantize",
    "is_rounding",
    "merge_quantization",
    "quantized_weight",
    "register_quantization",
    "remember_quantized",
    "spell_out_fake",
    "without_fake",
    "without_scales",
]

aten = torch.ops.aten

NAMESPACE = "quantized_decomposed"
"""Of the operations that stand in such graphs. They are registered by the quantizer, and may be missing without it."""

_WHOLE_MOVES = (
    aten.channel_shuffle.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.flatten.using_ints,
    aten.permute.default,
    aten.reshape.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.transpose.int,
    aten.unflatten.int,
    aten.unsqueeze.default,
)
"""What gives every element of its one tensor once."""

_MOVES = (*_WHOLE_MOVES, aten.narrow.default, aten.select.int, aten.slice.Tensor)

_SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)
"""Moves that give several tensors, each read by `getitem`."""

_QUANTIZED_WEIGHT = "kernelpress_quantized_weight"

_BY_ROW = frozenset(
    {
        "kernelpress.quantize_rows.default",
        *(
            f"{NAMESPACE}.{name}"
            for name in (
                *("choose_qparams.tensor", "quantize_per_tensor.tensor", "dequantize_per_tensor.tensor"),
                *("choose_qparams_per_token.default", "choose_qparams_per_token_asymmetric.default"),
                *("quantize_per_token.default", "dequantize_per_token.default"),
            )
        ),
    }
)
"""What works with scales that are found at each call."""


@dataclass(frozen=True)
class Affine:
    """int8 values that stand for `(value − zero_point) · scale`."""

    scale: float
    zero_point: int


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as int8 `values` times a float64 `scale: [C_out]` of its rows."""

    values: Tensor
    scale: Tensor

    def scaled(self, factor: Tensor) -> QuantizedWeight:
        """Its rows times `factor: [C_out]`, or times one number."""
        return replace(self, scale=self.scale * factor.to(self.scale))


def is_quantize(node: Node) -> bool:
    """Whether `node` quantizes per tensor, by plain numbers."""
    return _is(node, "quantize_per_tensor.default")


def is_dequantize(node: Node) -> bool:
    """Whether `node` dequantizes per tensor, by plain numbers."""
    return _is(node, "dequantize_per_tensor.default")


def is_rounding(node: Node) -> bool:
    """Whether `node` quantizes activations: per tensor or per row, by known scales or by such that are found."""
    return any(_is(node, f"quantize_{way}") for way in ("per_tensor.default", "per_tensor.tensor", "per_token.default"))


def without_scales(node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, with `...` in place of numbers that are scales and zero points, on which no time
    depends."""
    args = (node.args[0], ..., ..., *node.args[3:]) if is_quantize(node) or is_dequantize(node) else node.args
    kwargs = {
        name: ... if name.endswith(("scale", "zero_point")) and isinstance(argument, (int, float)) else argument
        for name, argument in node.kwargs.items()
    }
    return args, kwargs


def _is(node: Node, name: str) -> bool:
    return node.op == "call_function" and str(node.target) == f"{NAMESPACE}.{name}"


def affine_of(node: Node) -> Affine | None:
    """What `node`, which quantizes or dequantizes per tensor, does with the whole range of int8; None for others.

    A range cut short saturates elsewhere, which no op of ours does; values that are dequantized lie in it anyhow.
    """
    if not (is_quantize(node) or is_dequantize(node)):
        return None
    given = arguments(node)
    is_whole = is_dequantize(node) or (given["quant_min"], given["quant_max"]) == (-128, 127)
    if given["dtype"] != torch.int8 or not is_whole:
        return None
    scale, zero_point = number(given["scale"]), number(given["zero_point"])
    return None if scale is None or zero_point is None else Affine(scale, int(zero_point))


def dequantized(node: Node) -> tuple[Node, Affine] | None:
    """The int8 tensor that `node` dequantizes for one reader alone, if it does."""
    affine = affine_of(node) if is_dequantize(node) and len(node.users) == 1 else None
    return None if affine is None else (node.args[0], affine)  # type: ignore[return-value]


def canonicalize_quantization(graph_module: GraphModule) -> None:
    """Rewrites, in place: scales and zero points in constant tensors as numbers, uint8 as int8, and gives each reader
    of a dequantized tensor a dequantization of its own."""
    graph = graph_module.graph
    nodes = [node for node in graph.nodes if str(node.target).startswith(f"{NAMESPACE}.")]
    for node in nodes:
        _with_plain_numbers(graph_module, node)
    for node in nodes:
        if is_quantize(node):
            _to_int8(node)
    _stay_quantized(graph)
    for node in [node for node in graph.nodes if is_dequantize(node)]:
        _one_for_each_reader(graph, node)


def without_fake(model: nn.Module) -> nn.Module:
    """`model`, or a copy over its tensors without roundings that quantization-aware training leaves: they cannot be
    exported for batches of any size."""
    if not isinstance(model, GraphModule) or not any("fake_quantize" in str(node.target) for node in model.graph.nodes):
        return model
    graph = Graph()
    graph.set_codegen(model.graph._codegen)
    graph.output(graph.graph_copy(model.graph, {}))
    copied = GraphModule(model, graph)
    spell_out_fake(copied)
    copied.recompile()
    return copied


def spell_out_fake(graph_module: GraphModule) -> None:
    """Writes roundings that quantization-aware training leaves, which give floats, as quantize/dequantize pairs in
    int8, where they keep its range and are of float32. Gradients, which pass through the former, end at the latter."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.target is aten.fake_quantize_per_tensor_affine.default:
            kind, given = "per_tensor", [*node.args[1:]]
        elif node.target is aten.fake_quantize_per_channel_affine.default:
            kind, given = "per_channel", [*node.args[1:]]
        else:
            continue
        rounded = node.args[0].meta.get("val")
        if not -128 <= given[-2] <= given[-1] <= 127 or (rounded is not None and rounded.dtype != torch.float32):
            continue
        register_quantization()
        operations = getattr(torch.ops, NAMESPACE)
        with graph.inserting_before(node):
            values = graph.call_function(
                getattr(operations, f"quantize_{kind}").default, (node.args[0], *given, torch.int8)
            )
            result = graph.call_function(
                getattr(operations, f"dequantize_{kind}").default, (values, *given, torch.int8)
            )
        result.meta = dict(node.meta)
        values.meta = node.meta | ({"val": node.meta["val"].to(torch.int8)} if "val" in node.meta else {})
        node.replace_all_uses_with(result)
        graph.erase_node(node)


def _with_plain_numbers(graph_module: GraphModule, node: Node) -> None:
    if not (_is(node, "quantize_per_tensor.tensor") or _is(node, "dequantize_per_tensor.tensor")):
        return
    given = arguments(node)
    scale, zero_point = (constant_tensor(graph_module, given[name]) for name in ("scale", "zero_point"))
    if scale is None or zero_point is None or scale.numel() != 1 or zero_point.numel() != 1:
        return
    node.target = node.target.overloadpacket.default  # type: ignore[union-attr]
    _give(node, scale=float(scale), zero_point=int(zero_point))


def _to_int8(node: Node) -> None:
    """Lets a tensor of uint8 hold 128 less in int8, if all that reads it dequantizes it."""
    readers = list(node.users)
    if not all(is_dequantize(reader) for reader in readers):
        return
    given_to = {n: arguments(n) for n in (node, *readers)}
    if any(g["dtype"] != torch.uint8 or number(g["zero_point"]) is None for g in given_to.values()):
        return
    for n, given in given_to.items():
        shifted = {name: given[name] - 128 for name in ("zero_point", "quant_min", "quant_max")}
        _give(n, **shifted, dtype=torch.int8)
    node.meta["val"] = node.meta["val"].to(torch.int8)


def _stay_quantized(graph: Graph) -> None:
    """Moves values about in int8 wherever they come dequantized or will be quantized, which changes no value: a
    dequantization goes behind what moves its result, a quantization before what moves the same number of elements;
    where one meets the other and they agree, both go."""
    for node in list(graph.nodes):
        if node.op == "call_function":
            _dequantize_later(graph, node)
    waiting = [node for node in graph.nodes if affine_of(node) is not None and is_quantize(node)]
    while waiting:
        node = waiting.pop()
        waiting += _quantize_earlier(graph, node)
    for node in [node for node in graph.nodes if is_quantize(node)]:
        source = node.args[0]
        if affine_of(node) is not None and is_dequantize(source) and affine_of(source) == affine_of(node):
            node.replace_all_uses_with(source.args[0])
            graph.erase_node(node)
    for node in [node for node in graph.nodes if is_dequantize(node) and not node.users]:
        graph.erase_node(node)


def _dequantize_later(graph: Graph, node: Node) -> None:
    """Lets `node`, if it only moves dequantized values, move the int8 ones."""
    sources = _tensors(node)
    if not all(is_dequantize(source) and affine_of(source) is not None for source in sources):
        return
    first = sources[0] if sources else None
    is_split = node.target in _SPLITS and all(user.target is operator.getitem for user in node.users)
    if node.target is aten.cat.default:
        is_move = len({(affine_of(source), value(source).dtype) for source in sources}) == 1
    else:
        is_move = (node.target in _MOVES or is_split) and len(sources) == 1
    if first is None or not is_move or any(source.args[0].op == "get_attr" for source in sources):  # type: ignore[union-attr]
        return
    for source in sources:
        node.replace_input_with(source, source.args[0])  # type: ignore[arg-type]
    _hold_int8(node)
    for moved in list(node.users) if is_split else [node]:
        if is_split:
            _hold_int8(moved)
        with graph.inserting_after(moved):
            back = graph.node_copy(first, lambda source: source)
        moved.replace_all_uses_with(back)
        back.meta = {**moved.meta, "val": value(moved).to(value(first).dtype)}
        back.args = (moved, *back.args[1:])


def _quantize_earlier(graph: Graph, node: Node) -> list[Node]:
    """Quantizes what `node` quantizes before it is moved there, if it is; the new quantizations."""
    move = node.args[0]
    if not isinstance(move, Node) or len(move.users) != 1 or move.target not in (*_WHOLE_MOVES, aten.cat.default):
        return []
    found: list[Node] = []
    for source in _tensors(move):
        with graph.inserting_before(move):
            quantize = graph.node_copy(node, lambda source: source)
        quantize.args = (source, *node.args[1:])
        quantize.meta = {**source.meta, "val": value(source).to(torch.int8)}
        move.replace_input_with(source, quantize)
        found.append(quantize)
    _hold_int8(move)
    node.replace_all_uses_with(move)
    graph.erase_node(node)
    return found


def _tensors(node: Node) -> list[Node]:
    """What `node` reads, but for sizes."""
    return [source for source in node.all_input_nodes if isinstance(value(source), Tensor)]


def _hold_int8(node: Node) -> None:
    held = value(node)
    node.meta["val"] = held.to(torch.int8) if isinstance(held, Tensor) else [part.to(torch.int8) for part in held]


def _give(node: Node, **changed: Any) -> None:
    given = arguments(node) | changed
    schema = node.target._schema  # type: ignore[union-attr]
    node.args = tuple(given[a.name] for a in schema.arguments if not a.kwarg_only)
    node.kwargs = {a.name: given[a.name] for a in schema.arguments if a.kwarg_only and given[a.name] is not None}


def _one_for_each_reader(graph: Graph, node: Node) -> None:
    for reader in list(node.users)[1:]:
        with graph.inserting_before(reader):
            own = graph.node_copy(node, lambda source: source)
        own.meta = dict(node.meta)
        reader.replace_input_with(node, own)


def merge_quantization(graph: Graph) -> None:
    """Undoes what `canonicalize_quantization` and `own_ranges` did for readers that need none of their own: computes
    equal dequantizations of a tensor, and equal quantizations of its rows, once."""
    first: dict[str, Node] = {}
    for node in list(graph.nodes):
        target = str(node.target) if node.op == "call_function" else ""
        is_output = node.target is operator.getitem and str(node.args[0].target) in _BY_ROW
        if not (target in _BY_ROW or target == "kernelpress.dequantize.default" or is_output or is_dequantize(node)):
            continue
        known = first.setdefault(f"{node.target}{node.args}{node.kwargs}", node)
        if known is not node:
            node.replace_all_uses_with(known)
            graph.erase_node(node)


def remember_quantized(constant: Node, node: Node, inputs: dict[Node, Tensor]) -> None:
    """Notes on `constant`, the value of the dequantization `node` of constant `inputs`, which int8 weight it is."""
    per_tensor = is_dequantize(node)
    if not per_tensor and not _is(node, "dequantize_per_channel.default"):
        return
    given = arguments(node)
    values = inputs[given["input"]].to(torch.int32)
    if per_tensor:
        zero_point: Any = given["zero_point"]
        scale = torch.full((values.shape[0],), float(given["scale"]), dtype=torch.float64) if values.dim() else None
    else:
        is_by_row = given["axis"] % max(values.dim(), 1) == 0
        scale = inputs[given["scales"]].double() if is_by_row else None
        zero_point = 0 if given["zero_points"] is None else inputs[given["zero_points"]]
        zero_point = torch.as_tensor(zero_point).reshape(-1, *(1,) * (values.dim() - 1))
    centred = values - zero_point
    if scale is None or values.numel() == 0 or int(centred.min()) < -128 or int(centred.max()) > 127:
        return
    constant.meta[_QUANTIZED_WEIGHT] = QuantizedWeight(centred.to(torch.int8), scale.to(values.device))


def quantized_weight(constant: Node) -> QuantizedWeight | None:
    """The int8 weight that a constant is, if it was dequantized from one."""
    return constant.meta.get(_QUANTIZED_WEIGHT)


def hand_on_quantized(old: Node, new: Node, factor: Tensor) -> None:
    """Notes on `new` that it is the weight `old` with its rows times `factor`."""
    weight = quantized_weight(old)
    if weight is not None:
        new.meta[_QUANTIZED_WEIGHT] = weight.scaled(factor)
