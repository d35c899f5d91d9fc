"""When weights leave: all at once, or by and by while the network trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["Gradual", "Iterative", "Schedule", "StepHook"]

StepHook = Callable[[int, int], None]
"""(number of the step, number of steps in all), ahead of each step of a training."""
Cut = Callable[[Callable[[float], float]], None]
"""Prunes to the sparsities that a function makes of the final ones."""


@dataclass(frozen=True)
class Gradual:
    """Sparsity rises along s_t = s_f · (1 − (1 − (t − t_0) / (t_1 − t_0))³) during one training (Zhu & Gupta,
    arXiv:1710.01878, eq. 1, with s_i = 0).

        s_f ┤        ____________      steep while there is much to choose from,
            │     .·                   then slower; what follows `end` is
            │   .                      plain training under the final mask
          0 ┼──'────┬────────┬───
           begin   ···      end

    `finetune`: `(model, before_step)` trains the model in place and calls `before_step(step, steps)` ahead of each
    step, as `compress.finetune(before_step=…)` does. With a `checkpoint_dir` it goes on where it stopped: a
    checkpoint holds the masks.
    `begin`, `end`: fractions of all steps; `every`: steps from one pruning to the next.
    """

    finetune: Callable[[nn.Module, StepHook], Any]
    begin: float = 0.0
    end: float = 0.75
    every: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.begin <= self.end <= 1:
            raise ValueError(f"begin, end: expected 0 ≤ begin ≤ end ≤ 1, got {self.begin} and {self.end}")
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every: expected a positive number of steps, got {self.every!r}")

    def run(self, model: nn.Module, cut: Cut) -> None:
        """Trains `model` and prunes it meanwhile."""

        def before_step(step: int, steps: int) -> None:
            first, last = round(self.begin * steps), round(self.end * steps)
            if first <= step <= last and ((step - first) % self.every == 0 or step == last):
                left = 1 - (step - first) / (last - first) if last > first else 0.0
                cut(lambda final: final * (1 - left**3))

        self.finetune(model, before_step)
        # A training that ended ahead of its last pruning, or told of no steps.
        cut(lambda final: final)

    def plain(self) -> dict[str, Any]:
        """The schedule as a record states it."""
        return {"kind": "gradual", "begin": self.begin, "end": self.end, "every": self.every}


@dataclass(frozen=True)
class Iterative:
    """In each of `rounds` the same share of what is left leaves, 1 − (1 − s_f)^(1/rounds), then the network trains (Han
    et al., arXiv:1506.02626).

    `finetune`: `(model, round)` trains the model in place; a `checkpoint_dir` for each round makes it resumable.
    """

    finetune: Callable[[nn.Module, int], Any]
    rounds: int = 5

    def __post_init__(self) -> None:
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, int) or self.rounds < 1:
            raise ValueError(f"rounds: expected a positive integer, got {self.rounds!r}")

    def run(self, model: nn.Module, cut: Cut) -> None:
        """Prunes and trains `model` in turn."""
        for done in range(1, self.rounds + 1):
            cut(lambda final, done=done: 1 - (1 - final) ** (done / self.rounds))  # type: ignore[misc]
            self.finetune(model, done - 1)

    def plain(self) -> dict[str, Any]:
        """The schedule as a record states it."""
        return {"kind": "iterative", "rounds": self.rounds}


Schedule = Gradual | Iterative
