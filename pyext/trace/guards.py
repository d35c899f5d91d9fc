"""Conditions on symbolic sizes as plain trees of tuples, which files can hold and which are evaluated without code."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

__all__ = ["Expression", "UnknownExpressionError", "check_expression", "evaluate", "from_sympy", "spell", "symbols_in"]

Expression: TypeAlias = "bool | int | float | str | tuple[Any, ...]"
"""A number, the name of a symbol, or an operation: `("<=", "s0", ("*", 2, "s1"))`."""

MAXIMUM_DEPTH = 64

_FOLDED: dict[str, Callable[[Any, Any], Any]] = {"+": operator.add, "*": operator.mul, "max": max, "min": min}
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "//": operator.floordiv,
    "/": operator.truediv,
    "%": operator.mod,
    "**": lambda base, exponent: _power(base, exponent),
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_UNARY: dict[str, Callable[[Any], Any]] = {
    "not": operator.not_,
    "float": float,
    "ceil": math.ceil,
    "floor": math.floor,
    "trunc": math.trunc,
}
_CONNECTIVES: dict[str, Callable[[Any], bool]] = {"and": all, "or": any}

_SYMPY_NAMES = {
    "Add": "+", "Mul": "*", "Max": "max", "Min": "min",
    "FloorDiv": "//", "CleanDiv": "//", "IntTrueDiv": "/", "FloatTrueDiv": "/", "Mod": "%", "PythonMod": "%",
    "Pow": "**", "PowByNatural": "**", "FloatPow": "**",
    "Equality": "==", "Unequality": "!=", "StrictLessThan": "<", "LessThan": "<=", "StrictGreaterThan": ">",
    "GreaterThan": ">=", "And": "and", "Or": "or", "Not": "not",
    "ToFloat": "float", "CeilToInt": "ceil", "FloorToInt": "floor", "TruncToInt": "trunc",
}  # fmt: skip

_PREFIXES = {"max", "min", "not", "float", "ceil", "floor", "trunc"}


class UnknownExpressionError(ValueError):
    """An expression that this grammar has no word for."""


def from_sympy(expression: Any) -> Expression:
    """The tree of a sympy expression over integer symbols. Raises `UnknownExpressionError` for unknown functions."""
    if expression.is_Symbol:
        return str(expression.name)
    if expression.is_Boolean and not expression.args:
        return bool(expression)
    if expression.is_Integer:
        return int(expression)
    if expression.is_Rational:
        return ("/", int(expression.p), int(expression.q))
    if expression.is_Float:
        return float(expression)
    name = _SYMPY_NAMES.get(type(expression).__name__)
    if name is None or not expression.args:
        raise UnknownExpressionError(f"no word for {type(expression).__name__} in {expression}")
    return (name, *map(from_sympy, expression.args))


def evaluate(expression: Expression, sizes: Mapping[str, int]) -> Any:
    """The value at these sizes of its symbols. Raises `ArithmeticError` where it has none (a division by zero)."""
    if isinstance(expression, str):
        return sizes[expression]
    if not isinstance(expression, tuple):
        return expression
    name, *parts = expression
    if name in _CONNECTIVES:
        return _CONNECTIVES[name](evaluate(part, sizes) for part in parts)
    values = [evaluate(part, sizes) for part in parts]
    if name in _UNARY:
        return _UNARY[name](*values)
    if name in _BINARY:
        return _BINARY[name](*values)
    result = values[0]
    for value in values[1:]:
        result = _FOLDED[name](result, value)
    return result


def check_expression(stored: Any, symbols: frozenset[str], depth: int = 0) -> Expression:
    """`stored`, lists turned to tuples, if it is an expression over these symbols; else raises `ValueError`."""
    if isinstance(stored, (bool, int, float)):
        return stored
    if isinstance(stored, str):
        if stored not in symbols:
            raise ValueError(f"expression: expected a symbol among {sorted(symbols)}, got {stored!r}")
        return stored
    if not isinstance(stored, (list, tuple)) or len(stored) < 2 or depth > MAXIMUM_DEPTH:
        raise ValueError(f"expression: expected an operation on at most {MAXIMUM_DEPTH} levels, got {stored!r:.80}")
    name, *parts = stored
    known = isinstance(name, str) and (
        (name in _UNARY and len(parts) == 1)
        or (name in _BINARY and len(parts) == 2)
        or name in _FOLDED
        or name in _CONNECTIVES
    )
    if not known:
        raise ValueError(f"expression: no operation is called {name!r:.40} with {len(parts)} operands")
    return (name, *(check_expression(part, symbols, depth + 1) for part in parts))


def symbols_in(expression: Expression) -> frozenset[str]:
    """The names of its symbols."""
    if isinstance(expression, str):
        return frozenset({expression})
    if isinstance(expression, tuple):
        return frozenset().union(*map(symbols_in, expression[1:]))
    return frozenset()


def spell(expression: Expression, names: Mapping[str, str], *, outer: bool = True) -> str:
    """The expression as a person writes it, with `names` for its symbols."""
    if isinstance(expression, str):
        return names.get(expression, expression)
    if not isinstance(expression, tuple):
        return str(expression)
    name, *parts = expression
    if name in _PREFIXES:
        return f"{name}({', '.join(spell(part, names) for part in parts)})"
    text = f" {name} ".join(spell(part, names, outer=False) for part in parts)
    return text if outer else f"({text})"


def _power(base: Any, exponent: Any) -> Any:
    """Sizes to small powers: what a file says must not occupy the machine."""
    if abs(exponent) > MAXIMUM_DEPTH or abs(base) > 2**63:
        raise OverflowError(f"{base} ** {exponent}")
    return base**exponent
