"""`compare`: contestants measured in turn, and how much of the theoretical speed-up each one realises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from kernelpress.measure.cost import module_of
from kernelpress.measure.profiling import Profile, describe
from kernelpress.measure.units import count_text, energy_text, latency_text, memory_text, ratio_text, text_table
from kernelpress.preserve import evaluation
from kernelpress.runtime.clock import threads_set_to, time_alternately

__all__ = ["Comparison", "Speedup", "compare"]

Contestant = Callable[..., Any] | tuple[Callable[..., Any], tuple[Any, ...]]


@dataclass(frozen=True)
class Speedup:
    """How one contestant stands against the baseline; every ratio above 1 is in the contestant's favour."""

    measured: float
    """Ratio of the best rounds' medians."""
    low: float
    """Smallest ratio of any one round."""
    high: float
    """Largest ratio of any one round."""
    theoretical: float | None
    """Ratio of the FLOPs promised (`measure.promised_flops`); `None` where they are unknown."""

    @property
    def realisation(self) -> float | None:
        """Measured ÷ theoretical speed-up."""
        return None if self.theoretical is None else self.measured / self.theoretical


@dataclass(frozen=True)
class Comparison:
    """Profiles of contestants measured in turn, the baseline first among equals."""

    baseline: str
    profiles: tuple[Profile, ...]

    def __getitem__(self, name: str) -> Profile:
        for candidate in self.profiles:
            if candidate.name == name:
                return candidate
        raise KeyError(f"name: expected one of {', '.join(p.name for p in self.profiles)}, got {name!r}")

    def against(self, baseline: str) -> Comparison:
        """The same measurements seen from another baseline."""
        return Comparison(self[baseline].name, self.profiles)

    def fastest(self, *names: str) -> Profile:
        """The contestant with the lowest latency, among `names` or among all."""
        return min((self[name] for name in names) if names else self.profiles, key=lambda p: p.latency.median)

    def speedup(self, name: str) -> Speedup:
        """The measured and theoretical ratios of `name` against the baseline."""
        ours, base = self[name], self[self.baseline]
        rounds = [theirs / mine for theirs, mine in zip(base.latency.rounds, ours.latency.rounds, strict=True)]
        measured = base.latency.median / ours.latency.median
        return Speedup(
            measured=measured,
            low=min(measured, *rounds),
            high=max(measured, *rounds),
            theoretical=base.promised_flops / ours.promised_flops
            if base.promised_flops and ours.promised_flops
            else None,
        )

    def cells(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """The header and the rows of the table, as text."""
        header = (
            "", "latency", "p10 – p90", "speed-up", "(rounds)", "theoretical", "realisation",
            "FLOPs", "parameters", "weights", "peak memory", "energy",
        )  # fmt: skip
        rows: list[tuple[str, ...]] = []
        for entry in self.profiles:
            ratio = self.speedup(entry.name)
            realisation = ratio.realisation
            rows.append(
                (
                    entry.name + (" *" if entry.name == self.baseline else ""),
                    latency_text(entry.latency.median),
                    f"{latency_text(entry.latency.p10)} – {latency_text(entry.latency.p90)}",
                    ratio_text(ratio.measured),
                    f"{ratio.low:.2f} – {ratio.high:.2f}",
                    ratio_text(ratio.theoretical),
                    "–" if realisation is None else f"{realisation:.2f}",
                    count_text(entry.flops),
                    count_text(entry.parameters),
                    memory_text(entry.weight_bytes),
                    memory_text(entry.peak_memory_bytes),
                    energy_text(entry.energy_joules),
                )
            )
        return header, rows

    def notes(self) -> list[str]:
        """What a reader of the table has to know: the conditions, the baseline, and why energy is missing."""
        base = self[self.baseline]
        notes = [
            f"* baseline; {base.device}, batch {base.batch}, {base.threads} threads; "
            f"the best of {len(base.latency.rounds)} rounds' medians, contestants in turn; "
            "realisation = measured ÷ theoretical (FLOPs; of pruned weights the non-zeros; int8 by the machine's peak)"
        ]
        reasons = sorted({entry.energy_reason for entry in self.profiles if entry.energy_reason})
        return notes + [f"energy not measured: {reason}" for reason in reasons]

    def table(self) -> str:
        """The comparison as text."""
        return "\n".join([text_table(*self.cells()), *self.notes()])

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        contestants = []
        for entry in self.profiles:
            ratio = self.speedup(entry.name)
            contestants.append(
                {
                    **entry.to_dict(),
                    "speedup": ratio.measured,
                    "speedup_low": ratio.low,
                    "speedup_high": ratio.high,
                    "theoretical_speedup": ratio.theoretical,
                    "realisation": ratio.realisation,
                }
            )
        return {"baseline": self.baseline, "contestants": contestants}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Comparison:
        """The inverse of `to_dict`; raises `KeyError` or `TypeError` for anything else."""
        profiles = tuple(Profile.from_dict(contestant) for contestant in stored["contestants"])
        return cls(stored["baseline"], profiles)


def compare(
    contestants: Mapping[str, Contestant],
    *inputs: Any,
    baseline: str | None = None,
    rounds: int = 5,
    budget_seconds: float = 1.0,
    warmup: int = 3,
    threads: int | None = None,
    promised: Mapping[str, float] | None = None,
) -> Comparison:
    """Measure every contestant on `inputs`, in turn over several `rounds`; modules run in evaluation mode.

    A contestant is a module or callable, or a pair `(callable, its own inputs)` where it wants them in another form,
    such as channels_last. `budget_seconds` is the measuring time of each. The baseline is the first one unless named.
    `promised`: `promised_flops` of the contestants of which their passes promise more than fewer FLOPs.

    Raises `ValueError` for no contestants, an unknown baseline or promise, `TypeError` for a contestant that is not
    callable.
    """
    if not contestants:
        raise ValueError("contestants: expected at least one, got none")
    base = next(iter(contestants)) if baseline is None else baseline
    if base not in contestants:
        raise ValueError(f"baseline: expected one of {', '.join(contestants)}, got {base!r}")
    promised = promised or {}
    if unknown := promised.keys() - contestants.keys():
        raise ValueError(f"promised: expected some of {', '.join(contestants)}, got {', '.join(sorted(unknown))}")
    pairs: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {}
    for name, contestant in contestants.items():
        model, own_inputs = contestant if isinstance(contestant, tuple) else (contestant, inputs)
        if not callable(model):
            raise TypeError(f"contestants[{name!r}]: expected a module or another callable, got {type(model).__name__}")
        pairs[name] = (model, own_inputs)

    with threads_set_to(threads), ExitStack() as stack:
        for model, own_inputs in pairs.values():
            stack.enter_context(evaluation(module_of(model), own_inputs))
        timings = time_alternately(
            {name: _bound(model, own_inputs) for name, (model, own_inputs) in pairs.items()},
            budget_seconds=budget_seconds,
            rounds=rounds,
            warmup=warmup,
        )
        profiles = tuple(describe(name, model, own, timings[name]) for name, (model, own) in pairs.items())
    return Comparison(base, tuple(replace(p, promised_flops=promised.get(p.name, p.promised_flops)) for p in profiles))


def _bound(model: Callable[..., Any], inputs: tuple[Any, ...]) -> Callable[[], object]:
    return lambda: model(*inputs)
