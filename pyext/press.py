"""`press`: a recipe becomes a smaller, faster model and a report; stages that are finished are not done again."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kernelpress
from kernelpress.bench.machine import describe_machine
from kernelpress.emit.record import EmissionRecord
from kernelpress.measure import Comparison
from kernelpress.measure.latency import threads_set_to
from kernelpress.recipe import Recipe, load_recipe
from kernelpress.report import (
    AccuracyPoint,
    LayerRealisation,
    Report,
    Requirement,
    commit_of,
    layer_realisations,
    now,
    render_html,
    render_json,
)
from kernelpress.runfolder import RunFolder, StageRecord, stage_key
from kernelpress.stages import PRODUCT, STAGES, Context, Stage

__all__ = ["REPORT_HTML", "REPORT_JSON", "RequirementError", "press"]

REPORT_HTML, REPORT_JSON = "report.html", "report.json"


class RequirementError(RuntimeError):
    """The run did not reach what its recipe requires; `report` tells by how much."""

    def __init__(self, report: Report) -> None:
        unmet = [item for item in report.requirements if not item.is_met]
        super().__init__("; ".join(f"{item.name}: wanted {item.wanted}, got {item.got}" for item in unmet))
        self.report = report


def press(
    recipe: Recipe | str | Path,
    *,
    output: str | Path | None = None,
    fresh: bool = False,
    tell: Callable[[str], None] = print,
    progress: bool = True,
) -> Report:
    """Run a recipe: train → compress → finetune → emit → measure → report, into `output` (by default the recipe's).

    Every stage is kept in that folder under a key of all it depends on: a later run goes on where this one stopped and
    tells what it skipped. `fresh` forgets what is there. `tell` gets a line per event, `progress` allows bars.

    Raises `RecipeError` for a bad recipe, `ValueError` and `OSError` for bad data, models or folders, and
    `RequirementError`, once the report is written, where the result is not what the recipe requires.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    folder = RunFolder(Path(recipe.output if output is None else output))
    folder.create()
    context = Context(recipe, folder, tell, progress)
    key = stage_key(kernelpress.__version__)
    with threads_set_to(recipe.emit.threads):
        for stage in STAGES:
            if fresh:
                folder.forget(stage.name)
            key = stage_key(key, _plain(stage.depends_on(recipe)))
            # What later stages read are the files, not the settings that led to them.
            key = stage_key(key, _run_stage(context, stage, key).files)
    try:
        report = _report(context)
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"output: {folder.path} holds records of stages that no report follows from ({type(error).__name__}: "
            f"{error}); run it again with fresh=True"
        ) from error
    folder.write(REPORT_JSON, render_json(report).encode())
    folder.write(REPORT_HTML, render_html(report).encode())
    tell(f"report: {folder.path / REPORT_HTML}, {folder.path / REPORT_JSON}")

    if not all(item.is_met for item in report.requirements):
        raise RequirementError(report)
    return report


def _run_stage(context: Context, stage: Stage, key: str) -> StageRecord:
    """Take the stage from the folder where what lies there is still valid, else do its work and keep it there."""
    record = context.folder.finished(stage.name, key)
    if isinstance(record, StageRecord):
        context.tell(f"{stage.name}: skipped, finished before ({record.seconds:.1f} s)")
    else:
        context.tell(f"{stage.name}: again, because {record}" if record else f"{stage.name}: started")
        start = time.perf_counter()
        results = stage.work(context)
        record = context.folder.finish(stage.name, key, results, stage.files, time.perf_counter() - start)
        context.tell(f"{stage.name}: finished in {record.seconds:.1f} s")
    context.results[stage.name], context.seconds[stage.name] = record.results, record.seconds
    return record


def _plain(value: Any) -> Any:
    """Recipe sections as plain values."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def _report(context: Context) -> Report:
    results, recipe = context.results, context.recipe
    comparison = Comparison.from_dict(results["measure"]["comparison"])
    base, product = comparison[comparison.baseline], comparison[PRODUCT]
    emission = EmissionRecord.from_json(results["emit"]["record"])
    dense_record = results["measure"]["dense_record"]
    accuracies = (
        _point("dense", results["train"], results["train"]["accuracy"], base.latency.median),
        _point("compressed", results["compress"], results["compress"]["accuracy"], None),
        _point("pressed", results["finetune"], results["measure"]["accuracy"], product.latency.median),
    )
    return Report(
        title=recipe.title or f"{recipe.model.name} on {recipe.data.source}",
        date=now(),
        commit=commit_of(Path(__file__).parent),
        machine=describe_machine(),
        recipe=recipe.model_dump(mode="json", exclude_none=True),
        comparison=comparison,
        pressed=PRODUCT,
        accuracies=accuracies,
        layers=_layers(dense_record, emission),
        emission=emission,
        requirements=_requirements(recipe, comparison, accuracies),
        stage_seconds=dict(context.seconds),
        notes=(*results["measure"]["notes"], *([f"emission {emission.reason}"] if emission.kept_original else [])),
    )


def _layers(dense_record: dict[str, Any] | None, pressed: EmissionRecord) -> tuple[LayerRealisation, ...]:
    """What runs at each place; nothing where the places were weighed but the original model was kept."""
    if dense_record is None or pressed.kept_original:
        return ()
    return layer_realisations(EmissionRecord.from_json(dense_record), pressed)


def _point(name: str, stage: dict[str, Any], accuracy: float, latency_ms: float | None) -> AccuracyPoint:
    return AccuracyPoint(name, accuracy, stage["flops"], stage["parameters"], latency_ms)


def _requirements(
    recipe: Recipe, comparison: Comparison, accuracies: tuple[AccuracyPoint, ...]
) -> tuple[Requirement, ...]:
    wanted, dense, pressed = recipe.require, accuracies[0], accuracies[-1]
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
    if wanted.faster_than_baseline:
        speedup = comparison.speedup(PRODUCT).measured
        least = 1.0 if wanted.faster_than_baseline is True else float(wanted.faster_than_baseline)
        is_met = speedup > 1.0 and speedup >= least
        limit = f"≥ {least:g}×" if least > 1 else "> 1×"
        found.append(Requirement(f"speed-up over {comparison.baseline}", limit, f"{speedup:.2f}×", is_met))
    return tuple(found)
