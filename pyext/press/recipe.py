"""The recipe of a run: its data, its model and its steps, checked."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import GenericAlias
from typing import Any, cast

from pydantic import create_model, model_validator

from kernelpress.press.registry import known_passes
from kernelpress.press.sections import (
    OWN_STEPS,
    START,
    DataSection,
    EmitSection,
    MeasureSection,
    ModelSection,
    RequireSection,
    Section,
    SweepSection,
    TrainSection,
)

__all__ = ["SHORT_FORMS", "Recipe", "RecipeError", "RunStep", "Step", "recipe_class"]

SHORT_FORMS = {"data": "source", "model": "name"}
"""`data: digits` and `model: resnet20` stand for mappings with these keys."""


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the file, the line and the key."""


class Step(Section):
    """One item of a list of steps: exactly one key, the step's name, with its section."""

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, raw: Any) -> Any:
        """`emit`, or `emit:` without a value, stands for a section of defaults."""
        if isinstance(raw, str):
            return {raw: {}}
        return {name: {} if value is None else value for name, value in raw.items()} if isinstance(raw, dict) else raw

    @model_validator(mode="after")
    def _is_one(self) -> Step:
        if len(self.model_fields_set) != 1:
            raise ValueError(
                f"expected one step per list item, got {', '.join(sorted(self.model_fields_set)) or 'none'}"
            )
        return self

    @property
    def name(self) -> str:
        """The key that was given."""
        return next(iter(self.model_fields_set))

    @property
    def section(self) -> Section:
        """What was given under it."""
        section: Section = getattr(self, self.name)
        return section


@dataclass(frozen=True)
class RunStep:
    """A step in its place in a run. Its `id` is its name, with a number from the second of that name on."""

    id: str
    name: str
    section: Section
    before: str
    """The id of the step whose model it starts from."""
    emitted_by: RunStep | None = None
    """For `measure`: the step whose emitted model it measures."""

    @property
    def changes_model(self) -> bool:
        """Whether it leaves another model than it found."""
        return self.name not in ("emit", "measure")


class Recipe(Section):
    """A whole run. Its steps are a list, `steps`, or in short train → compress → finetune → emit → measure."""

    title: str = ""
    seed: int = 0
    data: DataSection = DataSection()
    model: ModelSection
    steps: tuple[Step, ...] = ()
    train: TrainSection | None = None
    compress: tuple[Step, ...] = ()
    finetune: TrainSection | None = None
    emit: EmitSection = EmitSection()
    measure: MeasureSection = MeasureSection()
    require: RequireSection = RequireSection()
    sweep: SweepSection | None = None
    output: Path = Path("results/press")

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        return {**raw, **{key: {form: raw[key]} for key, form in SHORT_FORMS.items() if isinstance(raw.get(key), str)}}

    @model_validator(mode="after")
    def _is_a_run(self) -> Recipe:
        both = self.model_fields_set & {"compress", *OWN_STEPS} if "steps" in self.model_fields_set else set()
        if both:
            raise ValueError(f"steps: expected either this list or the short form, got {', '.join(sorted(both))} too")
        is_trained = any(step.name in OWN_STEPS and isinstance(step.section, TrainSection) for step in self.run_steps())
        # Other libraries' models may come with weights.
        if self.model.weights is None and ":" not in self.model.name and not is_trained:
            raise ValueError("train: expected this section with epochs above zero, or model.weights to start from")
        if self.require.faster_than_emitted and not self.emissions_before(self.last_emission()):
            raise ValueError(
                "require: faster_than_emitted expects an emit step before a pass or training, alike the last"
            )
        return self

    def last_emission(self) -> RunStep:
        """The step whose emitted model the report is about."""
        last = next(step for step in reversed(self.run_steps()) if step.name == "measure")
        assert last.emitted_by is not None
        return last.emitted_by

    def run_steps(self) -> tuple[RunStep, ...]:
        """All steps in order. A list that measures nothing ends with `emit` and `measure`.

        Raises `ValueError` for a step where it cannot stand.
        """
        listed = [(step.name, step.section) for step in self.steps] or [
            *([("train", self.train)] if self.train else []),
            *((step.name, step.section) for step in self.compress),
            *([("finetune", self.finetune)] if self.finetune else []),
            ("emit", self.emit),
            ("measure", self.measure),
        ]
        if all(name != "measure" for name, _ in listed):
            listed += [("emit", EmitSection()), ("measure", MeasureSection())]
        found = [RunStep(START, START, self.model, START)]
        emitted: RunStep | None = None
        for name, section in listed:
            if isinstance(section, TrainSection) and section.epochs == 0:
                continue
            count = sum(step.name == name for step in found)
            before = next(step.id for step in reversed(found) if step.changes_model)
            step = RunStep(f"{name}-{count + 1}" if count else name, name, section, before)
            if name == "measure":
                if emitted is None or emitted.before != before:
                    raise ValueError(f"steps: expected emit before {step.id}, after {before}")
                step = RunStep(step.id, name, section, before, emitted)
            found.append(step)
            emitted = step if name == "emit" else emitted
        return tuple(found)

    def emissions_before(self, emission: RunStep) -> tuple[RunStep, ...]:
        """The last emission of each model before the one that this step emits, under the same conditions."""
        steps = self.run_steps()
        earlier = (step for step in steps[: steps.index(emission)] if step.section == emission.section)
        found = {step.before: step for step in earlier if step.name == "emit" and step.before != emission.before}
        return tuple(found.values())

    def plain(self) -> dict[str, Any]:
        """The recipe as plain values, its steps as a list."""
        values = self.model_dump(mode="json", exclude_none=True, exclude={"steps", "compress", "sweep", *OWN_STEPS})
        steps = [{s.name: s.section.model_dump(mode="json", exclude_none=True)} for s in self.run_steps()[1:]]
        return {**values, "steps": steps}


def recipe_class() -> type[Recipe]:
    """`Recipe` with a key for every pass that is registered by now."""
    return _recipe_class(tuple((name, known.options) for name, known in known_passes().items()))


@functools.cache
def _recipe_class(known: tuple[tuple[str, type[Section]], ...]) -> type[Recipe]:
    lists = {"steps": _step_class((*OWN_STEPS.items(), *known)), "compress": _step_class(known)}
    fields: dict[str, Any] = {name: (GenericAlias(tuple, (step, ...)), ()) for name, step in lists.items()}
    return cast(type[Recipe], create_model("Recipe", __base__=Recipe, **fields))


def _step_class(known: Iterable[tuple[str, type[Section]]]) -> type[Step]:
    fields: dict[str, Any] = {name: (section | None, None) for name, section in known}
    return cast(type[Step], create_model("Step", __base__=Step, **fields))
