"""Statements that read further arguments: tensors of other batches, masks, None, numbers, flags, containers."""

from __future__ import annotations

from modelfuzz.grower import Grower
from modelfuzz.images import convolved
from modelfuzz.registry import growth


@growth(2)
def optional(g: Grower) -> None:
    """An argument that may be None, or has a default."""
    if len(g.arguments) > 3:
        return
    x = g.tensor(2, 3, 4)
    shape = ", ".join(map(str, g.shape(x)))
    name = f"extra{len(g.arguments)}"
    kind = g.one("given", "absent", "scalar", "flag", "mode", "count", "mask", "list", "dict", "integers")
    if kind in ("given", "absent"):
        g.argument(f"torch.randn({shape})" if kind == "given" else "None", "None", name)
        g.block(f"OUT = {x} + {name} if {name} is not None else {x} * 0.5")
    elif kind == "scalar":
        g.argument(str(g.one(0.5, 2.0, 3)), str(g.one(1.0, 2)), name)
        g.let(
            g.one(
                f"{x} * {name}",
                f"{x} + {name}",
                f"{x} / {name}",
                f"{x}.clamp(max={name})",
                f"torch.full_like({x}, {name}) - {x}",
            )
        )
    elif kind == "flag":
        g.argument(str(g.maybe(0.5)), "False", name)
        g.block(f"OUT = {x}.flip(-1) if {name} else {x} + 1")
    elif kind == "mode":
        g.argument(repr(g.one("a", "b")), "'a'", name)
        g.block(f"OUT = {x} * 2 if {name} == 'a' else {x} - 1")
    elif kind == "count":
        g.argument(str(g.one(1, 2, 3)), "1", name)
        g.let(
            g.one(
                f"{x}[:, :{name}]",
                f"{x} * {name}",
                f"sum([{x}] * {name})",
                f"{x}.roll({name}, -1)",
                f"{x} + torch.arange({name}).sum()",
            )
        )
    elif kind == "mask":
        sides = [size if g.maybe(0.5) else 1 for size in g.shape(x)]
        g.argument(f"torch.rand({', '.join(map(str, sides))}) > 0.3", name=name)
        g.let(g.one(f"{x}.masked_fill({name}, 0.0)", f"{x} * {name}", f"torch.where({name}, {x}, -1.0)"))
    elif kind == "list":
        opening, closing = g.one("[]", "()")
        g.argument(f"{opening}torch.randn({shape}), torch.randn({shape}){closing}", name=name)
        g.let(g.one(f"{x} + {name}[0] - {name}[1]", f"{x} * {name}[-1]", f"{x} + sum({name})", f"{x} * len({name})"))
    elif kind == "dict":
        g.argument(f"{{'b': torch.randn({shape}), 'a': torch.randn({shape})}}", name=name)
        g.let(
            g.one(
                f"{x} + {name}['a'] - 2 * {name}['b']",
                f"{x} + {name}['a']",
                f"{x} + list({name}.values())[0]",
                f"{x} + {name}.get('c', 0.5)",
            )
        )
    else:
        c = g.shape(x)[1]
        g.argument(f"torch.randint(0, {c}, ({g.one(1, 3)},))", name=name)
        g.let(g.one(f"{x}.index_select(1, {name})", f"{x}[:, {name}]", f"{x} + {name}.sum()"))


@growth(1)
def second_input(g: Grower) -> None:
    """Another tensor: of the same shape, a smaller one, or one that broadcasts."""
    if len(g.arguments) > 3:
        return
    x = g.tensor(2, 3, 4)
    shape = list(g.shape(x))
    for axis in range(len(shape)):
        if g.maybe(0.25):
            shape[axis] = 1
    name = g.argument(f"torch.randn({', '.join(map(str, shape))})")
    g.let(
        g.one(
            f"{x} + {name}",
            f"{x} * {name}",
            f"{name} - {x}",
            f"torch.where({name} > 0, {x}, {name})",
            f"torch.maximum({x}, {name})",
        )
    )


@growth(1)
def other_batch(g: Grower) -> None:
    """An input whose batch is not the first one's, or that joins it."""
    if len(g.arguments) > 3:
        return
    x = g.tensor(4)
    shape = list(g.shape(x))
    shape[0] = g.one(1, 2, 3)
    name = g.argument(f"torch.randn({', '.join(map(str, shape))})")
    g.let(
        g.one(
            f"torch.cat([{x}, {name}], 0)",
            f"{name}.mean() + {x}",
            f"{name}[:1] * {x}",
            f"{convolved(g, name, f'nn.Conv2d({shape[1]}, 4, 1)')}.mean(0)",
        )
    )
