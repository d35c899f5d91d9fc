"""What the steps of a run left, as a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from kernelpress.bench.machine import describe_machine
from kernelpress.compress import PassRecord
from kernelpress.emit.record import EmissionRecord
from kernelpress.files.plain import from_plain
from kernelpress.measure import Comparison
from kernelpress.press.recipe import Recipe
from kernelpress.press.registry import known_passes
from kernelpress.press.steps import PRODUCT, Run, dense_name, emitted_name
from kernelpress.report import (
    Gain,
    LayerRealisation,
    Reading,
    Report,
    Requirement,
    StepPoint,
    commit_of,
    layer_realisations,
    now,
)

__all__ = ["report_of"]


def report_of(run: Run) -> Report:
    """The report of a finished run: its last measurement, and how its steps led there.

    Raises `ValueError`, `KeyError`, `TypeError`, `AttributeError` or `ArithmeticError` for records that these steps did
    not write.
    """
    recipe, results = run.recipe, {id: record.results for id, record in run.records.items()}
    last = next(step for step in reversed(run.steps) if step.name == "measure")
    assert last.emitted_by is not None
    measured, emission = results[last.id], EmissionRecord.from_json(results[last.emitted_by.id]["record"])
    comparison = Comparison.from_dict(measured["comparison"])
    points = _points(run, results, comparison, measured["accuracy"])
    return Report(
        title=recipe.title or f"{recipe.model.name} on {recipe.data.source}",
        date=now(),
        commit=commit_of(Path(__file__).parent),
        machine=describe_machine(),
        recipe=recipe.plain(),
        comparison=comparison,
        pressed=PRODUCT,
        points=points,
        gains=_gains(run, points, comparison),
        passes=_readings(run, results),
        layers=_layers(results[run.dense]["layers"], results[last.before]["passes"], measured, emission),
        emission=emission,
        requirements=_requirements(recipe, comparison, points),
        step_seconds={id: record.seconds for id, record in run.records.items()},
        notes=(*measured["notes"], *([f"emission {emission.reason}"] if emission.kept_original else [])),
    )


def _points(
    run: Run, results: Mapping[str, dict[str, Any]], comparison: Comparison, accuracy: float
) -> tuple[StepPoint, ...]:
    """The dense model, the model after each pass and each training since, of which the last as it runs."""
    base, product = comparison[comparison.baseline].latency.median, comparison[PRODUCT].latency.median
    earlier = run.recipe.emissions_before(run.recipe.last_emission())
    times = {step.before: comparison[emitted_name(step)].latency.median for step in earlier}
    dense, *later = _model_steps(run)
    return (
        _point("dense", results[dense], base),
        *(_point(id, results[id], times.get(id)) for id in later[:-1]),
        _point(PRODUCT, {**results[later[-1] if later else dense], "accuracy": accuracy}, product),
    )


def _model_steps(run: Run) -> list[str]:
    """The step that left the dense model, and all since that left another."""
    ids = [step.id for step in run.steps if step.changes_model]
    return ids[ids.index(run.dense) :]


def _gains(run: Run, points: tuple[StepPoint, ...], comparison: Comparison) -> tuple[Gain, ...]:
    """Emission of the dense model first, where that was measured; else it counts to the first step that is."""
    emissions = run.recipe.emissions_before(run.recipe.last_emission())
    known = {dense_name("emitted"), *(emitted_name(step) for step in emissions if step.before == run.dense)}
    emitted = min((p.latency.median for p in comparison.profiles if p.name in known), default=None)
    names = ["emission", *_model_steps(run)[1:]]
    # Without a step since, the pressed model is the dense one as it was emitted.
    course = [points[0], *([replace(points[0], latency_ms=emitted)] if len(names) > 1 else ()), *points[1:]]
    gains, since, timed = [], list[str](), points[0].latency_ms
    for name, (before, after) in zip(names, pairwise(course), strict=True):
        since.append(name)
        theoretical = before.promised_flops / after.promised_flops if after.promised_flops else None
        if timed is None or after.latency_ms is None:
            gains.append(Gain(name, theoretical, None, ()))
            continue
        gains.append(Gain(name, theoretical, timed / after.latency_ms, tuple(since)))
        since, timed = [], after.latency_ms
    return tuple(gains)


def _point(name: str, result: dict[str, Any], latency_ms: float | None) -> StepPoint:
    costs = result["flops"], result["promised_flops"], result["parameters"]
    return StepPoint(name, result["accuracy"], *costs, latency_ms)


def _records(result: dict[str, Any]) -> list[PassRecord]:
    return [from_plain(PassRecord, stored, "passes") for stored in result["passes"]]


def _readings(run: Run, results: Mapping[str, dict[str, Any]]) -> dict[str, Reading]:
    known = known_passes()
    return {s.id: known[s.name].read(_records(results[s.id])[-1]) for s in run.steps if s.name in known}


def _layers(
    layers: list[str], passes: list[dict[str, Any]], measured: dict[str, Any], emission: EmissionRecord
) -> tuple[LayerRealisation, ...]:
    """What runs in the place of each dense layer; nothing where the original model was kept or another one built."""
    is_rebuilt = any(change["kind"] == "rebuilt" for record in passes for change in record["changes"])
    if measured["dense_record"] is None or emission.kept_original or is_rebuilt:
        return ()
    dense = EmissionRecord.from_json(measured["dense_record"])
    return layer_realisations(dense, emission, layers, measured["layer_flops"])


def _requirements(recipe: Recipe, comparison: Comparison, points: tuple[StepPoint, ...]) -> tuple[Requirement, ...]:
    wanted, dense, pressed = recipe.require, points[0], points[-1]
    found = []
    if wanted.min_accuracy is not None:
        is_met = dense.accuracy >= wanted.min_accuracy
        found.append(
            Requirement("test accuracy, dense", f"≥ {wanted.min_accuracy:.2%}", f"{dense.accuracy:.2%}", is_met)
        )
    if wanted.max_drop is not None:
        drop = dense.accuracy - pressed.accuracy
        # Accuracies are counts over counts: leave room for their rounding.
        is_met = drop <= wanted.max_drop + 1e-9
        found.append(
            Requirement("accuracy lost by pressing", f"≤ {100 * wanted.max_drop:g} points", f"{100 * drop:.2f}", is_met)
        )
    if wanted.min_flops_ratio is not None:
        ratio = dense.flops / pressed.flops
        is_met = ratio >= wanted.min_flops_ratio
        found.append(Requirement("FLOPs, dense ÷ pressed", f"≥ {wanted.min_flops_ratio:g}", f"{ratio:.2f}", is_met))
    if wanted.faster_than_emitted is not None:
        name = emitted_name(recipe.emissions_before(recipe.last_emission())[-1])
        speedup, limit = comparison.against(name).speedup(PRODUCT).measured, f"≥ {wanted.faster_than_emitted:g}×"
        is_met = speedup >= wanted.faster_than_emitted
        found.append(Requirement(f"speed-up over the model {name}", limit, f"{speedup:.2f}×", is_met))
    if wanted.faster_than_baseline:
        speedup = comparison.speedup(PRODUCT).measured
        least = 1.0 if wanted.faster_than_baseline is True else float(wanted.faster_than_baseline)
        is_met = speedup > 1.0 and speedup >= least
        limit = f"≥ {least:g}×" if least > 1 else "> 1×"
        found.append(Requirement(f"speed-up over {comparison.baseline}", limit, f"{speedup:.2f}×", is_met))
    return tuple(found)
