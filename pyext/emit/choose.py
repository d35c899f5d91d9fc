"""Chooses the cheapest exact cover of the graph by candidates, and says why."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

from torch.fx import Node

from kernelpress.emit.candidates import Candidate
from kernelpress.emit.cover import Forms, Option, cheapest_cover, regions
from kernelpress.emit.evaluate import Evaluation
from kernelpress.emit.zeros import worth_of_zeros
from kernelpress.ops.layout import PIXELS, Layout
from kernelpress.ops.registry import NATIVE_BACKENDS

__all__ = ["FUSION_MARGINS", "Choice", "choose"]

Turning = Callable[[Node, Layout, Layout], float]

FUSION_MARGINS = (0.02, -0.05, -0.15)
"""By what fraction of its time a layer fused from several must beat them. The first is what counts where layers are
timed alone, with their inputs in cache; in the whole model the parts also wait for what lies between them, so the
others let a fusion win that seemed a little slower."""

TORCH_MARGIN = 0.05
"""By what fraction of its time a call of torch must beat a native layer: in a plan it also parts what runs natively,
and near ties are noise."""

ONLY_NATIVE = 9.0
"""The same for batches in shares, of which no call of torch may be part."""

SPARSE_MARGIN = 0.25
"""By what fraction of its time a layer that skips zeros must beat a dense one, which in a plan can also be streamed
with its neighbours, and whose time depends less on what the caches hold."""


@dataclass(frozen=True)
class Choice:
    """The candidate that executes one place, all that were weighed there, and the reason."""

    chosen: Candidate
    milliseconds: float
    considered: tuple[Evaluation, ...]
    parts: tuple[Evaluation, ...]
    """The cheapest way to execute the same nodes by smaller candidates, if there is one."""
    reason: str


def choose(
    evaluations: Sequence[Evaluation],
    order: Mapping[Node, int],
    turning: Turning,
    fusion_margin: float = FUSION_MARGINS[0],
    torch_margin: float = TORCH_MARGIN,
) -> list[Choice]:
    """One choice per place, in execution order; together they cover every node that a candidate covers exactly once.

    `turning(node, given, wanted)` are the milliseconds of turning a value into another form.
    """
    weighed = [e for e in evaluations if e.milliseconds is not None and _may_pay(e.candidate)]
    running = _with_useful_forms(weighed, torch_margin)
    options = [_option(e, i, fusion_margin, torch_margin) for i, e in enumerate(running)]
    nodes = sorted({node for option in options for node in option.elements}, key=order.__getitem__)
    forms = _forms(options, set(nodes), turning)
    choices: list[Choice] = []
    for region in regions(nodes, [*(option.elements for option in options), *_meetings(options)]):
        inside = set(region)
        cover = cheapest_cover(region, [option for option in options if option.elements <= inside], forms)
        choices += [_explain(evaluations, running, options, option, order) for option in cover]
    return sorted(choices, key=lambda choice: order[choice.chosen.output])


def _may_pay(candidate: Candidate) -> bool:
    """Whether a layer that skips zeros has enough of them; a faster form of memory alone does not make it one."""
    return candidate.pattern != "1×1" or candidate.kernel is None or candidate.density <= candidate.kernel.likes.single


def _with_useful_forms(evaluations: Sequence[Evaluation], torch_margin: float) -> list[Evaluation]:
    """Leaves the candidates in other forms than the usual one out if none of them is the fastest at its place: turning
    values, which costs time, then gains nothing anywhere."""
    usual = [e for e in evaluations if _is_usual(e.candidate)]
    fastest: dict[frozenset[Node], float] = {}
    for e in usual:
        fastest[e.candidate.nodes] = min(_time_of(e, torch_margin), fastest.get(e.candidate.nodes, math.inf))
    gains = any(_time_of(e, torch_margin) < fastest.get(e.candidate.nodes, math.inf) for e in evaluations)
    return list(evaluations) if gains else usual


def _is_usual(candidate: Candidate) -> bool:
    return all(form in (None, PIXELS) for form in (*candidate.reads, candidate.gives))


def _time_of(evaluation: Evaluation, torch_margin: float) -> float:
    assert evaluation.milliseconds is not None
    candidate = evaluation.candidate
    margin = 0.0 if candidate.variant in NATIVE_BACKENDS else torch_margin
    return evaluation.milliseconds * (1 + margin + (SPARSE_MARGIN if candidate.pattern else 0.0))


def _option(evaluation: Evaluation, index: int, fusion_margin: float, torch_margin: float) -> Option[Node]:
    candidate = evaluation.candidate
    cost = _time_of(evaluation, torch_margin) * (1 + fusion_margin if candidate.parts > 1 else 1)
    gives = None if candidate.gives is None else (candidate.output, candidate.gives)
    reads = tuple((x, form) for x, form in zip(candidate.inputs, candidate.reads, strict=True) if form is not None)
    return Option(candidate.nodes, cost, index, gives, reads)


def _forms(options: Sequence[Option[Node]], covered: set[Node], turning: Turning) -> Forms:
    """What is outside of all options gives and reads images as usual."""
    made = {option.gives[0] for option in options if option.gives}
    read = {value for option in options for value, _ in option.reads}
    given = dict.fromkeys(read - made, PIXELS)
    wanted = {value: PIXELS for value in made if not covered.issuperset(value.users)}  # type: ignore[attr-defined]
    return Forms(given, wanted, turning)


def _meetings(options: Sequence[Option[Node]]) -> list[frozenset[Node]]:
    """The nodes whose covers depend on each other through the form of a value."""
    named: dict[Hashable, tuple[set[Hashable], set[Node]]] = {}
    for option in options:
        for value, form in (*option.reads, *([option.gives] if option.gives else [])):
            forms, nodes = named.setdefault(value, (set(), set()))
            forms.add(form)
            nodes |= option.elements
    return [frozenset(nodes) for forms, nodes in named.values() if len(forms) > 1]


def _explain(
    evaluations: Sequence[Evaluation],
    running: Sequence[Evaluation],
    options: Sequence[Option[Node]],
    option: Option[Node],
    order: Mapping[Node, int],
) -> Choice:
    best = running[option.index]
    place = sorted(option.elements, key=order.__getitem__)
    considered = tuple(e for e in evaluations if e.candidate.nodes == option.elements)
    smaller = [other for other in options if other.elements < option.elements]
    try:
        parts = tuple(running[part.index] for part in cheapest_cover(place, smaller)) if smaller else ()
    except ValueError:
        parts = ()
    assert best.milliseconds is not None
    zeros = worth_of_zeros(best, [e for e in evaluations if e.candidate.nodes <= option.elements])
    reason = ", ".join(filter(None, (_reason(best, considered, parts), zeros)))
    return Choice(best.candidate, best.milliseconds, considered, parts, reason)


def _reason(best: Evaluation, considered: Sequence[Evaluation], parts: Sequence[Evaluation]) -> str:
    """The chosen candidate against the best original, and a fused one against its parts."""
    assert best.milliseconds is not None
    ours = [e.milliseconds for e in considered if e.milliseconds is not None and not e.candidate.is_original]
    originals = [e.milliseconds for e in considered if e.milliseconds is not None and e.candidate.is_original]
    if best.candidate.is_original:
        if not ours:
            refusals = [e.refusal for e in considered if e.refusal and not e.candidate.is_original]
            return f"no layer of ours fits: {refusals[0]}" if refusals else "in no faster layer"
        return f"the original is {min(ours) / best.milliseconds:.2f}× as fast as ours"
    reasons = [f"{min(originals) / best.milliseconds:.2f}× as fast as the original"] if originals else []
    if best.candidate.parts > 1 and parts:
        reasons.append(f"{sum(e.milliseconds or 0.0 for e in parts) / best.milliseconds:.2f}× as its parts")
    return ", ".join(reasons)
