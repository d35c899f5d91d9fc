"""Runs the functions of a test file without pytest: parametrised ones with every combination, fixtures given by hand.

Where pytest is not installed, a stand-in takes its name, that knows marks, `fixture` and `skip` and nothing more.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

__all__ = ["Outcome", "provide_pytest", "run_file"]


@dataclass(frozen=True)
class Outcome:
    """What became of one call: "passed", "skipped" or "failed", and why."""

    name: str
    result: str
    reason: str = ""


class Skipped(Exception):  # noqa: N818 - the name of pytest's own
    """What the stand-in's `skip` raises."""


@dataclass(frozen=True)
class _Mark:
    name: str
    args: tuple[Any, ...]


class _Marks:
    """`pytest.mark`: whatever mark is asked for, noted on the function."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def mark(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
            def noted(function: Any) -> Any:
                function.pytestmark = [*getattr(function, "pytestmark", []), _Mark(name, args)]
                return function

            return noted

        return mark


def provide_pytest() -> bool:
    """Puts the stand-in where `import pytest` finds it, unless pytest is there; returns whether it did."""
    if "pytest" in sys.modules or importlib.util.find_spec("pytest") is not None:
        return False
    module: Any = ModuleType("pytest")

    def skip(reason: str = "") -> None:
        raise Skipped(reason)

    def fixture(*args: Any, **kwargs: Any) -> Any:
        return args[0] if args and callable(args[0]) else lambda function: function

    def param(*values: Any, id: str | None = None, marks: Any = ()) -> SimpleNamespace:
        return SimpleNamespace(values=values, id=id)

    module.mark, module.skip, module.fixture, module.param = _Marks(), skip, fixture, param
    module.FixtureRequest = module.TempPathFactory = module.MonkeyPatch = object
    sys.modules["pytest"] = module
    return True


def run_file(name: str, fixtures: Mapping[str, Any]) -> Iterator[Outcome]:
    """Calls every test of the module `name`, each with the parameters of its marks and those of `fixtures` it names."""
    module = importlib.import_module(name)
    for test, function in vars(module).items():
        if test.startswith("test_") and callable(function):
            for parameters in _combinations(function):
                wanted = function.__code__.co_varnames[: function.__code__.co_argcount]
                given = {key: value for key, value in fixtures.items() if key in wanted}
                shown = ", ".join(str(value) for value in parameters.values())
                call = functools.partial(function, **given, **parameters)
                yield _outcome(f"{test}[{shown}]" if shown else test, call)


def _outcome(name: str, call: Callable[[], object]) -> Outcome:
    try:
        call()
    except Exception as error:
        if type(error).__name__ == "Skipped":
            return Outcome(name, "skipped", str(error))
        place = traceback.extract_tb(error.__traceback__)[-1]
        return Outcome(name, "failed", f"{type(error).__name__}: {error} ({place.name}, line {place.lineno})")
    return Outcome(name, "passed")


def _combinations(function: Any) -> Iterator[dict[str, Any]]:
    """The product of the function's parametrisations."""
    axes = []
    for mark in getattr(function, "pytestmark", []):
        if mark.name == "parametrize":
            names, values = mark.args[:2]
            keys = [key.strip() for key in names.split(",")] if isinstance(names, str) else list(names)
            axes.append([_named(keys, value) for value in values])
    for combination in itertools.product(*axes):
        yield {key: value for part in combination for key, value in part.items()}


def _named(keys: list[str], value: Any) -> dict[str, Any]:
    values = value.values if hasattr(value, "values") and hasattr(value, "id") else value
    if len(keys) == 1:
        return {keys[0]: values[0] if values is not value else value}
    return dict(zip(keys, values, strict=True))
