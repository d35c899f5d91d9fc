"""Calls of every op with a Triton kernel, of any size, as the compiler sees them: tensors without memory.

An op has one or several forms, which differ in the operands they have; `FORMS` makes a call of each from the sizes of a
layer. A kernel whose op is missing there fails `tests/test_triton_build.py`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["DEMANDING", "DEVICE", "FORMS", "Call", "Form", "Layer", "any_layer", "usual_layers"]

DEVICE = "meta"

ACTIVATION = "silu"

Operands = list[Tensor | None]
Call = tuple[Operands, dict[str, Any]]
"""Tensors and options."""

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


def _image(n: int, c: int, h: int, w: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(n, c, h, w, dtype=dtype, device=DEVICE, memory_format=torch.channels_last)


def _tensor(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE)


def _x(layer: Layer, dtype: torch.dtype, c_in: int | None = None) -> Tensor:
    return _image(layer.batch, layer.c_in if c_in is None else c_in, layer.height, layer.width, dtype)


def _out_sides(layer: Layer, kernel: int | None = None) -> tuple[int, int]:
    kernel = layer.kernel if kernel is None else kernel
    height, width = ((side + 2 * (kernel // 2) - kernel) // layer.stride + 1 for side in (layer.height, layer.width))
    return height, width


def _residual(layer: Layer, dtype: torch.dtype, c_out: int | None = None) -> Tensor:
    return _image(layer.batch, layer.c_out if c_out is None else c_out, *_out_sides(layer), dtype)


def _window(layer: Layer) -> dict[str, Any]:
    return {"stride": [layer.stride] * 2, "padding": [layer.kernel // 2] * 2}


def _whole(channels: int, groups: int) -> int:
    return -(-channels // groups) * groups


def _pointwise(layer: Layer, dtype: torch.dtype, *, input_scale: bool = False) -> Call:
    weight, vectors = _tensor(dtype, layer.c_out, layer.c_in, 1, 1), [_tensor(dtype, layer.c_out) for _ in range(2)]
    residual = _image(layer.batch, layer.c_out, layer.height, layer.width, dtype)
    scales = _tensor(dtype, layer.batch, layer.c_in) if input_scale else None
    return [_x(layer, dtype), weight, *vectors, residual, scales], {"activation": ACTIVATION}


def _linear(layer: Layer, dtype: torch.dtype) -> Call:
    rows = layer.batch * layer.height * layer.width
    tensors = [_tensor(dtype, rows, layer.c_in), _tensor(dtype, layer.c_out, layer.c_in)]
    vectors = [_tensor(dtype, layer.c_out) for _ in range(2)]
    return [*tensors, *vectors, _tensor(dtype, rows, layer.c_out)], {"activation": ACTIVATION}


def _depthwise(layer: Layer, dtype: torch.dtype) -> Call:
    channels, kernel = layer.c_in, layer.kernel
    vectors = [_tensor(dtype, channels) for _ in range(2)]
    weight, residual = _tensor(dtype, channels, 1, kernel, kernel), _residual(layer, dtype, channels)
    return [_x(layer, dtype), weight, *vectors, residual], {**_window(layer), "activation": ACTIVATION}


def _separable(layer: Layer, dtype: torch.dtype) -> Call:
    weights = _pair_of_weights(layer, dtype, layer.c_in)
    options = {**_window(layer), "depthwise_activation": ACTIVATION, "activation": ACTIVATION}
    return [_x(layer, dtype), *weights, _residual(layer, dtype)], options


def _pair_of_weights(layer: Layer, dtype: torch.dtype, hidden: int) -> list[Tensor]:
    """Of a depthwise convolution and the 1×1 convolution after it, each with its bias."""
    shapes = ((hidden, 1, layer.kernel, layer.kernel), (hidden,), (layer.c_out, hidden, 1, 1), (layer.c_out,))
    return [_tensor(dtype, *shape) for shape in shapes]


def _inverted(layer: Layer, dtype: torch.dtype) -> Call:
    hidden = 6 * layer.c_in
    expand = [_tensor(dtype, hidden, layer.c_in, 1, 1), _tensor(dtype, hidden)]
    weights = _pair_of_weights(layer, dtype, hidden)
    activations = {"expand_activation": ACTIVATION, "depthwise_activation": ACTIVATION}
    return [_x(layer, dtype), *expand, *weights, _residual(layer, dtype)], {**_window(layer), **activations}


def _grouped(layer: Layer, dtype: torch.dtype, *, shuffle: bool = False) -> Call:
    groups, kernel = layer.groups, layer.kernel
    c_in, c_out = _whole(layer.c_in, groups), _whole(layer.c_out, groups)
    weight, vectors = _tensor(dtype, c_out, c_in // groups, kernel, kernel), [_tensor(dtype, c_out) for _ in range(2)]
    options = {**_window(layer), "groups": groups, "shuffle": groups if shuffle else 1, "activation": ACTIVATION}
    return [_x(layer, dtype, c_in), weight, *vectors, _residual(layer, dtype, c_out)], options


def _shuffle(layer: Layer, dtype: torch.dtype) -> Call:
    return [_x(layer, dtype, _whole(layer.c_in, layer.groups))], {"groups": layer.groups}


def _concat(layer: Layer, dtype: torch.dtype) -> Call:
    return [_x(layer, dtype, _whole(layer.c_in, layer.groups)) for _ in range(2)], {"groups": layer.groups}


def _ghost(layer: Layer, dtype: torch.dtype, *, kernel: int = 1) -> Call:
    primary, cheap = layer.c_out, max(3, layer.kernel // 2 * 2 + 1)
    shapes = ((primary, layer.c_in, kernel, kernel), (primary,), (primary, 1, cheap, cheap), (primary,))
    height, width = ((side - 1) // layer.stride + 1 for side in (layer.height, layer.width))
    residual = _image(layer.batch, 2 * primary, height, width, dtype)
    options = {"stride": [layer.stride] * 2, "padding": [kernel // 2] * 2}
    activations = {"activation": ACTIVATION, "cheap_activation": ACTIVATION}
    return [_x(layer, dtype), *(_tensor(dtype, *shape) for shape in shapes), residual], options | activations


def _blocks(layer: Layer, dtype: torch.dtype, columns: int) -> tuple[list[Tensor], int]:
    """A block-CSR weight with every second block, and its rows; the indices have memory, as they are looked at."""
    r, rows = layer.block, -(-layer.c_out // layer.block)
    held = torch.arange(0, columns, 2, dtype=torch.int32)
    offsets = torch.arange(rows + 1, dtype=torch.int32) * len(held)
    return [offsets, held.repeat(rows), _tensor(dtype, rows * len(held), r, r)], rows * r


def _sparse_epilogue(dtype: torch.dtype, c_out: int) -> tuple[list[Tensor], torch.dtype, dict[str, Any]]:
    """Bias and scale, the dtype of the output, and options that ask for it."""
    is_int8 = dtype == torch.int8
    vectors = [_tensor(torch.float32 if is_int8 else dtype, c_out) for _ in range(2)]
    out = torch.bfloat16 if is_int8 else dtype
    return vectors, out, {"activation": ACTIVATION, "output_dtype": out}


def _sparse_matmul(layer: Layer, dtype: torch.dtype) -> Call:
    rows = layer.batch * layer.height * layer.width
    weight, c_out = _blocks(layer, dtype, -(-layer.c_in // layer.block))
    vectors, out, options = _sparse_epilogue(dtype, c_out)
    return [_tensor(dtype, rows, layer.c_in), *weight, *vectors, _tensor(out, rows, c_out)], options


def _sparse_conv(layer: Layer, dtype: torch.dtype) -> Call:
    weight, c_out = _blocks(layer, dtype, layer.kernel**2 * -(-layer.c_in // layer.block))
    vectors, out, options = _sparse_epilogue(dtype, c_out)
    options |= {**_window(layer), "kernel_size": [layer.kernel] * 2}
    return [_x(layer, dtype), *weight, *vectors, _residual(layer, out, c_out)], options


_MOST_PRODUCTS = 65536
"""Of a sum of int8 products."""

_AFFINE = {"input_scale": 0.37, "input_zero_point": -19, "activation": ACTIVATION}
_INT8_OUT = {"output_scale": 37.0, "output_zero_point": -11}
_INT8_RESIDUAL = {"residual_scale": 0.2, "residual_zero_point": 3}


def _int8_matmul(layer: Layer, dtype: torch.dtype, *, by_row: bool = False) -> Call:
    rows = layer.batch * layer.height * layer.width
    operands = [_tensor(dtype, rows, layer.c_in), _tensor(dtype, layer.c_out, layer.c_in)]
    vectors = [_tensor(torch.float32, layer.c_out) for _ in range(2)]
    if not by_row:
        residual = _tensor(dtype, rows, layer.c_out)
        return [*operands, *vectors, residual, None, None], _AFFINE | _INT8_OUT | _INT8_RESIDUAL
    of_rows = [_tensor(torch.float32, rows), _tensor(torch.int32, rows)]
    residual = _tensor(torch.bfloat16, rows, layer.c_out)
    return [*operands, *vectors, residual, *of_rows], {"activation": ACTIVATION, "output_dtype": torch.bfloat16}


def _int8_conv(layer: Layer, dtype: torch.dtype, *, floating: bool = False, depthwise: bool = False) -> Call:
    c_in = min(layer.c_in, _MOST_PRODUCTS // layer.kernel**2)
    c_out = c_in if depthwise else layer.c_out
    weight = _tensor(dtype, c_out, 1 if depthwise else c_in, layer.kernel, layer.kernel)
    vectors = [_tensor(torch.float32, c_out) for _ in range(2)]
    out = {"output_dtype": torch.bfloat16} if floating else _INT8_OUT | _INT8_RESIDUAL
    residual = _residual(layer, torch.bfloat16 if floating else dtype, c_out)
    return [_x(layer, dtype, c_in), weight, *vectors, residual], {**_AFFINE, **_window(layer), **out}


def _quantize(layer: Layer, dtype: torch.dtype) -> Call:
    return [_x(layer, dtype)], {"scale": 0.02, "zero_point": -5}


def _quantize_rows(layer: Layer, dtype: torch.dtype) -> Call:
    return [_tensor(dtype, layer.batch * layer.height, layer.c_in)], {"symmetric": False}


def _int8_add(layer: Layer, dtype: torch.dtype) -> Call:
    scales = {"input_scale": 0.3, "input_zero_point": 4, "other_scale": 0.7, "other_zero_point": 3}
    return [_x(layer, dtype), _x(layer, dtype)], {**scales, **_INT8_OUT, "activation": ACTIVATION}


def _bare(form: Form, *present: int) -> Form:
    """Without the operands but those at some positions."""

    def make(layer: Layer, dtype: torch.dtype) -> Call:
        tensors, options = form(layer, dtype)
        return [t if at in present else None for at, t in enumerate(tensors)], options

    return make


FORMS: Mapping[str, Mapping[str, Form]] = {
    "pointwise_conv2d": {
        "": _pointwise,
        "input_scale": lambda layer, dtype: _pointwise(layer, dtype, input_scale=True),
    },
    "linear": {"": _linear, "with a bias alone": _bare(_linear, 0, 1, 2)},
    "depthwise_conv2d": {"": _depthwise},
    "separable_conv2d": {"": _separable},
    "inverted_residual": {"": _inverted},
    "grouped_conv2d": {"": _grouped, "shuffled": lambda layer, dtype: _grouped(layer, dtype, shuffle=True)},
    "channel_shuffle": {"": _shuffle},
    "shuffle_concat": {"": _concat},
    "ghost_conv2d": {
        "": _ghost,
        "3x3 primary": lambda layer, dtype: _ghost(layer, dtype, kernel=3),
        "without a residual": _bare(_ghost, 0, 1, 2, 3, 4),
    },
    "sparse_matmul": {"": _sparse_matmul},
    "sparse_conv2d": {"": _sparse_conv},
    "int8_matmul": {"": _int8_matmul, "by row": lambda layer, dtype: _int8_matmul(layer, dtype, by_row=True)},
    "int8_conv2d": {"": _int8_conv, "bf16 out": lambda layer, dtype: _int8_conv(layer, dtype, floating=True)},
    "int8_depthwise_conv2d": {
        "": lambda layer, dtype: _int8_conv(layer, dtype, depthwise=True),
        "bf16 out": lambda layer, dtype: _int8_conv(layer, dtype, floating=True, depthwise=True),
    },
    "int8_add": {"": _int8_add},
    "quantize": {"": _quantize},
    "quantize_rows": {"": _quantize_rows},
    "dequantize": {"": _quantize},
}
"""Op → what is special of a form → how it is made. The first stands for the others."""
