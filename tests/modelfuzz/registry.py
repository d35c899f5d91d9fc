"""Where the growths are kept: functions that add statements of one kind to a program."""

from __future__ import annotations

from collections.abc import Callable

from modelfuzz.grower import Grower

__all__ = ["GROWTHS", "growth"]

Growth = Callable[[Grower], None]

GROWTHS: dict[Growth, float] = {}
"""All kinds of statements, and how often each is drawn."""


def growth(weight: float = 1.0) -> Callable[[Growth], Growth]:
    """Registers a function that grows programs."""

    def register(function: Growth) -> Growth:
        GROWTHS[function] = weight
        return function

    return register
