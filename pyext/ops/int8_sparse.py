"""The backend `sparse` of `int8_conv2d`: a CPU kernel that walks over those cells of the weight, four input channels of
one output channel, that are not all zero."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernelpress.ops.backends.kernel import Kernel, Likes, window
from kernelpress.ops.layout import PIXELS
from kernelpress.ops.registry import Problem, Tensors
from kernelpress.ops.sparse_walk import LARGEST, Strip
from kernelpress.runtime import native

__all__ = ["LIKES", "cells_reason", "share_of_cells", "with_cells"]

CELL = 4
"""Input channels that one product of a vector takes."""

LIKES = Likes(blocks=((1, CELL),), density=0.6)

_MOST_VECTORS = 8


def _cells(weight: Tensor) -> Tensor:
    """`[C_out, C_in, KH, KW]` → `[C_out, KH · KW, C_in / 4, 4]`"""
    return weight.flatten(2).unflatten(1, (-1, CELL)).permute(0, 3, 1, 2)


def share_of_cells(weight: Tensor) -> float:
    """The fraction of a weight's cells that are not all zero; 1 where its channels are no whole cells."""
    if weight.shape[1] % CELL or not weight.numel():
        return 1.0
    return float(_cells(weight).any(3).float().mean())


def cells_reason(problem: Problem) -> str | None:
    """Why a weight has no cells to walk over, else None."""
    x, weight = problem["x"], problem["weight"]
    if problem.options.groups != 1:
        return f"the kernel has groups = 1, got {problem.options.groups}"
    spacing = PIXELS.spacing(x.shape, x.stride) or x.shape[1]
    if x.shape[1] % CELL or spacing % CELL:
        return f"the kernel takes multiples of {CELL} channels, got {x.shape[1]} in pixels {spacing} apart"
    if native.cpu() is not None and x.shape[1] // CELL * _strip(problem).pitch >= LARGEST:
        return "the kernel takes fewer than 2³¹ values in a strip of input"
    return None if math.prod(weight.shape) < LARGEST else "the kernel takes fewer than 2³¹ weights"


def _strip(problem: Problem) -> Strip:
    batch, _, *image = problem["x"].shape
    of_window = window(problem["weight"].shape[2:], problem.options)
    return Strip.of(batch, tuple(image), tuple(problem.shape[2:]), of_window, _MOST_VECTORS)


def with_cells(kernel: Kernel, problem: Problem, tensors: Tensors, device: Any) -> Kernel:
    """The kernel, whose operands are all but the weight, with the walk over this weight behind x."""
    weight = tensors[1]
    assert weight is not None
    strip, of_cells = _strip(problem), _cells(weight.detach())
    kept = of_cells.any(3)
    _, tap, cell = kept.nonzero().unbind(1)
    starts = pad(kept.flatten(1).sum(1).cumsum(0), (1, 0)).to(torch.int32)
    walk = (of_cells[kept].contiguous(), starts, strip.begin(cell, tap).to(torch.int32))
    others = kernel.operands

    def operands(options: Any, *tensors: Any) -> tuple[Any, ...]:
        x, *rest = others(options, *tensors)
        return (x, *walk, *rest)

    def sizes(problem: Problem, spacing: Mapping[str, int]) -> tuple[int, ...]:
        return (
            *(strip.batch, *strip.image, problem["x"].shape[1], *strip.out, problem.shape[1]),
            *strip.form,
            *(spacing["x"], spacing["residual"], spacing["y"]),
            *(problem.options.input_zero_point, int(problem.dtype == torch.int8)),
            *strip.window,
        )

    return replace(kernel, operands=operands, sizes=sizes)
