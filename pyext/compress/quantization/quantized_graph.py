"""A quantized graph as a change that files replay: it takes the whole model's place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from kernelpress.emit.files.graph_json import graph_from_json, graph_to_json
from kernelpress.emit.graph import arguments, attribute, number

__all__ = ["Quantized", "check_scales"]

_LARGEST_SIZE = 2**31


@dataclass(frozen=True)
class Quantized:
    """A graph in the place of the whole model: `graph` as `emit.files.graph_json` has it, the shapes and dtypes of the
    tensors that it reads, and which of them are trained."""

    graph: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    trained: tuple[str, ...] = ()
    layer: str = ""
    kind: Literal["quantized"] = "quantized"

    @classmethod
    def of(cls, module: GraphModule) -> Quantized:
        """What makes a graph like `module`."""
        tensors: list[Tensor] = []
        graph = graph_to_json(module, tensors)
        dtypes = tuple(str(t.dtype).removeprefix("torch.") for t in tensors)
        trained = tuple(name for name, p in module.named_parameters() if p.requires_grad)
        return cls(graph, tuple(tuple(t.shape) for t in tensors), dtypes, trained)

    def apply(self, model: nn.Module) -> nn.Module:
        """The graph, over tensors on the meta device; nothing of `model` is in it."""
        if len(self.shapes) != len(self.dtypes):
            raise ValueError(f"{len(self.shapes)} shapes of {len(self.dtypes)} tensors")
        tensors = [_meta_tensor(*form) for form in zip(self.shapes, self.dtypes, strict=True)]
        try:
            module = graph_from_json(self.graph, tensors)
        except (AttributeError, IndexError, KeyError, RecursionError) as error:
            raise ValueError(f"no graph of a quantized model: {type(error).__name__} {error}") from error
        parameters = dict(module.named_parameters())
        for name in self.trained:
            if name not in parameters or not parameters[name].is_floating_point():
                raise ValueError(f"the graph of a quantized model has no {name} to train")
            parameters[name].requires_grad_(True)
        check_scales(module)
        return module

    def __str__(self) -> str:
        return f"a graph of {len(self.graph['nodes'])} operations"


def check_scales(model: nn.Module) -> None:
    """Raises `ValueError` for a scale in the graph of a quantized model that is not a normal number above 0, and for a
    zero point that its int8 values do not reach."""
    for node in model.graph.nodes if isinstance(model, GraphModule) else ():
        name = str(node.target)
        if not name.startswith(("quantized_decomposed.", "aten.fake_quantize")):
            continue
        given = arguments(node)
        found = [given[key] for key in ("scale", "scales") if key in given]
        known = [s for s in found if not isinstance(s, Node) or s.op == "get_attr"]  # others are found at each call
        for scale in [attribute(model, str(s.target)) if isinstance(s, Node) else torch.tensor(s) for s in known]:
            smallest = torch.finfo(torch.float32).tiny
            if not scale.is_meta and not bool(((scale >= smallest) & scale.isfinite()).all()):
                raise ValueError(f"{node.name}: expected scales of at least {smallest:.1e}, got {scale.min():g}")
        zero_point = number(given.get("zero_point"))
        if zero_point is None:
            continue
        limits = given["quant_min"], given["quant_max"]
        if not limits[0] <= zero_point <= limits[1]:
            raise ValueError(f"{node.name}: expected a zero point from {limits[0]} to {limits[1]}, got {zero_point:g}")


def _meta_tensor(shape: Sequence[int], dtype: str) -> Tensor:
    known = getattr(torch, dtype, None)
    if not isinstance(known, torch.dtype) or not all(type(size) is int and 0 <= size < _LARGEST_SIZE for size in shape):
        raise ValueError(f"no tensor of a quantized model is {dtype} {list(shape)}")
    return torch.empty(tuple(shape), dtype=known, device="meta")
