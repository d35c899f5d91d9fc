"""A YAML file becomes a checked recipe, or an error that names file, line and key."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from kernelpress.files.plain import did_you_mean
from kernelpress.press.options import with_options
from kernelpress.press.recipe import Recipe, RecipeError, recipe_class

__all__ = ["RecipeFile", "load_recipe", "read_recipe"]

LARGEST = 1 << 18
"""Bytes of a recipe file."""
MOST_VALUES, LONGEST_VALUE = 10_000, 4_000


@dataclass(frozen=True)
class RecipeFile:
    """What a recipe's file says, and on which line each key stands."""

    path: Path
    raw: Mapping[str, Any]
    lines: Mapping[tuple[str | int, ...], int] = field(repr=False)

    def checked(self, raw: Mapping[str, Any] | None = None) -> Recipe:
        """The recipe, or that of `raw`, which began as this one. Raises `RecipeError` as `load_recipe` does."""
        try:
            return recipe_class().model_validate(self.raw if raw is None else raw)
        except ValidationError as error:
            told = "\n".join(_explain(detail, self.lines, self.path) for detail in error.errors())
            raise RecipeError(told) from error


def load_recipe(path: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> Recipe:
    """Read and check a recipe, in which `options` by their dotted paths, such as `steps.0.train.epochs`, are changed.

    Raises `RecipeError` for a file that is missing or is no YAML, an unknown or duplicate key, a value not allowed, a
    path that leads nowhere.
    """
    return read_recipe(path, options).checked()


def read_recipe(path: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> RecipeFile:
    """As `load_recipe`, before its keys and values are checked."""
    file = Path(path)
    try:
        with file.open("rb") as stream:
            content = stream.read(LARGEST + 1)
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(f"{file}: the recipe cannot be read: {reason}") from error
    if len(content) > LARGEST:
        raise RecipeError(f"{file}: expected a recipe of at most {LARGEST} bytes, got more")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_size(node, file)
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file}:{mark.line + 1}" if mark else str(file)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{place}: this is not YAML: {problem}") from error
    except RecipeError:
        raise
    except (ValueError, TypeError, AttributeError, ArithmeticError, LookupError, RecursionError) as error:
        # Dates that no calendar has, numbers without end, nests without bottom.
        raise RecipeError(f"{file}: this is not YAML as recipes use it: {error}") from error
    if not isinstance(raw, dict):
        kind = "nothing" if raw is None else type(raw).__name__
        raise RecipeError(
            f"{file}: expected a mapping with the keys {', '.join(recipe_class().model_fields)}, got {kind}"
        )
    return RecipeFile(file, with_options(raw, options or {}), _lines(node, file))


def _check_size(node: yaml.Node | None, file: Path) -> None:
    """Raises `RecipeError` for a recipe of too many values once its aliases are written out, or of too long ones."""
    sizes: dict[int, int] = {}

    def size_of(node: yaml.Node, above: tuple[int, ...]) -> int:
        line = node.start_mark.line + 1
        if id(node) in above or len(above) > 20:
            raise RecipeError(f"{file}:{line}: expected a nest of at most 20 levels")
        if id(node) not in sizes:
            parts = node.value if isinstance(node, yaml.CollectionNode) else ()
            flat = [part for item in parts for part in (item if isinstance(item, tuple) else (item,))]
            sizes[id(node)] = 1 + sum(size_of(part, (*above, id(node))) for part in flat)
        if sizes[id(node)] > MOST_VALUES or (isinstance(node, yaml.ScalarNode) and len(node.value) > LONGEST_VALUE):
            raise RecipeError(
                f"{file}:{line}: expected at most {MOST_VALUES} values, aliases written out, "
                f"of {LONGEST_VALUE} characters"
            )
        return sizes[id(node)]

    if node is not None:
        size_of(node, ())


def _lines(node: yaml.Node | None, file: Path, at: tuple[str | int, ...] = ()) -> dict[tuple[str | int, ...], int]:
    """Line number of every key and list item below `node`."""
    lines: dict[tuple[str | int, ...], int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            place = (*at, str(key.value))
            line = key.start_mark.line + 1
            if place in lines:
                raise RecipeError(f"{file}:{line}: {_dotted(place)}: this key stands twice")
            lines[place] = line
            lines |= _lines(value, file, place)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            place = (*at, index)
            lines[place] = value.start_mark.line + 1
            lines |= _lines(value, file, place)
    return lines


def _dotted(place: tuple[str | int, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")


def _known_keys(place: tuple[str | int, ...]) -> list[str]:
    """The keys allowed beside `place`."""
    section: type[BaseModel] = recipe_class()
    for part in place[:-1]:
        if isinstance(part, str):
            section = _section_in(section.model_fields[part].annotation) or section
    return list(section.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The model that an annotation such as `tuple[Section, ...]` or `Section | None` speaks of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part)) is not None), None)


def _explain(detail: Mapping[str, Any], lines: Mapping[tuple[str | int, ...], int], file: Path) -> str:
    """One line for one of pydantic's errors."""
    place: tuple[str | int, ...] = tuple(detail["loc"])
    while place and place not in lines and detail["type"] != "missing":
        place = place[:-1]
    line = next((lines[place[:n]] for n in range(len(place), 0, -1) if place[:n] in lines), None)
    where = f"{file}:{line}" if line else str(file)
    if detail["type"] == "extra_forbidden":
        known = _known_keys(place)
        return f"{where}: {_dotted(place)}: unknown key{did_you_mean(str(place[-1]), known)}; known: {', '.join(known)}"
    if detail["type"] == "missing":
        return f"{where}: {_dotted(place)}: this key is required"
    message = str(detail["msg"]).removeprefix("Value error, ")
    label = f"{_dotted(place)}: " if place else ""
    got = "" if detail["type"] == "value_error" else f", got {detail['input']!r}"
    return f"{where}: {label}{message[0].lower()}{message[1:]}{got}"
