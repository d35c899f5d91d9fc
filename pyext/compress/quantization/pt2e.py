"""All that is used of torchao: its PT2E flow puts observers where our quantizer wants int8, and quantize/dequantize
pairs in their place.

torchao is imported when it is needed; what it says meanwhile of extensions that it cannot load is not told.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from kernelpress.compress.quantization.places import Places, Point
from kernelpress.compress.quantization.ranges import LIMITS, OBSERVERS, WEIGHT_LIMIT, Histogram, affine, weight_scale

__all__ = ["NotFiniteError", "Observed", "convert"]


@functools.cache
def torchao() -> SimpleNamespace:
    """What is used of torchao. Raises `ImportError` that says how to install it."""
    with _silenced():
        try:
            from torchao.quantization.pt2e import ObserverBase
            from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
            from torchao.quantization.pt2e.quantizer import (
                QuantizationAnnotation,
                QuantizationSpec,
                Quantizer,
                SharedQuantizationSpec,
            )
        except ImportError as error:
            raise ImportError(f"quantization needs torchao ({error}): pip install 'kernelpress[quantize]'") from error
    return SimpleNamespace(
        ObserverBase=ObserverBase,
        QuantizationAnnotation=QuantizationAnnotation,
        QuantizationSpec=QuantizationSpec,
        Quantizer=Quantizer,
        SharedQuantizationSpec=SharedQuantizationSpec,
        convert_pt2e=convert_pt2e,
        prepare_pt2e=prepare_pt2e,
    )


@contextmanager
def _silenced() -> Iterator[None]:
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


class Observed:
    """A folded graph with observers, put into it: `module` to run on calibration data, and what is seen of each group.

    `seen[i]` belongs to `places.groups[i]`.
    """

    def __init__(self, module: GraphModule, places: Places, observer: str) -> None:
        self.seen = [Histogram() for _ in places.groups]
        self.rule = observer
        self.is_counted = observer != "minmax"
        with _silenced():
            self.module: GraphModule = torchao().prepare_pt2e(module, _quantizer(places, self))

    def range_of(self, group: int) -> tuple[float, float]:
        """The range of a group of tensors."""
        seen = self.seen[group]
        if not seen.low < seen.high:
            return (0.0, 0.0) if seen.constant is None else (seen.low, seen.high)
        return OBSERVERS[self.rule](seen)


def convert(observed: Observed) -> GraphModule:
    """The graph with quantize/dequantize pairs in the place of observers, weights in int8; `observed` is used up."""
    with _silenced():
        converted: GraphModule = torchao().convert_pt2e(observed.module)
    return converted


def _quantizer(places: Places, observed: Observed) -> Any:
    """Tells torchao of the places."""
    ao = torchao()
    shared = ao.SharedQuantizationSpec

    class Int8Quantizer(ao.Quantizer):  # type: ignore[name-defined]
        """Weights symmetric per output channel, activations affine per tensor, each where int8 kernels have it."""

        def annotate(self, model: GraphModule) -> GraphModule:
            # The places were found in the graph that this one is a copy of.
            own = {node.name: node for node in model.graph.nodes}
            for index, group in enumerate(places.groups):
                first: Point | None = None
                for node, *reader in ((p,) if isinstance(p, Node) else p for p in group):
                    point = (own[node.name], own[reader[0].name]) if reader else own[node.name]
                    _annotate(point, _activation_spec(observed, index) if first is None else shared(first))
                    first = first or point
            weights: dict[Node, Point] = {}
            for layer in places.layers:
                point = own[layer.weight.name], own[layer.node.name]
                known = weights.setdefault(layer.weight, point)
                _annotate(point, _weight_spec(layer.axis) if known is point else shared(known))
            return model

        def validate(self, model: GraphModule) -> None:
            """What is annotated was found in the graph."""

    return Int8Quantizer()


def _annotate(point: Point, spec: Any) -> None:
    node = point if not isinstance(point, tuple) else point[1]
    known = node.meta.setdefault("quantization_annotation", torchao().QuantizationAnnotation(_annotated=True))
    known.allow_implicit_sharing = False
    if isinstance(point, tuple):
        known.input_qspec_map[point[0]] = spec
    else:
        known.output_qspec = spec


def _activation_spec(observed: Observed, group: int) -> Any:
    class RangeObserver(torchao().ObserverBase):  # type: ignore[misc]
        """Shows a tensor to the histogram of its group."""

        def __init__(self, **options: Any) -> None:
            super().__init__(dtype=options["dtype"])
            self.qscheme = options["qscheme"]
            self.quant_min, self.quant_max = LIMITS

        def forward(self, x: Tensor) -> Tensor:
            if not bool(x.isfinite().all()):
                raise NotFiniteError(group)
            observed.seen[group].update(x, is_counted=observed.is_counted)
            return x

        def calculate_qparams(self) -> tuple[Tensor, Tensor]:
            scale, zero_point = affine(*observed.range_of(group))
            return torch.tensor([scale], dtype=torch.float64), torch.tensor([zero_point])

    return _spec(RangeObserver, torch.per_tensor_affine, LIMITS)


def _weight_spec(axis: int) -> Any:
    class PerChannelWeight(torchao().ObserverBase):  # type: ignore[misc]
        """Keeps a weight, to say what its channels' scales are."""

        def __init__(self, **options: Any) -> None:
            super().__init__(dtype=options["dtype"])
            self.qscheme, self.ch_axis = options["qscheme"], axis
            self.quant_min, self.quant_max = -WEIGHT_LIMIT, WEIGHT_LIMIT
            self.scale = torch.ones(1)

        def forward(self, x: Tensor) -> Tensor:
            self.scale = weight_scale(x, axis)
            return x

        def calculate_qparams(self) -> tuple[Tensor, Tensor]:
            return self.scale, torch.zeros(len(self.scale), dtype=torch.int64, device=self.scale.device)

    limits = -WEIGHT_LIMIT, WEIGHT_LIMIT
    return _spec(PerChannelWeight, torch.per_channel_symmetric, limits, axis)


def _spec(observer: Any, scheme: Any, limits: tuple[int, int], axis: int | None = None) -> Any:
    low, high = limits
    return torchao().QuantizationSpec(torch.int8, observer, quant_min=low, quant_max=high, qscheme=scheme, ch_axis=axis)


class NotFiniteError(ValueError):
    """An activation holds NaN or infinity."""

    def __init__(self, group: int) -> None:
        super().__init__(f"group {group} of tensors")
        self.group = group
