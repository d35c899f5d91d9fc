"""Calls of every op with a Triton kernel, of any size, as the compiler sees them: tensors without memory.

An op has one or several forms, which differ in the operands they have; `FORMS` makes a call of each from the sizes of a
layer. A kernel whose op is missing there fails `tests/test_triton_build.py`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from kernelpress.bench.calls import OpCall
from kernelpress.bench.calls import Operands as Call
from kernelpress.ops import registry

__all__ = ["DEMANDING", "DEVICE", "FORMS", "Call", "Form", "Layer", "any_layer", "usual_layers"]

DEVICE = "meta"

ACTIVATION = "silu"

Form = Callable[["Layer", torch.dtype], Call]


@dataclass(frozen=True)
class Layer:
    """Sizes of a layer; an op takes those it has a use for, and rounds channels up to whole groups."""

    batch: int
    c_in: int
    c_out: int
    height: int
    width: int
    kernel: int = 3
    stride: int = 1
    groups: int = 2
    block: int = 32

    @property
    def rows(self) -> int:
        """Pixels of all images."""
        return self.batch * self.height * self.width

    @property
    def window(self) -> dict[str, Any]:
        return {"stride": [self.stride] * 2, "padding": [self.kernel // 2] * 2}

    def image(self, channels: int | None = None) -> tuple[int, ...]:
        return self.batch, self.c_in if channels is None else channels, self.height, self.width

    def whole(self, channels: int) -> int:
        """Rounded up to whole groups."""
        return -(-channels // self.groups) * self.groups


DEMANDING = (
    Layer(64, 512, 512, 56, 56, kernel=7),
    Layer(64, 512, 512, 56, 56, kernel=7, stride=2),
    Layer(64, 512, 512, 56, 56, kernel=3),
    Layer(64, 511, 511, 56, 56, kernel=7, groups=7),
)
"""Large enough for every large tile; windows at both ends of what is unrolled; channels that are read one by one. First
the one that stands for others."""


def usual_layers() -> Iterator[Layer]:
    """Layers of each class of sizes that heuristics tell apart: images that fill a device many times or not once, sides
    and channels on either side of each tile's."""
    sides = ((1, 1), (2, 2), (4, 4), (1, 14), (14, 1), (7, 7), (14, 14), (21, 21), (2, 56), (4, 56), (56, 56))
    even = ((8, 16), (24, 32), (40, 40), (64, 128), (960, 160), (512, 1000))
    odd = ((13, 7), (31, 25), (127, 63), (511, 999), (512, 999))
    for batch, (height, width), (c_in, c_out) in itertools.product((1, 64), sides, even + odd):
        yield Layer(batch, c_in, c_out, height, width, kernel=7)
    for kernel, stride, groups, block in ((3, 1, 8, 16), (5, 2, 4, 64), (1, 1, 3, 32), (9, 1, 32, 16)):
        for batch, (height, width), (c_in, c_out) in itertools.product((1, 64), sides, (*even[::2], *odd)):
            yield Layer(batch, c_in, c_out, height, width, kernel, stride, groups, block)
    for c_in in (256, 2048, 4096, 8192, 16384):
        yield Layer(8, c_in, 64, 14, 14, kernel=1)


def any_layer(draw: random.Random) -> Layer:
    """A random one."""

    def size(largest: int) -> int:
        return max(1, round(2 ** draw.uniform(0, largest)))

    sizes = (size(8), size(11), size(11), size(8), size(8))
    window = {"kernel": draw.choice((1, 2, 3, 5, 7, 9)), "stride": draw.choice((1, 2, 3))}
    return Layer(*sizes, **window, groups=draw.choice((1, 2, 3, 4, 8, 32)), block=draw.choice((16, 32, 64)))


_META = torch.device(DEVICE)
_RARE = frozenset({"input_scale", "row_scale", "row_zero_point"})
"""Operands that only the forms named after them have."""


def _made(
    op: str,
    dtype: torch.dtype,
    x: tuple[int, ...],
    *weights: tuple[int, ...],
    absent: Iterable[str] = (),
    **options: Any,
) -> Call:
    """The call, each of its activations being one that is costly."""
    names = registry.operator(op).signature.options._fields
    options = {name: ACTIVATION for name in names if name.endswith("activation")} | options
    return OpCall(op, x, weights, options, frozenset(absent)).make(_META, dtype)


def _pointwise(s: Layer, dtype: torch.dtype, absent: Iterable[str] = _RARE) -> Call:
    return _made("pointwise_conv2d", dtype, s.image(), (s.c_out, s.c_in, 1, 1), absent=absent)


def _linear(s: Layer, dtype: torch.dtype, absent: Iterable[str] = ()) -> Call:
    return _made("linear", dtype, (s.rows, s.c_in), (s.c_out, s.c_in), absent=absent)


def _depthwise(s: Layer, dtype: torch.dtype) -> Call:
    return _made("depthwise_conv2d", dtype, s.image(), (s.c_in, 1, s.kernel, s.kernel), **s.window)


def _separable(s: Layer, dtype: torch.dtype) -> Call:
    weights = ((s.c_in, 1, s.kernel, s.kernel), (s.c_out, s.c_in, 1, 1))
    return _made("separable_conv2d", dtype, s.image(), *weights, **s.window)


def _inverted(s: Layer, dtype: torch.dtype) -> Call:
    hidden = 6 * s.c_in
    weights = ((hidden, s.c_in, 1, 1), (hidden, 1, s.kernel, s.kernel), (s.c_out, hidden, 1, 1))
    return _made("inverted_residual", dtype, s.image(), *weights, activation="identity", **s.window)


def _grouped(s: Layer, dtype: torch.dtype, *, is_shuffled: bool = False) -> Call:
    c_in, c_out = s.whole(s.c_in), s.whole(s.c_out)
    options = {**s.window, "groups": s.groups, "shuffle": s.groups if is_shuffled else 1}
    weight = (c_out, c_in // s.groups, s.kernel, s.kernel)
    return _made("grouped_conv2d", dtype, s.image(c_in), weight, **options)


def _shuffle(s: Layer, dtype: torch.dtype, op: str) -> Call:
    return _made(op, dtype, s.image(s.whole(s.c_in)), groups=s.groups)


def _ghost(s: Layer, dtype: torch.dtype, kernel: int = 1, absent: Iterable[str] = ()) -> Call:
    cheap = max(3, s.kernel // 2 * 2 + 1)
    weights = ((s.c_out, s.c_in, kernel, kernel), (s.c_out, 1, cheap, cheap))
    options = {"stride": [s.stride] * 2, "padding": [kernel // 2] * 2}
    return _made("ghost_conv2d", dtype, s.image(), *weights, absent=absent, **options)


def _tucker(s: Layer, dtype: torch.dtype) -> Call:
    inner, outer = max(1, s.c_in // 2), max(1, s.c_out // 2)
    weights = ((inner, s.c_in, 1, 1), (outer, inner, s.kernel, s.kernel), (s.c_out, outer, 1, 1))
    return _made("lowrank_conv2d", dtype, s.image(), *weights, **s.window)


def _two_products(s: Layer, dtype: torch.dtype) -> Call:
    rank = max(1, min(s.c_in, s.c_out) // 2)
    return _made("lowrank_linear", dtype, (s.rows, s.c_in), (rank, s.c_in), (s.c_out, rank))


def _sparse(s: Layer, dtype: torch.dtype, op: str) -> Call:
    is_product, sides = op == "sparse_matmul", (-(-s.c_out // s.block), -(-s.c_in // s.block))
    options: dict[str, Any] = {"output_dtype": torch.bfloat16 if dtype == torch.int8 else dtype}
    if is_product:
        return _made(op, dtype, (s.rows, s.c_in), (*sides, s.block), **options)
    grid, options = (sides[0], s.kernel**2 * sides[1], s.block), {**options, "kernel_size": [s.kernel] * 2}
    return _made(op, dtype, s.image(), grid, **options, **s.window)


_MOST_PRODUCTS = 65536
"""Of a sum of int8 products."""

_AFFINE: dict[str, Any] = {"input_scale": 0.37, "input_zero_point": -19}
_INT8_OUT: dict[str, Any] = {"output_scale": 37.0, "output_zero_point": -11}
_INT8_RESIDUAL: dict[str, Any] = {"residual_scale": 0.2, "residual_zero_point": 3}
_FLOATING: dict[str, Any] = {"output_dtype": torch.bfloat16}


def _int8_matmul(s: Layer, dtype: torch.dtype, *, by_row: bool = False) -> Call:
    options = _FLOATING if by_row else _AFFINE | _INT8_OUT | _INT8_RESIDUAL
    weight, absent = (s.c_out, s.c_in), () if by_row else _RARE
    return _made("int8_matmul", dtype, (s.rows, s.c_in), weight, absent=absent, **options)


def _int8_conv(s: Layer, dtype: torch.dtype, op: str = "int8_conv2d", *, is_floating: bool = False) -> Call:
    c_in, is_depthwise = min(s.c_in, _MOST_PRODUCTS // s.kernel**2), op == "int8_depthwise_conv2d"
    weight = (c_in if is_depthwise else s.c_out, 1 if is_depthwise else c_in, s.kernel, s.kernel)
    options = {**_AFFINE, **s.window, **(_FLOATING if is_floating else _INT8_OUT | _INT8_RESIDUAL)}
    return _made(op, dtype, s.image(c_in), weight, **options)


def _quantize(s: Layer, dtype: torch.dtype, op: str) -> Call:
    return _made(op, dtype, s.image(), scale=0.02, zero_point=-5)


def _quantize_rows(s: Layer, dtype: torch.dtype) -> Call:
    return _made("quantize_rows", dtype, (s.batch * s.height, s.c_in), symmetric=False)


def _int8_add(s: Layer, dtype: torch.dtype) -> Call:
    scales: dict[str, Any] = {"input_scale": 0.3, "input_zero_point": 4, "other_scale": 0.7, "other_zero_point": 3}
    return _made("int8_add", dtype, s.image(), **scales | _INT8_OUT)


FORMS: Mapping[str, Mapping[str, Form]] = {
    "pointwise_conv2d": {"": _pointwise, "input_scale": partial(_pointwise, absent=())},
    "linear": {"": _linear, "with a bias alone": partial(_linear, absent=("scale", "residual"))},
    "depthwise_conv2d": {"": _depthwise},
    "separable_conv2d": {"": _separable},
    "inverted_residual": {"": _inverted},
    "grouped_conv2d": {"": _grouped, "shuffled": partial(_grouped, is_shuffled=True)},
    "channel_shuffle": {"": partial(_shuffle, op="channel_shuffle")},
    "shuffle_concat": {"": partial(_shuffle, op="shuffle_concat")},
    "ghost_conv2d": {
        "": _ghost,
        "3x3 primary": partial(_ghost, kernel=3),
        "without a residual": partial(_ghost, absent=("residual",)),
    },
    "lowrank_conv2d": {"": _tucker},
    "lowrank_linear": {"": _two_products},
    "sparse_matmul": {"": partial(_sparse, op="sparse_matmul")},
    "sparse_conv2d": {"": partial(_sparse, op="sparse_conv2d")},
    "int8_matmul": {"": _int8_matmul, "by row": partial(_int8_matmul, by_row=True)},
    "int8_conv2d": {"": _int8_conv, "bf16 out": partial(_int8_conv, is_floating=True)},
    "int8_depthwise_conv2d": {
        "": partial(_int8_conv, op="int8_depthwise_conv2d"),
        "bf16 out": partial(_int8_conv, op="int8_depthwise_conv2d", is_floating=True),
    },
    "int8_add": {"": _int8_add},
    "quantize": {"": partial(_quantize, op="quantize")},
    "quantize_rows": {"": _quantize_rows},
    "dequantize": {"": partial(_quantize, op="dequantize")},
}
"""Op → what is special of a form → how it is made. The first stands for the others."""
