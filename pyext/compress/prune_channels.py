"""Structured pruning: whole channels leave, with everything in other layers that depends on them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernelpress.compress.changes import copied, resizes
from kernelpress.compress.criteria import CRITERIA
from kernelpress.compress.dependency import Axis, Dependencies, Pool, contradiction, find_dependencies
from kernelpress.compress.naming import layers_in
from kernelpress.compress.record import PassRecord, SkippedLayers, add_record
from kernelpress.compress.resize import adapt_sizes, named_tensors, replace_tensors
from kernelpress.measure.cost import count_flops, count_parameters
from kernelpress.preserve import preserved
from kernelpress.runtime.torch_private import pytree
from kernelpress.trace import TraceError, trace

__all__ = ["prune_channels"]

_SCOPES = ("local", "global")
_TARGET = ("flops", "channels")


def prune_channels(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    ratio: float = 0.5,
    criterion: str = "l1",
    scope: str = "local",
    round_to: int = 8,
    target: str = "flops",
    ignore: Iterable[str] = (),
    data: Iterable[Any] | None = None,
) -> nn.Module:
    """Removes the least important channels of `model` at once and returns a smaller copy; `model` stays as it is.

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
    `ratio`: the fraction, in [0, 1), of the FLOPs at these inputs (`target="flops"`) or of the prunable channels
        (`target="channels"`) to remove; reached or exceeded by less than one step of `round_to` channels.
    `criterion`: `"l1"` or `"l2"`, the norm of a channel's filter (Li et al., Pruning Filters for Efficient ConvNets,
        ICLR 2017), divided by its mean over the group and averaged over the layers that make the channel.
    `scope`: `"local"` prunes every group by the same fraction; `"global"` ranks all channels against each other.
    `round_to`: what every pruned layer keeps is a multiple of it (if all it depends on can be), at least one multiple;
        where at least so many channels of a layer leave together, those sets are not rounded.
    `ignore`: qualified names of layers, or of modules with all layers in them, that keep their output channels.
    `data`: batches for a criterion that looks at activations or gradients; norms do not read it.

    Raises `ValueError` for an argument outside these bounds, a model without prunable channels, a ratio that cannot
    be reached, a weight that is not finite, or a model whose `forward` only works at its own sizes;
    `TraceError` (a `ValueError`) for a model that cannot be exported.
    """
    _check(ratio, criterion, scope, round_to, target)
    ignored = layers_in(model, ignore, "ignore")
    settings = _Settings(ratio, criterion, scope, round_to, target)
    # Tensors made under inference mode could not be trained.
    with torch.inference_mode(False), torch.no_grad(), preserved(model, example_inputs):
        inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
        # A clone has no marks of the caller's compilers, such as a dynamic batch.
        inputs = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)
        if any(tensor.is_inference() for _, tensor in named_tensors(model)):
            model = copied(model)
        return _pruned(model, inputs, settings, ignored, data)


@dataclass(frozen=True)
class _Settings:
    """The arguments of `prune_channels` that its record states."""

    ratio: float
    criterion: str
    scope: str
    round_to: int
    target: str


def _pruned(
    model: nn.Module,
    inputs: tuple[Any, ...],
    settings: _Settings,
    ignored: frozenset[str],
    data: Iterable[Any] | None,
) -> nn.Module:
    graph = trace(model, inputs, dynamic_batch=False)
    flops = count_flops(model, *inputs)
    failure = ""
    for couple_splits in (True, False):
        dependencies = find_dependencies(graph, model, ignore=ignored, couple_splits=couple_splits)
        groups = _groups(model, dependencies, settings, data)
        removing = _choose(dependencies, groups, flops, settings)
        pruned = _apply(model, dependencies, removing)
        failure = _failure(pruned, inputs, dependencies, removing) or ""
        if not failure:
            break
    else:
        raise ValueError(
            f"model: {type(model).__name__} does not work with fewer channels: {failure}; "
            "name the layers whose size its forward relies on in `ignore`"
        )

    record = PassRecord(
        name="prune_channels",
        arguments={**asdict(settings), "ignore": sorted(ignored)},
        flops_before=flops,
        flops_after=count_flops(pruned, *inputs),
        parameters_before=count_parameters(model),
        parameters_after=count_parameters(pruned),
        changes=resizes(model, pruned),
        skipped=(*dependencies.skipped, *_too_small(groups, settings.round_to)),
    )
    add_record(pruned, record)
    return pruned


@dataclass(frozen=True)
class _Group:
    """A pool with its sets of channels from least to most important, and how many leave in one step."""

    pool: Pool
    roots: tuple[int, ...]
    importance: tuple[float, ...]
    unit: int

    @property
    def steps(self) -> int:
        """How often channels can be removed, down to one unit."""
        return math.ceil(len(self.roots) / self.unit) - 1

    def removed(self, steps: int) -> int:
        """How many sets of channels are gone after `steps`; what stays is a multiple of the unit."""
        return 0 if steps == 0 else len(self.roots) - (math.ceil(len(self.roots) / self.unit) - steps) * self.unit


def _check(ratio: float, criterion: str, scope: str, round_to: int, target: str) -> None:
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise TypeError(f"ratio: expected a number in [0, 1), got {ratio!r}")
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio: expected a fraction in [0, 1), got {ratio!r}")
    for name, value, allowed in (
        ("criterion", criterion, tuple(CRITERIA)),
        ("scope", scope, _SCOPES),
        ("target", target, _TARGET),
    ):
        if value not in allowed:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise ValueError(f"round_to: expected a positive integer, got {round_to!r}")


def _groups(
    model: nn.Module, dependencies: Dependencies, settings: _Settings, data: Iterable[Any] | None
) -> list[_Group]:
    criterion, round_to = settings.criterion, settings.round_to
    producers = list(dict.fromkeys(axis for pool in dependencies.pools for axis, _ in pool.producers))
    scores = CRITERIA[criterion](model, producers, dependencies.weights, data)
    for axis, score in scores.items():
        if not bool(score.isfinite().all()):
            raise ValueError(f"model: {axis.parameter} holds NaN or Inf, its channels have no {criterion} importance")
    groups = []
    for pool in dependencies.pools:
        importance = torch.zeros(len(pool.roots), dtype=torch.float64)
        roots = torch.tensor(pool.roots)
        for axis, _ in pool.producers:
            labels = dependencies.axes[axis]
            inside = torch.isin(labels, roots)
            sums = torch.zeros_like(importance)
            sums.index_add_(0, torch.searchsorted(roots, labels[inside]), scores[axis][inside])
            importance += sums / sums.mean().clamp_min(torch.finfo(torch.float64).tiny) / len(pool.producers)
        order = importance.argsort(stable=True)
        positions = math.gcd(*(count for _, count in pool.producers))
        # A set of that many channels is as coarse as rounding would be.
        unit = 1 if positions >= round_to else round_to // math.gcd(round_to, positions)
        groups.append(_Group(pool, tuple(roots[order].tolist()), tuple(importance[order].tolist()), unit))
    return groups


def _choose(dependencies: Dependencies, groups: Sequence[_Group], flops: int, settings: _Settings) -> frozenset[int]:
    """The labels of the channels to remove: the first steps, in the order of `scope`, that reach `ratio`."""
    ratio, target, round_to = settings.ratio, settings.target, settings.round_to
    steps = _order(groups, settings.scope)
    if not steps and ratio > 0:
        reasons = {skipped.reason for skipped in (*dependencies.skipped, *_too_small(groups, round_to))}
        why = "; ".join(sorted(reasons)) or "it has no convolution or linear layer"
        raise ValueError(f"model: no channel can be pruned: {why}")

    def taken(count: int) -> list[int]:
        per_group = [0] * len(groups)
        for index in steps[:count]:
            per_group[index] += 1
        return per_group

    def reached(count: int) -> float:
        removed = [group.removed(n) for group, n in zip(groups, taken(count), strict=True)]
        if target == "channels":
            return sum(removed) / max(1, sum(len(group.roots) for group in groups))
        return _flops_removed(dependencies, groups, removed) / max(1, flops)

    if reached(len(steps)) < ratio:
        raise ValueError(
            f"ratio: expected at most {reached(len(steps)):.3f}, which is what round_to={round_to} allows to remove "
            f"of the {target} of this model, got {ratio}"
        )
    low, high = 0, len(steps)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) >= ratio else (middle + 1, high)
    return frozenset(
        root for group, n in zip(groups, taken(low), strict=True) for root in group.roots[: group.removed(n)]
    )


def _order(groups: Sequence[_Group], scope: str) -> list[int]:
    """The group of every step, first step first. Within a group, later steps never come before earlier ones."""
    ranked = []
    for index, group in enumerate(groups):
        for step in range(1, group.steps + 1):
            before, after = group.removed(step - 1), group.removed(step)
            importance = sum(group.importance[before:after]) / (after - before)
            fraction = (before + after) / 2 / len(group.roots)
            ranked.append(((fraction, importance) if scope == "local" else (importance, fraction), index))
    return [index for _, index in sorted(ranked)]


def _flops_removed(dependencies: Dependencies, groups: Sequence[_Group], removed: Sequence[int]) -> float:
    gone: dict[Axis, int] = {}
    for group, count in zip(groups, removed, strict=True):
        for axis, positions in group.pool.occurrences:
            gone[axis] = gone.get(axis, 0) + positions * count

    def kept(axis: Axis) -> float:
        return 1 - gone[axis] / len(dependencies.axes[axis]) if axis in gone else 1.0

    return sum(call.flops * (1 - kept(call.output) * kept(call.input)) for call in dependencies.calls)


def _kept_positions(labels: Tensor, removing: frozenset[int]) -> Tensor:
    gone = torch.isin(labels, torch.tensor(sorted(removing), dtype=labels.dtype))
    return (~gone).nonzero().flatten()


def _apply(model: nn.Module, dependencies: Dependencies, removing: frozenset[int]) -> nn.Module:
    pruned = copied(model)
    old = dict(named_tensors(pruned))
    new: dict[str, Tensor] = {}
    kept = {axis: _kept_positions(labels, removing) for axis, labels in dependencies.axes.items()}
    for axis, positions in kept.items():
        if len(positions) < len(dependencies.axes[axis]):
            tensor = new.get(axis.parameter, old[axis.parameter]).detach()
            new[axis.parameter] = tensor.index_select(axis.dim, positions.to(tensor.device))
    for magnitude, (direction, dim) in dependencies.weight_norms.items():
        if direction in new:
            # The weight is magnitude · direction / ‖direction‖: what stays of it has to stay the same.
            whole = torch.norm_except_dim(old[direction].detach(), 2, dim)
            positions = kept.get(Axis(direction, dim), torch.arange(whole.size(dim))).to(whole.device)
            share = torch.norm_except_dim(new[direction], 2, dim) / whole.index_select(dim, positions)
            new[magnitude] = new.get(magnitude, old[magnitude]).detach() * share.nan_to_num(1.0)
    replace_tensors(pruned, new)
    for (path, attribute, place), labels in dependencies.counts.items():
        module, count = pruned.get_submodule(path), len(_kept_positions(labels, removing))
        stated = getattr(module, attribute)
        setattr(module, attribute, count if place is None else (*stated[:place], count, *stated[place + 1 :]))
    for name, module in model.named_modules():
        adapt_sizes(pruned.get_submodule(name), original=module)
    return pruned


def _failure(
    pruned: nn.Module, inputs: tuple[Any, ...], dependencies: Dependencies, removing: frozenset[int]
) -> str | None:
    """Why `pruned` is not what was intended, or None: it must run, and bring every channel to its own weights."""
    kept = {axis: labels[_kept_positions(labels, removing)] for axis, labels in dependencies.axes.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = trace(pruned, inputs, dynamic_batch=False)
    except TraceError as error:
        return str(error)
    place = contradiction(graph, pruned, kept)
    return place and f"{place} brings channels to the wrong weights"


def _too_small(groups: Sequence[_Group], round_to: int) -> tuple[SkippedLayers, ...]:
    return tuple(
        SkippedLayers(
            group.pool.layers,
            len(group.roots),
            f"too few channels to keep a multiple of {round_to}" if len(group.roots) > 1 else "all leave together",
        )
        for group in groups
        if group.steps == 0
    )
