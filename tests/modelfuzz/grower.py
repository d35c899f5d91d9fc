"""Grows a random program statement by statement: each is run at once on the example, and dropped where it fails."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kernelpress.runtime.torch_private import pytree
from modelfuzz.program import Argument, Program, Step, environment

__all__ = ["Grower", "UnsuitableError"]

LARGEST = 1 << 16
"""Elements of a variable: models are small, so that many can be tried."""
LOUDEST = 1e3
ATTEMPTS = 60


class UnsuitableError(Exception):
    """No variable of the program is what a statement asks for."""


class Grower:
    """A program under construction: its variables with their values on the example, and a source of chance."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.chance = random.Random(seed)
        self.module = nn.Module()
        self.values: dict[str, Any] = {}
        self.arguments: list[Argument] = []
        self.members: dict[str, tuple[str, ...]] = {}
        self.steps: list[Step] = []
        self._space: dict[str, Any] = {**environment(), "self": self.module}
        self._count = 0

    # Chance.

    def one(self, *options: Any) -> Any:
        """One of the options."""
        return self.chance.choice(options)

    def maybe(self, probability: float) -> bool:
        """True with that probability."""
        return self.chance.random() < probability

    # Variables.

    def pick(self, suits: Callable[[Any], bool], *, fresh: float = 0.6) -> str:
        """A variable that `suits`, the latest with probability `fresh`. Raises `UnsuitableError`."""
        names = [name for name, value in self.values.items() if suits(value)]
        if not names:
            raise UnsuitableError
        return names[-1] if self.maybe(fresh) else self.chance.choice(names)

    def tensor(self, *ranks: int, fresh: float = 0.6) -> str:
        """A floating-point variable with one of these ranks (any rank from 1 if none is named)."""
        return self.pick(
            lambda v: isinstance(v, Tensor) and v.is_floating_point() and (v.dim() in ranks if ranks else v.dim() > 0),
            fresh=fresh,
        )

    def like(self, name: str) -> str:
        """Another variable of the same shape and dtype, or the same one."""
        wanted = self.values[name]
        return self.pick(
            lambda v: isinstance(v, Tensor) and v.shape == wanted.shape and v.dtype == wanted.dtype, fresh=0.0
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """The variable's shape on the example."""
        return tuple(self.values[name].shape)

    def shape_of(self, member: str) -> tuple[int, ...]:
        """The shape of a parameter of the model."""
        return tuple(getattr(self.module, member.removeprefix("self.")).shape)

    # Statements.

    def argument(self, example: str, default: str | None = None, name: str | None = None) -> str:
        """A new argument of `forward`; with a default where one before it has one."""
        name = name or f"x{len(self.arguments)}"
        if default is None and any(argument.default is not None for argument in self.arguments):
            default = "None"
        torch.manual_seed(self.seed)
        self.values[name] = self._space[name] = eval(example, self._space)
        self.arguments.append(Argument(name, example, default))
        return name

    def member(self, expression: str, *further: str, prefix: str | None = None) -> str:
        """A new attribute of the model, `self.<name>`; in `further`, `@` stands for that."""
        kind = re.match(r"(?:nn\.)?(\w+)", expression)
        name = f"{prefix or (kind[1].lower() if kind else 'part')}{self._new()}"
        lines = (f"self.{name} = {expression}", *(line.replace("@", f"self.{name}") for line in further))
        self._make(name, lines)
        return f"self.{name}"

    def parameter(self, *shape: int, buffer: bool = False, scale: float = 0.5) -> str:
        """A new parameter or buffer of the model, of random numbers."""
        value = f"{scale} * torch.randn({', '.join(map(str, shape))})"
        return self.buffer(value) if buffer else self.member(f"nn.Parameter({value})", prefix="weight")

    def buffer(self, value: str, *, persistent: bool = True) -> str:
        """A new buffer of the model."""
        name = f"buffer{self._new()}"
        self._make(name, (f'self.register_buffer("{name}", {value}, persistent={persistent})',))
        return f"self.{name}"

    def let(self, expression: str) -> str:
        """A new variable."""
        name = f"v{self._new()}"
        self.do(f"{name} = {expression}")
        return name

    def block(self, code: str) -> str:
        """A new variable, named `OUT` in a statement of several lines."""
        name = f"v{self._new()}"
        self.do(code.replace("OUT", name))
        return name

    def do(self, code: str) -> None:
        """Adds a statement and runs it; what it assigns must be tame: finite, not too loud, not too large."""
        step = Step(code)
        before = {name: self._space.get(name) for name in step.writes}
        with torch.no_grad():
            exec(code, self._space)
        for name in step.writes:
            if re.fullmatch(r"v\d+", name):
                _check(self._space[name])
                self.values[name] = self._space[name]
            elif before[name] is None:
                del self._space[name]
        self.steps.append(step)

    def attempt(self, grow: Callable[[Grower], None]) -> bool:
        """Lets `grow` add statements; takes them back if it raises anything."""
        steps, members, count = len(self.steps), dict(self.members), self._count
        names = set(self.values)
        try:
            grow(self)
        except Exception:
            for name in set(self.values) - names:
                del self.values[name]
            del self.steps[steps:]
            self.members, self._count = members, count
            return False
        return len(self.steps) > steps or set(self.values) != names

    def program(self, output: str) -> Program:
        """What has grown."""
        return Program(self.seed, tuple(self.arguments), dict(self.members), tuple(self.steps), output)

    def _new(self) -> int:
        self._count += 1
        return self._count

    def _make(self, name: str, lines: Sequence[str]) -> None:
        for line in lines:
            exec(line, self._space)
        self.members[name] = tuple(lines)
        # A member's training mode changes what a statement computes; emission is for evaluation.
        self.module.eval()


def _check(value: Any) -> None:
    """Raises `UnsuitableError` unless the value is one that errors would show in."""
    for leaf in pytree.tree_leaves(value):
        if not isinstance(leaf, Tensor):
            continue
        if not 0 < leaf.numel() <= LARGEST:
            raise UnsuitableError
        if leaf.is_floating_point():
            loudest = float(leaf.abs().max())
            if not math.isfinite(loudest) or not 1e-6 < loudest < LOUDEST:
                raise UnsuitableError
