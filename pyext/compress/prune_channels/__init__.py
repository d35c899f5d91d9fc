"""Structured pruning: whole channels leave, with everything in other layers that depends on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from kernelpress.compress.changes import copied, resizes
from kernelpress.compress.channels.dependency import Axis, Dependencies, find_dependencies
from kernelpress.compress.modules import layers_in
from kernelpress.compress.prune_channels.budgets import Cost, channels_left, flops_left, parameters_left
from kernelpress.compress.prune_channels.choice import Chosen, greedily, in_one_shot, rank
from kernelpress.compress.prune_channels.criteria import CRITERIA
from kernelpress.compress.prune_channels.cutting import cut, failure
from kernelpress.compress.prune_channels.evidence import Batches, Evidence, Loss, batches_of
from kernelpress.compress.prune_channels.measured import LayerCosts, by_knapsack, measured_left
from kernelpress.compress.prune_channels.reconstruction import restoring_scales
from kernelpress.compress.record import PassRecord, SkippedLayers, add_record
from kernelpress.compress.resize import named_tensors
from kernelpress.measure.cost import count_flops, count_parameters
from kernelpress.preserve import own_tensors, preserved
from kernelpress.trace import checked_inputs, trace

__all__ = ["prune_channels"]

_SCOPES = ("local", "global")
_SCHEDULES = {"one-shot": in_one_shot, "greedy": greedily}
_MEASURED = ("latency", "energy")
_TARGETS = ("flops", "channels", "parameters", *_MEASURED)
_MEASURED_TOLD = "target='latency' and 'energy'"


def prune_channels(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    ratio: float = 0.5,
    criterion: str = "l1",
    scope: str = "local",
    schedule: str = "one-shot",
    iterations: int = 1,
    between: Callable[[nn.Module], object] | None = None,
    round_to: int = 8,
    target: str = "flops",
    ignore: Iterable[str] = (),
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    layer_costs: LayerCosts | None = None,
) -> nn.Module:
    """Removes the least important channels of `model` and returns a smaller copy; `model` stays as it is.

    The copy is of the same class, with smaller parameters, and trains as before. Channels that depend on each other
    (residual sums, also weighted ones, concatenations, depthwise and grouped convolutions, normalisations, flatten →
    linear, channel and pixel shuffles) leave together; what is not understood stays, and `record_of(pruned)` says why.
    Inputs and outputs of the network keep their channels.

    Removing channels that are silent (zero wherever they are read) changes no output, with one exception: statistics
    over channels. Of GroupNorm whole groups leave, which leaves those of the others as they were. LayerNorm, RMSNorm
    and GroupNorm of a single group have the statistics of the channels that stay; so has GroupNorm where no group can
    leave (their number is a literal in `forward`, or a grouped convolution comes before): each keeps as many channels.
    Masks of `torch.nn.utils.prune` and weight norms are cut with their weight; a weight that is parametrised otherwise
    (spectral norm) keeps its layer whole.

    Whatever it returns or raises, `model`, its buffers, the example tensors and the random states stay as they were.
    The copy trains, also one made under `torch.inference_mode` or of a model that was.

    `example_inputs`: what `forward` takes, as for `trace`.
    `ratio`: the fraction, in [0, 1), of the FLOPs at these inputs (`target="flops"`), of the prunable channels
        (`"channels"`), of the parameters (`"parameters"`) or of the time or energy of its convolutions and linear
        layers (`"latency"`, `"energy"`) to remove; reached or exceeded by less than one step of `round_to` channels.
        For the last two a knapsack chooses the sets of least importance together that save as much; with
        `scope="local"` those that leave every group the largest share of its importance.
    `criterion`: what the importance of a channel is; the functions behind `criteria.CRITERIA` state their equations.
        Of the weights: `"l1"`, `"l2"`, the norm of its filter; `"fpgm"`, its distance from the other filters;
        `"bn_scale"`, |γ| of the BatchNorm behind it; `"random"`.
        Of `data`: `"activation"`, its mean size; `"apoz"`, how often it is not zero; `"pca"`, its share in the leading
        components; `"reconstruction"`, what the next layers lose without it (ThiNet; their weights for the channels
        that stay are then scaled by least squares).
        Of `data` and `loss`: `"taylor"`, the change of the loss to first order, squared; `"gradient_activation"`.
    `scope`: `"local"` prunes every group by the same fraction; `"global"` ranks all channels against each other.
    `schedule`: `"one-shot"`, or `"greedy"`: one step of one group at a time, all channels scored anew after each (for
        any target but latency and energy).
    `iterations`: prunes in so many rounds, each by the same factor, and calls `between(pruned)`, which trains in
        place, after each but the last.
    `round_to`: what every pruned layer keeps is a multiple of it (if all it depends on can be), at least one multiple;
        where at least so many channels of a layer leave together, those sets are not rounded.
    `ignore`: qualified names of layers, or of modules with all layers in them, that keep their output channels.
    `data`: batches, read once and held: what `forward` takes by position, alone or followed by a target.
    `loss`: (output, target) → scalar, a mean over the batch; by default the cross-entropy of class indices.
    `layer_costs`: for `target="latency"` and `"energy"`, measures layers: (layer, what it reads) of each → milliseconds
        or joules of each. With `kernelpress.emit.layer_times` and `layer_energies` they are those of emission.

    Raises `ValueError` for an argument outside these bounds, a model without prunable channels, a ratio that cannot
    be reached, weights, activations or gradients that are not finite (naming the layer), data that a criterion needs
    and does not get, or a model whose `forward` only works at its own sizes; `TraceError` (a `ValueError`) for a model
    that cannot be exported.
    """
    settings = _Settings(ratio, criterion, scope, schedule, iterations, round_to, target)
    if data is None and CRITERIA[criterion].needs != "weights":
        raise ValueError(f"data: expected batches, which the criterion {criterion!r} looks at, got None")
    if (layer_costs is None) == (target in _MEASURED):
        raise ValueError(f"layer_costs: expected a function for {_MEASURED_TOLD}, and only there, got {layer_costs!r}")
    if between is not None and iterations == 1:
        raise ValueError("between: expected iterations of at least 2 to train between, got 1")
    ignored = layers_in(model, ignore, "ignore")
    # Tensors made under inference mode could not be trained.
    with torch.inference_mode(False), torch.no_grad(), preserved(model, example_inputs):
        inputs = own_tensors(checked_inputs(model, example_inputs))
        if any(tensor.is_inference() for _, tensor in named_tensors(model)):
            model = copied(model)
        held = (
            batches_of(model, inputs, data, loss)
            if CRITERIA[criterion].needs != "weights" and data is not None
            else None
        )
        rounds = _Rounds(inputs, settings, ignored, held, layer_costs)
        pruned = rounds.prune(model, 1)
        for index in range(2, iterations + 1):
            if between is not None:
                with torch.enable_grad():
                    between(pruned)
            pruned = rounds.prune(pruned, index)
        record = PassRecord(
            name="prune_channels",
            arguments={**asdict(settings), "ignore": sorted(ignored)},
            flops_before=count_flops(model, *inputs),
            flops_after=count_flops(pruned, *inputs),
            parameters_before=count_parameters(model),
            parameters_after=count_parameters(pruned),
            changes=resizes(model, pruned),
            skipped=rounds.skipped,
        )
        add_record(pruned, record)
        return pruned


@dataclass(frozen=True)
class _Settings:
    """The arguments of `prune_channels` that its record states."""

    ratio: float
    criterion: str
    scope: str
    schedule: str
    iterations: int
    round_to: int
    target: str

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, (int, float)):
            raise TypeError(f"ratio: expected a number in [0, 1), got {self.ratio!r}")
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio: expected a fraction in [0, 1), got {self.ratio!r}")
        for name, allowed in (
            ("criterion", tuple(CRITERIA)),
            ("scope", _SCOPES),
            ("schedule", tuple(_SCHEDULES)),
            ("target", _TARGETS),
        ):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
        if self.target in _MEASURED and self.schedule != "one-shot":
            raise ValueError(f"schedule: expected 'one-shot' for target={self.target!r}, got {self.schedule!r}")
        for name in ("round_to", "iterations"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")


class _Rounds:
    """Prunes a model in rounds: after round i of n, (1 − ratio)^(i/n) of its cost is left."""

    def __init__(
        self,
        inputs: tuple[Any, ...],
        settings: _Settings,
        ignored: frozenset[str],
        data: Batches | None,
        layer_costs: LayerCosts | None,
    ) -> None:
        self._inputs, self._settings, self._ignored = inputs, settings, ignored
        self._data, self._layer_costs = data, layer_costs
        self._cost_at_first: float | None = None
        self.skipped: tuple[SkippedLayers, ...] = ()

    def prune(self, model: nn.Module, index: int) -> nn.Module:
        """The model after the round of this number, the first being 1."""
        graph = trace(model, self._inputs, dynamic_batch=False)
        data = self._data and Batches(model, self._data.batches, self._data.loss)
        reason = ""
        for couple_splits in (True, False):
            dependencies = find_dependencies(graph, model, ignore=self._ignored, couple_splits=couple_splits)
            _check_finite(model, dependencies)
            cost = self._cost(model, graph, dependencies)
            chosen = self._choose(model, dependencies, data, cost, index)
            scales: dict[Axis, Tensor] = {}
            if self._settings.criterion == "reconstruction":
                scales = _scales(model, Evidence(dependencies, dependencies.pools, frozenset(), data), chosen.removing)
            pruned = cut(model, dependencies, chosen.removing, scales)
            reason = failure(pruned, self._inputs, dependencies, chosen.removing) or ""
            if not reason:
                break
        else:
            raise ValueError(
                f"model: {type(model).__name__} does not work with fewer channels: {reason}; "
                "name the layers whose size its forward relies on in `ignore`"
            )
        if index == 1:
            self.skipped = (*dependencies.skipped, *chosen.ranking.skipped)
        return pruned

    def _cost(self, model: nn.Module, graph: GraphModule, dependencies: Dependencies) -> Cost:
        if self._layer_costs is not None:
            return measured_left(graph, dependencies, self._settings.round_to, self._layer_costs)
        if self._settings.target == "channels":
            return channels_left(dependencies)
        if self._settings.target == "parameters":
            return parameters_left(dependencies, model)
        return flops_left(dependencies, count_flops(model, *self._inputs))

    def _choose(
        self, model: nn.Module, dependencies: Dependencies, data: Batches | None, cost: Cost, index: int
    ) -> Chosen:
        settings, pools = self._settings, len(dependencies.pools)
        whole = cost([0] * pools)
        if index == 1:
            self._cost_at_first = whole
        assert self._cost_at_first is not None
        left = (1 - settings.ratio) ** (index / settings.iterations)
        goal = self._cost_at_first * left * (1 + 1e-9)
        score = partial(rank, model, dependencies, CRITERIA[settings.criterion], data, settings.round_to)
        choose = by_knapsack if settings.target in _MEASURED else _SCHEDULES[settings.schedule]
        chosen = choose(score, pools, cost, goal, settings.scope)
        # Of no channels at all, any share is none.
        if isinstance(chosen, Chosen) and (whole > 0 or settings.ratio == 0):
            return chosen
        if isinstance(chosen, Chosen) or (chosen == whole and index == 1):
            skipped = (*dependencies.skipped, *score(frozenset()).skipped)
            why = "; ".join(sorted({s.reason for s in skipped})) or "it has no convolution or linear layer"
            raise ValueError(f"model: no channel can be pruned: {why}")
        raise ValueError(
            f"ratio: expected at most {1 - chosen / self._cost_at_first:.3f}, which is what round_to="
            f"{settings.round_to} allows to remove of the {settings.target} of this model, got {settings.ratio}"
        )


def _scales(model: nn.Module, evidence: Evidence, removing: frozenset[int]) -> dict[Axis, Tensor]:
    """What weights of layers that lose inputs are multiplied by: those that run once and are no product of others."""
    runs = [call.input.parameter for call in evidence.dependencies.calls]
    plain = {name for name, _ in model.named_parameters()} - set(evidence.dependencies.weight_norms.values())
    return {
        call.input: factors[: len(evidence.dependencies.axes[call.input])]
        for call, factors in restoring_scales(evidence, removing)
        if runs.count(call.input.parameter) == 1 and call.input.parameter in plain
    }


def _check_finite(model: nn.Module, dependencies: Dependencies) -> None:
    tensors = dict(named_tensors(model)) | dict(dependencies.weights)
    for name in dict.fromkeys(axis.parameter for axis in dependencies.axes):
        if not bool(tensors[name].isfinite().all()):
            raise ValueError(f"model: {name} holds NaN or Inf, its channels have no importance")
