"""Groups of a convolution as the GPU kernels take them: narrow ones merged, each with its window of input channels."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from kernelpress.ops.calls import packing

__all__ = ["Grouping", "grouping_of", "windowed_weight"]

_FRAGMENT = 16
_MOST_MERGED = 64


class Grouping(NamedTuple):
    """`groups` merged groups of `group_in` input and `group_out` output channels, the last one of what remains.

    Group `g` reads `window` channels, from `start(g)` on, a multiple of `window_step` channels: what 16 bytes hold, or
    1 where that does not divide the channels of x. Weights of channels in the window that are no input are zero.
    """

    groups: int
    group_in: int
    group_out: int
    window: int
    window_step: int
    channels: int

    def start(self, group: int) -> int:
        """First channel that a merged group reads."""
        own = group * self.group_in // self.window_step * self.window_step
        return min(own, self.channels - self.window)


@functools.lru_cache(1024)
def grouping_of(groups: int, group_in: int, group_out: int, element_bytes: int) -> Grouping:
    """The grouping in which tensor cores multiply least, and among such the one of the widest windows.

    A fragment has 16 output channels: narrow groups cost no more than two or four of them merged, zeros included.
    """
    channels = groups * group_in
    per_vector = 16 // element_bytes
    step = per_vector if channels % per_vector == 0 else 1
    best, least = None, 0
    for merged in range(1, min(groups, _MOST_MERGED) + 1):
        ends = [(first * group_in, min(first + merged, groups) * group_in) for first in range(0, groups, merged)]
        window = max(-(-end // step) * step - begin // step * step for begin, end in ends)
        columns = -(-merged * group_out // _FRAGMENT) * _FRAGMENT
        cost = len(ends) * columns * window
        if best is None or cost <= least:
            best, least = Grouping(len(ends), merged * group_in, merged * group_out, window, step, channels), cost
    assert best is not None
    return best


def windowed_weight(weight: Tensor, groups: int) -> Tensor:
    """`[C_out, C_in / groups, KH, KW]` → `[C_out, KH, KW, window]`; packed once per weight."""
    return packing.packed(weight, None, ("windows", groups), lambda w: _to_windows(w, groups))


def _to_windows(weight: Tensor, groups: int) -> Tensor:
    c_out, group_in, kernel_h, kernel_w = weight.shape
    grouping = grouping_of(groups, group_in, c_out // groups, weight.element_size())
    windows = weight.new_zeros(c_out, kernel_h, kernel_w, grouping.window)
    if weight.is_meta:
        return windows
    merged = grouping.group_in // group_in
    begins = [group * group_in - grouping.start(group // merged) for group in range(groups)]
    first = torch.tensor(begins, device=weight.device).repeat_interleave(c_out // groups)
    columns = first[:, None] + torch.arange(group_in, device=weight.device)
    index = columns[:, None, None].expand(-1, kernel_h, kernel_w, -1)
    return windows.scatter_(3, index, weight.permute(0, 2, 3, 1))
