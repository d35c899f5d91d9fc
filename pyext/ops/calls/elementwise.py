"""Calls of the kernels `elementwise` and `int8_copy`: arithmetic and copies of tensors that lie anyhow."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kernelpress.ops.backends.kernel import activation_index, bits
from kernelpress.ops.calls.steps import NativeCall

__all__ = ["elementwise", "int8_copy", "merged_dims"]

MOST_DIMS = 6
"""Of the kernels, `kMostDims`."""

Operand = Tensor | None


def elementwise(
    y: Tensor,
    a: Operand = None,
    b: Operand = None,
    c: Operand = None,
    *,
    scale: float = 1.0,
    c_scale: float = 1.0,
    shift: float = 0.0,
    activation: str = "identity",
) -> NativeCall | None:
    """`y = activation(scale · a · b + c_scale · c + shift)`, operands broadcast to `y`; without `a` and `b`, these
    are 1. None where the dimensions are too many."""
    operands = [None if t is None else t.expand(y.shape) for t in (a, b, c)]
    strides = [(0,) * y.dim() if t is None else t.stride() for t in (*operands, y)]
    dims = merged_dims(y.shape, strides)
    if len(dims) > MOST_DIMS:
        return None
    dims = [(1, (0,) * len(strides))] * (MOST_DIMS - len(dims)) + dims
    words = [
        *(0 if t is None else t.data_ptr() for t in (*operands, y)),
        *(size for size, _ in dims),
        *(stride[i] for i in range(len(strides)) for _, stride in dims),
        activation_index(activation),
        *map(bits, (scale, c_scale, shift)),
    ]
    return NativeCall("elementwise", tuple(words), tuple(t for t in (*operands, y) if t is not None))


def int8_copy(y: Tensor, x: Tensor) -> NativeCall | None:
    """`y = x` of int8 tensors of one shape; None where the dimensions are too many."""
    dims = merged_dims(y.shape, (x.stride(), y.stride()))
    if len(dims) > MOST_DIMS:
        return None
    dims = [(1, (0, 0))] * (MOST_DIMS - len(dims)) + dims
    words = (*(size for size, _ in dims), *(stride[i] for i in range(2) for _, stride in dims))
    return NativeCall("int8_copy", (x.data_ptr(), y.data_ptr(), *words), (x, y))


def merged_dims(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> list[tuple[int, tuple[int, ...]]]:
    """Size and strides of every dimension, the last operand's largest stride first; those along which all operands run
    on into the next one are one with it."""
    dims = [(size, tuple(s[d] for s in strides)) for d, size in enumerate(shape) if size > 1]
    merged: list[tuple[int, tuple[int, ...]]] = []
    for size, inner in sorted(dims, key=lambda dim: -dim[1][-1]):
        if merged and all(o == size * i for o, i in zip(merged[-1][1], inner, strict=True)):
            size *= merged.pop()[0]
        merged.append((size, inner))
    return merged
