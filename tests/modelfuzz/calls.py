"""Random calls of a program: how they differ from the example, in sizes, dtypes, layouts, structure and values."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from modelfuzz.program import Call, Program

__all__ = ["draw_calls"]

_RANDN = re.compile(r"torch\.randn\((?P<sizes>[\d, ]+)\)")

_LAYOUTS = ("channels_last", "a slice", "permuted", "expanded", "requires grad", "a parameter")
_CONTEXTS = {"in inference mode": "torch.inference_mode()", "with gradients": "torch.enable_grad()"}

HARMLESS = ("the same form", *_LAYOUTS, *_CONTEXTS)
"""What an emitted model must take: same shapes, same dtypes."""


def draw_calls(program: Program, count: int) -> list[Call]:
    """`count` calls, the first with fresh values of the example's form."""
    chance = random.Random(f"calls of {program.seed}")
    calls = [replace(program.example, what="the same form", seed=program.seed + 1)]
    tries = 0
    while len(calls) < count and tries < 20 * count:
        tries += 1
        call = chance.choice(_KINDS)(chance, program)
        if call is not None and all(call.code != known.code for known in calls) and _exists(call):
            calls.append(replace(call, seed=program.seed + 1 + len(calls)))
    return calls


def _exists(call: Call) -> bool:
    """Whether its expressions have values: an expanded tensor of another size has none."""
    try:
        call.arguments()
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
    return True


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",") if size.strip()]


def _resized(expression: str, change: Callable[[list[int]], Sequence[int]]) -> str:
    """The expression with other sizes in each of its random tensors."""

    def other(match: re.Match[str]) -> str:
        return f"torch.randn({', '.join(map(str, change(_sizes(match['sizes']))))})"

    return _RANDN.sub(other, expression)


def _changed(program: Program, what: str, change: Callable[[str], str], only: int | None = None) -> Call:
    examples = program.example.positional
    return Call(what, tuple(change(e) if only in (None, i) else e for i, e in enumerate(examples)))


def _some(chance: random.Random, program: Program) -> int | None:
    """The position of one argument, or None for all."""
    return None if chance.random() < 0.75 else chance.randrange(len(program.example.positional))


def _batch(chance: random.Random, program: Program) -> Call:
    n = chance.choice((0, 1, 1, 2, 3, 4, 5, 7))
    only = _some(chance, program)
    return _changed(program, f"a batch of {n}", lambda e: _resized(e, lambda sizes: [n, *sizes[1:]]), only)


def _size(chance: random.Random, program: Program) -> Call:
    by, axis = chance.choice((-1, 1, 2, 3)), chance.choice((-1, -1, -2, -2, 1, 2))

    def change(sizes: list[int]) -> list[int]:
        if len(sizes) > 1 and -len(sizes) < axis < len(sizes):
            sizes[axis] = max(sizes[axis] + by, 1)
        return sizes

    return _changed(program, f"axis {axis} {by:+d}", lambda e: _resized(e, change), _some(chance, program))


def _both_sides(chance: random.Random, program: Program) -> Call:
    times = chance.choice((2, 3))
    return _changed(
        program,
        f"images {times} times as large",
        lambda e: _resized(e, lambda s: [*s[:2], *(times * k for k in s[2:])]),
    )


def _rank(chance: random.Random, program: Program) -> Call:
    change = chance.choice((lambda s: s[1:], lambda s: [1, *s], lambda s: [*s, 1]))
    return _changed(program, "another rank", lambda e: _resized(e, change), _some(chance, program))


def _dtype(chance: random.Random, program: Program) -> Call:
    dtype = chance.choice(("float64", "float16", "bfloat16", "int64", "float32", "uint8"))
    return _changed(
        program, f"as {dtype}", lambda e: _RANDN.sub(rf"\g<0>.to(torch.{dtype})", e), _some(chance, program)
    )


def _layout(chance: random.Random, program: Program) -> Call:
    kind = chance.choice(_LAYOUTS)

    def change(match: re.Match[str]) -> str:
        sizes = _sizes(match["sizes"])

        def text(shape: Sequence[int]) -> str:
            return f"torch.randn({', '.join(map(str, shape))})"

        if kind == "channels_last" and len(sizes) == 4:
            return f"{match[0]}.to(memory_format=torch.channels_last)"
        if kind == "a slice":
            return f"{text([*sizes[:-1], 2 * sizes[-1] + 1])}[..., 1::2]"
        if kind == "permuted" and len(sizes) > 1:
            return f"{text(sizes[::-1])}.permute({', '.join(map(str, range(len(sizes) - 1, -1, -1)))})"
        if kind == "expanded":
            return f"{text([1, *sizes[1:]])}.expand({', '.join(map(str, sizes))})"
        return match[0]

    if kind in ("requires grad", "a parameter"):
        marked = r"\g<0>.requires_grad_()" if kind == "requires grad" else r"nn.Parameter(\g<0>)"
        return _changed(program, kind, lambda e: _RANDN.sub(marked, e) if "(" in e else e, _some(chance, program))
    return _changed(program, kind, lambda e: _RANDN.sub(change, e), _some(chance, program))


def _none(chance: random.Random, program: Program) -> Call:
    """None for a tensor, or a tensor for None."""
    i = chance.randrange(len(program.example.positional))
    other = program.arguments[chance.randrange(len(program.arguments))].example
    return _changed(program, "None or not", lambda e: other if e == "None" else "None", i)


def _number(chance: random.Random, program: Program) -> Call | None:
    examples = program.example.positional
    plain = [i for i, e in enumerate(examples) if "(" not in e and e != "None"]
    if not plain:
        return None
    i = chance.choice(plain)
    example = examples[i]
    value = chance.choice(
        (
            *(
                "0",
                "1",
                "2",
                "3",
                "0.5",
                "1.0",
                "-1.5",
                "True",
                "False",
                "'a'",
                "'b'",
                "'c'",
                "torch.tensor(2.0)",
                "None",
            ),
            *((f"{example} + 1", f"float({example})", f"int({example})") if "'" not in example else ()),
        )
    )
    return _changed(program, "another value", lambda e: value, i)


def _count(chance: random.Random, program: Program) -> Call:
    examples = program.example.positional
    if chance.random() < 0.5 and len(examples) > 1:
        return Call("arguments left out", examples[: chance.randrange(1, len(examples))])
    if left_out := program.arguments[len(examples) :]:
        return Call(
            "one more argument", (*examples, chance.choice((left_out[0].example, left_out[0].default or "None")))
        )
    return Call("one more argument", (*examples, chance.choice(("None", "1", examples[0]))))


def _within(chance: random.Random, program: Program) -> Call:
    what, context = chance.choice(
        [*_CONTEXTS.items(), ("under autocast", "torch.autocast('cpu', dtype=torch.bfloat16)")]
    )
    return replace(program.example, what=what, context=context)


def _named(chance: random.Random, program: Program) -> Call:
    first = chance.randrange(len(program.arguments))
    named = [(a.name, a.example) for a in program.arguments[first : program.given if chance.random() < 0.7 else None]]
    if chance.random() < 0.3:
        named.append((chance.choice(("flag", "other", "size")), "None"))
    chance.shuffle(named)
    return Call("arguments by name", tuple(a.example for a in program.arguments[:first]), tuple(named))


def _structure(chance: random.Random, program: Program) -> Call | None:
    def change(expression: str) -> str:
        inner = expression[1:-1]
        if expression[:1] in "([":
            return chance.choice((f"[{inner}]", f"({inner})", f"[{inner}, {inner}]", f"[*{expression}, None]"))
        if expression[:1] == "{":
            return chance.choice(
                (
                    f"dict(reversed({expression}.items()))",
                    f"{{**{expression}, 'c': 1.0}}",
                    f"list({expression}.values())",
                )
            )
        return expression

    return _changed(program, "another structure", change)


_KINDS = (
    *(4 * (_batch,)),
    *(3 * (_size,)),
    *(2 * (_layout, _number)),
    *(_within, _both_sides, _rank, _dtype, _none, _count, _named, _structure),
)
