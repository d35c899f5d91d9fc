"""Draws a program and the calls of it from one seed."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import torch
from torch import Tensor

from kernelpress.runtime.torch_private import pytree
from modelfuzz import arithmetic, blocks, control, images, inputs, memory, sequences  # noqa: F401 - growths
from modelfuzz.grower import Grower
from modelfuzz.program import Program
from modelfuzz.registry import GROWTHS

__all__ = ["draw"]

LONGEST = 10
"""Growths of a program; most add several statements."""


def draw(seed: int) -> Program:
    """The program of this seed."""
    attempt = 0
    while True:
        program = _attempt(seed, attempt)
        if program is not None:
            return program
        attempt += 1


def _attempt(seed: int, attempt: int) -> Program | None:
    g = Grower(seed)
    g.chance = random.Random(f"{seed}:{attempt}")
    torch.manual_seed(seed)
    _first_input(g)
    growths, weights = list(GROWTHS), list(GROWTHS.values())
    wanted, tries = g.chance.randint(1, LONGEST), 0
    while wanted and tries < 40:
        tries += 1
        wanted -= g.attempt(g.chance.choices(growths, weights)[0])
    output = _output(g)
    dtype = g.chance.choices(("float32", "float64", "bfloat16", "float16"), (90, 4, 3, 3))[0]
    program = replace(
        g.program(output).without_unused(),
        cost=g.chance.choices(("cpu", "mixed"), (75, 25))[0],
        kernels=g.one("", "", "", "avx2", "baseline"),
        threads=g.one(1, 1, 2),
    )
    optional = sum(a.default is not None for a in program.arguments)
    if optional and g.maybe(0.3):
        program = replace(program, given=max(len(program.arguments) - g.chance.randint(1, optional), 1))
    if dtype != "float32":
        program = _cast(program, dtype)
    return program if _runs(program) else None


def _first_input(g: Grower) -> None:
    n, c = g.one(1, 1, 2, 2, 3, 4), g.one(1, 2, 3, 3, 4, 6, 8, 8, 16, 5, 24, 33)
    kind = g.chance.choices(("image", "tokens", "vector", "volume"), (80, 9, 8, 3))[0]
    sides = {
        "image": (c, g.one(1, 4, 6, 7, 8, 8, 9, 12, 17), g.one(1, 4, 5, 7, 8, 8, 10, 16, 21)),
        "tokens": (g.one(1, 4, 6, 9), g.one(4, 8, 12)),
        "vector": (g.one(1, 4, 8, 16, 20),),
        "volume": (g.one(1, 3, 4), g.one(2, 3), g.one(4, 6), g.one(4, 5)),
    }[kind]
    shape = (n, *sides)
    text = f"torch.randn({', '.join(map(str, shape))})"
    if len(shape) == 4 and g.maybe(0.12):
        text += ".to(memory_format=torch.channels_last)"
    elif g.maybe(0.08):
        text = f"torch.randn({', '.join(map(str, (1, *sides)))}).expand({', '.join(map(str, shape))})"
    elif g.maybe(0.06):
        text = f"torch.randn({', '.join(map(str, (*shape[:-1], 2 * shape[-1])))})[..., ::2]"
    name = g.one("x", "x", "x", "images", "a", "z")
    if g.maybe(0.05):
        g.argument(f"{{'image': {text}}}", name="batch")
        g.let("batch['image']")
    elif g.maybe(0.05):
        g.argument(f"[{text}, {text}]", name="pyramid")
        g.let("pyramid[0] + pyramid[1]")
    else:
        g.argument(text, name=name)
    if g.maybe(0.15) and len(shape) == 4:
        g.argument(f"torch.randn({', '.join(map(str, shape))})", name=g.one("b", "y0", "mask"))


def _output(g: Grower) -> str:
    """What forward returns: mostly the last variable."""
    names = [name for name in g.values if isinstance(g.values[name], Tensor)]
    arguments = {argument.name for argument in g.arguments}
    last = next((name for name in reversed(names) if name not in arguments), names[-1])
    other = g.one(*names)
    return g.chance.choices(
        (
            last,
            f"({last}, {other})",
            f"{{'out': {last}, 'other': {other}}}",
            f"[{last}, {other}]",
            f"({last}, None)",
            f"({last}, {other}.shape[0])",
            f"({last}, ({other}, {{'a': {last}}}))",
            f"({last}, {last})",
            f"({last}, 3, 'name')",
            f"{last}, {other}.argmax(-1)",
            f"{last}, {other} > 0",
            f"{last}.argmax(1)",
            f"{last}.double()",
            f"{last}.clone(), {last}.shape",
            f"{last}.sum()",
        ),
        (60, 8, 4, 3, 2, 2, 2, 2, 1, 3, 3, 1.5, 1, 1, 1),
    )[0]


def _cast(program: Program, dtype: str) -> Program:
    """The program, and its examples, in another dtype."""
    examples = [re.sub(r"torch\.randn\([^()]*\)", rf"\g<0>.to(torch.{dtype})", a.example) for a in program.arguments]
    arguments = tuple(replace(a, example=e) for a, e in zip(program.arguments, examples, strict=True))
    return replace(program, arguments=arguments, dtype=dtype)


def _runs(program: Program) -> bool:
    """Whether the model takes its example, and gives finite tensors of it."""
    try:
        positional, named = program.example.arguments()
        with torch.no_grad():
            result = program.model()(*positional, **named)
    except Exception:
        return False
    tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    return bool(tensors) and all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point())
