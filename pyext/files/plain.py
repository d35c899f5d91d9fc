"""Dataclasses from plain values, as JSON knows them, checked against the types that their fields state."""

from __future__ import annotations

import difflib
import functools
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

__all__ = ["did_you_mean", "from_plain", "printable"]

T = TypeVar("T")


def from_plain(cls: type[T], value: Any, place: str) -> T:
    """The inverse of `dataclasses.asdict`, before JSON or after it; integers have at most 64 bits. Where one of several
    dataclasses may stand, each has a field `kind` of its own.

    Raises `ValueError` that starts with `place` for a missing or unknown field and a value of another type.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{place}: expected the fields of a {cls.__name__}, got {_shown(value)}")
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    required = {name for name, field in known.items() if field.default is field.default_factory is MISSING}
    if wrong := sorted(map(str, (value.keys() - known.keys()) | (required - value.keys()))):
        raise ValueError(f"{place}: unknown or missing in a {cls.__name__}: {printable(', '.join(wrong)[:200])}")
    hints = _hints(cls)  # type: ignore[arg-type]
    return cls(**{name: _checked(hints[name], given, f"{place}.{name}") for name, given in value.items()})


_hints = functools.cache(get_type_hints)


def _checked(hint: Any, value: Any, place: str) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and types.NoneType in inner:
            return None
        kinds = [other for other in inner if other is not types.NoneType]
        if len(kinds) > 1:
            kinds = [kind for kind in kinds if isinstance(value, dict) and _kind_of(kind) == value.get("kind")]
        if not kinds:
            raise ValueError(f"{place}: expected one of {hint}, got {_shown(value)}")
        return _checked(kinds[0], value, place)
    if origin is Literal and isinstance(value, str) and value in inner:
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_checked(inner[0], item, f"{place}[{i}]") for i, item in enumerate(value))
    if origin in (dict, Mapping) and isinstance(value, dict):
        return {name: _checked(inner[1], item, f"{place}[{name[:40]!r}]") for name, item in value.items()}
    if is_dataclass(hint):
        return from_plain(hint, value, place)  # type: ignore[arg-type]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        is_number = False
    if (hint is float and is_number) or (hint is int and is_number and isinstance(value, int)):
        return value
    if hint in (str, bool) and isinstance(value, hint):
        return value
    raise ValueError(f"{place}: expected {getattr(hint, '__name__', hint)}, got {_shown(value)}")


def _kind_of(cls: Any) -> Any:
    """The name by which a dataclass is told from others that may stand in its place."""
    return next((field.default for field in fields(cls) if field.name == "kind"), None)


def _shown(value: Any) -> str:
    return printable(repr(value)[:60])


def printable(text: str) -> str:
    """`text` without what moves a terminal's cursor or changes its state; line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """What ends the message of an error about an unknown word: the known one closest to it, if any is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""
