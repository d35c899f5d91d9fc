"""Chooses the cheapest exact cover of the graph by candidates, and says why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.fx import Node

from kernelpress.emit.candidates import Candidate
from kernelpress.emit.cover import Option, cheapest_cover, regions
from kernelpress.emit.evaluate import Evaluation

__all__ = ["FUSION_MARGINS", "Choice", "choose"]

FUSION_MARGINS = (0.02, -0.05, -0.15)
"""By what fraction of its time a layer fused from several must beat them. The first is what counts where layers are
timed alone, with their inputs in cache; in the whole model the parts also wait for what lies between them, so the
others let a fusion win that seemed a little slower."""

TORCH_MARGIN = 0.05
"""By what fraction of its time a call of torch must beat a native layer: in a plan it also parts what runs natively,
and near ties are noise."""


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
    evaluations: Sequence[Evaluation], order: Mapping[Node, int], fusion_margin: float = FUSION_MARGINS[0]
) -> list[Choice]:
    """One choice per place, in execution order; together they cover every node that a candidate covers exactly once."""
    nodes = sorted({node for e in evaluations for node in e.candidate.nodes}, key=order.__getitem__)
    options = [_option(e, i, fusion_margin) for i, e in enumerate(evaluations) if e.milliseconds is not None]
    choices: list[Choice] = []
    for region in regions(nodes, [option.elements for option in options]):
        inside = set(region)
        cover = cheapest_cover(region, [option for option in options if option.elements <= inside])
        choices += [_explain(evaluations, options, option, order) for option in cover]
    return sorted(choices, key=lambda choice: order[choice.chosen.output])


def _option(evaluation: Evaluation, index: int, fusion_margin: float) -> Option[Node]:
    assert evaluation.milliseconds is not None
    margin = fusion_margin if evaluation.candidate.parts > 1 else 0.0
    margin += 0.0 if evaluation.candidate.variant == "cpu" else TORCH_MARGIN
    return Option(evaluation.candidate.nodes, evaluation.milliseconds * (1 + margin), index)


def _explain(
    evaluations: Sequence[Evaluation], options: Sequence[Option[Node]], option: Option[Node], order: Mapping[Node, int]
) -> Choice:
    best = evaluations[option.index]
    place = sorted(option.elements, key=order.__getitem__)
    considered = tuple(e for e in evaluations if e.candidate.nodes == option.elements)
    smaller = [other for other in options if other.elements < option.elements]
    try:
        parts = tuple(evaluations[part.index] for part in cheapest_cover(place, smaller)) if smaller else ()
    except ValueError:
        parts = ()
    assert best.milliseconds is not None
    return Choice(best.candidate, best.milliseconds, considered, parts, _reason(best, considered, parts))


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
