"""`sweep`: a recipe run once for each combination of values of its options; each trial is a run in its own folder."""

from __future__ import annotations

import functools
import itertools
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from kernelpress.bench.machine import describe_machine
from kernelpress.press.folder import RunFolder, step_key
from kernelpress.press.options import with_options
from kernelpress.press.ray_trials import run_on_ray
from kernelpress.press.reading import RecipeFile, read_recipe
from kernelpress.press.recipe import Recipe, RecipeError
from kernelpress.press.run import RequirementError, press
from kernelpress.press.sections import RangeSection, SweepSection
from kernelpress.press.steps import dense_name
from kernelpress.report import Limits, Reached, SweepReport, Trial, commit_of, now, render_sweep

__all__ = ["SWEEP_HTML", "SWEEP_JSON", "Planned", "SweepError", "planned", "report_on", "run_trials", "sweep"]

SWEEP_HTML, SWEEP_JSON = "sweep.html", "sweep.json"
MOST_TRIALS = 10_000


class SweepError(RuntimeError):
    """Every trial failed; the message has each one's reason."""


@dataclass(frozen=True)
class Planned:
    """A trial to come: the options that it changes, and its recipe or why there is none."""

    name: str
    options: Mapping[str, Any]
    recipe: Recipe | RecipeError

    @property
    def folder(self) -> str:
        """The name of its folder, which depends on nothing but itself."""
        readable = re.sub(r"[^\w.=-]+", "-", self.name).strip("-")[:60]
        return f"{readable}-{step_key(self.name, repr(self.options))[:8]}"


def sweep(
    recipe: str | Path,
    *,
    options: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    output: str | Path | None = None,
    fresh: bool = False,
    ray: str | None = None,
    tell: Callable[[str], None] = print,
    progress: bool = True,
) -> SweepReport:
    """Run a recipe for every combination of its section `sweep`, and write a table of what the trials reached, with
    Pareto plots, into `output` (by default the recipe's), as HTML and JSON.

    Each trial is a run of `press` in a folder of its own below `trials/`: a later sweep goes on where this one stopped,
    and steps that trials have in common are done once. `options` are changed in all of them. A trial that fails is told
    with its reason and ends no other; one that misses what its recipe requires counts, with a remark. They run one
    after the other; with `ray`, the address of a cluster or "local", on Ray Tune, each with a node to itself.

    Raises `RecipeError` for a bad recipe or one without that section, `SweepError` where every trial fails,
    `ImportError` for `ray` where it is not installed.
    """
    file = read_recipe(recipe, options)
    base = file.checked()
    if base.sweep is None:
        raise RecipeError(f"{file.path}: sweep: expected this section, with cases or options to try")
    trials = run_trials(
        planned(file, base.sweep, base.seed),
        folder := Path(base.output if output is None else output),
        fresh=fresh,
        ray=ray,
        tell=tell,
        progress=progress,
    )
    return report_on(base.title or f"{base.model.name}, swept", trials, limits or Limits(), folder, tell)


def planned(
    file: RecipeFile,
    section: SweepSection,
    seed: int,
    adapted: Callable[[dict[str, Any]], Mapping[str, Any]] = lambda raw: raw,
) -> list[Planned]:
    """The trials of a recipe; `adapted` has the last word on the plain values of each.

    Raises `RecipeError` for a path that leads nowhere, and more trials than anybody can wait for.
    """
    found = []
    for name, options in _combinations(section, seed):
        raw = with_options({key: value for key, value in file.raw.items() if key != "sweep"}, options)
        try:
            found.append(Planned(name, options, file.checked(adapted(raw))))
        except RecipeError as error:
            found.append(Planned(name, options, error))
    return found


def run_trials(
    trials: Sequence[Planned],
    folder: Path,
    *,
    fresh: bool,
    tell: Callable[[str], None],
    progress: bool,
    ray: str | None = None,
) -> tuple[Trial, ...]:
    """Presses one after the other, as each is to be timed alone, or on nodes of a cluster. Raises `SweepError` where
    all of them fail."""
    folder = folder.resolve()
    RunFolder(folder).create()
    places = [folder / "trials" / trial.folder for trial in trials]

    def attempt(index: int, tell: Callable[[str], None], progress: bool) -> Trial:
        others = [other for other in places if other != places[index] and other.is_dir() and not fresh]
        return _tried(trials[index], places[index], others[::-1], fresh, tell, progress)

    found = list[Trial]()
    if ray is not None:
        quietly = functools.partial(attempt, tell=_nobody, progress=False)
        for trial, result in zip(trials, run_on_ray(quietly, len(trials), folder, ray), strict=True):
            found.append(result if isinstance(result, Trial) else _of(trial, failure=result))
            tell(f"{trial.name}: {_told(found[-1])}")
    else:
        for index, trial in enumerate(trials):
            tell(f"trial {index + 1} of {len(trials)}: {trial.name}")
            found.append(attempt(index, tell, progress))
            tell(f"  {_told(found[-1])}")
    if all(trial.reached is None for trial in found):
        reasons = "".join(f"\n  {trial.name}: {trial.failure}" for trial in found)
        raise SweepError(f"sweep: each of the {len(found)} trials failed{reasons}")
    return tuple(found)


def report_on(
    title: str, trials: tuple[Trial, ...], limits: Limits, folder: Path, tell: Callable[[str], None]
) -> SweepReport:
    """The report on these trials, written into the folder."""
    report = SweepReport(title, now(), commit_of(Path(__file__).parent), describe_machine(), limits, trials)
    RunFolder(folder).write(SWEEP_JSON, report.to_json().encode())
    RunFolder(folder).write(SWEEP_HTML, render_sweep(report).encode())
    tell(f"report: {folder / SWEEP_HTML}, {folder / SWEEP_JSON}")
    return report


def _tried(
    planned: Planned, place: Path, others: Iterable[Path], fresh: bool, tell: Callable[[str], None], progress: bool
) -> Trial:
    trial = _of(planned)
    if isinstance(planned.recipe, RecipeError):
        return replace(trial, failure=str(planned.recipe))
    try:
        report = press(
            planned.recipe,
            output=place,
            fresh=fresh,
            shared=others,
            tell=lambda line: tell(f"  {line}"),
            progress=progress,
        )
    except RequirementError as error:
        return replace(trial, reached=Reached.of(error.report, dense_name("emitted")), failure=f"required: {error}")
    except Exception as error:  # Whatever ends a trial does not end the others.
        return replace(trial, failure=f"{type(error).__name__}: {error}")
    return replace(trial, reached=Reached.of(report, dense_name("emitted")))


def _of(planned: Planned, failure: str = "") -> Trial:
    return Trial(planned.name, dict(planned.options), f"trials/{planned.folder}", failure=failure)


def _nobody(line: str) -> None:
    """Hears what is told."""


def _told(trial: Trial) -> str:
    if trial.reached is None:
        return f"failed: {trial.failure}"
    return f"reached: accuracy {trial.reached.accuracy:.2%}, {trial.reached.latency_ms:.3g} ms"


def _combinations(section: SweepSection, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name of each trial, and the options that it changes."""
    cases = section.cases or {"": {}}
    labels = _labels(section.options)

    def combined(case: str, values: Iterable[Any]) -> tuple[str, dict[str, Any]]:
        chosen = dict(zip(section.options, values, strict=True))
        names = [f"{labels[path]}={_shown(value)}" for path, value in chosen.items()]
        return ", ".join([*([case] if case else []), *names]), {**cases[case], **chosen}

    if section.trials is None:
        lists = [values for values in section.options.values() if not isinstance(values, RangeSection)]
        count = len(cases) * math.prod(map(len, lists))
        if count > MOST_TRIALS:
            raise RecipeError(f"sweep: expected at most {MOST_TRIALS} combinations without trials, got {count}")
        for case, *values in itertools.product(cases, *lists):
            yield combined(case, values)
        return
    drawn: dict[str, dict[str, Any]] = {}
    generator = random.Random(seed)
    for _ in range(100 * section.trials):
        values = [_drawn(values, generator) for values in section.options.values()]
        name, options = combined(generator.choice(list(cases)), values)
        if name not in drawn:
            drawn[name] = options
            yield name, options
        if len(drawn) == section.trials:
            return


def _drawn(values: tuple[Any, ...] | RangeSection, generator: random.Random) -> Any:
    if not isinstance(values, RangeSection):
        return generator.choice(values)
    low, high = (math.log(values.low), math.log(values.high)) if values.log else (values.low, values.high)
    if isinstance(values.low, int) and isinstance(values.high, int):
        if not values.log:
            return generator.randint(values.low, values.high)
        return round(math.exp(generator.uniform(low, high)))
    value = generator.uniform(low, high)
    # Three digits tell values apart, and can be read.
    return float(f"{math.exp(value) if values.log else value:.3g}")


def _labels(paths: Iterable[str]) -> dict[str, str]:
    """The last part of each path, with as many before it as tell it from the others."""
    known = [path.split(".") for path in paths]
    found = {}
    for parts in known:
        count = next(n for n in range(1, len(parts) + 1) if sum(p[-n:] == parts[-n:] for p in known) == 1)
        found[".".join(parts)] = ".".join(parts[-count:])
    return found


def _shown(value: Any) -> str:
    """A value as YAML has it, on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
