"""`search`: one model pressed by every recipe that ships, the fastest within an accuracy budget kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from kernelpress.press.reading import RecipeFile, read_recipe
from kernelpress.press.recipe import Recipe, RecipeError
from kernelpress.press.sections import SweepSection
from kernelpress.press.steps import file_of
from kernelpress.press.sweeps import Planned, planned, report_on, run_trials
from kernelpress.report import Limits, SweepReport

__all__ = ["BEST", "search", "shipped_recipes"]

BEST = "best.pt2"
TRIED = ("methods", "digits", "decompose", "sparse", "distill")
"""What a search tries by default; `lottery` studies one network over seeds."""
LEARNING_RATE, WEIGHT_DECAY = 0.1, 5e-4


def shipped_recipes() -> list[Path]:
    """The recipes that a search tries by default. Raises `FileNotFoundError` where they were not installed."""
    try:
        folder = Path(str(resources.files("kernelpress.recipes").joinpath("")))
    except ModuleNotFoundError as error:
        raise FileNotFoundError("recipes: none are installed beside kernelpress; name files") from error
    return [folder / f"{name}.yaml" for name in TRIED]


def search(
    model: str,
    *,
    latency_ms: float,
    max_drop: float = 0.01,
    data: str | Path = "digits",
    image_size: int = 32,
    options: Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
    epochs: int = 10,
    batch: int = 1,
    threads: int | None = None,
    recipes: Sequence[str | Path] | None = None,
    output: str | Path = "results/search",
    tell: Callable[[str], None] = print,
    progress: bool = True,
) -> SweepReport:
    """Press `model`, a name as recipes have it with its `options`, by each of the `recipes` (those that ship) and each
    of their cases; the fastest of at most `latency_ms` that loses at most `max_drop` of the dense model's accuracy is
    `report.best()`, and its emitted model is copied to `output/best.pt2`.

    The model starts from `weights`, a safetensors file, or is trained for `epochs` first, by every recipe alike. What
    fails, such as a loss on layers that this model lacks, stands in the report with its reason. A later search goes on
    where this one stopped.

    Raises `RecipeError` for bad recipes, `ValueError` for arguments out of range, `SweepError` where everything fails.
    """
    for name, value, is_right in (
        ("latency_ms", latency_ms, latency_ms > 0),
        ("max_drop", max_drop, 0 <= max_drop <= 1),
        ("epochs", epochs, epochs > 0),
    ):
        if not is_right:
            raise ValueError(f"{name}: expected {'0 to 1' if name == 'max_drop' else 'more than 0'}, got {value}")
    given = {
        "model": {"name": model, "options": dict(options or {}), "weights": weights and str(weights)},
        "data": {"source": str(data), "image_size": image_size, "shift": image_size // 16},
    }
    training = {"epochs": 0} if weights else {"epochs": epochs, "lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY}
    common: dict[str, dict[str, Any]] = {
        "emit": {"batch": batch, "threads": threads},
        "measure": {"peers": ["eager", "channels_last", "emitted"]},
    }

    def adapted(raw: dict[str, Any]) -> dict[str, Any]:
        first, *others = ({step: {}} if isinstance(step, str) else step for step in raw["steps"])
        if "train" in first:
            first = {"train": {**first["train"], **training}}
        steps = [first, *({name: common.get(name, section) for name, section in step.items()} for step in others)]
        return {**raw, **given, "require": {}, "steps": steps}

    trials: list[Planned] = []
    for path in recipes or shipped_recipes():
        file = read_recipe(path)
        trials += _planned(file, adapted)
    folder = Path(output)
    limits = Limits(max_ms=latency_ms, max_drop=max_drop)
    found = run_trials(trials, folder, fresh=False, tell=tell, progress=progress)
    report = report_on(f"{model}, every way to press it", found, limits, folder, tell)
    best = report.best()
    if best is not None:
        recipe = trials[report.trials.index(best)].recipe
        assert isinstance(recipe, Recipe)
        shutil.copyfile(folder / best.folder / file_of(recipe.last_emission()), folder / BEST)
        tell(f"kept: {folder / BEST}")
    return report


def _planned(file: RecipeFile, adapted: Callable[[dict[str, Any]], Mapping[str, Any]]) -> list[Planned]:
    """The cases of a recipe, or itself, under its file's name."""
    name = file.path.stem
    if not file.checked().steps:
        raise RecipeError(f"{file.path}: steps: expected this list, which a search adapts")
    section = file.checked().sweep
    cases = {f"{name}: {case}": options for case, options in section.cases.items()} if section else {}
    return planned(file, SweepSection(cases=cases or {name: {}}), 0, adapted)
