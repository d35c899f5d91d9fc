"""Quantization to int8: ordinary PyTorch with quantize/dequantize pairs, which emission turns into int8 kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from kernelpress.compress.changes import Quantized
from kernelpress.compress.modules import layers_in
from kernelpress.compress.quantization.batches import calibration_batches
from kernelpress.compress.quantization.converted import finished, fold_shared, set_bias
from kernelpress.compress.quantization.dynamic import linear_places, with_found_scales
from kernelpress.compress.quantization.equalize import equalize as equalize_layers
from kernelpress.compress.quantization.errors import bias_shifts, layer_errors, output_error
from kernelpress.compress.quantization.float_graph import float_graph, plain_copy
from kernelpress.compress.quantization.places import Layer, Places, Point, find_places, layer_nodes
from kernelpress.compress.quantization.pt2e import NotFiniteError, Observed, convert
from kernelpress.compress.quantization.ranges import OBSERVERS
from kernelpress.compress.quantization.rounding import round_adaptively
from kernelpress.compress.quantization.training import convert_qat, trainable
from kernelpress.compress.record import LayerError, PassRecord, SkippedLayers, add_record, record_of
from kernelpress.emit.graph import arguments, attribute, constant_tensor, only_user
from kernelpress.measure.cost import count_flops, count_parameters
from kernelpress.measure.theory import Promise
from kernelpress.preserve import outside_modes, own_tensors, random_state_kept
from kernelpress.progress import phases
from kernelpress.trace import checked_inputs, module_of

__all__ = ["convert_qat", "quantize"]

METHODS = ("static", "dynamic", "qat")
ROUNDINGS = ("nearest", "adaptive")


def quantize(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    data: Tensor | Iterable[Any] | None = None,
    method: str = "static",
    observer: str = "minmax",
    ignore: Iterable[str] = (),
    samples: int = 512,
    equalize: bool = False,
    correct_bias: bool = False,
    rounding: str = "nearest",
    budget: float | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    progress: bool = True,
) -> nn.Module:
    """Quantizes `model`, in eval mode, to int8 after training and returns a graph module; `model` stays as it is.

    Weights are symmetric per output channel, activations affine per tensor; a range always holds 0, so padding is
    exact. BatchNorm and activations belong to the layer before them, sums to the layer or to an int8 sum; what only
    moves values shares the scale of what it moves. What is returned computes in float on rounded values, as any PyTorch
    does, and `kernelpress.emit` runs it on int8 kernels. `record_of(quantized)` tells each layer's error, and which
    stayed float and why.

    `example_inputs`: what `forward` takes, as for `trace`.
    `data`: examples to calibrate on: a DataLoader, a tensor of them, or batches; labels behind inputs are left out.
        A dynamic quantization needs none unless an option measures on them; each layer's error is then that on the
        example inputs.
    `method`: `"static"` is ready to emit; `"qat"` trains (`compress.finetune`), with the scales of the calibration and
        without dropout, and becomes the same by `compress.convert_qat`; `emit` takes it as it is, too. `"dynamic"` is
        of linear layers alone, and ready to emit: each row of what they read (the last dimension) has a scale and a
        zero point of its own, which are found at each call; all else computes in float.
    `observer`: how an activation's range follows from what is seen: `"minmax"` all of it; `"percentile"` 99.99 % of
        either side; `"mse"` the least square error; `"entropy"` the least divergence.
    `ignore`: qualified names of layers, or of modules with all layers in them, that stay float.
    `samples`: calibration ends with the batch that completes so many examples.
    `equalize`, `correct_bias`: cross-layer equalization and bias correction (Nagel et al. 2019, arXiv:1906.04721).
    `rounding`: `"adaptive"` chooses for each weight which neighbour keeps the layer's result (arXiv:2004.10568).
    `budget`: the loss that may be; as few layers as it takes, those that int8 disturbs most, stay float for it.
        The loss is what `metric` (higher is better) loses from `model` to the quantized model, without a metric the
        relative error ‖y − y₀‖ / ‖y₀‖ of the outputs on the calibration data.

    Raises `ValueError` for arguments outside these bounds, data without examples or of another shape or dtype, NaN and
    infinity in data, weights or activations, a model without a layer that can be int8 and a budget that none may
    be for; `TypeError` for arguments of another type; `TraceError` (a `ValueError`) for a model that cannot be
    exported; `ImportError` without torchao.
    """
    settings = _Settings(method, observer, samples, equalize, correct_bias, rounding, budget)
    _check(settings, metric, has_data=data is not None)
    inputs = own_tensors(checked_inputs(model, example_inputs))
    ignored = _ignored(model, ignore)
    with torch.inference_mode(False), torch.no_grad(), outside_modes(model), phases(progress) as phase:
        phase("exporting", 1)
        module = float_graph(model, inputs)
        with random_state_kept():
            examples = [inputs] if data is None and method == "dynamic" else data
            batches = calibration_batches(examples, inputs, module.meta["contract"], samples)
        notes: tuple[str, ...] = ()
        if equalize:
            pairs = equalize_layers(module, _places(module, ignored, method))
            notes = tuple(f"{first} and {second} were equalized" for first, second in pairs)
        building = _Building(module, batches, settings, phase, type(model).__name__)
        built = building.build(ignored)
        if budget is not None:
            before = None if metric is None else float(metric(model))

            def loss(candidate: GraphModule) -> float:
                if metric is None or before is None:
                    return output_error(module, candidate, batches)
                return before - float(metric(candidate))

            built = _within(budget, building, built, ignored, loss)
        places, quantized = built.places, fold_shared(built.quantized, built.places)
        if method == "qat":
            quantized = _trainable(model, module, built)
        flops = count_flops(model, *inputs)
        record = PassRecord(
            name="quantize",
            arguments={**asdict(settings), "ignore": sorted(ignored)},
            flops_before=flops,
            flops_after=flops,
            parameters_before=count_parameters(model),
            parameters_after=count_parameters(quantized),
            changes=(Quantized.of(quantized),),
            skipped=_skipped(module, places),
            promises=tuple(Promise(name, is_int8=True) for name in _paths(places)),
            errors=built.errors,
            notes=(*notes, *built.notes),
        )
    for earlier in record_of(model):
        add_record(quantized, earlier)
    add_record(quantized, record)
    return quantized


@dataclass(frozen=True)
class _Settings:
    """The arguments of `quantize` that its record states."""

    method: str
    observer: str
    samples: int
    equalize: bool
    correct_bias: bool
    rounding: str
    budget: float | None


def _check(settings: _Settings, metric: object, *, has_data: bool) -> None:
    for name, allowed in (("method", METHODS), ("observer", tuple(OBSERVERS)), ("rounding", ROUNDINGS)):
        if (value := getattr(settings, name)) not in allowed:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
    samples, budget = settings.samples, settings.budget
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples: expected a positive integer, got {samples!r}")
    if budget is not None and not 0 <= budget < math.inf:
        raise ValueError(f"budget: expected a loss of zero or more, got {budget!r}")
    if metric is not None and budget is None:
        raise ValueError("budget: expected the loss of the metric that may be, got None")
    if settings.method != "dynamic":
        return
    if settings.observer != "minmax":
        raise ValueError(
            f"observer: a dynamic quantization takes each row's range as it comes, 'minmax', got {settings.observer!r}"
        )
    measured = {
        "correct_bias": settings.correct_bias,
        "rounding": settings.rounding != "nearest",
        "budget": budget is not None and metric is None,
    }
    if not has_data and (wanting := [name for name, is_measured in measured.items() if is_measured]):
        raise ValueError(f"data: expected examples, which {' and '.join(wanting)} measure on, got None")


def _places(module: GraphModule, ignored: Mapping[str, str], method: str) -> Places:
    places = find_places(module, ignored)
    return linear_places(places) if method == "dynamic" else places


@dataclass(frozen=True)
class _Built:
    """A quantized graph before the last steps, and what was seen of it."""

    places: Places
    quantized: GraphModule
    errors: tuple[LayerError, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Building:
    """What a quantized graph is made of."""

    module: GraphModule
    batches: list[tuple[Any, ...]]
    settings: _Settings
    phase: Callable[[str, int], Callable[[int], None]]
    name: str

    def build(self, ignored: Mapping[str, str]) -> _Built:
        """The graph with these layers in float. Raises `ValueError` where no other is left."""
        places = _places(self.module, ignored, self.settings.method)
        if not places.layers:
            reasons = "; ".join(sorted({reason for _, reason in places.floats})) or "it has none"
            raise ValueError(f"model: no layer of {self.name} can be int8: {reasons}")
        count = len(self.batches)
        observed = _calibrated(
            self.module, places, self.settings.observer, self.batches, self.phase("calibrating", count)
        )
        notes = _notes(observed, places)
        quantized = finished(convert(observed), places)
        if self.settings.method == "dynamic":
            quantized = with_found_scales(quantized, places)
        if self.settings.rounding == "adaptive":
            advance = self.phase("rounding", len(places.layers))
            rounded = round_adaptively(self.module, quantized, places.layers, self.batches, advance)
            notes = (*notes, f"{len(rounded)} of {len(places.layers)} layers are rounded adaptively")
        if self.settings.correct_bias:
            _correct_biases(self.module, quantized, places, self.batches)
        layers = dict.fromkeys(places.layers, True) | {layer: False for layer, _ in places.floats}
        errors = layer_errors(self.module, quantized, layers, self.batches, self.phase("comparing", count))
        return _Built(places, quantized, errors, notes)


def _within(
    budget: float,
    building: _Building,
    built: _Built,
    ignored: Mapping[str, str],
    loss: Callable[[GraphModule], float],
) -> _Built:
    """The build with the fewest layers in float whose loss is within the budget.

    Layers go by the error that their own rounding adds, the largest first; of those that it then takes, each that need
    not have gone comes back.
    """
    order = sorted(built.errors, key=lambda e: e.float_error**2 - e.error**2)
    ranked = [error.layer for error in order if error.is_int8]

    def kept(names: Iterable[str]) -> Mapping[str, str]:
        sqnr = {error.layer: error.sqnr for error in order}
        reason = "kept in float for the budget of {:g}: SQNR {:.1f} dB in int8"
        return {**ignored, **{name: reason.format(budget, sqnr[name]) for name in names}}

    tried: dict[frozenset[str], tuple[_Built, float]] = {frozenset(): (built, loss(built.quantized))}

    def holds(names: Iterable[str]) -> bool:
        chosen = frozenset(names)
        if chosen not in tried:
            candidate = building.build(kept(chosen))
            tried[chosen] = candidate, loss(candidate.quantized)
        return tried[chosen][1] <= budget

    if holds(()):
        return built
    low, high = 0, len(ranked) - 1
    if not high or not holds(ranked[:high]):
        lost = min(found for _, found in tried.values())
        raise ValueError(f"budget: no layer of {building.name} can be int8 for a loss of {budget:g}, only of {lost:g}")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(ranked[:middle]) else (middle, high)
    names = ranked[:high]
    for name in reversed(names[:-1]):
        fewer = [other for other in names if other != name]
        if holds(fewer):
            names = fewer
    return tried[frozenset(names)][0]


def _correct_biases(
    module: GraphModule, quantized: GraphModule, places: Places, batches: list[tuple[Any, ...]]
) -> None:
    """Adds what rounding takes from the mean of each channel to the biases of layers with a weight of their own."""
    layers = [layer for layer in places.layers if only_user(layer.weight) is not None]
    shifts = bias_shifts(module, quantized, layers, batches)
    nodes = {node.name: node for node in quantized.graph.nodes}
    for layer in layers:
        node = nodes[layer.node.name]
        bias, shift = arguments(node)["bias"], shifts[node.name]
        old = torch.zeros_like(shift) if bias is None else attribute(quantized, str(bias.target)).double()
        set_bias(quantized, node, (old + shift).float())
    quantized.recompile()


def _trainable(model: nn.Module, module: GraphModule, built: _Built) -> GraphModule:
    weights = {str(layer.weight.target): attribute(module, str(layer.weight.target)) for layer in built.places.layers}
    biases = [arguments(node)["bias"] for node in layer_nodes(built.quantized)]
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained = {*weights, *names, *(str(bias.target) for bias in biases if bias is not None)}
    return trainable(built.quantized, weights, trained)


def _ignored(model: nn.Module, names: Iterable[str]) -> Mapping[str, str]:
    """Each layer that `names` keep float, with the reason."""
    return dict.fromkeys(layers_in(model, names, "ignore"), "named in ignore")


def _calibrated(
    module: GraphModule, places: Places, observer: str, batches: list[tuple[Any, ...]], advance: Any
) -> Observed:
    observed = Observed(plain_copy(module), places, observer)
    for batch in batches:
        try:
            observed.module(*batch)
        except NotFiniteError as error:
            raise ValueError(
                f"data: an activation becomes NaN or infinite at {_place(places.groups[error.group][0])}; check the "
                "images, or name the layer before it in `ignore`"
            ) from None
        advance(1)
    return observed


def _place(point: Point) -> str:
    node = point[0] if isinstance(point, tuple) else point
    return f"{module_of(node) or 'the model'} ({node.name})"


def _notes(observed: Observed, places: Places) -> tuple[str, ...]:
    """What is remarkable about activations."""
    return tuple(
        f"{_place(group[0])} is {'all zero' if seen.constant == 0 else f'the constant {seen.constant:g}'} on the "
        "calibration data: its scale means nothing elsewhere"
        for group, seen in zip(places.groups, observed.seen, strict=True)
        if seen.constant is not None
    )


def _skipped(module: GraphModule, places: Places) -> tuple[SkippedLayers, ...]:
    found: dict[str, list[Layer]] = {}
    for layer, reason in places.floats:
        found.setdefault(reason, []).append(layer)
    return tuple(
        SkippedLayers(tuple(layer.name for layer in layers), sum(_channels(module, layer) for layer in layers), reason)
        for reason, layers in found.items()
    )


def _channels(module: GraphModule, layer: Layer) -> int:
    weight = constant_tensor(module, layer.weight)
    return 0 if weight is None else math.prod(weight.shape[layer.axis : layer.axis + 1])


def _paths(places: Places) -> list[str]:
    """The modules whose every layer is int8."""
    floats = {layer.name.partition("@")[0] for layer, _ in places.floats}
    return [
        name for name in dict.fromkeys(layer.name.partition("@")[0] for layer in places.layers) if name not in floats
    ]
