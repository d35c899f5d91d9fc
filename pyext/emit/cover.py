"""The cheapest exact cover: every element covered once, by options that each cover several."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Option", "cheapest_cover", "regions"]

Element = TypeVar("Element", bound=Hashable)


@dataclass(frozen=True)
class Option(Generic[Element]):
    """Something that covers `elements` at `cost`; `index` tells the caller which of its things this is."""

    elements: frozenset[Element]
    cost: float
    index: int


def regions(elements: Sequence[Element], groups: Sequence[frozenset[Element]]) -> list[list[Element]]:
    """Splits `elements`, order kept, so that no group reaches into two parts: covers of the parts are independent."""
    leader = {element: element for element in elements}

    def find(element: Element) -> Element:
        while leader[element] != element:
            leader[element] = leader[leader[element]]
            element = leader[element]
        return element

    for group in groups:
        first, *others = group
        for other in others:
            leader[find(other)] = find(first)
    parts: dict[Element, list[Element]] = {}
    for element in elements:
        parts.setdefault(find(element), []).append(element)
    return list(parts.values())


def cheapest_cover(elements: Sequence[Element], options: Sequence[Option[Element]]) -> list[Option[Element]]:
    """The options of least total cost that cover each of `elements` exactly once.

    Dynamic programming over `elements` in the order given: the state is what is covered ahead of the first gap. Chains
    of layers, in topological order, keep that state small, and so the time linear in their length.

    Raises `ValueError` if no selection of options covers everything.
    """
    position = {element: i for i, element in enumerate(elements)}
    by_first: list[list[tuple[frozenset[int], Option[Element]]]] = [[] for _ in elements]
    for option in options:
        covered = frozenset(position[element] for element in option.elements)
        by_first[min(covered)].append((covered, option))

    State = tuple[int, frozenset[int]]  # noqa: N806
    # The first uncovered position only grows, so states are settled in its order.
    waiting: list[dict[frozenset[int], tuple[float, State | None, Option[Element] | None]]] = [
        {} for _ in range(len(elements) + 1)
    ]
    waiting[0][frozenset()] = (0.0, None, None)
    for first in range(len(elements)):
        for ahead, (cost, _, _) in waiting[first].items():
            for covered, option in by_first[first]:
                if covered & ahead or not math.isfinite(option.cost):
                    continue
                gap, rest = _advance(first, ahead | covered)
                known = waiting[gap].get(rest)
                if known is None or cost + option.cost < known[0]:
                    waiting[gap][rest] = (cost + option.cost, (first, ahead), option)
    if not waiting[-1]:
        raise ValueError("options: no selection of them covers every element exactly once")

    chosen: list[Option[Element]] = []
    state: State | None = (len(elements), frozenset())
    while state is not None:
        _, state, used = waiting[state[0]][state[1]]
        if used is not None:
            chosen.append(used)
    return chosen[::-1]


def _advance(first: int, covered: frozenset[int]) -> tuple[int, frozenset[int]]:
    """The first position from `first` on that is not covered, and the covered ones beyond it."""
    while first in covered:
        first += 1
    return first, frozenset(i for i in covered if i > first)
