"""Statements on images: convolutions of all kinds, norms, activations, pooling, resizing, padding."""

from __future__ import annotations

import re

from modelfuzz.grower import Grower
from modelfuzz.registry import growth

__all__ = ["activated", "convolution_text", "convolved", "normalized"]

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
    # PyTorch itself crashes on strided and padded kernels of one tap that state a dilation.
    if g.maybe(0.25) and not re.search(r"\b1\b", kernel):
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
            f"F.interpolate({x}, scale_factor={g.one(1.5, 0.5, 1.1, (2, 1), (2.3, 1.1))}, {whole})",
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
