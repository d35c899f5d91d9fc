"""Sparse weights as the CPU kernels walk over them: for each run of output channels the places in a strip of input to
multiply, and what with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernelpress.ops.backends.kernel import Kernel, window
from kernelpress.ops.calls import packing
from kernelpress.ops.layout import DENSE, ROWS
from kernelpress.ops.registry import Problem, Tensors
from kernelpress.runtime import native

__all__ = ["LARGEST", "Strip", "channel_dim", "images", "walk_reason", "with_walk"]

LARGEST = 2**31
"""Bound of the indices of a walk."""

_CHANNEL_BYTES, _STRIP_BYTES = 320, 96 << 10
"""At most, of a channel and of all, in a strip that single weights of a 1×1 window walk over: every output channel
reads it again, so it is to stay near the core."""


def channel_dim(problem: Problem) -> int:
    """Of x and of the output."""
    return -1 if problem.layout is ROWS else 1


def images(problem: Problem) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Input and output size of an image, and the window; a matrix product has one pixel per row of x."""
    if problem.layout is ROWS:
        return (1, 1), (1, 1), (1, 1, 1, 1, 0, 0, 1, 1)
    options = problem.options
    return tuple(problem["x"].shape[2:]), tuple(problem.shape[2:]), window(options.kernel_size, options)


@dataclass(frozen=True)
class Strip:
    """How a run of outputs finds its input in scratch: see `kernels/cpu/strip.h`."""

    batch: int
    image: tuple[int, ...]
    out: tuple[int, ...]
    window: tuple[int, ...]
    length: int
    width: int
    phases: tuple[int, int]
    phase_pitch: int

    @classmethod
    def of(
        cls, batch: int, image: tuple[int, ...], out: tuple[int, ...], of_window: tuple[int, ...], vectors: int
    ) -> Strip:
        """At most so many `vectors` of outputs long."""
        lanes = native.cpu().panel_width() // 2
        kernel_h, kernel_w, stride_h, stride_w, _, _, dilation_h, dilation_w = of_window
        if of_window[:6] == (1, 1, 1, 1, 0, 0):  # positions in a row
            image = out = (1, math.prod(image))
        reach_h, reach_w = (kernel_h - 1) * dilation_h, (kernel_w - 1) * dilation_w
        width = out[1] + reach_w // stride_w
        length = lanes * min(vectors, -(-out[0] * width // lanes))
        furthest = reach_h // stride_h * width + reach_w // stride_w
        phases = [
            1 + max(k * dilation % stride for k in range(kernel))
            for kernel, dilation, stride in ((kernel_h, dilation_h, stride_h), (kernel_w, dilation_w, stride_w))
        ]
        pitch = -(-(length + furthest) // lanes) * lanes
        return cls(batch, image, out, of_window, length, width, (phases[0], phases[1]), pitch)

    @property
    def pitch(self) -> int:
        """Floats of scratch between two channels."""
        return math.prod(self.phases) * self.phase_pitch

    @property
    def form(self) -> tuple[int, ...]:
        """As the argument structs have it."""
        return (self.length, self.width, *self.phases, self.phase_pitch)

    def begin(self, channel: Tensor, tap: Tensor) -> Tensor:
        """Where in scratch the inputs of a channel under a tap of the window begin."""
        _, kernel_w, stride_h, stride_w, _, _, dilation_h, dilation_w = self.window
        down, right = tap // kernel_w * dilation_h, tap % kernel_w * dilation_w
        phase = down % stride_h * self.phases[1] + right % stride_w
        return channel * self.pitch + phase * self.phase_pitch + down // stride_h * self.width + right // stride_w


def _rows(problem: Problem) -> int:
    """Output channels of a row of the walk: 4 where blocks are as high, else 1."""
    return 1 if problem["blocks"].shape[1] % 4 else 4


def _strip(problem: Problem) -> Strip:
    image, out, of_window = images(problem)
    batch = math.prod(problem.shape) // (problem.shape[channel_dim(problem)] * math.prod(out))
    most = 8 if _rows(problem) == 1 else 6 if native.cpu().panel_width() == 32 else 2
    if _rows(problem) == 1 and of_window[:2] == (1, 1):
        channels, vector_bytes = problem["x"].shape[channel_dim(problem)], 2 * native.cpu().panel_width()
        most = max(2, min(most, min(_CHANNEL_BYTES, _STRIP_BYTES // channels) // vector_bytes))
    if problem.layout is ROWS:  # all rows of x are the positions of one image
        batch, image, out = 1, (1, batch), (1, batch)
    return Strip.of(batch, image, out, of_window, most)


def walk_reason(problem: Problem) -> str | None:
    """Why a weight cannot be walked over, else None."""
    if native.cpu() is None:
        return None  # the backend says so
    strip, blocks = _strip(problem), problem["blocks"]
    if max(problem["x"].shape[channel_dim(problem)] * strip.pitch, math.prod(blocks.shape)) >= LARGEST:
        return "the kernel takes fewer than 2³¹ values in a strip of input and in the blocks"
    return None


def _encoded(strip: Strip, height: int, c_in: int, c_out: int, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """Starts of the rows, their steps and values: those of the blocks, within the weight, that are not all zero."""
    _, row_offsets, columns, blocks, _, scale, _ = (None if t is None else t.detach() for t in tensors)
    assert row_offsets is not None
    assert columns is not None
    assert blocks is not None
    (count, r, c), rows = blocks.shape, len(row_offsets) - 1
    block_row = torch.repeat_interleave(torch.arange(rows), row_offsets.diff().long(), output_size=count)
    if scale is not None:
        blocks = blocks * pad(scale, (0, rows * r - c_out)).view(rows, r, 1)[block_row]
    values = blocks.reshape(count, r // height, height, c).transpose(2, 3)
    row = block_row[:, None, None] * (r // height) + torch.arange(r // height)[None, :, None]
    column = columns.long()[:, None, None] * c + torch.arange(c)
    per_tap = -(-c_in // c) * c
    row, column = (t.expand(values.shape[:3]) for t in (row, column))
    channel, tap = column % per_tap, column // per_tap
    kept = (values != 0).any(3) & (channel < c_in) & (row * height < c_out)
    order = (row[kept] * (per_tap * strip.window[0] * strip.window[1]) + column[kept]).argsort()
    steps = strip.begin(channel[kept], tap[kept])[order].to(torch.int32)
    counts = torch.bincount(row[kept], minlength=-(-c_out // height))
    return pad(counts.cumsum(0), (1, 0)).to(torch.int32), steps, values[kept][order].contiguous()


def with_walk(kernel: Kernel, problem: Problem, tensors: Tensors, device: Any) -> Kernel:
    """The kernel with the walk over this weight."""
    strip, rows, channels = _strip(problem), _rows(problem), channel_dim(problem)
    c_in, c_out = problem["x"].shape[channels], problem.shape[channels]
    walk = _encoded(strip, rows, c_in, c_out, tensors)

    def sizes(problem: Problem, spacing: Mapping[str, int]) -> tuple[int, ...]:
        return (
            *(rows, strip.batch, *strip.image, c_in, *strip.out, c_out),
            *strip.form,
            *(problem.layout is not DENSE, spacing["x"], spacing["residual"], spacing["y"]),
            *strip.window,
        )

    return replace(
        kernel,
        operands=lambda options, x, row_offsets, columns, blocks, bias, scale, residual: (
            *(x, *walk, packing.vector(bias), residual),
        ),
        sizes=sizes,
    )
