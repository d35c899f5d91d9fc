"""Statements that compute element by element, with and without broadcasting, and spectra."""

from __future__ import annotations

from modelfuzz.grower import Grower
from modelfuzz.registry import growth


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
