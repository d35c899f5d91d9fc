"""Layers of int8 tensors, found by the quantizations around them; int8 stays int8 where one layer's output is the
next one's input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from kernelpress.emit.canonical import activation_of
from kernelpress.emit.fuse.match import Match, RowScales
from kernelpress.emit.fuse.pools import averaged_image, max_window
from kernelpress.emit.fuse.stages import Stage
from kernelpress.emit.graph import arguments, constant_node, constant_tensor, only_user, shape, value
from kernelpress.emit.quantized import Affine, affine_of, dequantized, is_dequantize, is_quantize, quantized_weight
from kernelpress.emit.quantized_rows import quantized_rows
from kernelpress.ops.int8_checks import FLOATS
from kernelpress.ops.int8_sparse import LIKES, share_of_cells

__all__ = ["int8_gates", "int8_layers", "int8_pools", "int8_sums", "quantizers"]

aten = torch.ops.aten

_OPS = {
    "linear": "int8_matmul",
    "pointwise_conv2d": "int8_conv2d",
    "conv2d": "int8_conv2d",
    "depthwise_conv2d": "int8_depthwise_conv2d",
}


@dataclass(frozen=True)
class _End:
    """How a layer hands its result on: as `output`, in int8 where the arguments name an `output_scale`."""

    nodes: frozenset[Node]
    output: Node
    arguments: dict[str, Any]


def quantizers(node: Node) -> Iterator[Match]:
    """The quantization or dequantization that `node` is, per tensor."""
    affine = affine_of(node)
    floating = node.args[0] if is_quantize(node) else node
    if affine is None or not shape(node) or value(floating).dtype not in FLOATS:  # type: ignore[arg-type]
        return
    given = {"x": node.args[0], "scale": affine.scale, "zero_point": affine.zero_point}
    if is_dequantize(node):
        yield Match("dequantize", frozenset({node}), node, given | {"output_dtype": value(node).dtype})
    else:
        yield Match("quantize", frozenset({node}), node, given)


def int8_sums(node: Node) -> Iterator[Match]:
    """The sum of two dequantized tensors that `node` is."""
    if node.target is not aten.add.Tensor or arguments(node)["alpha"] != 1:
        return
    first, second = (_dequantized(argument) for argument in node.args[:2])
    if first is None or second is None or shape(node.args[0]) != shape(node.args[1]):
        return
    if value(node).dtype not in FLOATS:
        return
    nodes = frozenset({node, *node.all_input_nodes})
    user = only_user(node)
    activation = activation_of(user) if user is not None else None
    summed = _end(nodes, node)
    if activation is not None:
        summed = _end(nodes | {user}, user)  # type: ignore[arg-type]
    given = {
        "x": first[0],
        "other": second[0],
        "input_scale": first[1].scale,
        "input_zero_point": first[1].zero_point,
        "other_scale": second[1].scale,
        "other_zero_point": second[1].zero_point,
        "activation": activation or "identity",
    }
    yield Match("int8_add", summed.nodes, summed.output, given | summed.arguments)


def int8_gates(node: Node) -> Iterator[Match]:
    """The product of a dequantized image with a dequantized value a channel that `node` is."""
    if node.target is not aten.mul.Tensor or value(node).dtype not in FLOATS:
        return
    image, gate = sorted(node.args[:2], key=lambda a: (shape(a) or ())[2:] == (1, 1))
    sizes, x, factor = shape(image) or (), _dequantized(image), _dequantized(gate)
    if x is None or factor is None or len(sizes) != 4 or shape(gate) != (*sizes[:2], 1, 1) or image is gate:
        return
    end = _end(frozenset({node, *node.all_input_nodes}), node)
    given = {
        "x": x[0],
        "input_scale": x[1].scale,
        "input_zero_point": x[1].zero_point,
        "gate": factor[0],
        "gate_scale": factor[1].scale,
        "gate_zero_point": factor[1].zero_point,
    }
    yield Match("int8_gate", end.nodes, end.output, given | end.arguments)


def int8_pools(node: Node) -> Iterator[Match]:
    """The mean over all pixels of a dequantized image, or its largest values, quantized as the image was."""
    window, image = max_window(node), averaged_image(node)
    source = _dequantized(node.args[0]) if window is not None or image is not None else None
    if source is None or value(node).dtype not in FLOATS:
        return
    x, affine = source
    end = _end(frozenset({node, node.args[0]}), node)  # type: ignore[arg-type]
    if image is not None:
        given = {"x": x, "input_scale": affine.scale, "input_zero_point": affine.zero_point}
        given["keepdim"] = len(shape(node) or ()) == 4
        yield Match("int8_global_avg_pool2d", end.nodes, end.output, given | end.arguments)
    elif window is not None and affine_of(end.output) == affine:
        yield Match("max_pool2d", end.nodes, end.output, {"x": x, **window})


def _dequantized(argument: Any) -> tuple[Node, Affine] | None:
    return dequantized(argument) if isinstance(argument, Node) else None


def _end(nodes: frozenset[Node], output: Node) -> _End:
    """With the quantization that alone reads `output`, if there is one."""
    quantize = only_user(output)
    affine = affine_of(quantize) if quantize is not None and is_quantize(quantize) else None
    if quantize is None or affine is None:
        return _End(nodes, output, {"output_dtype": value(output).dtype})
    scales = {"output_scale": affine.scale, "output_zero_point": affine.zero_point}
    return _End(nodes | {quantize}, quantize, scales)


def int8_layers(graph_module: GraphModule, stages: list[Stage]) -> Iterator[Match]:
    """Layers of a dequantized input and a dequantized constant weight; linear ones also of an input that is quantized
    by scales that are found at each call."""
    known: dict[tuple[Node, Node | None], dict[str, Any]] = {}
    for stage in stages:
        source = _dequantized(stage.x)
        rows = quantized_rows(stage.x) if stage.kind == "linear" and len(stage.x.users) == 1 else None
        if (source is None and rows is None) or stage.kind not in _OPS:
            continue
        if quantized_weight(stage.weight) is None or value(stage.output).dtype not in FLOATS:
            continue
        key = (stage.weight, stage.bias)
        if key not in known:
            known[key] = _parameters(graph_module, stage)
        given: dict[str, Any] = {**known[key], **stage.geometry, "activation": stage.activation}
        scales = None
        if source is not None:
            x, affine = source
            given |= {"x": x, "input_scale": affine.scale, "input_zero_point": affine.zero_point}
            inner = frozenset({stage.x})
        else:
            assert rows is not None
            given |= {"x": rows.x}
            scales, inner = RowScales(rows.symmetric, rows.whole), frozenset(rows.nodes)
        end = _with_residual(replace(stage, nodes=stage.nodes | inner))
        match = Match(_OPS[stage.kind], end.nodes, end.output, given | end.arguments, row_scales=scales)
        yield match
        yield from _sparse(graph_module, match)


def _sparse(graph_module: GraphModule, match: Match) -> Iterator[Match]:
    """The same layer for a kernel that skips zeros, where the weight has enough of them."""
    if match.op != "int8_conv2d":
        return
    weight = constant_tensor(graph_module, match.arguments["weight"])
    assert weight is not None
    (block,) = LIKES.blocks
    if share_of_cells(weight) <= LIKES.density:
        density = int(weight.count_nonzero()) / weight.numel()
        yield replace(match, pattern=f"{block[0]}×{block[1]}", density=density)


def _with_residual(stage: Stage) -> _End:
    """A float residual comes with a float output, an int8 one with an int8 output."""
    end = _end(stage.nodes, stage.output)
    if stage.residual is None:
        return end
    source = _dequantized(stage.residual)
    if "output_scale" in end.arguments and source is not None:
        residual, affine = source
        given = {"residual": residual, "residual_scale": affine.scale, "residual_zero_point": affine.zero_point}
        return replace(end, nodes=end.nodes | {stage.residual}, arguments=end.arguments | given)
    return _End(stage.nodes, stage.output, {"residual": stage.residual, "output_dtype": value(stage.output).dtype})


def _parameters(graph_module: GraphModule, stage: Stage) -> dict[str, Any]:
    """The arguments of the op that are constant tensors."""
    weight = quantized_weight(stage.weight)
    assert weight is not None
    target = str(stage.weight.target)
    given: dict[str, Any] = {
        "weight": constant_node(graph_module, f"{target}_int8", weight.values, stage.weight),
        "weight_scale": constant_node(graph_module, f"{target}_scale", weight.scale.float(), stage.weight),
        "bias": stage.bias,
    }
    bias = constant_tensor(graph_module, stage.bias)
    if stage.bias is not None and bias is not None and bias.dtype != torch.float32:
        given["bias"] = constant_node(graph_module, f"{stage.bias.target}_float32", bias.float(), stage.bias)
    return given
