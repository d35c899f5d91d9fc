"""Calls of any op at any size: random tensors, on the device `meta` such without memory, and the options."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kernelpress.ops import registry
from kernelpress.ops.registry import Problem

__all__ = ["FOLDED", "Call", "OpCall", "Operands", "random_tensor"]

Call = Callable[[], Tensor]

Operands = tuple[list[Tensor | None], dict[str, Any]]
"""Tensors and options of a call."""

FOLDED = frozenset({"scale", "residual", "input_scale", "row_scale", "row_zero_point"})
"""Operands that most layers of networks do without, norms being folded."""


def random_tensor(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """Standard normal, or int8 of the whole range; channels_last where it is an image."""
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    t = torch.empty(shape, device=device, dtype=dtype, memory_format=layout)
    if device.type == "meta":  # where drawing numbers costs a hundred times what there is to it
        return t
    return t.random_(-128, 128) if dtype == torch.int8 else t.normal_()


@dataclass(frozen=True)
class OpCall:
    """A call of `op` by the shapes of its inputs and weights, from which those of all other operands follow.

    `weights` stand in the op's order. One in blocks is (block rows, block columns, side of a block), of which a
    fraction `density` is there at random places, or of each row every second one. `absent` names operands that are not
    there; `residual_is_x` makes one of x.
    """

    op: str
    x: tuple[int, ...]
    weights: tuple[tuple[int, ...], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    absent: frozenset[str] = FOLDED
    density: float | None = None
    residual_is_x: bool = False

    @property
    def dtype(self) -> torch.dtype | None:
        """That of x, where no other will do."""
        return torch.int8 if self.op.startswith("int8_") else None

    def make(self, device: torch.device, dtype: torch.dtype) -> Operands:
        """Fresh tensors, x of that dtype or of the op's own, and the options. Weights are scaled so that sums of
        products are of the size of their terms. Indices have memory on any device, as their values are looked at."""
        dtype = self.dtype or dtype
        weights, of_vectors = iter(self.weights), torch.float32 if dtype == torch.int8 else dtype
        made: dict[str, Tensor | None] = {}
        for name in registry.operator(self.op).tensors:
            if name in self.absent or name in made:
                made.setdefault(name, None)
            elif name == "row_offsets":
                made |= self._blocks(next(weights), device, dtype)
                c_out, fan_in = self.weights[0][0] * self.weights[0][2], 1
            elif name.endswith("weight"):
                c_out, *others = next(weights)
                fan_in = torch.Size(others).numel()
                made[name] = _scaled(random_tensor(device, dtype, c_out, *others), fan_in)
            elif name == "weight_scale":  # brings sums of products of bytes to the size of one
                made[name] = (torch.rand(c_out, device=device) + 0.5) / (74 * 74 * fan_in**0.5)
            elif name.endswith("bias") or name == "scale":
                made[name] = random_tensor(device, of_vectors, c_out)
            elif name == "input_scale":
                made[name] = random_tensor(device, dtype, *self.x[:2])
            elif name in ("row_scale", "row_zero_point"):
                of_rows = torch.float32 if name == "row_scale" else torch.int32
                made[name] = torch.ones(self.x[0], device=device, dtype=of_rows)
            elif name == "residual":
                out = self._problem(list(made.values())).outputs[0]
                made[name] = made["x"] if self.residual_is_x else random_tensor(device, out.dtype, *out.shape)
            else:
                made[name] = random_tensor(device, dtype, *self.x)
        return list(made.values()), dict(self.options)

    @cached_property
    def flops(self) -> int:
        """Operations of its products, a multiplication and an addition counted as two."""
        problem = self._without_memory(torch.float32)
        shapes = [None if spec is None else spec.shape for spec in problem.tensors]
        return 2 * int(problem.operator.macs(problem.options, problem.shape, *shapes))

    def traffic_bytes(self, dtype: torch.dtype) -> int:
        """Least bytes to move in that dtype or the op's own: operands but indices read once, the output written."""
        problem = self._without_memory(dtype)
        moved = [spec for spec in problem.tensors if spec is not None and spec.dtype != torch.int32]
        moved = moved[: -1 if self.residual_is_x else None]
        return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in (*moved, *problem.outputs))

    def _without_memory(self, dtype: torch.dtype) -> Problem:
        """What the op is asked to do."""
        return self._problem(self.make(torch.device("meta"), dtype)[0])

    def _problem(self, tensors: Sequence[Tensor | None]) -> Problem:
        entry = registry.operator(self.op)
        bound, options, _ = entry.signature.bind(tensors, self.options)
        return registry.problem(entry, registry.specs_of(bound), options, "meta")

    def _blocks(self, grid: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor | None]:
        rows, columns, side = grid
        mask = torch.zeros(rows, columns, dtype=torch.bool)
        if self.density is None:
            mask[:, ::2] = True
        else:
            mask.view(-1)[torch.randperm(mask.numel())[: max(1, round(self.density * mask.numel()))]] = True
        offsets = torch.cat([torch.zeros(1), mask.sum(1).cumsum(0)])
        place = torch.device("cpu") if device.type == "meta" else device
        blocks = _scaled(random_tensor(device, dtype, int(mask.sum()), side, side), columns * side)
        return {
            "row_offsets": offsets.to(place, torch.int32),
            "columns": mask.nonzero()[:, 1].to(place, torch.int32),
            "blocks": blocks,
        }


def _scaled(weight: Tensor, fan_in: int) -> Tensor:
    return weight if weight.dtype == torch.int8 or weight.is_meta else weight * fan_in**-0.5
