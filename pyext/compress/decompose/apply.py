"""The pass: which layers are taken apart, by which method and at which ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kernelpress.compress.changes import Change, copied, put, replace_layer
from kernelpress.compress.decompose.candidates import Job
from kernelpress.compress.decompose.chains import METHODS, Geometry
from kernelpress.compress.decompose.decide import Choice, Latency, Rules, by_budget, by_rule
from kernelpress.compress.decompose.inputs import Layer, inspect, second_moments
from kernelpress.compress.decompose.ranks import Rank, Weights, check_rank
from kernelpress.compress.decompose.search import Metric
from kernelpress.compress.modules import layers_in
from kernelpress.compress.record import PassRecord, SkippedLayers, add_record
from kernelpress.measure.cost import count_flops, count_parameters
from kernelpress.preserve import evaluation, own_tensors, preserved
from kernelpress.progress import phases
from kernelpress.trace import checked_inputs

__all__ = ["decompose"]

BUDGETS = ("flops", "sensitivity")
"""Rules for the whole model."""


def decompose(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    method: str = "auto",
    rank: Rank | Literal["flops", "sensitivity"] | Mapping[str, Rank] = "energy",
    energy: float = 0.9,
    ratio: float = 0.5,
    metric: Metric | None = None,
    max_drop: float = 0.01,
    ignore: Iterable[str] = (),
    data: Iterable[Any] | None = None,
    round_to: int = 8,
    only_cheaper: bool = True,
    latency: Latency | None = None,
    seed: int = 0,
    progress: bool = False,
) -> nn.Module:
    """Replaces convolutions and linear layers of `model` by chains of smaller ones and returns a copy; `model` stays.

    Each layer becomes an `nn.Sequential` of plain convolutions or linear layers, which train. Strides, paddings (also
    reflected and circular ones), dilations and groups go where they belong, the bias into the last layer; at full rank
    a chain computes what the layer did. A chain that an earlier call made is taken as the layer that it stands for, so
    that ranks can fall a little at a time, with training in between (MUSCO, arXiv:1903.09973). Factors are computed in
    float64, by the same seed always the same ones. What stays as it was, and why, says `record_of(small)[-1].skipped`;
    of each chain, `decomposed` has errors and costs.

    `method`: `"svd"` (k×k to fewer channels, then 1×1), `"spatial_svd"` (k×1, then 1×k), `"tucker2"` (1×1, k×k, 1×1),
        `"cp"` (1×1, depthwise k×1 and 1×k, 1×1), `"tt"` (1×1, k×1, 1×k, 1×1); linear layers and 1×1 convolutions have
        two factors by any. `"auto"` takes for each layer the cheapest of spatial_svd, tucker2 and tt where `rank` is
        `"energy"` or `"vbmf"`, else the one of least error.
    `rank`: the channels between the layers, in each group. `"energy"`: the fewest whose squared singular values come to
        the share `energy` of all; `"vbmf"`: what is no noise, by variational Bayes (Nakajima et al. 2013); a float in
        (0, 1]: a share of the largest rank, 1.0 being exact; an integer, or a tuple with one for each place between
        layers; or a dict of these by name of the layers, or of modules with all layers in them, to decompose.
        For the whole model: `"flops"`, those of least error that save the share `ratio` of its FLOPs; `"sensitivity"`,
        those that save most while `metric` of the model, measured for chains of each layer alone and at last for all of
        them together, falls by no more than `max_drop`.
    `metric`: the model in eval mode → a number, higher for better, such as the accuracy on images held out for this.
    `round_to`: ranks by a rule or a share are rounded up to multiples of it, or to all that the weight has; those given
        as integers are taken as they are.
    `ignore`: qualified names of layers, or of modules with all layers in them, that stay.
    `data`: batches, tensors or tuples that begin with what `forward` takes. The factors then have the least error of
        the outputs on them, not of the weight: inputs are whitened by their second moments. Of CP's, the last is so.
    `only_cheaper`: a layer stays where its chain would take more FLOPs or parameters.
    `latency`: (modules by name, an input) → milliseconds of each. A layer stays where its chain is not faster;
        `"auto"` takes the fastest. `emit.plan_latencies` times them as plans on this machine.

    Raises `ValueError` for an argument outside these bounds, a rank above the largest of every layer, a ratio that no
    chains reach, a weight that is not finite, and a model that is itself a single layer.
    """
    _check(method, rank, energy, round_to)
    _check_budget(rank, ratio, metric, max_drop)
    paths = frozenset(path for path, _ in model.named_modules())
    reasons = (
        dict.fromkeys(paths - layers_in(model, rank, "rank"), "not named in rank") if isinstance(rank, Mapping) else {}
    )
    reasons |= dict.fromkeys(layers_in(model, ignore, "ignore"), "named in ignore")
    rules = Rules(method, rank, energy, round_to, only_cheaper, ratio, max_drop, metric, latency)  # type: ignore[arg-type]
    with torch.inference_mode(False), torch.no_grad(), preserved(model, example_inputs):
        inputs = own_tensors(checked_inputs(model, example_inputs))
        small = copied(model)
        with evaluation(small, inputs):
            layers = inspect(small, inputs, reasons)
        jobs = _jobs(small, layers, None if data is None else _batches(data, len(inputs)), seed)
        _check_integers(rules, jobs)
        with phases(progress) as phase:

            def advance(text: str) -> None:
                phase(f"decomposing: {text}", 1)

            if rank in BUDGETS:
                choices = by_budget(jobs, rules, small, count_flops(small, *inputs), advance)
            else:
                choices = []
                for job in jobs:
                    advance(job.layer.path)
                    if (choice := by_rule(job, rules)) is not None:
                        choices.append(choice)
        changes = _replaced(small, inputs, choices)
        placed = {change.layer for change in changes}
        record = PassRecord(
            name="decompose",
            arguments={
                "method": method,
                "rank": {name: _plain(value) for name, value in rank.items()}
                if isinstance(rank, Mapping)
                else _plain(rank),
                "energy": energy,
                "ratio": ratio,
                "max_drop": max_drop,
                "round_to": round_to,
                "ignore": sorted(path for path, reason in reasons.items() if reason == "named in ignore"),
                "only_cheaper": only_cheaper,
                "data": data is not None,
                "latency": latency is not None,
                "seed": seed,
            },
            flops_before=count_flops(model, *inputs),
            flops_after=count_flops(small, *inputs),
            parameters_before=count_parameters(model),
            parameters_after=count_parameters(small),
            changes=changes,
            skipped=tuple(
                SkippedLayers((layer.path,), layer.channels, layer.reason) for layer in layers if layer.reason
            ),
            decomposed=tuple(c.job.told(c.chain, c.milliseconds) for c in choices if c.job.layer.path in placed),
        )
    add_record(small, record)
    return small


def _plain(rank: Any) -> Any:
    """As files give it back."""
    return list(rank) if isinstance(rank, tuple) else rank


def _check(method: str, rank: object, energy: float, round_to: int) -> None:
    if method not in (*METHODS, "auto"):
        raise ValueError(f"method: expected one of {', '.join(map(repr, (*METHODS, 'auto')))}, got {method!r}")
    if rank not in BUDGETS:
        check_rank(rank, further=BUDGETS)
    if isinstance(energy, bool) or not isinstance(energy, (int, float)) or not 0 < energy <= 1:
        raise ValueError(f"energy: expected a share in (0, 1], got {energy!r}")
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise ValueError(f"round_to: expected a positive integer, got {round_to!r}")


def _check_budget(rank: object, ratio: float, metric: Metric | None, max_drop: float) -> None:
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < 1:
        raise ValueError(f"ratio: expected a share in (0, 1), got {ratio!r}")
    if isinstance(max_drop, bool) or not isinstance(max_drop, (int, float)) or not max_drop >= 0:
        raise ValueError(f"max_drop: expected a number of at least 0, got {max_drop!r}")
    if (metric is None) == (rank == "sensitivity"):
        raise ValueError(f"metric: expected a function for rank='sensitivity' alone, got {metric} for rank={rank!r}")


def _check_integers(rules: Rules, jobs: Sequence[Job]) -> None:
    """Raises `ValueError` for integers that fit none of the layers that they are for."""
    for name in rules.rank if isinstance(rules.rank, Mapping) else [""] if rules.rank not in BUDGETS else []:
        meant = [job for job in jobs if not name or f"{job.layer.path}.".startswith(f"{name}.")]
        tried = [rules.candidates(job) for job in meant if not isinstance(rules.rank_of(job.layer.path), (str, float))]
        if tried and not any(found for found, _ in tried):
            raise ValueError(f"rank{f'[{name!r}]' if name else ''}: {tried[-1][1]}")


def _batches(data: Iterable[Any], count: int) -> Iterator[tuple[Any, ...]]:
    """What `forward` takes, `count` arguments, of each batch."""
    for batch in data:
        if isinstance(batch, Tensor):
            yield (batch,)
        elif isinstance(batch, (tuple, list)) and len(batch) >= count:
            yield tuple(batch[:count])
        else:
            raise TypeError(f"data: expected batches that are tensors or tuples of at least {count}, got {type(batch)}")


def _jobs(model: nn.Module, layers: Sequence[Layer], batches: Iterable[tuple[Any, ...]] | None, seed: int) -> list[Job]:
    """The layers that no reason keeps, with their weights."""
    if any(layer.path == "" for layer in layers):
        raise ValueError(f"model: expected a module with layers in it, got a single {type(model).__name__}")
    open_layers = [layer for layer in layers if not layer.reason]
    moments = {} if batches is None else second_moments(model, open_layers, batches)
    jobs = []
    for layer in open_layers:
        geometry, now = layer.geometry, tuple(Geometry.of(part) for part in layer.parts)
        assert geometry is not None
        grams = tuple(moments.get(layer.path, [None] * geometry.groups))
        precision = torch.finfo(layer.parts[-1].weight.dtype).eps
        jobs.append(Job(layer, Weights(geometry, layer.weights(), grams, precision), now, seed))  # type: ignore[arg-type]
    return jobs


def _replaced(model: nn.Module, inputs: tuple[Any, ...], choices: Sequence[Choice]) -> tuple[Change, ...]:
    """Puts the chains in; where the model reads its layers otherwise than by calling them, those stay."""
    changes = [replace_layer(model, choice.job.layer.path, *choice.chain.modules) for choice in choices]
    if not changes or _runs(model, inputs):
        return tuple(changes)
    for choice in choices:
        put(model, choice.job.layer.path, choice.job.layer.module)
    kept: list[Change] = []
    for choice in choices:
        change = replace_layer(model, choice.job.layer.path, *choice.chain.modules)
        if _runs(model, inputs):
            kept.append(change)
        else:
            put(model, choice.job.layer.path, choice.job.layer.module)
            choice.job.layer.reason = "the model reads its attributes, which a chain does not have"
    return tuple(kept)


def _runs(model: nn.Module, inputs: tuple[Any, ...]) -> bool:
    try:
        with evaluation(model, inputs):
            model(*inputs)
    except Exception:
        return False
    return True
