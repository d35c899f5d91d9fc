"""The sparse ops on CUDA: what the kernel takes, and the schedule of a weight."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernelpress.ops.backends.cuda import FLOATING, CudaDevice, CudaKernel, data_type, float_vector, tf32_reason
from kernelpress.ops.layout import PIXELS, ROWS
from kernelpress.ops.registry import Problem, Tensors
from kernelpress.ops.sparse_schedule import longest_segment, make_schedule

__all__ = ["block_reason", "sparse_cuda_kernel"]

_BLOCK_SIZES = (16, 32, 64)
_SMALL, _LARGE = 2**15, 2**31


def _window(problem: Problem) -> tuple[tuple[int, ...], ...]:
    """Input and output size of an image, and the window; a matrix product has one pixel per row of x."""
    x, options = problem.tensors[0], problem.options
    assert x is not None
    if problem.op == "sparse_matmul":
        return ((1, 1), (1, 1), (1, 1), (1, 1), (0, 0), (1, 1))
    window = (options.kernel_size, options.stride, options.padding, options.dilation)
    return (tuple(x.shape[2:]), tuple(problem.shape[2:]), *window)


def _pixels(problem: Problem) -> int:
    """Rows of the product."""
    return math.prod(problem.shape) // problem.shape[problem.layout.channels]


def block_reason(problem: Problem) -> str | None:
    """Why a kernel for blocks of the usual sizes must not run, else None."""
    blocks = problem.tensors[3]
    assert blocks is not None
    r, c = blocks.shape[1:]
    if r not in _BLOCK_SIZES or c not in _BLOCK_SIZES:
        return f"the kernel takes blocks of 16, 32 or 64 rows and columns, got {r}×{c}"
    return None


def _reason(problem: Problem) -> str | None:
    reason = block_reason(problem)
    if reason is not None:
        return reason
    x, _, _, blocks, *_ = problem.tensors
    assert x is not None
    assert blocks is not None
    image, _, kernel, stride, padding, dilation = _window(problem)
    reach = [d * (k - 1) + 1 + p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    if max(*image, *reach, *stride) >= _SMALL:
        return "the kernel takes heights, widths, strides and reaches of the window below 2¹⁵"
    rows = problem.tensors[1]
    assert rows is not None
    pixels, most = _pixels(problem), rows.shape[0] + blocks.shape[0]
    if max(pixels, x.shape[0] * math.prod(image)) >= _LARGE or -(-pixels // 64) * most >= _LARGE:
        return "the kernel takes fewer than 2³¹ pixels and tiles of the output"
    return tf32_reason(problem)


def _contiguous(t: Tensor) -> Tensor:
    t = t.detach().contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _sizes(problem: Problem, spacings: tuple[int, ...], y_spacing: int, segments: int, splits: int) -> tuple[int, ...]:
    x, blocks = problem.tensors[0], problem.tensors[3]
    assert x is not None
    assert blocks is not None
    image, out, *window = _window(problem)
    batch = _pixels(problem) // math.prod(out)
    channels = problem.layout.channels
    return (
        *(batch, *image, x.shape[channels], *out, problem.shape[channels]),
        *(*blocks.shape[1:], segments, splits),
        *(spacings[0], spacings[6], y_spacing),
        *[size for pair in window for size in pair],
        data_type(problem.dtype),
    )


def _specialise(kernel: CudaKernel, problem: Problem, tensors: Tensors, device: CudaDevice) -> CudaKernel:
    """The kernel with the schedule of this weight."""
    _, row_offsets, _, blocks, *_ = tensors
    assert row_offsets is not None
    assert blocks is not None
    (count, r, c), pixels = blocks.shape, _pixels(problem)
    longest = longest_segment(count, c * blocks.element_size(), pixels, device.multiprocessors)
    schedule = make_schedule(row_offsets, longest)
    items, splits = schedule.items.to(blocks.device), schedule.splits.to(blocks.device)

    def operands(tensors: Tensors, options: Any) -> tuple[Tensor | None, ...]:
        x, _, columns, blocks, bias, scale, residual = tensors
        assert columns is not None
        assert blocks is not None
        vectors = (float_vector(bias), float_vector(scale))
        return (x, _contiguous(columns), _contiguous(blocks), *vectors, residual, items, splits)

    return replace(
        kernel,
        operands=operands,
        sizes=lambda problem, spacings, y: _sizes(problem, spacings, y, len(items), len(splits)),
        workspace=lambda problem, device: 4 * schedule.slots * pixels * r,
        specialise=None,
    )


def _unscheduled(*_: Any) -> Any:
    raise AssertionError("a schedule comes first: see specialise")


def sparse_cuda_kernel(op: str) -> CudaKernel:
    """The kernel of `sparse_matmul` or `sparse_conv2d`."""
    layout = ROWS if op == "sparse_matmul" else PIXELS
    return CudaKernel(
        name="sparse_conv2d",
        layouts=(layout, None, None, None, None, None, layout),
        supports=_reason,
        operands=_unscheduled,
        sizes=_unscheduled,
        dtypes=(*FLOATING, torch.int8),
        has_workspace=True,
        specialise=_specialise,
    )
