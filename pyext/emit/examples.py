"""How the values of a graph look when the example inputs run through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from kernelpress.emit.graph import shares_memory_within
from kernelpress.ops.layout import PIXELS, Layout
from kernelpress.trace.regions import writes

__all__ = ["Example", "example_values"]

MOST_DRAWN = 1_000_003
"""Values drawn for one tensor, a prime: drawing takes longer than most layers."""


@dataclass(frozen=True)
class Example:
    """How a value of the graph looks when the example inputs run through: a tensor's form, or a plain value.

    `magnitude` is the largest absolute value of a tensor of floats there, NaN if one is.
    """

    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    plain: Any = None
    magnitude: float = field(default=0.0, compare=False)

    def random(self) -> Any:
        """A fresh tensor of this form: standard normal floats, int8 values of the whole range, zeros of other
        dtypes; a plain value as it is."""
        if self.dtype is None:
            return self.plain
        empty = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        if self.dtype == torch.int8:
            return empty.random_(-128, 128)
        return _normal(empty) if self.dtype.is_floating_point else empty.zero_()

    def laid(self, form: Layout | None) -> Example:
        """The same tensor in that form; None leaves it as it is."""
        return self if form is None else replace(self, stride=tuple(form.stride(self.shape)))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return 0 if self.dtype is None else torch.Size(self.shape).numel() * self.dtype.itemsize

    def __str__(self) -> str:
        return repr(self.plain) if self.dtype is None else f"{self.dtype}{list(self.shape)}/{list(self.stride)}"


def _normal(tensor: Tensor) -> Tensor:
    """Fills it with standard normal values; those of a large one repeat, but differently from image to image."""
    memory = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,))
    drawn = memory[:MOST_DRAWN].normal_()
    for part in memory[MOST_DRAWN:].split(MOST_DRAWN):
        part.copy_(drawn[: len(part)])
    return tensor


def example_values(graph_module: GraphModule, inputs: Sequence[Any]) -> dict[Node, Example]:
    """Runs the graph once on `inputs` (flat, one per placeholder) and notes the form of every value.

    Images between operations are noted as channels_last, which is what the emitted graph hands on, graph inputs as the
    caller lays them out, and tensors whose elements share memory as dense ones. Writes into buffers are left out.
    """
    examples: dict[Node, Example] = {}

    class Recorder(Interpreter):
        def run_node(self, node: Node) -> Any:
            result = self.env[node.args[0]] if writes(node) else super().run_node(node)  # type: ignore[index]
            examples[node] = _example(result, is_input=node.op == "placeholder")
            return result

    with torch.no_grad():
        Recorder(graph_module).run(*inputs, enable_io_processing=False)
    return examples


def _example(result: Any, *, is_input: bool) -> Example:
    if not isinstance(result, Tensor) or result.layout != torch.strided:
        return Example(plain=result if isinstance(result, (int, float, bool)) else None)
    stride = torch.empty_like(result).stride() if shares_memory_within(result) else result.stride()
    if result.dim() == 4 and not is_input:
        stride = PIXELS.stride(tuple(result.shape))
    magnitude = float(result.abs().max()) if result.is_floating_point() and result.numel() else 0.0
    return Example(tuple(result.shape), tuple(stride), result.dtype, result.device, magnitude=magnitude)
