"""`press`: the steps of a recipe one after the other; those that are finished are not done again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import kernelpress
from kernelpress.press.folder import RunFolder, StepRecord, step_key
from kernelpress.press.reading import load_recipe
from kernelpress.press.recipe import Recipe, RunStep
from kernelpress.press.results import report_of
from kernelpress.press.steps import Run, depends_on, do, file_of
from kernelpress.report import Report, render_html, render_json

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
    shared: Iterable[str | Path] = (),
    tell: Callable[[str], None] = print,
    progress: bool = True,
) -> Report:
    """Run the steps of a recipe and write the report of its last measurement, into `output` (by default the recipe's).

    Every step is kept in that folder under a key of all it depends on: a later run goes on where this one stopped and
    tells what it skipped. `fresh` forgets what is there. Steps that the runs of the folders `shared` finished alike
    are taken from there. `tell` gets a line per event, `progress` allows bars.

    Raises `RecipeError` for a bad recipe, `ValueError`, `OSError` and `ImportError` for bad data, models or folders,
    and `RequirementError`, once the report is written, where the result is not what the recipe requires.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    folder = RunFolder(Path(recipe.output if output is None else output))
    folder.create()
    run = Run(recipe, folder, tell, progress)
    others = tuple(RunFolder(Path(other)) for other in shared)
    key = step_key(kernelpress.__version__)
    for step in run.steps:
        if fresh:
            folder.forget(step.id)
        key = step_key(key, depends_on(step, recipe))
        run.records[step.id] = _finished(run, step, key, others)
        # What later steps read are the files, not the settings that led to them.
        key = step_key(key, run.records[step.id].files)
    try:
        report = report_of(run)
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"output: {folder.path} holds records of steps that no report follows from ({type(error).__name__}: "
            f"{error}); run it again with fresh=True"
        ) from error
    folder.write(REPORT_JSON, render_json(report).encode())
    folder.write(REPORT_HTML, render_html(report).encode())
    tell(f"report: {folder.path / REPORT_HTML}, {folder.path / REPORT_JSON}")

    if not all(item.is_met for item in report.requirements):
        raise RequirementError(report)
    return report


def _finished(run: Run, step: RunStep, key: str, others: tuple[RunFolder, ...]) -> StepRecord:
    """Take the step from the folder, or from others, where what lies there is valid, else do its work and keep it."""
    record = run.folder.finished(step.id, key)
    if isinstance(record, StepRecord):
        run.tell(f"{step.id}: skipped, finished before ({record.seconds:.1f} s)")
        return record
    for other in others:
        if taken := run.folder.take(step.id, key, other):
            run.tell(f"{step.id}: skipped, finished in {other.path} ({taken.seconds:.1f} s)")
            return taken
    run.tell(f"{step.id}: again, because {record}" if record else f"{step.id}: started")
    start = time.perf_counter()
    results, file = do(run, step, key), file_of(step)
    record = run.folder.finish(step.id, key, results, (file,) if file else (), time.perf_counter() - start)
    run.tell(f"{step.id}: finished in {record.seconds:.1f} s")
    return record
