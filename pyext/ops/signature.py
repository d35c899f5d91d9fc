"""Small helpers of op signatures."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["IntOrPair", "pair"]

IntOrPair = int | Sequence[int]
"""One integer for both dimensions, or (height, width)."""


def pair(value: IntOrPair) -> tuple[int, ...]:
    """`3` → `(3, 3)`; a pair stays. Its values are checked by the op."""
    if type(value) is tuple:
        return value
    if isinstance(value, int):
        return (value, value)
    return tuple(value)
