"""Statements on tokens, vectors, sequences and volumes: attention, linear layers, recurrences, 1-D and 3-D layers."""

from __future__ import annotations

from modelfuzz.grower import Grower
from modelfuzz.images import activated, convolution_text
from modelfuzz.registry import growth


@growth(2)
def tokens_of_image(g: Grower) -> None:
    x = g.tensor(4)
    n, c, h, w = g.shape(x)
    g.let(
        g.one(
            f"{x}.flatten(2).transpose(1, 2)",
            f"{x}.permute(0, 2, 3, 1).flatten(1, 2)",
            f"{x}.permute(0, 2, 3, 1).reshape({x}.shape[0], -1, {c})",
            f"{x}.reshape({n}, {c}, {h * w}).mT",
            f"{x}.flatten(2)",
        )
    )


@growth(1.5)
def image_of_tokens(g: Grower) -> None:
    x = g.tensor(3)
    _, length, c = g.shape(x)
    sides = g.one(*((d, length // d) for d in range(1, length + 1) if length % d == 0))
    g.let(
        g.one(
            f"{x}.transpose(1, 2).reshape({x}.shape[0], {c}, {sides[0]}, {sides[1]})",
            f"{x}.transpose(1, 2).unflatten(2, {sides})",
            f"{x}.unflatten(1, {sides}).permute(0, 3, 1, 2)",
            f"{x}.permute(0, 2, 1).view(-1, {c}, {sides[0]}, {sides[1]})"
            if g.maybe(0.3)
            else f"{x}.mT.reshape(-1, {c}, {sides[0]}, {sides[1]})",
        )
    )


@growth(4)
def linear(g: Grower) -> None:
    x = g.tensor()
    c = g.shape(x)[-1]
    further = []
    if g.maybe(0.25):
        further = [
            g.one(
                "@.weight.data *= torch.rand_like(@.weight) > 0.9",
                "@.weight.data[:, : @.weight.shape[1] // 2] = 0",
                "@.weight.data.view(-1)[::2] = 0",
            )
        ]
    layer = g.member(f"nn.Linear({c}, {g.one(1, 3, 4, 8, 10, 16, 33)}, bias={g.maybe(0.7)})", *further)
    y = activated(g, g.let(f"{layer}({x})"))
    if g.shape(y) == g.shape(x) and g.maybe(0.5):
        g.let(f"{x} + {y}")


@growth(1)
def matrix(g: Grower) -> None:
    x = g.tensor(2, 3)
    c = g.shape(x)[-1]
    w = g.parameter(c, g.one(4, 8))
    g.let(
        g.one(
            f"{x} @ {w}",
            f"torch.matmul({x}, {w}) + {g.parameter(g.shape_of(w)[1])}",
            f"F.linear({x}, {w}.t(), None)",
            f"torch.einsum('...c,cd->...d', {x}, {w})",
        )
    )


@growth(2)
def norm_of_tokens(g: Grower) -> None:
    x = g.tensor(2, 3)
    c = g.shape(x)[-1]
    second = g.shape(x)[1]
    options = [
        f"nn.LayerNorm({c})",
        f"nn.LayerNorm({c}, elementwise_affine=False)",
        f"nn.LayerNorm({c}, bias=False)",
        f"nn.RMSNorm({c})",
        f"nn.BatchNorm1d({second})",
        f"nn.GroupNorm(1, {second})",
    ]
    g.let(f"{g.member(g.one(*options))}({x})")


@growth(1)
def norm_over_channels(g: Grower) -> None:
    """ConvNeXt's LayerNorm on images."""
    x = g.tensor(4)
    c = g.shape(x)[1]
    norm = g.member(f"nn.LayerNorm({c})")
    if g.maybe(0.5):
        g.let(f"{norm}({x}.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)")
        return
    y = g.let(f"{norm}({x}.permute(0, 2, 3, 1))")
    y = activated(g, g.let(f"{g.member(f'nn.Linear({c}, {2 * c})')}({y})"))
    y = g.let(f"{g.member(f'nn.Linear({2 * c}, {c})')}({y}){g.one('', f' * {g.parameter(c)}')}")
    y = g.let(f"{y}.permute(0, 3, 1, 2)")
    g.let(f"{x} + {y}")


@growth(2)
def attention(g: Grower) -> None:
    x = g.tensor(3)
    _, length, c = g.shape(x)
    heads = g.one(*(d for d in (1, 2, 3, 4) if c % d == 0))
    if g.maybe(0.35):
        options = g.one("", ", bias=False", ", add_bias_kv=True", ", dropout=0.1")
        layer = g.member(f"nn.MultiheadAttention({c}, {heads}, batch_first={g.maybe(0.8)}{options})")
        asked = g.one("", ", need_weights=False", ", average_attn_weights=False")
        g.let(f"{layer}({x}, {x}, {x}{asked})[0]{g.one('', '', ' + ' + x)}")
        return
    if g.maybe(0.15):
        options = f"batch_first=True, norm_first={g.maybe(0.5)}"
        g.let(f"{g.member(f'nn.TransformerEncoderLayer({c}, {heads}, {2 * c}, {options})')}({x})")
        return
    qkv = g.let(f"{g.member(f'nn.Linear({c}, {3 * c})')}({x})")
    count = g.one(f"{x}.shape[1]", length)
    split = g.let(
        g.one(
            f"{qkv}.reshape({x}.shape[0], {count}, 3, {heads}, {c // heads}).permute(2, 0, 3, 1, 4)",
            f"{qkv}.unflatten(-1, (3, {heads}, -1)).permute(2, 0, 3, 1, 4)",
        )
    )
    name = g.block(
        f"q, k, v = {split}.unbind(0)\nOUT = "
        + g.one(
            "F.scaled_dot_product_attention(q, k, v)",
            "F.scaled_dot_product_attention(q, k, v, is_causal=True)",
            f"(q @ k.transpose(-2, -1) * {c // heads} ** -0.5).softmax(-1) @ v",
            f"F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(2 * ({x}.shape[1],)).tril() > 0)",
            f"F.scaled_dot_product_attention(q, k, v, attn_mask={g.parameter(1, heads, length, length)})",
            "torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1) @ v",
            "F.relu(q) @ (F.relu(k).mT @ v)",
        )
    )
    y = g.let(f"{name}.transpose(1, 2).flatten(2)")
    g.let(f"{x} + {g.member(f'nn.Linear({c}, {c})')}({y})")


@growth(1.5)
def of_tokens(g: Grower) -> None:
    x = g.tensor(3)
    _, length, c = g.shape(x)
    token = g.parameter(1, 1, c)
    g.let(
        g.one(
            f"torch.cat([{token}.expand({x}.shape[0], -1, -1), {x}], dim=1)",
            f"torch.cat(({token}.repeat({x}.size(0), 1, 1), {x}), 1)",
            f"{x} + {g.parameter(1, length, c)}",
            f"{x} + {g.parameter(1, length + 3, c)}[:, : {x}.shape[1]]",
            f"{x}.mean(1)",
            f"{x}[:, 0]",
            f"{x}.amax(dim=1)",
            f"{x}.roll(1, 1)",
            f"{x}.softmax({g.one(-1, 1)})",
            f"F.normalize({x}, dim=-1)",
            f"{x}.cumsum(1)",
            f"F.glu({x}, {g.one(1, 2)})",
            f"{x}.unfold(1, {min(length, 4)}, 2).flatten(2)",
        )
    )


@growth(1.5)
def one_dimensional(g: Grower) -> None:
    x = g.tensor(3)
    c, k = g.shape(x)[1], g.one(2, 3)
    y = g.let(
        g.one(
            *3 * (f"{g.member(convolution_text(g, c, rank=1))}({x})",),
            f"{g.member(f'nn.ConvTranspose1d({c}, 4, 3, stride=2)')}({x})",
            f"F.max_pool1d({x}, {k}, {g.one(1, 2)}, 1)",
            f"F.avg_pool1d({x}, {k}, {g.one(1, 2)}, 1, {g.maybe(0.5)}, {g.maybe(0.5)})",
            f"F.adaptive_avg_pool1d({x}, {g.one(1, 3)})",
            f"F.interpolate({x}, scale_factor=2, mode='{g.one('nearest', 'linear')}')",
            f"{g.member(f'nn.BatchNorm1d({c})')}({x})",
            f"{g.member(f'nn.InstanceNorm1d({c})')}({x})",
            f"F.pad({x}, (1, 2), mode='{g.one('replicate', 'circular', 'constant')}')",
        )
    )
    activated(g, y, 0.4)


@growth(0.6)
def recurrent(g: Grower) -> None:
    x = g.tensor(3)
    kind = g.one("LSTM", "GRU", "RNN")
    options = g.one("", ", bidirectional=True", ", num_layers=2")
    g.let(f"{g.member(f'nn.{kind}({g.shape(x)[2]}, 4, batch_first={g.maybe(0.8)}{options})')}({x})[0]")


@growth(1)
def volumes(g: Grower) -> None:
    if g.maybe(0.5):
        x = g.tensor(4)
        x = g.let(
            g.one(
                f"{x}.unsqueeze(2)",
                f"torch.stack([{x}, {x}.flip(3)], 2)",
                f"{x}[:, None]",
                f"{x}.unflatten(1, (1, -1))",
            )
        )
    x = g.tensor(5)
    c = g.shape(x)[1]
    y = g.let(
        g.one(
            *2 * (f"{g.member(convolution_text(g, c, rank=3))}({x})",),
            f"F.max_pool3d({x}, (1, 2, 2))",
            f"F.avg_pool3d({x}, (1, 2, 2), ceil_mode=True)",
            f"{g.member(f'nn.BatchNorm3d({c})')}({x})",
            f"F.adaptive_avg_pool3d({x}, (1, 2, 2))",
            f"{g.member(f'nn.ConvTranspose3d({c}, 3, (1, 2, 2), stride=(1, 2, 2))')}({x})",
        )
    )
    y = activated(g, y, 0.5)
    g.let(g.one(f"{y}.flatten(1, 2)", f"{y}.mean(2)", f"{y}[:, :, 0]", f"{y}.flatten(2)"))


@growth(1.5)
def of_vectors(g: Grower) -> None:
    x = g.tensor(2)
    n, c = g.shape(x)
    g.let(
        g.one(
            f"{g.member(f'nn.BatchNorm1d({c})')}({x})",
            f"{x}.softmax({g.one(1, -1, 0)})",
            f"F.log_softmax({x}, dim=1)",
            f"{x}[:, :, None, None].expand(-1, -1, 3, 3)",
            f"{x}.view({x}.shape[0], {c}, 1, 1)",
            f"{x}[:, :, None]",
            f"{x} @ {x}.t()",
            f"torch.cdist({x}, {g.parameter(3, c)})",
            f"F.normalize({x})",
            f"{g.member(f'nn.Bilinear({c}, {c}, 4)')}({x}, {x})",
            f"F.cosine_similarity({x}[:, None], {g.parameter(3, c)}[None], dim=-1)",
            f"{g.member('nn.Embedding(10, 6)')}({x}.abs().long() % 10)",
            f"{g.member(f'nn.EmbeddingBag({c}, 5)')}({x}.argsort(1))",
            f"{x}.flatten()[: {n * c}].view(-1, {c})",
        )
    )
