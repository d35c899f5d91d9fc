"""How tensors lie in memory, as the native kernels see it: pixels or rows, evenly spaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DENSE", "IMAGES_ANYHOW_OR_ROWS", "IMAGES_OR_ROWS", "PIXELS", "ROWS", "Layout", "pixel_stride", "row_stride"]


def _channels_last_stride(shape: Sequence[int]) -> tuple[int, ...]:
    _, c, h, w = shape
    return (h * w * c, 1, w * c, c)


def _contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _even_spacing(steps: Sequence[tuple[int, int, int]], least: int) -> int | None:
    """The `s ≥ least` with `stride = s · count` for every `(size, stride, count)` of more than one element."""
    spacings = {(stride // count, stride % count) for size, stride, count in steps if size > 1}
    if not spacings:
        return least
    spacing, remainder = spacings.pop()
    return spacing if not spacings and remainder == 0 and spacing >= least else None


def pixel_stride(shape: Sequence[int], stride: Sequence[int]) -> int | None:
    """Distance in elements between neighbouring pixels of `[N, C, H, W]`; None where its memory is not channels_last.

    A slice of the channels of a wider channels_last tensor has one; dimensions of one element put no condition.
    """
    n, c, h, w = shape
    if 0 in shape:
        return max(c, 1)
    if c > 1 and stride[1] != 1:
        return None
    return _even_spacing(((w, stride[3], 1), (h, stride[2], w), (n, stride[0], h * w)), c)


def row_stride(shape: Sequence[int], stride: Sequence[int]) -> int | None:
    """Distance in elements between neighbouring rows of `[..., C]`; None where they are not evenly spaced."""
    c = shape[-1]
    if 0 in shape:
        return max(c, 1)
    if c > 1 and stride[-1] != 1:
        return None
    steps, count = [], 1
    for size, step in zip(reversed(shape[:-1]), reversed(stride[:-1]), strict=True):
        steps.append((size, step, count))
        count *= size
    return _even_spacing(steps, c)


@dataclass(frozen=True)
class Layout:
    """A way of lying in memory that a kernel takes: its channel dimension (the last one of rows), the spacing that a
    tensor of this shape and stride has (None where it lies otherwise), the strides of a new tensor, and the copy that
    lies so.
    """

    name: str
    channels: int
    spacing: Callable[[Sequence[int], Sequence[int]], int | None]
    stride: Callable[[Sequence[int]], tuple[int, ...]]
    copy: Callable[[Tensor], Tensor]


def _rigid(shape: Sequence[int], stride: Sequence[int]) -> int | None:
    spacing = row_stride(shape, stride)
    return spacing if spacing == max(shape[-1], 1) else None


def _to_channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _by_rank(shape: Sequence[int]) -> Layout:
    return PIXELS if len(shape) == 4 else ROWS


PIXELS = Layout("channels_last", 1, pixel_stride, _channels_last_stride, _to_channels_last)
ROWS = Layout("evenly spaced rows", -1, row_stride, _contiguous_stride, Tensor.contiguous)
IMAGES_OR_ROWS = Layout(
    "channels_last or evenly spaced rows",
    -1,
    lambda shape, stride: _by_rank(shape).spacing(shape, stride),
    lambda shape: _by_rank(shape).stride(shape),
    lambda t: _by_rank(t.shape).copy(t),
)
IMAGES_ANYHOW_OR_ROWS = Layout(
    "any or evenly spaced rows",
    -1,
    lambda shape, stride: 1 if len(shape) == 4 else ROWS.spacing(shape, stride),
    IMAGES_OR_ROWS.stride,
    IMAGES_OR_ROWS.copy,
)
DENSE = Layout("contiguous", -1, _rigid, _contiguous_stride, Tensor.contiguous)
