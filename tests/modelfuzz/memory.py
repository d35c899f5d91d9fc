"""Statements on memory: parts and views, writes in place, buffers, casts and what other dtypes are for."""

from __future__ import annotations

from torch import Tensor

from modelfuzz.grower import Grower
from modelfuzz.registry import growth


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
