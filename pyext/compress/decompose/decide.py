"""Which chain takes a layer's place: by a rule for each layer, or by a budget for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from kernelpress.compress.decompose import search
from kernelpress.compress.decompose.candidates import Candidate, Chain, Job
from kernelpress.compress.decompose.chains import resolved
from kernelpress.compress.decompose.ranks import RULES, Rank, Unranked, energy_ranks, ranks_for
from kernelpress.preserve import evaluation

__all__ = ["Choice", "Latency", "Rules", "by_budget", "by_rule"]

AUTO = ("spatial_svd", "tucker2", "tt")
"""What "auto" chooses from where a kernel has several taps; CP takes too long to be tried everywhere."""

Latency = Callable[[Mapping[str, nn.Module], Tensor], Mapping[str, float]]
"""Modules by name, and an input of all → milliseconds of each, measured in turn."""


@dataclass(frozen=True, eq=False)
class Choice:
    """A chain that takes a layer's place, and the times of both where they were measured."""

    job: Job
    chain: Chain
    milliseconds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Rules:
    """The arguments that decide."""

    method: str
    rank: Rank | Mapping[str, Rank]
    energy: float
    round_to: int
    only_cheaper: bool
    ratio: float
    max_drop: float
    metric: search.Metric | None
    latency: Latency | None

    def rank_of(self, path: str) -> Rank:
        """The rule for a layer: that of the innermost module which has one."""
        if not isinstance(self.rank, Mapping):
            return self.rank
        return self.rank[max((name for name in self.rank if f"{path}.".startswith(f"{name}.")), key=len)]

    def candidates(self, job: Job) -> tuple[list[Candidate], str]:
        """The chains that these rules give a layer, and why a method gives none."""
        found, reason = [], ""
        for method in self.methods(job):
            rule = self.rank_of(job.layer.path)
            try:
                ranks = ranks_for(rule, method, job.weights, energy=self.energy, round_to=self.round_to)
            except Unranked as error:
                reason = str(error)
            else:
                found.append(job.candidate(method, ranks))
        return found, reason

    def methods(self, job: Job) -> list[str]:
        """Those that are tried on a layer."""
        names = AUTO if self.method == "auto" else (self.method,)
        return list(dict.fromkeys(resolved(name, job.geometry) for name in names))


def by_rule(job: Job, rules: Rules) -> Choice | None:
    """The chain that the rule for a layer gives it, or None and the layer's reason."""
    candidates, reason = rules.candidates(job)
    affordable = [c for c in candidates if not rules.only_cheaper or job.is_cheaper(c)]
    if not affordable:
        job.layer.reason = _too_dear(job, candidates) or reason
        return None
    if rules.rank_of(job.layer.path) in RULES and rules.latency is None:
        affordable = [min(affordable, key=lambda candidate: candidate.flops)]
    return _timed(job, [job.made(candidate) for candidate in affordable], rules.latency)


def by_budget(
    jobs: Sequence[Job], rules: Rules, model: nn.Module, flops: int, advance: Callable[[str], None]
) -> list[Choice]:
    """The chains with which the model, of so many FLOPs, stays within the budget and loses least, those of them that
    are faster; the other layers have their reason."""
    options = [option for job in jobs for option in _options(job, rules, advance)]
    if rules.metric is not None:
        search.measure_sensitivities(options, model, rules.metric, advance)
    timed: dict[search.Option, Choice | None] = {}
    while True:
        if rules.metric is None:
            chosen = search.within_flops(options, flops, rules.ratio)
        else:
            chosen = search.most_within(options, model, rules.metric, rules.max_drop, advance)
        for option in chosen:
            if option not in timed:
                advance(option.job.layer.path)
                timed[option] = _timed(option.job, [option.chain], rules.latency)
        choices = [choice for option in chosen if (choice := timed[option]) is not None]
        if len(choices) == len(chosen):
            break
        options = [option for option in options if timed.get(option, True) is not None]
    taken = {choice.job.layer.path for choice in choices}
    for job in jobs:
        if job.layer.path in taken:
            job.layer.reason = ""
        elif not job.layer.reason:
            job.layer.reason = "the budget is kept without it" if rules.metric is None else "no chain keeps the budget"
    return choices


def _options(job: Job, rules: Rules, advance: Callable[[str], None]) -> list[search.Option]:
    """What a layer could become: chains at several shares of its singular values."""
    advance(job.layer.path)
    found: dict[tuple[str, tuple[int, ...]], Candidate] = {}
    for method in rules.methods(job):
        for level in search.LEVELS:
            ranks = energy_ranks(level, method, job.weights, round_to=rules.round_to)
            found.setdefault((method, ranks), job.candidate(method, ranks))
    cheaper = [c for c in found.values() if job.is_cheaper(c) and c.flops < job.flops]
    if not cheaper:
        job.layer.reason = _too_dear(job, found.values())
    return [search.Option(job, candidate, job.expected_loss(candidate)) for candidate in cheaper]


def _timed(job: Job, chains: Sequence[Chain], latency: Latency | None) -> Choice | None:
    """The fastest of the chains, or None and the layer's reason where none is faster than what is there; the one of
    least error where nothing is measured."""
    if latency is None:
        return Choice(job, min(chains, key=lambda chain: chain.output_error))
    rivals = {"layer": job.layer.module} | {c.candidate.method: nn.Sequential(*c.modules) for c in chains}
    assert job.layer.probe is not None
    with evaluation(nn.ModuleList(rivals.values())):
        times = latency(rivals, job.layer.probe)
    best = min(chains, key=lambda chain: times[chain.candidate.method])
    before, after = times["layer"], times[best.candidate.method]
    if after >= before:
        job.layer.reason = f"{best.candidate} is not faster: {before:.3g} → {after:.3g} ms"
        return None
    return Choice(job, best, (before, after))


def _too_dear(job: Job, candidates: Iterable[Candidate]) -> str:
    """Both counts of the cheapest."""
    least = min(candidates, key=lambda candidate: candidate.flops, default=None)
    if least is None:
        return ""
    is_more = least.flops > job.flops or least.parameters > job.parameters
    return f"{least} would cost {'more' if is_more else 'as much'}: {job.costs(least)}"
