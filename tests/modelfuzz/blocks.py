"""Statements that are the blocks of efficient and of quantized CNNs."""

from __future__ import annotations

from modelfuzz.grower import Grower
from modelfuzz.images import activated, convolved, normalized
from modelfuzz.registry import growth


@growth(3)
def separable(g: Grower) -> None:
    x = g.tensor(4)
    c, k, multiplier = g.shape(x)[1], g.one(3, 5, 7), g.one(1, 1, 1, 2)
    padding = g.one(k // 2, k // 2, 0)
    options = f"stride={g.one(1, 1, 2)}, padding={padding}, groups={c}, bias={g.maybe(0.5)}"
    text = f"nn.Conv2d({c}, {c * multiplier}, {k}, {options})"
    y = activated(g, normalized(g, convolved(g, x, text), 0.7), 0.6)
    y = convolved(g, y, f"nn.Conv2d({c * multiplier}, {g.one(c, 4, 8, 24)}, 1, bias={g.maybe(0.5)})")
    y = activated(g, normalized(g, y, 0.7), 0.6)
    if g.shape(x) == g.shape(y) and g.maybe(0.6):
        g.let(f"{y} + {x}")


@growth(3)
def inverted_residual(g: Grower) -> None:
    x = g.tensor(4)
    c, k, stride = g.shape(x)[1], g.one(3, 5), g.one(1, 1, 2)
    hidden = g.one(2 * c, 3 * c, 16)
    y = activated(g, normalized(g, convolved(g, x, f"nn.Conv2d({c}, {hidden}, 1, bias=False)"), 0.9), 0.9)
    text = f"nn.Conv2d({hidden}, {hidden}, {k}, stride={stride}, padding={k // 2}, groups={hidden}, bias=False)"
    y = activated(g, normalized(g, convolved(g, y, text), 0.9), 0.9)
    if g.maybe(0.3):
        y = squeezed(g, y)
    y = normalized(g, convolved(g, y, f"nn.Conv2d({hidden}, {g.one(c, c, 12)}, 1, bias=False)"), 0.9)
    if g.shape(x) == g.shape(y):
        g.let(g.one(f"{x} + {y}", f"{y} + {x}", f"{y}.add_({x})"))


def squeezed(g: Grower, x: str) -> str:
    """`x` times a gate of its channels (squeeze and excitation)."""
    c = g.shape(x)[1]
    small = max(c // 4, 1)
    pooled = g.let(
        g.one(
            f"F.adaptive_avg_pool2d({x}, 1)",
            f"{x}.mean((2, 3), keepdim=True)",
            f"{g.member('nn.AdaptiveAvgPool2d(1)')}({x})",
        )
    )
    s = activated(g, g.let(f"{g.member(f'nn.Conv2d({c}, {small}, 1)')}({pooled})"), 1.0)
    s = g.let(f"{g.member(f'nn.Conv2d({small}, {c}, 1)')}({s})")
    gate = g.let(
        g.one("torch.sigmoid({s})", "F.hardsigmoid({s})", "F.relu6({s} + 3) / 6", "{s}.softmax(1)").format(s=s)
    )
    return g.let(g.one(f"{x} * {gate}", f"{gate} * {x}", f"torch.mul({x}, {gate}.expand_as({x}))"))


@growth(2)
def squeeze_excitation(g: Grower) -> None:
    x = g.tensor(4)
    if g.maybe(0.5):
        squeezed(g, x)
        return
    c = g.shape(x)[1]
    first = g.member(f"nn.Linear({c}, {g.one(2, 4)})")
    s = g.let(f"{first}({x}.mean((2, 3)))")
    second = g.member(f"nn.Linear({g.shape(s)[1]}, {c})")
    s = g.let(f"{second}(F.relu({s}))")
    g.let(
        f"{x} * torch.sigmoid({s}).{g.one(f'view(-1, {c}, 1, 1)', 'unsqueeze(-1).unsqueeze(-1)')}"
        if g.maybe(0.6)
        else f"{x} * {s}.sigmoid()[:, :, None, None]"
    )


@growth(1)
def convolutional_attention(g: Grower) -> None:
    """CBAM's spatial half."""
    x = g.tensor(4)
    k = g.one(3, 7)
    stacked = g.let(f"torch.cat([{x}.mean(1, keepdim=True), {x}.amax(1, keepdim=True)], 1)")
    g.let(f"{x} * torch.sigmoid({g.member(f'nn.Conv2d(2, 1, {k}, padding={k // 2}, bias=False)')}({stacked}))")


@growth(2)
def ghost(g: Grower) -> None:
    x = g.tensor(4)
    c, half = g.shape(x)[1], g.one(2, 4, 6)
    p = activated(g, normalized(g, convolved(g, x, f"nn.Conv2d({c}, {half}, 1, bias=False)"), 0.8), 0.7)
    q = activated(
        g,
        normalized(g, convolved(g, p, f"nn.Conv2d({half}, {half}, 3, padding=1, groups={half}, bias=False)"), 0.8),
        0.7,
    )
    y = g.let(f"torch.cat([{p}, {q}], {g.one('1', 'dim=1')})" + g.one("", "", f"[:, :{2 * half - 1}]"))
    if g.shape(x) == g.shape(y):
        g.let(f"{x} + {y}")


@growth(2)
def shuffle(g: Grower) -> None:
    x = g.tensor(4)
    _, c, h, w = g.shape(x)
    groups = g.one(*(d for d in (2, 3, 4) if c % d == 0), c)
    n, split = g.one(f"{x}.shape[0]", "-1"), f"{groups}, {c // groups}"
    image = f"{n}, {c}, {h}, {w}"
    g.let(
        g.one(
            f"F.channel_shuffle({x}, {groups})",
            f"{g.member(f'nn.ChannelShuffle({groups})')}({x})",
            f"{x}.reshape({x}.shape[0], {split}, {x}.shape[2], {x}.shape[3]).transpose(1, 2).reshape({x}.shape)",
            f"{x}.view({n}, {split}, {h}, {w}).permute(0, 2, 1, 3, 4).contiguous().view({image})",
            f"{x}.unflatten(1, ({split})).transpose(1, 2).flatten(1, 2)",
            f"{x}.unflatten(1, ({split})).flatten(1, 2)",
            f"{x}.reshape({x}.shape[0], {split}, -1).transpose(1, 2).reshape({image})",
            f"{x}.reshape({n}, {split}, {h}, {w}).transpose(1, 2).transpose(3, 4).reshape({image})",
        )
    )


@growth(2)
def shuffle_unit(g: Grower) -> None:
    """ShuffleNet V2's: half of the channels pass by."""
    x = g.tensor(4)
    c = g.shape(x)[1]
    half = c // 2
    a, b = (g.let(text) for text in (f"{x}.chunk(2, 1)[0]", f"{x}.chunk(2, dim=1)[1]"))
    if g.maybe(0.5):
        a, b = g.let(f"{x}[:, :{half}]"), g.let(f"{x}[:, {half}:]")
    b = activated(g, normalized(g, convolved(g, b, f"nn.Conv2d({c - half}, {half}, 1)"), 0.8), 0.8)
    b = normalized(g, convolved(g, b, f"nn.Conv2d({half}, {half}, 3, padding=1, groups={half})"), 0.8)
    y = g.let(f"torch.cat(({a}, {b}), 1)")
    g.let(
        g.one(
            f"F.channel_shuffle({y}, 2)",
            f"{y}.view({y}.size(0), 2, -1, {y}.size(2), {y}.size(3)).transpose(1, 2).reshape({y}.shape)",
        )
    )


@growth(1.5)
def low_rank(g: Grower) -> None:
    x = g.tensor(4)
    c, rank, c_out, k = g.shape(x)[1], g.one(1, 2, 3), g.one(4, 8), g.one(3, 5)
    if g.maybe(0.5):
        parts = [
            f"nn.Conv2d({c}, {rank}, 1, bias=False)",
            f"nn.Conv2d({rank}, {rank}, {k}, padding={k // 2}, stride={g.one(1, 2)}, bias=False)",
        ]
    else:
        down, over = f"({k}, 1), padding=({k // 2}, 0)", f"(1, {k}), padding=(0, {k // 2})"
        group = g.one(f", groups={rank}, bias=False", f", groups={rank}", "")
        parts = [
            f"nn.Conv2d({c}, {rank}, 1, bias=False)",
            f"nn.Conv2d({rank}, {rank}, {down}{group})",
            f"nn.Conv2d({rank}, {rank}, {over}{group})",
        ]
    parts.append(f"nn.Conv2d({rank}, {c_out}, 1)")
    if g.maybe(0.3):
        parts.append(f"nn.BatchNorm2d({c_out})")
    if g.maybe(0.5):
        g.let(f"{g.member(f'nn.Sequential({chr(44).join(parts)})')}({x})")
        return
    for part in parts:
        x = g.let(f"{g.member(part)}({x})")


@growth(2)
def padded_convolution(g: Grower) -> None:
    """A pad of its own before a convolution without, as models from other frameworks have it."""
    x = g.tensor(4)
    c, k, s = g.shape(x)[1], g.one(3, 5), g.one(1, 2)
    if g.maybe(0.4):
        # TensorFlow's "same", by sizes.
        wide, high = (f"max((-(-{x}.shape[{i}] // {s}) - 1) * {s} + {k} - {x}.shape[{i}], 0)" for i in (3, 2))
        x = g.block(f"w, h = {wide}, {high}\nOUT = F.pad({x}, (w // 2, w - w // 2, h // 2, h - h // 2))")
    else:
        x = g.let(f"F.pad({x}, ({', '.join(str(g.one(0, 1, 2)) for _ in range(4))}))")
    y = convolved(g, x, f"nn.Conv2d({c}, {c}, {k}, stride={s}, groups={g.one(1, c)})")
    activated(g, normalized(g, y))


@growth(1)
def quantized(g: Grower) -> None:
    """Quantize/dequantize pairs around a convolution or linear layer."""
    x = g.tensor(4, 2)
    scale, zero = g.one(0.02, 0.05, 1 / 64), g.one(0, 3, -17)
    library, form = "torch.ops.quantized_decomposed", "{1}, {2}, -128, 127, torch.int8"
    pair = f"{library}.dequantize_per_tensor({library}.quantize_per_tensor({{0}}, {form}), {form})"
    fake = f"torch.fake_quantize_per_tensor_affine({x}, {scale}, {zero}, -128, 127)"
    y = g.let(pair.format(x, scale, zero) if g.maybe(0.7) else fake)
    c = g.shape(x)[1]
    if len(g.shape(x)) == 4:
        sizes = g.one(f"{c}, 8, 3, padding=1", f"{c}, {c}, 3, padding=1, groups={c}", f"{c}, 8, 1")
        y = g.let(f"{g.member(f'nn.Conv2d({sizes})')}({y})")
    else:
        y = g.let(f"{g.member(f'nn.Linear({c}, 8)')}({y})")
    y = activated(g, y, 0.5)
    if g.maybe(0.6):
        g.let(pair.format(y, 0.03, g.one(0, 5)))


@growth(1)
def quantized_layers(g: Grower) -> None:
    """Layers as a quantizer leaves them: int8 weights with a scale a row, activations quantized before and after."""
    x = g.tensor(4)
    library, form = "torch.ops.quantized_decomposed", "-128, 127, torch.int8"

    def pair(value: str, scale: float, zero: int) -> str:
        whole = f"{library}.quantize_per_tensor({value}, {scale}, {zero}, {form})"
        return f"{library}.dequantize_per_tensor({whole}, {scale}, {zero}, {form})"

    y = g.let(pair(x, g.one(0.02, 0.05), g.one(0, 3, -17)))
    for _ in range(g.one(1, 2)):
        c = g.shape(y)[1]
        c_out, groups, k = g.one((8, 1, 1), (8, 1, 3), (c, c, 3), (c, 1, 3), (c, 1, 1))
        values = g.buffer(f"torch.randint(-127, 128, ({c_out}, {c // groups}, {k}, {k}), dtype=torch.int8)")
        scale, zero = (
            g.buffer(f"torch.rand({c_out}) * 0.01 + 0.001"),
            g.buffer(f"torch.zeros({c_out}, dtype=torch.int64)"),
        )
        weight = f"{library}.dequantize_per_channel({values}, {scale}, None, 0, -127, 127, torch.int8)"
        weight = weight.replace("None", zero)
        y = g.let(f"F.conv2d({y}, {weight}, {g.one('None', g.parameter(c_out))}, 1, {k // 2}, 1, {groups})")
        y = activated(g, y, 0.6)
        y = g.let(pair(y, g.one(0.03, 0.1), g.one(0, 5)))
    if g.shape(x) == g.shape(y) and g.maybe(0.5):
        g.let(f"{y} + {x}")
