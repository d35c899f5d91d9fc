"""The cheapest exact cover: every element covered once, by options that each cover several, on values that are turned
into the forms which options read them in."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

__all__ = ["Forms", "Option", "cheapest_cover", "regions"]

Element = TypeVar("Element", bound=Hashable)

LARGEST_NUMBER_OF_STATES = 1024


@dataclass(frozen=True)
class Option(Generic[Element]):
    """Something that covers `elements` at `cost`; `index` tells the caller which of its things this is.

    It makes the value `gives[0]` in the form `gives[1]` and reads each of `reads` in a form; values of one form only
    need not be named.
    """

    elements: frozenset[Element]
    cost: float
    index: int
    gives: tuple[Hashable, Hashable] | None = None
    reads: tuple[tuple[Hashable, Hashable], ...] = ()


@dataclass(frozen=True)
class Forms:
    """In which forms values are there, or wanted, beside what options say, and what turning costs.

    `given` are forms of values that no option makes; those named nowhere are there in every form. `wanted` are forms in
    which somebody else reads a value. `turning(value, form, other)` is the cost of having it in `other` too.
    """

    given: Mapping[Hashable, Hashable] = field(default_factory=dict)
    wanted: Mapping[Hashable, Hashable] = field(default_factory=dict)
    turning: Callable[[Any, Any, Any], float] = lambda value, form, other: 0.0


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


def cheapest_cover(
    elements: Sequence[Element], options: Sequence[Option[Element]], forms: Forms | None = None
) -> list[Option[Element]]:
    """The options of least total cost that cover each of `elements` exactly once, turning of values included.

    Dynamic programming over `elements` in the order given: the state is what is covered ahead of the first gap, and the
    forms of the values that are still to be read. Chains of layers, in topological order, keep that state small, and so
    the time linear in their length; of a gap's states, those beyond the `LARGEST_NUMBER_OF_STATES` cheapest are given
    up.

    Raises `ValueError` if no selection of options covers everything.
    """
    position = {element: i for i, element in enumerate(elements)}
    by_first: list[list[tuple[frozenset[int], Option[Element]]]] = [[] for _ in elements]
    for option in options:
        covered = frozenset(position[element] for element in option.elements)
        if math.isfinite(option.cost):
            by_first[min(covered)].append((covered, option))
    values = _Values(options, position, forms or Forms())

    # The first uncovered position only grows, so states are settled in its order.
    waiting: list[dict[_State, tuple[float, _Step[Element] | None]]] = [{} for _ in range(len(elements) + 1)]
    waiting[0][_State(frozenset(), frozenset())] = (0.0, None)
    for first in range(len(elements)):
        if len(waiting[first]) > LARGEST_NUMBER_OF_STATES:
            cheapest = sorted(waiting[first].items(), key=lambda item: item[1][0])
            waiting[first] = dict(cheapest[:LARGEST_NUMBER_OF_STATES])
        for state, (cost, _) in waiting[first].items():
            for covered, option in by_first[first]:
                if covered & state.ahead:
                    continue
                gap, rest = _advance(first, state.ahead | covered)
                held, turning = values.after(option, state.held, gap)
                total, reached = cost + option.cost + turning, _State(rest, held)
                known = waiting[gap].get(reached)
                if known is None or total < known[0]:
                    waiting[gap][reached] = (total, _Step(first, state, option))
    if not waiting[-1]:
        raise ValueError("options: no selection of them covers every element exactly once")

    chosen: list[Option[Element]] = []
    step = min(waiting[-1].values(), key=lambda reached: reached[0])[1]
    while step is not None:
        chosen.append(step.option)
        step = waiting[step.first][step.state][1]
    return chosen[::-1]


class _Held(NamedTuple):
    """A value that is still to be read: the forms it is there in, or, not yet made, will be wanted in."""

    value: Hashable
    is_made: bool
    forms: frozenset[Hashable]


class _State(NamedTuple):
    """What is covered beyond the first gap, and the values that matter to what is not."""

    ahead: frozenset[int]
    held: frozenset[_Held]


class _Step(NamedTuple, Generic[Element]):
    """How a state was reached: by `option`, from `state` at the gap `first`."""

    first: int
    state: _State
    option: Option[Element]


class _Values:
    """The values that may be had in more than one form."""

    def __init__(self, options: Sequence[Option[Any]], position: Mapping[Any, int], forms: Forms) -> None:
        self._forms = forms
        named: dict[Hashable, set[Hashable]] = {}
        self._last: dict[Hashable, int] = {}
        """Behind it, nobody reads the value any more."""
        made = {option.gives[0] for option in options if option.gives} | set(forms.given)
        for known in (forms.given, forms.wanted):
            for value, form in known.items():
                named.setdefault(value, set()).add(form)
        for option in options:
            for value, form in (*option.reads, *([option.gives] if option.gives else [])):
                named.setdefault(value, set()).add(form)
                self._last[value] = max(self._last.get(value, 0), *(position[e] for e in option.elements))
        self._several = {value for value, forms_of in named.items() if len(forms_of) > 1 and value in made}

    def after(self, option: Option[Any], held: frozenset[_Held], gap: int) -> tuple[frozenset[_Held], float]:
        """What is held once `option` is taken and all before `gap` is covered, and the cost of turning values."""
        values, cost = {known.value: known for known in held}, 0.0
        for value, form in option.reads:
            if value in self._several:
                values[value], more = self._read(values.get(value) or self._unmade(value), form)
                cost += more
        if option.gives is not None and option.gives[0] in self._several:
            value, form = option.gives
            wanted = (values.get(value) or self._unmade(value)).forms
            cost += sum(self._forms.turning(value, form, other) for other in wanted if other != form)
            values[value] = _Held(value, True, wanted | {form})
        return frozenset(known for known in values.values() if self._last[known.value] >= gap), cost

    def _unmade(self, value: Hashable) -> _Held:
        known = self._forms.given if value in self._forms.given else self._forms.wanted
        forms = frozenset({known[value]}) if value in known else frozenset()
        return _Held(value, value in self._forms.given, forms)

    def _read(self, known: _Held, form: Hashable) -> tuple[_Held, float]:
        if form in known.forms:
            return known, 0.0
        cost = min(self._forms.turning(known.value, had, form) for had in known.forms) if known.is_made else 0.0
        return known._replace(forms=known.forms | {form}), cost


def _advance(first: int, covered: frozenset[int]) -> tuple[int, frozenset[int]]:
    """The first position from `first` on that is not covered, and the covered ones beyond it."""
    while first in covered:
        first += 1
    return first, frozenset(i for i in covered if i > first)
