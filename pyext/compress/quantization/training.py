"""Quantization-aware training: the same graph with rounding that gradients pass, straight through and clipped.

    activation   quantize → dequantize      ⇄   aten.fake_quantize_per_tensor_affine
    weight       int8 values → dequantize   ⇄   float weight → aten.fake_quantize_per_channel_affine

Scales are those of the calibration: a weight trains within the range that it had. torchao's own QAT would keep
BatchNorm apart from its layer; here it is folded already, so that nothing depends on the mode.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from kernelpress.compress.changes import Quantized
from kernelpress.compress.record import PassRecord, add_record, record_of
from kernelpress.emit.assemble import copy_of, owned_copy
from kernelpress.emit.graph import arguments, attribute, constant_tensor
from kernelpress.emit.quantized import is_quantize, register_quantization, spell_out_fake
from kernelpress.measure.cost import count_parameters

__all__ = ["convert_qat", "trainable", "trains_rounding"]

aten = torch.ops.aten
_DEQUANTIZE_CHANNELS = "quantized_decomposed.dequantize_per_channel.default"
_QUANTIZE_CHANNELS = "quantized_decomposed.quantize_per_channel.default"


def trainable(quantized: GraphModule, weights: Mapping[str, Tensor], trained: Collection[str]) -> GraphModule:
    """A copy of `quantized` that trains: `weights` are the float ones by parameter, `trained` all that change."""
    module = owned_copy(quantized)
    graph = module.graph
    for node in list(graph.nodes):
        if is_quantize(node):
            with graph.inserting_before(node):
                given = arguments(node)
                fake = graph.call_function(
                    aten.fake_quantize_per_tensor_affine.default,
                    (given["input"], given["scale"], given["zero_point"], given["quant_min"], given["quant_max"]),
                )
            fake.meta = dict(given["input"].meta)
            for reader in list(node.users):
                reader.replace_all_uses_with(fake)
                graph.erase_node(reader)
            graph.erase_node(node)
        elif str(node.target) == _DEQUANTIZE_CHANNELS:
            given = arguments(node)
            values, scale = given["input"], attribute(module, str(given["scales"].target))
            _set(module, f"{given['scales'].target}_zero_point", torch.zeros(len(scale), dtype=torch.int32))
            with graph.inserting_before(node):
                zero_point = graph.get_attr(f"{given['scales'].target}_zero_point")
                fake = graph.call_function(
                    aten.fake_quantize_per_channel_affine.default,
                    (values, given["scales"], zero_point, given["axis"], given["quant_min"], given["quant_max"]),
                )
            fake.meta = dict(node.meta)
            node.replace_all_uses_with(fake)
            graph.erase_node(node)
    for name, weight in weights.items():
        _set(module, name, nn.Parameter(weight.detach().clone()))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trained and parameter.is_floating_point())
    graph.lint()
    module.recompile()
    return module


def trains_rounding(model: nn.Module) -> bool:
    """Whether it has quantizations that gradients pass: what `trainable` made."""
    return isinstance(model, GraphModule) and any("fake_quantize" in str(node.target) for node in model.graph.nodes)


def convert_qat(model: nn.Module) -> nn.Module:
    """What `quantize(..., method="qat")` returned, trained or not, with its weights in int8: the model to emit, a copy.

    Raises `ValueError` for a model without quantizations that train.
    """
    if not isinstance(model, GraphModule) or not trains_rounding(model):
        raise ValueError(f"model: expected what quantize(..., method='qat') returned, got {type(model).__name__}")
    register_quantization()
    module = owned_copy(model)
    spell_out_fake(module)
    graph = module.graph
    for node in [node for node in graph.nodes if str(node.target) == _QUANTIZE_CHANNELS]:
        source = node.args[0]
        if constant_tensor(module, source) is None:
            continue
        weight, scale, zero_point = (attribute(module, str(n.target)).detach() for n in node.args[:3])
        if weight.dtype != torch.int8:  # another layer's, too
            values = node.target(weight, scale, zero_point, *node.args[3:])
            _set(module, str(source.target), nn.Parameter(values, requires_grad=False))
        for reader in list(node.users):
            reader.args = (source, reader.args[1], None, *reader.args[3:])
        node.replace_all_uses_with(source)
        graph.erase_node(node)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    graph.eliminate_dead_code()
    converted = copy_of(module)
    earlier = record_of(model)
    flops = earlier[-1].flops_after if earlier else 0
    for record in earlier:
        add_record(converted, record)
    changes = (Quantized.of(converted),)
    parameters = count_parameters(model), count_parameters(converted)
    add_record(converted, PassRecord("convert_qat", {}, flops, flops, *parameters, changes))
    return converted


def _set(module: GraphModule, target: str, tensor: Tensor) -> None:
    """Puts a parameter, or a buffer, in the place of what has its name."""
    path, _, name = target.rpartition(".")
    owner = module.get_submodule(path)
    if hasattr(owner, name):
        delattr(owner, name)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(name, tensor)
    else:
        owner.register_buffer(name, tensor)
