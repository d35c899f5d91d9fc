"""The pass: weights leave as scope and schedule say, and the record tells what became of which layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernelpress.compress.changes import Masked, copied
from kernelpress.compress.masks import settle_masks
from kernelpress.compress.prune_weights.cutting import Cutter, checked_settings
from kernelpress.compress.prune_weights.derivatives import Loss
from kernelpress.compress.prune_weights.schedules import Schedule
from kernelpress.compress.prune_weights.sensitivity import sensitivity
from kernelpress.compress.record import PassRecord, add_record
from kernelpress.measure.cost import count_flops, count_parameters
from kernelpress.measure.theory import Promise

__all__ = ["add_pruning_record", "prune_weights"]


def prune_weights(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | None = None,
    *,
    sparsity: float | None = None,
    criterion: str = "magnitude",
    scope: str | Mapping[str, float] = "global",
    granularity: str = "element",
    block: tuple[int, int] | None = None,
    ignore: Iterable[str] = (),
    data: Iterable[Any] | None = None,
    loss: Loss = F.cross_entropy,
    schedule: Schedule | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    max_drop: float = 0.01,
    seed: int = 0,
) -> nn.Module:
    """A copy of `model` whose convolutions and linear layers have zeros that stay: masks keep them exactly 0.0 in
    training, state dicts and copies, until `compress.bake_masks` leaves plain weights with zeros in them.

    `example_inputs`: what `forward` takes, for the FLOPs in the record.
    `sparsity`: the fraction, in [0, 1), of the weights *that earlier masks left* to remove: 0.5 twice means 0.75 of
        all, which the record states. 0.9 unless `scope` or `granularity` say how many.
    `criterion`: a name of `compress.WEIGHT_CRITERIA`, whose functions state their equations.
    `scope`: `"global"` ranks the weights of all layers against each other, `"layer"` takes the same fraction of each,
        `"erk"` leaves more of small layers (Erdős–Rényi-Kernel), a mapping gives the sparsity of each layer it names;
        `"sensitivity"` finds such a mapping: what each layer alone can do without by `evaluate`, a function that gives
        a model's accuracy, within `max_drop`.
    `granularity`: `"element"`; `"vector"` and `"block"` of `block` = (outputs, inputs); `"kernel"`; `"filter"`; or
        `"n:m"`, such as `"2:4"`: at most n of m inputs in a row. Groups rank by the mean score of their weights.
    `ignore`: qualified names of layers, or of modules with all layers in them, that stay as they are.
    `data`: batches (inputs, targets), read anew at each pruning, for the criteria that differentiate `loss`, which
        takes (output, target) and gives the mean over a batch.
    `schedule`: `None` prunes once; `Gradual` and `Iterative` train the model meanwhile.

    Weights that several layers share are pruned once, for all of them. Raises `ValueError` for an argument outside
    these bounds, missing data, weights or derivatives that are not finite.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    if isinstance(data, Iterator):
        data = list(data)
    scan: dict[str, Any] = {}
    if scope == "sensitivity":
        if evaluate is None or sparsity is not None:
            wrong = "evaluate: expected a function" if evaluate is None else "sparsity: expected None"
            raise ValueError(f"{wrong} for scope='sensitivity', got {None if evaluate is None else sparsity}")
        form: Any = {"criterion": criterion, "granularity": granularity, "block": block, "seed": seed}
        found = sensitivity(model, evaluate, ignore=ignore, data=data, loss=loss, **form)
        scope, scan = found.within(max_drop), {"sensitivity": asdict(found), "max_drop": max_drop}
    settings = checked_settings(sparsity, criterion, scope, granularity, block, seed)
    if settings.pattern.kept is not None and schedule is not None:
        raise ValueError(f"schedule: expected None for granularity={granularity!r}, which has one sparsity")
    # Tensors made under inference mode could not be trained.
    with torch.inference_mode(False), torch.no_grad():
        small = copied(model)
        cutter = Cutter.of(small, settings, ignore, data, loss)
        if schedule is None:
            cutter.cut(lambda final: final)
        else:
            schedule.run(small, cutter.cut)
        settle_masks(small)
        add_pruning_record(
            "prune_weights",
            small,
            example_inputs,
            cutter,
            {"ignore": sorted(ignore), "schedule": None if schedule is None else schedule.plain(), **scan},
        )
    return small


def add_pruning_record(
    name: str,
    small: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | None,
    cutter: Cutter,
    arguments: dict[str, Any],
) -> None:
    changes, promises, empty = [], [], []
    before = [int(mask.count_nonzero()) for mask in cutter.start]
    after = [int(target.alive().count_nonzero()) for target in cutter.targets]
    for target, was, left in zip(cutter.targets, before, after, strict=True):
        for path, module, parameter in target.owners:
            mask = module.get_buffer(f"{parameter}_mask")
            changes.append(Masked(path, parameter, int(mask.count_nonzero()), mask.numel()))
            promises.append(Promise(path, density=left / was if was else 1.0))
        if was and not left:
            empty.append(target.layer)
    if empty:
        warnings.warn(
            f"every weight of {', '.join(empty)} is gone: what follows no longer depends on its input; prune less, "
            "or name it in `ignore`",
            stacklevel=4,
        )
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs or ())
    flops = count_flops(small, *inputs) if inputs else 0
    parameters, sizes = count_parameters(small), sum(target.original.numel() for target in cutter.targets)
    record = PassRecord(
        name=name,
        arguments={
            **cutter.settings.plain(),
            **arguments,
            "zeros_before": 1 - sum(before) / sizes,
            "zeros_after": 1 - sum(after) / sizes,
        },
        flops_before=flops,
        flops_after=flops,
        parameters_before=parameters,
        parameters_after=parameters,
        changes=tuple(changes),
        skipped=cutter.skipped,
        promises=tuple(promises),
    )
    add_record(small, record)
