"""Statements that Python decides: branches on sizes, loops, sizes as numbers, regions, what values or chance decide."""

from __future__ import annotations

from modelfuzz.grower import Grower
from modelfuzz.registry import growth


@growth(3)
def branch_on_a_size(g: Grower) -> None:
    x = g.tensor()
    axis = g.one(0, 0, 0, *range(len(g.shape(x))))
    size = g.shape(x)[axis]
    test = g.one(
        *(f"{{x}}.shape[{axis}] {sign} {size + k}" for sign in (">", "<", "==", ">=", "!=") for k in (-1, 0, 1)),
        f"{{x}}.shape[{axis}] % 2 == {g.one(0, 1)}",
        f"{{x}}.shape[{axis}] % {g.one(3, 4)} == 0",
        f"{{x}}.shape[{axis}] == 1",
        f"{{x}}.size({axis}) > 1",
        f"len({{x}}) == {g.shape(x)[0]}",
        f"{{x}}.numel() > {g.values[x].numel() + g.one(-1, 0, 1)}",
        f"{{x}}.shape[0] * {{x}}.shape[-1] > {g.shape(x)[0] * g.shape(x)[-1] + g.one(-1, 0)}",
        "{x}.shape[0] != {x}.shape[-1]",
        f"{{x}}.dim() == {len(g.shape(x))}",
        "self.training",
        "{x}.dtype == torch.float32",
    ).format(x=x)
    changed = g.one(f"{x} * 2", f"{x}.flip(-1)", f"-{x}", f"{x} + 1", f"{x}.relu()", f"{x}.roll(1, 0)")
    g.block(
        g.one(
            f"OUT = {changed} if {test} else {x}",
            f"OUT = {x}\nif {test}:\n    OUT = {changed}",
            f"OUT = {x} if {test} else {changed}",
        )
    )


@growth(1.5)
def assertion(g: Grower) -> None:
    x = g.tensor()
    axis = g.one(*range(len(g.shape(x))))
    size = g.shape(x)[axis]
    check = g.one(
        f"assert {x}.shape[{axis}] == {size}",
        f"assert {x}.shape[{axis}] >= {max(size - 1, 1)}",
        f"assert {x}.dim() == {len(g.shape(x))}",
        f"torch._assert({x}.shape[{axis}] == {size}, 'another size')",
        f"torch._check({x}.shape[{axis}] <= {size + 2})",
        f"if {x}.shape[{axis}] > {size + 1}:\n    raise RuntimeError('too large')",
    )
    g.block(f"{check}\nOUT = {x} * 1.5")


@growth(2)
def loop_over_images(g: Grower) -> None:
    x = g.tensor(3, 4)
    other = g.like(x)
    g.block(
        g.one(
            f"rows = []\nfor i in range({x}.shape[0]):\n    rows.append({x}[i] * (i + 1))\nOUT = torch.stack(rows)",
            f"OUT = torch.stack([image.flip(-1) for image in {x}])",
            f"OUT = torch.stack([a + b.mean() for a, b in zip({x}, {other})])",
            f"OUT = torch.cat([part * 0.5 for part in {x}.split(1)], 0)",
            f"OUT = sum({x}[i] for i in range(len({x})))",
            f"OUT = {x}\nfor i in range({x}.shape[1]):\n    OUT = OUT + {x}[:, i : i + 1] * {g.one(0.1, -0.2)}",
            f"total = 0\nfor c in {x}.unbind(1):\n    total = total + c\nOUT = total",
            f"OUT = torch.stack([{x}[-1 - i] for i in range({x}.shape[0])])",
        )
    )


@growth(3)
def sizes_as_numbers(g: Grower) -> None:
    x = g.tensor()
    last, axis = f"{x}.shape[-1]", g.one(*range(len(g.shape(x))))
    sizes = ", ".join(f"{x}.shape[{i}]" for i in range(len(g.shape(x))))
    n = f"{x}.shape[{axis}]"
    g.let(
        g.one(
            f"{x} / {n}",
            f"{x} * {n} ** -0.5",
            f"{x} / math.sqrt({n})",
            f"{x} + torch.arange({last}, dtype={x}.dtype)",
            f"{x} + torch.arange({last}) / {last}",
            f"{x} * torch.linspace(0, 1, {last}, dtype={x}.dtype)",
            f"torch.cat([{x}, torch.zeros({sizes}, dtype={x}.dtype)], {axis})",
            f"torch.cat([{x}, {x}.new_ones({x}.shape)], -1)",
            f"{x} + torch.full(({last},), 0.5, dtype={x}.dtype)",
            f"{x} @ torch.eye({last}, dtype={x}.dtype).flip(0)",
            f"{x} + torch.tensor({n}, dtype={x}.dtype)",
            f"{x} * torch.ones({last}, {last}, dtype={x}.dtype).tril().sum(0)",
            f"{x}.sum({axis}, keepdim=True) / max({n}, 3)",
            f"{x}[..., : {last} // 2]",
            f"{x}.narrow(-1, 0, max({last} - 1, 1))",
            f"{x}.reshape({x}.shape[0], -1)",
            f"{x}.reshape({x}.shape[0] * {x}.shape[1], *{x}.shape[2:])",
            f"{x}.flatten()[:: {g.one(2, 3)}]",
            f"{x} + float({n})",
            f"{x} * (1.0 if {n} > {g.shape(x)[axis]} else 2.0)",
            f"{x} * min({n}, 4)",
            f"{x} + torch.randn_like({x}) * 0",
            f"{x}.repeat({', '.join(g.one('1', '1', '2') for _ in g.shape(x))})",
            f"{x} + torch.meshgrid(torch.arange({last}), torch.arange({last}), indexing='ij')[1][0] * 0.1",
        )
    )


@growth(1)
def grid(g: Grower) -> None:
    """Coordinates of an image's pixels."""
    x = g.tensor(4)
    n, h, w = (f"{x}.shape[{i}]" for i in (0, 2, 3))
    rows, columns = f"torch.linspace(-1, 1, {h}, dtype={x}.dtype)", f"torch.linspace(-1, 1, {w}, dtype={x}.dtype)"
    mesh = f"yy, xx = torch.meshgrid({rows}, {columns}, indexing='ij')"
    sampled = "OUT = F.grid_sample({}, {}, align_corners=False)"
    affine = f"F.affine_grid(theta, list({x}.shape), align_corners=False)"
    g.block(
        g.one(
            f"{mesh}\nOUT = torch.cat([{x}, xx.expand({n}, 1, -1, -1), yy.expand({n}, 1, -1, -1)], 1)",
            f"{mesh}\n{sampled.format(x, f'torch.stack([xx, yy], -1).expand({n}, -1, -1, -1)')}",
            f"OUT = {x} + torch.arange({h}, dtype={x}.dtype)[:, None] * 0.1 + torch.arange({w}) * 0.01",
            f"theta = torch.eye(2, 3, dtype={x}.dtype).expand({n}, 2, 3)\n{sampled.format(x, affine)}",
        )
    )


@growth(1)
def regions(g: Grower) -> None:
    """Regions that export as sub-graphs."""
    x = g.tensor(4)
    c = g.shape(x)[1]
    layer = g.member(f"nn.Conv2d({c}, {c}, {g.one(1, 3)}, padding='same')")
    g.block(
        g.one(
            f"with torch.no_grad():\n    OUT = {layer}({x}).relu()",
            f"with torch.autocast('cpu', enabled=False):\n    OUT = {layer}({x}.float()) * 2",
            f"OUT = torch.utils.checkpoint.checkpoint({layer}, {x}, use_reentrant=False)",
            f"with torch.autocast('cpu', dtype=torch.bfloat16):\n    OUT = {layer}({x}).float()",
            f"with torch.no_grad():\n    OUT, second = {layer}({x}), {x} + 1\nOUT = OUT + second",
            f"with torch.inference_mode():\n    OUT = {layer}({x})\nOUT = OUT + 1",
            f"with torch.enable_grad():\n    OUT = {layer}({x}).sigmoid()",
            f"OUT = torch.cond({x}.mean() > 0, lambda t: t + 1, lambda t: t - 1, ({layer}({x}),))",
        )
    )


@growth(0.7)
def depending_on_values(g: Grower) -> None:
    """Sizes and numbers that only the values tell."""
    x = g.tensor()
    g.let(
        g.one(
            f"{x} + {x}[{x} > 0].sum()",
            f"{x} * ({x} > 0).sum().item()",
            f"{x} + {x}.mean().item()",
            f"{x} + torch.masked_select({x}, {x} < 0).mean()",
            f"{x} * {x}.nonzero().shape[0]",
            f"{x} + torch.unique({x}.round()).sum()",
            f"{x} if {x}.sum() > 0 else -{x}",
            f"{x} + {x}.flatten()[int({x}.flatten().argmax())]",
        )
    )


@growth(0.7)
def by_chance(g: Grower) -> None:
    """Random numbers at each call."""
    x = g.tensor()
    g.let(
        g.one(
            f"{x} + torch.rand_like({x})",
            f"{x} * torch.rand(1, dtype={x}.dtype)",
            f"F.dropout({x}, 0.5, training=True)",
            f"{x} + torch.randn({x}.shape, dtype={x}.dtype)",
            f"{x}[:, torch.randperm({x}.shape[1])]",
            f"torch.bernoulli({x}.sigmoid())",
            f"{x} + {x}.new_empty({x}.shape).normal_()",
        )
    )
