"""What a typed function says of an op: its tensors, its options, and the schema that torch knows it by."""

from __future__ import annotations

import inspect
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

import torch
from torch import Tensor

__all__ = ["IntOrPair", "Signature", "pair"]

IntOrPair = int | Sequence[int]
"""One integer for both dimensions, or (height, width)."""

_TYPES: Mapping[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    IntOrPair: "SymInt[2]",
    int: "SymInt",
    int | None: "int?",
    float: "float",
    float | None: "float?",
    bool: "bool",
    str: "str",
    torch.dtype: "ScalarType",
    torch.dtype | None: "ScalarType?",
}
_TENSORS = frozenset({"Tensor", "Tensor?"})


def pair(value: IntOrPair) -> tuple[int, ...]:
    """`3` → `(3, 3)`; a pair stays. Its values are checked by the op."""
    if type(value) is tuple:
        return value
    if isinstance(value, int):
        return (value, value)
    return tuple(value)


@dataclass(frozen=True)
class Signature:
    """`tensors` names the positional arguments, all of them tensors; `options` is the named tuple of the keyword
    arguments but `backend`, with one integer for both dimensions of a pair spelled out by `of`; `outputs` counts the
    tensors that are returned.
    """

    name: str
    schema: str
    tensors: tuple[str, ...]
    options: Any
    pairs: frozenset[str]
    outputs: int

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Signature:
        """That of a function whose positional arguments are tensors, and whose last keyword argument is `backend`."""
        name, hints = function.__name__.lstrip("_"), get_type_hints(function)
        parameters = inspect.signature(function).parameters
        types = {parameter: _TYPES[hints[parameter]] for parameter in parameters}
        pairs = frozenset(parameter for parameter, kind in types.items() if kind == "SymInt[2]")
        tensors = tuple(parameter for parameter, kind in types.items() if kind in _TENSORS)
        written = [f"{kind} {p}{_written_default(parameters[p].default, kind)}" for p, kind in types.items()]
        outputs = 1 if hints["return"] is Tensor else len(hints["return"].__args__)
        returned = "Tensor" if outputs == 1 else f"({', '.join(['Tensor'] * outputs)})"
        schema = f"({', '.join([*written[: len(tensors)], '*', *written[len(tensors) :]])}) -> {returned}"
        named = [parameter for parameter in parameters if parameter not in tensors and parameter != "backend"]
        given = [parameters[option].default for option in named]
        defaults = [
            pair(default) if option in pairs else default
            for option, default in zip(named, given, strict=True)
            if default is not inspect.Parameter.empty
        ]
        make_options: Any = namedtuple
        options = make_options(f"{name}_options", named, defaults=defaults)
        return cls(name, schema, tensors, options, pairs, outputs)

    def options_of(self, values: Sequence[Any]) -> Any:
        """The options from their values in order."""
        return self.options(*map(self._canonical, self.options._fields, values))

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], Any, str]:
        """Sort a call's arguments as the schema does: its tensors (None where absent), its options, its backend.

        Raises `TypeError` for an argument too many, unknown or missing.
        """
        if len(args) > len(self.tensors):
            raise TypeError(f"{self.name}: expected at most {len(self.tensors)} tensors, got {len(args)}")
        options = {name: self._canonical(name, value) for name, value in kwargs.items()}
        backend = options.pop("backend", "auto")
        tensors = [*args, *[options.pop(name, None) for name in self.tensors[len(args) :]]]
        return tensors, self.options(**options), backend

    def _canonical(self, name: str, value: Any) -> Any:
        return pair(value) if name in self.pairs else value


def _written_default(value: Any, kind: str) -> str:
    if value is inspect.Parameter.empty:
        return ""
    if kind == "SymInt[2]":
        return f"=[{', '.join(map(str, pair(value)))}]"
    return f'="{value}"' if isinstance(value, str) else f"={str(value).removeprefix('torch.')}"
