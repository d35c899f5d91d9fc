"""Statements that look at sizes, write in place, cast, split, join, reduce, and take what callers may leave out."""

from __future__ import annotations

from torch import Tensor

from modelfuzz.grower import Grower
from modelfuzz.images import convolved
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


@growth(3)
def parts(g: Grower) -> None:
    x = g.tensor()
    axis = g.one(1, 1, 1, 0, -1)
    size = g.shape(x)[axis]
    cut = g.chance.randrange(size + 1)
    index = ", ".join(str(g.chance.randrange(size)) for _ in range(g.one(1, 2, 3)))
    slices = g.one(
        f":, {cut}:",
        f":, :{cut}",
        ":, ::2",
        "..., 1:",
        "..., :-1",
        ":, -1:",
        "1:",
        ":1",
        "::2",
        f":, {cut}",
        "..., None",
        "None",
    )
    g.let(
        g.one(
            *5 * (f"{x}[{slices}]",),
            f"{x}.chunk({g.one(2, 3)}, {axis})[{g.one(0, -1)}]",
            f"{x}.split({g.one(1, 2, max(size // 2, 1))}, dim={axis})[{g.one(0, -1)}]",
            f"torch.split({x}, [{cut}, {size - cut}], {axis})[1]",
            f"{x}.flip({axis})",
            f"{x}.roll({g.one(1, -1)}, {axis})",
            f"{x}[:, [{index}]]",
            f"{x}.index_select({axis}, torch.tensor([{index}]))",
            f"{x}.unbind({axis})[0]",
            f"{x}.narrow({axis}, {min(cut, size - 1)}, 1)",
            f"{x}.select({axis}, {cut % size})",
            f"{x}.tensor_split(2, {axis})[0]",
            f"{x}.gather({axis}, {x}.argsort({axis}))",
            f"{x}.movedim({axis}, -1)",
            f"{x}.transpose({axis}, -1)",
            f"{x}.unsqueeze({axis}).squeeze({axis})",
            f"{x}.repeat_interleave(2, {axis})",
            f"{x}.contiguous()",
            f"{x}.clone()",
        )
    )


@growth(3)
def joined(g: Grower) -> None:
    x = g.tensor()
    axis = g.one(1, 1, 1, -1, 0)
    shape = list(g.shape(x))
    shape[axis] = 0

    def fits(v: object) -> bool:
        if not isinstance(v, Tensor) or not v.is_floating_point() or v.dim() != len(shape):
            return False
        other = list(v.shape)
        other[axis] = 0
        return other == shape

    y = g.pick(fits, fresh=0.2)
    g.let(
        g.one(
            *3 * (f"torch.cat([{x}, {y}], {axis})",),
            f"torch.cat(({y}, {x}, {y}), dim={axis})",
            f"torch.stack([{x}, {g.like(x)}], {axis})",
            f"torch.stack([{x}, {g.like(x)}]).sum(0)",
            f"torch.cat([{x}], {axis})",
            f"torch.hstack([{x}, {y}])",
        )
    )


@growth(4)
def arithmetic(g: Grower) -> None:
    x = g.tensor()
    y, number = g.like(x), g.one(0.5, 2, -1, 3.0, 1, 0.0)
    a = g.one(x, f"({x} * {number})", f"{x}.abs()")
    g.let(
        g.one(
            *3 * (f"{x} + {y}",),
            *(
                f"{a} * {y}",
                f"{x} - {y}",
                f"{x} / ({y}.abs() + 1)",
                f"torch.maximum({x}, {y})",
                f"torch.minimum({x}, {y})",
            ),
            *(
                f"{x} + {number}",
                f"{number} - {x}",
                f"{x} * {number}",
                f"{x} / 3",
                f"{x} ** 2",
                f"1 / ({x}.abs() + 1)",
                f"-{x}",
            ),
            *(
                f"({x}.abs() + 0.1).sqrt()",
                f"({x}.abs() + 0.1).rsqrt()",
                f"torch.exp(-{x}.abs())",
                f"{x}.tanh()",
                f"{x}.sin()",
            ),
            *(
                f"torch.where({x} > {y}, {x}, {y} * 0.5)",
                f"torch.lerp({x}, {y}, 0.3)",
                f"torch.addcmul({x}, {y}, {y}, value=0.1)",
            ),
            *(
                f"{x}.masked_fill({y} > 0, {number})",
                f"{x}.clamp(-1, 1)",
                f"({x} > 0) * {y}",
                f"{x}.nan_to_num()",
                f"{x}.floor() + {y}",
            ),
            *(
                f"{x} + {x}",
                f"{x} * {x}",
                f"{x} - {x}.mean()",
                f"{x}.round(decimals=1)",
                f"{x} % 1.5",
                f"{x}.sign() * {y}",
            ),
        )
    )


@growth(2.5)
def broadcast(g: Grower) -> None:
    x = g.tensor(2, 3, 4)
    shape = [size if g.maybe(0.4) else 1 for size in g.shape(x)]
    shape[0] = 1 if g.maybe(0.9) else shape[0]
    w = g.parameter(*shape[g.one(0, 0, 1) :], buffer=g.maybe(0.4))
    g.let(
        g.one(
            *3 * (f"{x} * {w}",),
            f"{x} + {w}",
            f"{w} * {x} + {w}",
            f"{x} * (1 + {w})",
            f"{x} * {w} / 2",
            f"torch.where({w} > 0, {x}, 0.0)",
            f"{x} * {w}.sigmoid()",
            f"{x} - {x}.mean({g.one(1, -1, 0)}, keepdim=True)",
            f"{x} * {x}.mean(tuple(range(2, {x}.dim())), keepdim=True)",
            f"{x} / {x}.norm(dim=1, keepdim=True).clamp(min=0.1)",
            f"{x} * {x}.softmax(1)",
            f"{x} + {x}[:1]",
            f"{x} * {g.parameter(1)}",
            f"{x} * {x}[:, :1]",
        )
    )


@growth(3)
def in_place(g: Grower) -> None:
    x = g.tensor(2, 3, 4)
    y, c = g.like(x), g.shape(x)[1]
    k = g.chance.randrange(1, c + 1)
    fresh = g.one(f"{x}.clone()", f"{x} * 1.5", f"{x} + 1", f"{g.member(g.one('nn.ReLU()', 'nn.Tanh()'))}({x})")
    write = g.one(
        *(
            f"OUT[:, :{k}] = 0",
            "OUT[:, 0] += 1",
            "OUT[:, ::2].mul_(2)",
            "OUT.mul_(2).add_(1)",
            f"OUT[:, :{k}] = {y}[:, :{k}]",
        ),
        *(
            f"OUT.add_({y})",
            f"OUT += {y}",
            "OUT *= 0.5",
            "OUT.relu_()",
            "F.relu_(OUT)",
            "OUT.clamp_(-1, 1)",
            f"OUT.masked_fill_({y} > 0, 0.5)",
        ),
        *(
            "OUT[..., 1:] = OUT[..., :-1].clone()",
            "OUT.view(-1)[:3] = 7",
            "OUT.transpose(1, -1).add_(1)",
        ),
        *(
            "OUT[:1].zero_()",
            "OUT[0] = OUT[-1]",
            "OUT[OUT > 1] = 1",
            "OUT.index_fill_(1, torch.tensor([0]), 2.0)",
            f"OUT.copy_({y}.flip(-1))",
        ),
        *(
            "part = OUT[:, :1]\npart.neg_()",
            "a, b = OUT.tensor_split(2, 1)\na.add_(1)",
            "OUT.unsqueeze(0).mul_(3)",
            "OUT.sub_(OUT.mean())",
        ),
        f"OUT.narrow(1, 0, 1).fill_(2)\nOUT = OUT * {y}",
        "torch.add(OUT, 1, out=OUT)",
        "late = OUT[:, 0]\nOUT.mul_(2)\nOUT = OUT + late.mean()",
        "early = OUT + 0\nOUT.add_(1)\nOUT = OUT * early",
    )
    g.block(f"OUT = {fresh}\n{write}")


@growth(1)
def in_place_after_use(g: Grower) -> None:
    """A write to what others have read, or to a view of what they will read."""
    x = g.tensor(2, 3, 4)
    if x in {argument.name for argument in g.arguments}:
        x = g.let(f"{x} * 1.5")
    g.let(
        g.one(
            f"{x}.add_(1)",
            f"{x}.mul_(0.5)",
            f"F.relu({x}, inplace=True)",
            f"{x}[:, :1].add_(1)",
            f"{x}.transpose(0, 1).mul_(2)",
        )
    )


@growth(1.5)
def casts(g: Grower) -> None:
    x = g.tensor()
    g.let(
        g.one(
            *(
                f"{x}.double().to({x}.dtype)",
                f"{x}.bfloat16().float()",
                f"{x}.half().to({x}.dtype)",
                f"{x}.to(torch.float32)",
            ),
            *(
                f"({x} * 4).to(torch.int32)",
                f"({x} > 0)",
                f"({x} * 10).long().to({x}.dtype)",
                f"{x}.type_as({x})",
                f"{x}.double()",
            ),
            *(
                f"({x} > 0).float() * {x}.float()",
                f"{x}.argmax(1)",
                f"{x}.argmax(-1, keepdim=True)",
                f"{x}.topk(2, -1)[0]",
            ),
            *(
                f"{x}.sort(1)[0]",
                f"{x}.argsort(-1)",
                f"{x}.max(1)[1]",
                f"{x}.isnan().any()",
                f"({x} > 0).sum(1)",
                f"({x} > 0.5).all(-1)",
            ),
            *(
                f"{x}.bool().int()",
                f"{x}.mean(0)",
                f"{x}.sum()",
                f"{x}.var(1, keepdim=True)",
                f"{x}.mean().expand(2, 3)",
                f"{x}.amin(1)",
            ),
            *(
                f"({x}.sigmoid() > 0.5).long()",
                f"{x}.softmax(1).argmax(1)",
                f"{x}.round().int()",
                f"{x}.to(torch.uint8).float()",
            ),
            *(
                f"{x}.abs().logsumexp(1)",
                f"{x}.cumsum(1)",
                f"{x}.median(1)[0]",
                f"F.one_hot({x}.argmax(1), {g.shape(x)[1] if len(g.shape(x)) > 1 else 2})",
            ),
        )
    )


@growth(1)
def of_integers(g: Grower) -> None:
    """What models do with masks and indices."""
    m = g.pick(lambda v: isinstance(v, Tensor) and not v.is_floating_point() and v.dim() > 0)
    g.let(
        g.one(
            f"{m}.float()",
            f"{m}.to(torch.float32) * 0.5",
            f"{m} + 1",
            f"{m} == 1",
            f"{m}.float().mean(-1, keepdim=True)",
            f"~({m} > 0)",
            f"{m}[:1]",
        )
    )


@growth(1)
def buffers(g: Grower) -> None:
    x = g.tensor(4)
    c = g.shape(x)[1]
    order = g.buffer(f"torch.randperm({c})", persistent=g.maybe(0.5))
    table = g.buffer(f"torch.randn(1, {c}, 1, 1)", persistent=g.maybe(0.5))
    plain = g.member(f"torch.randn({c}, 1, 1)", prefix="table")
    g.let(
        g.one(
            f"{x}[:, {order}]",
            f"{x}.index_select(1, {order})",
            f"{x} + {table}",
            f"{x} * {plain}",
            f"{x}[:, {order}.argsort()]",
            f"{x} + {order}.view(-1, 1, 1)",
        )
    )


@growth(0.25)
def stateful(g: Grower) -> None:
    """A buffer that forward changes."""
    x = g.tensor()
    b = g.parameter(1, buffer=True)
    g.block(
        g.one(
            f"{b}.add_(1)\nOUT = {x} + {b}",
            f"{b} += 1\nOUT = {x} * 1.5",
            f"{b}.copy_({x}.mean().reshape(1))\nOUT = {x} * {b}",
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


@growth(0.6)
def spectra(g: Grower) -> None:
    x = g.tensor(2, 3, 4)
    g.let(
        g.one(
            f"torch.fft.rfft({x}).abs()",
            f"torch.fft.fft2({x}).real",
            f"torch.fft.irfft(torch.fft.rfft({x}), n={x}.shape[-1])",
            f"torch.view_as_real(torch.fft.fft({x}))",
            f"torch.complex({x}, {x}).abs()",
            f"torch.vmap(lambda t: t * t.sum())({x})",
        )
    )
