"""One small call or more of every op, for runs on a CUDA device: shapes off every tile, all options, all dtypes.

Needs torch alone, so that `make gpu` can run it where there is nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import kernelpress
from kernelpress import ops
from kernelpress.kernels import reference
from kernelpress.ops import registry
from kernelpress.ops.sparse_blocks import BlockCsr, conv_matrix

__all__ = ["CASES", "FLOATS", "OpCase", "absent_because", "check", "has_kernel", "run"]

FLOATS = (torch.bfloat16, torch.float16, torch.float32)

RELATIVE_ERROR = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}
TF32_ERROR = 2e-3
"""Of float32 where tensor cores may take it as TF32."""

EXACT_FLOAT32 = frozenset({"depthwise_conv2d", "channel_shuffle", "shuffle_concat", "global_avg_pool2d", "max_pool2d"})

Maker = Callable[[torch.dtype], Sequence[Tensor | None]]


@dataclass(frozen=True)
class OpCase:
    """A call of `op`: `tensors(dtype)` makes its arguments on the CPU, `dtypes` are those it is made for."""

    family: str
    op: str
    label: str
    tensors: Maker
    options: dict[str, Any] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = FLOATS

    @property
    def name(self) -> str:
        """As it stands in reports."""
        return f"{self.op}: {self.label}"


def image(n: int, c: int, h: int, w: int) -> Tensor:
    """Random, channels_last."""
    return torch.randn(n, c, h, w).contiguous(memory_format=torch.channels_last)


def weights(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Random, scaled so that sums of products are of the size of their terms."""
    return [torch.randn(*shape) / max(1, torch.Size(shape[1:]).numel()) ** 0.5 for shape in shapes]


def bytes_of(*shape: int) -> Tensor:
    """Random int8, channels_last where it is an image."""
    t = torch.randint(-128, 128, shape).to(torch.int8)
    return t.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else t


def cast(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors]


def floating(make: Callable[[], Sequence[Tensor | None]]) -> Maker:
    return lambda dtype: cast(make(), dtype)


def _with_epilogue(op: str, x: Tensor, weight: Tensor, options: dict[str, Any], full: bool) -> list[Tensor | None]:
    """x, weight, bias, and where `full` scale and residual."""
    c_out = weight.shape[0]
    tensors: list[Tensor | None] = [x, weight, torch.randn(c_out), torch.rand(c_out) + 0.5 if full else None]
    shape = ops.allocate(op, tensors, options).shape
    return [*tensors, image(*shape) if full and len(shape) == 4 else torch.randn(shape) if full else None]


def _convolution(
    family: str, op: str, label: str, x: tuple[int, ...], weight: tuple[int, ...], **options: Any
) -> OpCase:
    def make() -> list[Tensor | None]:
        made = image(*x) if len(x) == 4 else torch.randn(*x)
        return _with_epilogue(op, made, *weights(weight), options, full=bool(options) or len(x) != 4)

    return OpCase(family, op, label, floating(make), options)


def _window(kernel: int, stride: int = 1, **options: Any) -> dict[str, Any]:
    return {"stride": [stride] * 2, "padding": [kernel // 2] * 2, **options}


def _separable(label: str, c: int, c_out: int, size: int, kernel: int, stride: int) -> OpCase:
    options = _window(kernel, stride, depthwise_activation="relu", activation="relu6")
    shapes = ((c, 1, kernel, kernel), (c,), (c_out, c, 1, 1), (c_out,))
    return OpCase(
        *("separable", "separable_conv2d", label),
        floating(lambda: [image(2, c, size, size), *weights(*shapes), None]),
        options,
    )


def _inverted(label: str, c: int, hidden: int, c_out: int, size: int, stride: int) -> OpCase:
    options = _window(3, stride, expand_activation="relu6", depthwise_activation="relu6")
    shapes = ((hidden, c, 1, 1), (hidden,), (hidden, 1, 3, 3), (hidden,), (c_out, hidden, 1, 1), (c_out,))

    def make() -> list[Tensor | None]:
        x = image(2, c, size, size)
        return [x, *weights(*shapes), x if stride == 1 and c == c_out else None]

    return OpCase("separable", "inverted_residual", label, floating(make), options)


def _stem() -> OpCase:
    shapes = ((16, 3, 3, 3), (16,), (16, 1, 3, 3), (16,), (24, 16, 1, 1), (24,))
    options = {"stem_stride": [2, 2], "stem_padding": [1, 1], "padding": [1, 1], "stem_activation": "relu"}
    return OpCase(
        *("separable", "separable_stem", "21x21 3 to 24"),
        floating(lambda: [image(2, 3, 21, 21), *weights(*shapes)]),
        options,
    )


def _ghost(label: str, c: int, primary: int, size: int, cheap: int, **options: Any) -> OpCase:
    shapes = ((primary, c, 1, 1), (primary,), (primary, 1, cheap, cheap), (primary,))
    return OpCase(
        *("ghost", "ghost_conv2d", label),
        floating(lambda: [image(2, c, size, size), *weights(*shapes), None]),
        {"activation": "relu", "cheap_activation": "relu", **options},
    )


def _tucker(label: str, c: int, rank: int, size: int, kernel: int, stride: int) -> OpCase:
    shapes = ((rank, c, 1, 1), (rank + 3, rank, kernel, kernel), (c, rank + 3, 1, 1), (c,))
    return OpCase(
        *("lowrank", "lowrank_conv2d", label),
        floating(lambda: [image(2, c, size, size), *weights(*shapes), None]),
        _window(kernel, stride, activation="relu"),
    )


def _block_csr(matrix: Tensor, block: int) -> list[Tensor]:
    grid = [-(-size // block) for size in matrix.shape]
    mask = torch.rand(*grid) < 0.5
    mask.view(-1)[0] = True
    weight = BlockCsr.from_dense(matrix, block, mask=mask)
    return [weight.row_offsets, weight.columns, weight.blocks]


def _sparse_matmul(block: int, rows: int) -> OpCase:
    c_in, c_out = 5 * block - 8, 3 * block - 4

    def make() -> list[Tensor | None]:
        return [torch.randn(rows, c_in), *_block_csr(*weights((c_out, c_in)), block), torch.randn(c_out)]

    options = {"out_features": c_out, "activation": "relu"}
    return OpCase("sparse", "sparse_matmul", f"blocks of {block}, {rows} rows", floating(make), options)


def _sparse_conv(block: int, kernel: int, stride: int) -> OpCase:
    def make() -> list[Tensor | None]:
        (weight,) = weights((2 * block, 48, kernel, kernel))
        return [image(2, 48, 11, 9), *_block_csr(conv_matrix(weight, block), block), torch.randn(2 * block)]

    options = {"kernel_size": [kernel] * 2, **_window(kernel, stride), "out_channels": 2 * block}
    return OpCase("sparse", "sparse_conv2d", f"{kernel}x{kernel}/{stride}, blocks of {block}", floating(make), options)


_INT8_OUTPUTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("int8 out", {"output_scale": 37.0, "output_zero_point": -11, "activation": "relu"}),
    ("bfloat16 out", {"output_dtype": torch.bfloat16}),
    ("float32 out", {}),
)


def _int8_cases() -> list[OpCase]:
    def case(op: str, label: str, make: Callable[[], Sequence[Tensor | None]], options: dict[str, Any]) -> OpCase:
        return OpCase("int8", op, label, lambda dtype: make(), options, (torch.int8,))

    def matmul(rows: int, c_in: int, c_out: int, *, by_row: bool) -> list[Tensor | None]:
        per_row = [torch.rand(rows) + 0.1, torch.randint(-128, 128, (rows,), dtype=torch.int32)] if by_row else []
        vectors = [torch.rand(c_out) + 0.01, torch.randn(c_out) * 100, None]
        return [bytes_of(rows, c_in), bytes_of(c_out, c_in), *vectors, *per_row]

    def convolution(weight: tuple[int, ...], c_in: int) -> list[Tensor | None]:
        vectors = [torch.rand(weight[0]) + 0.01, torch.randn(weight[0]) * 100]
        return [bytes_of(2, c_in, 13, 11), bytes_of(*weight), *vectors]

    found = []
    affine = {"input_scale": 0.37, "input_zero_point": -19}
    for label, output in _INT8_OUTPUTS:
        for rows, c_in, c_out in ((150, 144, 136), (5, 7, 3), (3, 2064, 20)):
            by_row = rows == 5
            options = output if by_row else output | affine
            make = lambda r=rows, i=c_in, o=c_out, b=by_row: matmul(r, i, o, by_row=b)  # noqa: E731
            found.append(case("int8_matmul", f"{rows}x{c_in}x{c_out}, {label}", make, options))
        for kernel, stride in ((1, 1), (3, 2)):
            options = output | affine | _window(kernel, stride)
            make = lambda k=kernel: convolution((40, 48, k, k), 48)  # noqa: E731
            found.append(case("int8_conv2d", f"{kernel}x{kernel}/{stride}, {label}", make, options))
        options = output | affine | _window(3)
        found.append(case("int8_depthwise_conv2d", label, lambda: convolution((48, 1, 3, 3), 48), options))
        scales = {"input_scale": 0.2, "other_scale": 0.7, "other_zero_point": 3}
        found.append(case("int8_add", label, lambda: [bytes_of(2, 24, 7, 5), bytes_of(2, 24, 7, 5)], output | scales))
    options = affine | _window(3)
    found.append(case("int8_depthwise_conv2d", "five channels", lambda: convolution((5, 1, 3, 3), 5), options))
    for label, output in (("int8 out", {"output_scale": 0.3}), ("float32 out", {})):
        options = {"input_scale": 0.2, **output}
        found.append(case("int8_global_avg_pool2d", label, lambda: [bytes_of(2, 24, 7, 5)], options))
        scales = {"input_scale": 0.2, "gate_scale": 0.02, **output}
        found.append(case("int8_gate", label, lambda: [bytes_of(2, 24, 7, 5), bytes_of(2, 24, 1, 1)], scales))
    found.append(case("dequantize", "an image", lambda: [bytes_of(2, 24, 7, 5)], {"scale": 0.1, "zero_point": 5}))
    for shape in ((2, 24, 7, 5), (33, 17)):
        make_x = floating(lambda s=shape: [image(*s) if len(s) == 4 else torch.randn(s)])
        options = {"scale": 0.02, "zero_point": -5}
        found.append(OpCase("int8", "quantize", "x".join(map(str, shape)), make_x, options))
    return found


CASES: tuple[OpCase, ...] = (
    *[
        _convolution("depthwise", "depthwise_conv2d", label, (2, c, *size), (c * multiplier, 1, k, k), **options)
        for label, c, multiplier, size, k, options in (
            ("3x3", 40, 1, (13, 11), 3, _window(3, activation="relu6")),
            ("3x3/2", 24, 1, (18, 15), 3, _window(3, 2, activation="hardswish")),
            ("5x5", 64, 1, (14, 14), 5, _window(5)),
            ("7x7", 33, 1, (9, 17), 7, _window(7)),
            ("3x3 dilated", 16, 1, (15, 15), 3, {"padding": [2, 2], "dilation": [2, 2]}),
            ("2x5 of any stride, multiplier 2", 10, 2, (12, 12), 5, {"stride": [1, 3]}),
            ("no options", 7, 1, (9, 9), 3, {}),
        )
    ],
    *[
        _convolution("dense", "pointwise_conv2d", f"{c} to {c_out}", (2, c, *size), (c_out, c, 1, 1), **options)
        for c, c_out, size, options in (
            (64, 128, (14, 14), {"activation": "relu"}),
            (33, 7, (5, 3), {"activation": "silu"}),
            (256, 72, (7, 7), {"activation": "gelu"}),
            (3, 16, (9, 10), {}),
        )
    ],
    _convolution("dense", "linear", "37 rows", (37, 96), (40, 96), activation="relu"),
    _convolution("dense", "linear", "one row", (1, 1024), (100, 1024)),
    _convolution("dense", "conv2d", "3x3/2", (2, 24, 15, 13), (40, 24, 3, 3), **_window(3, 2, activation="relu")),
    _convolution("dense", "conv2d", "7x7 of three channels", (2, 3, 33, 33), (16, 3, 7, 7), **_window(7, 2)),
    _separable("3x3", 32, 64, 14, 3, 1),
    _separable("3x3/2, ragged", 21, 35, 17, 3, 2),
    _separable("5x5", 48, 80, 11, 5, 1),
    _inverted("stride 1 and its input", 24, 144, 24, 14, 1),
    _inverted("stride 2", 16, 96, 24, 15, 2),
    _inverted("ragged", 10, 30, 14, 9, 1),
    _stem(),
    *[
        _convolution("grouped", "grouped_conv2d", label, (2, c, 11, 9), (c_out, c // groups, k, k), **options)
        for label, c, c_out, groups, k, options in (
            ("1x1, shuffled", 48, 96, 3, 1, {"groups": 3, "shuffle": 3, "activation": "relu"}),
            ("3x3", 64, 64, 8, 3, _window(3, groups=8, activation="relu")),
            ("3x3/2, ragged", 30, 60, 5, 3, _window(3, 2, groups=5, shuffle=5)),
        )
    ],
    OpCase("grouped", "channel_shuffle", "3 groups", floating(lambda: [image(2, 48, 7, 9)]), {"groups": 3}),
    OpCase("grouped", "channel_shuffle", "7 groups", floating(lambda: [image(1, 35, 5, 3)]), {"groups": 7}),
    OpCase("grouped", "shuffle_concat", "58 and 58", floating(lambda: [image(2, 58, 7, 9), image(2, 58, 7, 9)])),
    _ghost("3x3", 24, 36, 14, 3),
    _ghost("5x5, ragged", 17, 11, 9, 5, out_channels=21),
    _tucker("3x3", 48, 16, 14, 3, 1),
    _tucker("5x5/2, ragged", 21, 6, 9, 5, 2),
    OpCase(
        *("lowrank", "lowrank_linear", "ragged"),
        floating(lambda: [torch.randn(17, 70), *weights((9, 70), (33, 9), (33,)), torch.randn(17, 33)]),
    ),
    *[_sparse_matmul(block, rows) for block, rows in ((16, 70), (32, 129), (64, 17))],
    *[_sparse_conv(block, kernel, stride) for block, kernel, stride in ((16, 3, 1), (32, 1, 1), (16, 3, 2))],
    *_int8_cases(),
    OpCase(
        *("squeeze_excite", "squeeze_excite", "ragged"),
        floating(lambda: [image(3, 40, 7, 7), *weights((10, 40, 1, 1), (10,), (37, 10, 1, 1)), None]),
    ),
    OpCase("dense", "global_avg_pool2d", "7x7", floating(lambda: [image(3, 40, 7, 7)])),
    OpCase(
        *("dense", "max_pool2d", "3x3/2", floating(lambda: [image(2, 24, 15, 13)])),
        {"kernel_size": [3, 3], "stride": [2, 2], "padding": [1, 1]},
    ),
)


def has_kernel(case: OpCase, backend: str = "cuda") -> bool:
    """Whether the op has a kernel of ours for that backend, on this machine or another."""
    return any(entry.backend == backend for entry in registry.operator(case.op).implementations)


def absent_because(case: OpCase, backend: str) -> str | None:
    """Why a backend that has a kernel of the op runs nothing on this machine."""
    return registry.availability()[case.op][backend]


def run(case: OpCase, dtype: torch.dtype, device: torch.device, *, backend: str) -> tuple[list[Tensor | None], Tensor]:
    """The arguments, on the CPU, and what the op makes of them on `device`."""
    tensors = list(case.tensors(dtype))
    moved = [None if t is None else t.to(device) for t in tensors]
    with torch.no_grad(), kernelpress.use_backend(backend):
        return tensors, getattr(ops, case.op)(*moved, **case.options)


def check(case: OpCase, dtype: torch.dtype, device: torch.device, *, backend: str) -> float:
    """The error of the op on `device` to the reference on the CPU, in float64, or exactly for int8. Raises
    `AssertionError` where it is too large, and whatever the op raises."""
    tensors, out = run(case, dtype, device, backend=backend)
    out = out.cpu()
    if dtype == torch.int8 or out.dtype == torch.int8:
        return _exact(case, tensors, out)
    exact = [t.double() if t is not None and t.is_floating_point() else t for t in tensors]
    expected = getattr(reference, case.op)(*exact, **case.options)
    assert out.shape == expected.shape, f"shape {list(out.shape)}, expected {list(expected.shape)}"
    error = float((out.double() - expected).norm() / expected.norm().clamp_min(1e-30))
    allowed = RELATIVE_ERROR[dtype]
    if dtype == torch.float32 and case.op not in EXACT_FLOAT32:
        allowed = TF32_ERROR
    assert error <= allowed, f"relative error {error:.1e}, allowed {allowed:.1e}"
    return error


def _exact(case: OpCase, tensors: Sequence[Tensor | None], out: Tensor) -> float:
    """The reference rounds where the kernels do, step by step; `quantize` of 16-bit floats too."""
    expected = getattr(reference, case.op)(*tensors, **case.options)
    assert out.dtype == expected.dtype, f"{out.dtype}, expected {expected.dtype}"
    assert out.shape == expected.shape, f"shape {list(out.shape)}, expected {list(expected.shape)}"
    wrong = int((out != expected).sum())
    assert not wrong, f"{wrong} of {out.numel()} values differ from the reference"
    return 0.0
