"""Options of a recipe by dotted paths: `steps.1.prune_weights.sparsity`, where items of lists go by numbers from 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kernelpress.press.recipe import SHORT_FORMS, RecipeError

__all__ = ["plain_copy", "with_options"]


def with_options(raw: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a recipe's plain values in which each path of `options`, one after the other, has its value.

    Short forms on the way are written out, absent mappings made. Raises `RecipeError` for a path that leads nowhere.
    """
    made: dict[str, Any] = plain_copy(raw)
    for path, value in options.items():
        _set(made, path, plain_copy(value))
    return made


def plain_copy(value: Any) -> Any:
    """A copy in which no two places share a list or mapping, as YAML's aliases do."""
    if isinstance(value, Mapping):
        return {key: plain_copy(part) for key, part in value.items()}
    return [plain_copy(part) for part in value] if isinstance(value, list | tuple) else value


def _set(made: dict[str, Any], path: str, value: Any) -> None:
    here: Any = made
    parts = path.split(".")
    for index, part in enumerate(parts):
        above = ".".join(parts[:index]) or "the recipe"
        key: Any = part
        if isinstance(here, list):
            if not part.isdecimal() or int(part) >= len(here):
                raise RecipeError(f"{path}: expected a number below {len(here)}, of an item of {above}, got {part!r}")
            key = int(part)
        elif not isinstance(here, dict):
            raise RecipeError(f"{path}: expected a mapping or a list at {above}, got {here!r}")
        if index == len(parts) - 1:
            here[key] = value
            return
        below = here[key] if isinstance(here, list) else here.get(key)
        if isinstance(below, str) and below == parts[index + 1]:
            below = {below: {}}
        elif isinstance(below, str) and not index and part in SHORT_FORMS:
            below = {SHORT_FORMS[part]: below}
        here[key] = here = {} if below is None else below
