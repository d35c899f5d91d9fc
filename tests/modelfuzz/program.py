"""A random model as text: a class whose `forward` is a list of statements, and the arguments of one call."""

from __future__ import annotations

import ast
import linecache
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

__all__ = ["COSTS", "PRELUDE", "Argument", "Call", "Program", "Step", "environment", "evaluate"]

PRELUDE = '''\
import math
import random

import torch
import torch.ao.quantization.fx._decomposed
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn


def settle(model):
    """Values that matter for weights and statistics that are all alike, as norms have them; eval mode."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and tensor.numel() and bool((tensor == tensor.flatten()[0]).all()):
            with torch.no_grad():
                is_one = float(tensor.flatten()[0]) == 1
                tensor.uniform_(0.5, 1.5) if is_one else tensor.normal_(std=0.2)
    return model.eval()
'''

COSTS = {
    "cpu": 'lambda c: 1.0 if c.variant == "cpu" else 10.0 * len(c.nodes)',
    "mixed": 'lambda c: len(c.nodes) * random.Random(f"{c.label} of {c.output}").random()',
}
"""What candidates cost: so that the fewest layers of our CPU kernels win, or any backend and format here and there."""


@dataclass(frozen=True)
class Step:
    """One statement of `forward`, of one line or several; it assigns new variables."""

    code: str

    @property
    def writes(self) -> frozenset[str]:
        """Variables that it assigns."""
        return frozenset(n.id for n in self._names() if isinstance(n.ctx, ast.Store))

    @property
    def reads(self) -> frozenset[str]:
        """Names that it reads and does not assign."""
        return frozenset(n.id for n in self._names() if isinstance(n.ctx, ast.Load)) - self.writes

    @property
    def members(self) -> frozenset[str]:
        """Attributes of `self` that it uses."""
        return _members(self.code)

    @property
    def mutates(self) -> bool:
        """Whether it may write to the memory of what it reads."""
        return re.search(r"\w_\(|\] *[-+*]?= |[-+*]= |inplace=True|out=", self.code) is not None

    def renamed(self, old: str, new: str) -> Step:
        """The step reading `new` where it reads `old`."""
        tree = ast.parse(self.code)
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id == old:
                node.id = new
        return Step(ast.unparse(tree))

    def _names(self) -> list[ast.Name]:
        return [node for node in ast.walk(ast.parse(self.code)) if isinstance(node, ast.Name)]


@dataclass(frozen=True)
class Argument:
    """A parameter of `forward`: the expression of its example, and of its default, if it has one."""

    name: str
    example: str
    default: str | None = None


@dataclass(frozen=True)
class Call:
    """Expressions of what a model is called with, by position and by name; `what` says how it differs from the
    example. Random tensors in them follow from `seed`."""

    what: str
    positional: tuple[str, ...]
    named: tuple[tuple[str, str], ...] = ()
    seed: int = 0
    context: str = "torch.no_grad()"
    """Within which it is made."""

    @property
    def code(self) -> str:
        """The arguments as they stand between the parentheses of a call."""
        return ", ".join([*self.positional, *(f"{name}={value}" for name, value in self.named)])

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Fresh values of the arguments, the same each time."""
        torch.manual_seed(self.seed)
        return tuple(map(evaluate, self.positional)), {name: evaluate(value) for name, value in self.named}


@dataclass(frozen=True)
class Program:
    """A model's text. `members` are the statements that make each attribute of `self`, in order."""

    seed: int
    arguments: tuple[Argument, ...]
    members: Mapping[str, tuple[str, ...]]
    steps: tuple[Step, ...]
    output: str
    dtype: str = "float32"
    cost: str = "cpu"
    """Which of `COSTS` emission is told."""
    given: int | None = None
    """How many of the arguments the example gives; all if None."""
    kernels: str = ""
    """The instruction set of our kernels, where the processor has it; the best if empty."""
    threads: int = 1

    @property
    def source(self) -> str:
        """The class `Model`."""
        making = [line for lines in self.members.values() for line in lines]
        takes = ["self", *(a.name + (f"={a.default}" if a.default is not None else "") for a in self.arguments)]
        lines = ["class Model(nn.Module):"]
        if making:
            lines += ["    def __init__(self):", "        super().__init__()", *_indented(making), ""]
        lines += [f"    def forward({', '.join(takes)}):", *_indented([step.code for step in self.steps])]
        return "\n".join([*lines, f"        return {self.output}", ""])

    @property
    def making(self) -> str:
        """The statements that make `model`."""
        cast = "" if self.dtype == "float32" else f".to(torch.{self.dtype})"
        return f"torch.manual_seed({self.seed})\nmodel = settle(Model()){cast}"

    @property
    def example(self) -> Call:
        """What the model is emitted for: all arguments by position."""
        return Call("the example", tuple(a.example for a in self.arguments[: self.given]), seed=self.seed)

    def model(self) -> nn.Module:
        """The model, the same each time."""
        name = f"<fuzzed model {self.seed}>"
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(True), name)
        space = environment()
        exec(compile(self.source, name, "exec"), space)
        exec(self.making, space)
        return space["model"]

    def without_unused(self) -> Program:
        """The program without statements, members and arguments that nothing reads."""
        wanted = set(Step(self.output).reads)
        steps: list[Step] = []
        for step in reversed(self.steps):
            if step.writes & wanted or (step.mutates and step.reads & wanted):
                steps.append(step)
                wanted |= step.reads
        members: dict[str, tuple[str, ...]] = {}
        used = _members(self.output).union(*(step.members for step in steps))
        for name, lines in reversed(self.members.items()):
            if name in used:
                members[name] = lines
                used |= _members("\n".join(lines))
        arguments = tuple(a for a in self.arguments if a.name in wanted)
        given = None if self.given is None else sum(a in arguments for a in self.arguments[: self.given])
        kept = {"steps": tuple(reversed(steps)), "members": dict(reversed(members.items()))}
        return replace(self, arguments=arguments, given=given, **kept)


def environment() -> dict[str, Any]:
    """The names that programs and expressions use."""
    return dict(_PRELUDE_NAMES)


def evaluate(expression: str) -> Any:
    """The value of an argument's expression."""
    return eval(expression, environment())


def _prelude_names() -> dict[str, Any]:
    space: dict[str, Any] = {"__name__": "modelfuzz.generated"}
    exec(PRELUDE, space)
    return space


_PRELUDE_NAMES = _prelude_names()


def _members(code: str) -> frozenset[str]:
    return frozenset(
        node.attr
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    )


def _indented(statements: Sequence[str]) -> list[str]:
    return [f"        {line}" for statement in statements for line in statement.splitlines()]
