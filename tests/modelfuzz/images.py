"""Statements on images: convolutions of all kinds, norms, pooling, and the blocks of efficient CNNs."""

from __future__ import annotations

from modelfuzz.grower import Grower
from modelfuzz.registry import growth

__all__ = ["activated", "normalized"]

ACTIVATIONS = (
    *(
        "nn.ReLU()",
        "nn.ReLU(inplace=True)",
        "nn.ReLU6()",
        "nn.ReLU6(inplace=True)",
        "nn.SiLU()",
        "nn.SiLU(inplace=True)",
    ),
    *("nn.Hardswish()", "nn.Hardswish(inplace=True)", "nn.Hardsigmoid()", "nn.Sigmoid()", "nn.GELU()"),
    *(
        "nn.GELU(approximate='tanh')",
        "nn.LeakyReLU(0.1)",
        "nn.LeakyReLU(0.2, inplace=True)",
        "nn.ELU()",
        "nn.CELU(0.5)",
    ),
    *("nn.SELU()", "nn.Mish()", "nn.Mish(inplace=True)", "nn.PReLU()", "nn.Softplus()", "nn.Tanh()", "nn.Softsign()"),
    *(
        "nn.Hardtanh()",
        "nn.Hardtanh(0, 6)",
        "nn.Hardtanh(-2, 3, inplace=True)",
        "nn.Threshold(0.1, 0.5)",
        "nn.LogSigmoid()",
    ),
    *("nn.Hardshrink(0.3)", "nn.Softshrink(0.3)", "nn.Tanhshrink()", "nn.RReLU()", "nn.Identity()", "nn.Dropout(0.5)"),
    *("nn.Dropout2d()", "nn.AlphaDropout()"),
)
WRITTEN_OUT = (
    *(
        "F.relu({x})",
        "torch.relu({x})",
        "{x}.clamp(0, 6)",
        "{x}.clamp(min=0)",
        "{x}.clamp(min=0.0, max=6.0)",
        "{x}.clamp_min(0)",
    ),
    *(
        "{x} * torch.sigmoid({x})",
        "torch.sigmoid({x}) * {x}",
        "{x} * F.relu6({x} + 3) / 6",
        "{x} * (F.relu6({x} + 3) / 6)",
    ),
    *(
        "F.relu6({x} + 3) / 6",
        "F.relu6({x} + 3.0) * (1.0 / 6.0)",
        "{x} * F.hardsigmoid({x})",
        "F.hardtanh({x}, 0.0, 6.0)",
    ),
    *(
        "torch.where({x} > 0, {x}, 0.1 * {x})",
        "torch.maximum({x}, torch.zeros_like({x}))",
        "F.softplus({x}).tanh() * {x}",
    ),
    *(
        "F.gelu({x})",
        "0.5 * {x} * (1 + torch.erf({x} / math.sqrt(2)))",
        "F.silu({x})",
        "F.hardswish({x})",
        "{x}.relu().square()",
    ),
    *(
        "{x} * {x}.sigmoid().detach()",
        "F.relu({x} + 3) / 6",
        "F.relu6({x} + 2) / 6",
        "{x}.clamp(-1, 6)",
        "{x} + F.relu6({x} + 3) / 6",
    ),
    *("F.dropout({x}, 0.2, self.training)", "F.relu(-{x})", "F.relu6({x} * 6) / 6", "{x}.clamp(max=6).clamp(min=0)"),
)


def activated(g: Grower, x: str, probability: float = 0.7) -> str:
    """`x` through some activation, mostly."""
    if not g.maybe(probability):
        return x
    if g.maybe(0.35):
        return g.let(g.one(*WRITTEN_OUT).format(x=x))
    return g.let(f"{g.member(g.one(*ACTIVATIONS))}({x})")


def normalized(g: Grower, x: str, probability: float = 0.5) -> str:
    """`x`, an image, through BatchNorm or another norm."""
    if not g.maybe(probability):
        return x
    _, c, h, w = g.shape(x)
    groups = g.one(*(d for d in (1, 2, 4, c) if c % d == 0))
    affine = g.one("", ", affine=False")
    norm = g.one(
        *4 * (f"nn.BatchNorm2d({c})",),
        f"nn.BatchNorm2d({c}, eps=1e-3{affine})",
        f"nn.BatchNorm2d({c}, track_running_stats=False)",
        f"nn.GroupNorm({groups}, {c})",
        f"nn.GroupNorm({groups}, {c}{affine})",
        f"nn.InstanceNorm2d({c}{g.one('', ', affine=True')})",
        f"nn.InstanceNorm2d({c}, track_running_stats=True)",
        f"nn.LayerNorm([{c}, {h}, {w}])",
        f"nn.LocalResponseNorm({g.one(2, 3)})",
    )
    return g.let(f"{g.member(norm)}({x})")


def convolution_text(
    g: Grower, c_in: int, *, c_out: int | None = None, kernel: str | None = None, stride: int = 1, rank: int = 2
) -> str:
    """A convolution layer from `c_in` channels, of any kind."""
    groups = g.one(*3 * (1,), *(d for d in (2, 3, 4, c_in) if c_in % d == 0))
    if c_out is None:
        c_out = groups * g.one(1, 2, 3, 4) if groups > 1 else g.one(1, 2, 3, 4, 5, 6, 8, 12, 16, 17, 32, 40, 65)
    elif c_out % groups:
        groups = 1
    sides = (1, 1, 3, 3, 3, 5, 2, 4, 7)
    kernel = kernel or (str(g.one(*sides)) if g.maybe(0.75) else _tuple(g, (1, 2, 3, 5), rank))
    options = [f"groups={groups}"] if groups > 1 else []
    stride = g.one(1, 1, 1, 2, 3) if stride == 1 else stride
    if g.maybe(0.25):
        options.append(f"dilation={g.one(2, 3) if g.maybe(0.6) else _tuple(g, (1, 2, 3), rank)}")
    kind = g.one("same", "valid", "number", "number", "number", "number", "tuple")
    if kind == "same" and stride == 1:
        options.append("padding='same'")
    elif kind == "number":
        options.append(f"padding={g.one(0, 1, 1, 2, 3)}")
    elif kind == "tuple":
        options.append(f"padding={_tuple(g, (0, 1, 2), rank)}")
    if stride > 1:
        options.append(f"stride={stride if g.maybe(0.7) else _tuple(g, (1, 2, 3), rank)}")
    if g.maybe(0.15):
        options.append(f"padding_mode='{g.one('reflect', 'replicate', 'circular')}'")
    if g.maybe(0.4):
        options.append("bias=False")
    return f"nn.Conv{rank}d({', '.join([str(c_in), str(c_out), kernel, *options])})"


def _tuple(g: Grower, values: tuple[int, ...], rank: int) -> str:
    return f"({', '.join(str(g.one(*values)) for _ in range(rank))}{',' if rank == 1 else ''})"


def convolved(g: Grower, x: str, text: str) -> str:
    """`x` through a convolution whose weights may hold zeros."""
    further = []
    if g.maybe(0.08):
        further = g.one(
            ["@.weight.data *= torch.rand_like(@.weight) > 0.9"],
            ["@.weight.data[: @.weight.shape[0] // 2] = 0"],
            ["@.weight.data *= torch.rand(@.weight.shape[0], @.weight.shape[1], 1, 1) > 0.7"],
            ["@.weight.data.zero_()"],
        )
    return g.let(f"{g.member(text, *further)}({x})")


@growth(6)
def convolution(g: Grower) -> None:
    x = g.tensor(4)
    y = convolved(g, x, convolution_text(g, g.shape(x)[1]))
    order = g.maybe(0.8)
    y = normalized(g, y) if order else activated(g, y)
    y = activated(g, y) if order else normalized(g, y)
    if g.maybe(0.15) and g.shape(x) == g.shape(y):
        y = g.let(f"{x} + {y}")
        activated(g, y, 0.4)


@growth(2)
def residual_of_two(g: Grower) -> None:
    x = g.tensor(4)
    c, k = g.shape(x)[1], g.one(1, 3, 5)
    y = x
    for _ in range(g.one(1, 2)):
        y = activated(
            g, normalized(g, convolved(g, y, f"nn.Conv2d({c}, {c}, {k}, padding={k // 2}, bias={g.maybe(0.5)})")), 0.6
        )
    y = g.let(
        g.one(
            f"{y} + {x}",
            f"{x} + {y}",
            f"torch.add({y}, {x})",
            f"torch.add({y}, {x}, alpha=0.5)",
            f"{y}.add_({x})",
            f"{y} - {x}",
        )
    )
    activated(g, y, 0.6)


@growth(2)
def functional_convolution(g: Grower) -> None:
    """Weights that are parameters of the model itself, or computed."""
    x = g.tensor(4)
    c, k, c_out = g.shape(x)[1], g.one(1, 3), g.one(4, 8)
    w = g.parameter(c_out, c, k, k, scale=0.2)
    weight = g.one(
        w,
        f"{w} - {w}.mean((1, 2, 3), keepdim=True)",
        f"{w} * {g.parameter(c_out, 1, 1, 1)}",
        f"{w}.abs()",
        f"{w}.flip(3)",
    )
    bias = g.one("None", g.parameter(c_out))
    g.let(f"F.conv2d({x}, {weight}, {bias}, stride={g.one(1, 1, 2)}, padding={g.one(0, 1)})")


@growth(1)
def reparametrized_convolution(g: Grower) -> None:
    x = g.tensor(4)
    c = g.shape(x)[1]
    text = f"nn.Conv2d({c}, {g.one(4, 8)}, {g.one(1, 3)})"
    wrap = g.one(
        "torch.nn.utils.parametrizations.weight_norm",
        "torch.nn.utils.parametrizations.spectral_norm",
        "torch.nn.utils.weight_norm",
    )
    g.let(f"{g.member(f'{wrap}({text})', prefix='conv')}({x})")


@growth(1.5)
def transposed_convolution(g: Grower) -> None:
    x = g.tensor(4)
    c = g.shape(x)[1]
    stride, groups = g.one(1, 2, 3), g.one(*2 * (1,), *(d for d in (2, c) if c % d == 0))
    output_padding, dilation = g.one(0, 1) if stride > 1 else 0, g.one(1, 1, 2)
    options = f"{stride}, {g.one(0, 1)}, {output_padding}, groups={groups}, dilation={dilation}"
    y = g.let(f"{g.member(f'nn.ConvTranspose2d({c}, {groups * g.one(1, 2, 3)}, {g.one(1, 2, 3, 4)}, {options})')}({x})")
    activated(g, normalized(g, y))


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
    first, second = g.member(f"nn.Linear({c}, {g.one(2, 4)})"), None
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
        group = g.one(f", groups={rank}", "")
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


@growth(3)
def pool(g: Grower) -> None:
    x = g.tensor(4)
    h, w = g.shape(x)[2:]
    k, s, p = g.one(2, 3, 3, (2, 3), 4), g.one(1, 2, 2, 3, "None"), g.one(0, 1, 1)
    ceil = g.one("", ", ceil_mode=True")
    g.let(
        g.one(
            *3 * (f"{g.member(f'nn.MaxPool2d({k}, {s}, {p}{ceil})')}({x})",),
            f"F.max_pool2d({x}, {k}, {s}, {p}, dilation={g.one(1, 2)}{ceil})",
            *2 * (f"{g.member(f'nn.AvgPool2d({k}, {s}, {p}{ceil}, count_include_pad={g.maybe(0.5)})')}({x})",),
            f"F.avg_pool2d({x}, {k}, {s}, {p}{ceil}, divisor_override={g.one(2, 5)})",
            f"{g.member(f'nn.AdaptiveAvgPool2d({g.one(1, 2, (3, 2), (None, 1), 7)})')}({x})",
            f"{g.member(f'nn.AdaptiveMaxPool2d({g.one(1, 2, (2, 3))})')}({x})",
            f"F.lp_pool2d({x}.abs() + 0.1, 2, {g.one(2, 3)})",
            f"F.adaptive_avg_pool2d({x}, (1, 1))",
            f"F.max_pool2d({x}, ({h}, {w}))",
            f"F.max_unpool2d(*F.max_pool2d({x}, 2, return_indices=True), 2)",
            f"F.avg_pool2d({x}, {x}.shape[2:])",
        )
    )


@growth(2)
def global_pool(g: Grower) -> None:
    """An image becomes a vector."""
    x = g.tensor(4)
    g.let(
        g.one(
            *(
                f"{x}.mean((2, 3))",
                f"{x}.mean([-1, -2])",
                f"F.adaptive_avg_pool2d({x}, 1).flatten(1)",
                f"{x}.amax((2, 3))",
            ),
            *(f"torch.flatten(F.adaptive_max_pool2d({x}, 1), 1)", f"{x}.flatten(2).mean(-1)", f"{x}.mean(3).mean(2)"),
            *(f"F.adaptive_avg_pool2d({x}, 1).squeeze(-1).squeeze(-1)", f"F.adaptive_avg_pool2d({x}, 1).squeeze()"),
            *(
                f"{x}.flatten(1)[:, :40]",
                f"{x}.reshape({x}.shape[0], -1)[:, ::3]",
                f"{x}.sum((2, 3))",
                f"{x}.std((2, 3))",
            ),
            *(
                f"F.adaptive_avg_pool2d({x}, 1).view({x}.size(0), {x}.size(1))",
                f"{x}.mean((0, 2, 3))[None]",
                f"{x}.norm(dim=(2, 3))",
            ),
        )
    )


@growth(2.5)
def resized(g: Grower) -> None:
    x, y = g.tensor(4), g.tensor(4, fresh=0.0)
    c = g.shape(x)[1]
    mode = g.one(
        "mode='nearest'",
        "mode='bilinear'",
        "mode='bilinear', align_corners=True",
        "mode='bicubic'",
        "mode='nearest-exact'",
        "mode='area'",
    )
    whole = g.one("mode='nearest'", "mode='bilinear', align_corners=False", "mode='bilinear', align_corners=True")
    g.let(
        g.one(
            f"F.interpolate({x}, scale_factor=2, {whole})",
            f"F.interpolate({x}, scale_factor={g.one(1.5, 0.5, (2, 1))}, {whole})",
            f"F.interpolate({x}, size={y}.shape[-2:], {mode})",
            f"F.interpolate({x}, size=({y}.shape[2] * 2, {y}.shape[3]), {mode})",
            f"F.interpolate({x}, size=(5, 7), {mode})",
            f"{g.member('nn.Upsample(scale_factor=2)')}({x})",
            f"{g.member('nn.UpsamplingBilinear2d(scale_factor=2)')}({x})",
            f"F.interpolate({x}, size=(int({x}.shape[2] * 1.5), {x}.shape[3] // 2 + 1))",
            *(f"F.pixel_shuffle({x}, {r})" for r in (2, 3) if c % r**2 == 0),
            *(f"{g.member(f'nn.PixelUnshuffle({r})')}({x})" for r in (2, 3)),
        )
    )


@growth(2)
def padded(g: Grower) -> None:
    x = g.tensor(4)
    sides = ", ".join(str(g.one(0, 1, 2)) for _ in range(4))
    g.let(
        g.one(
            f"F.pad({x}, ({sides}))",
            f"F.pad({x}, ({sides}), value={g.one(1.0, -0.5)})",
            f"F.pad({x}, ({sides}), mode='{g.one('reflect', 'replicate', 'circular')}')",
            f"F.pad({x}, (-1, 0, 1, -1))",
            f"F.pad({x}, (0, 0, 0, 0, {g.one(1, 2)}, 1))",
            f"{g.member(f'nn.ZeroPad2d(({sides}))')}({x})",
            f"{g.member(f'nn.ReflectionPad2d({g.one(1, 2)})')}({x})",
            f"{g.member('nn.ConstantPad2d(1, 0.5)')}({x})",
            f"F.pad({x}, (0, -{x}.shape[3] % 4, 0, -{x}.shape[2] % 4))",
            f"F.pad({x}, (0, 1, 0, 1)).contiguous()",
        )
    )


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


@growth(1.5)
def shared_layer(g: Grower) -> None:
    """A layer that was used before, again; or one that has its weight."""
    calls = [step.code for step in g.steps if step.code.count("(") == 1 and step.members]
    if not calls:
        return
    text = g.one(*calls).split(" = ", 1)[1]
    member, _, argument = text.rstrip(")").partition("(")
    wanted = g.shape(argument)
    x = g.pick(
        lambda v: isinstance(v, type(g.values[argument])) and v.dim() == len(wanted) and v.shape[1] == wanted[1],
        fresh=0.3,
    )
    if g.maybe(0.3) and member.startswith(("self.conv2d", "self.linear")):
        own = g.members[member.removeprefix("self.")][0].split(" = ", 1)[1]
        member = g.member(own, f"@.weight = {member}.weight")
    g.let(f"{member}({x})")


@growth(1)
def sequential(g: Grower) -> None:
    x = g.tensor(4)
    c, hidden = g.shape(x)[1], g.one(4, 8)
    layers = [
        convolution_text(g, c, c_out=hidden, stride=2),
        g.one(f"nn.BatchNorm2d({hidden})", f"nn.GroupNorm(2, {hidden})"),
        g.one(*ACTIVATIONS),
        convolution_text(g, hidden),
    ]
    g.let(f"{g.member(f'nn.Sequential({chr(44).join(layers)})')}({x})")


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
