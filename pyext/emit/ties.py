"""Compares an emitted graph with the original where values decide: at a tie, a rounding error turns a pixel of a mask
over, and everything that the mask selects jumps.

A *decision* is an operation on floats whose result jumps: a comparison, an index, a rounding, a sub-graph. Emission
leaves decisions as they came, so both graphs take the same ones, on floats that differ by rounding errors. The emitted
graph is run on the original's decisions, and at each of them the floats that it would have decided on are compared
instead, element by element: what turns over then lay within the tolerance of a tie.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from kernelpress.emit.quantized import is_rounding
from kernelpress.emit.tolerance import relative_error
from kernelpress.preserve import random_state_kept
from kernelpress.runtime.torch_private import HigherOrderOperator, OpOverload, pytree
from kernelpress.trace.regions import writes_undone

__all__ = ["Comparison", "compare", "moved_by_rounding"]

FEWEST_TURNED = 2
"""Elements of a decision that may turn over however few it has: two that change places in an order."""

ROUNDING = 4e-7
"""By how much values may differ, relative to their root mean square, that were summed in another order in float32."""
ROUNDINGS = 3
"""How often a quantized graph is rounded otherwise, to see how far that carries."""

_ROUNDINGS = {"round", "floor", "ceil", "trunc", "fix", "frac", "floor_divide", "fmod", "remainder", "nextafter"}
_SIGNS = {"sign", "sgn", "heaviside", "copysign", "angle", "atan2"}
_CUTS = {"hardshrink", "threshold", "mode", "histc", "bernoulli"}
_JUMPING = frozenset(_ROUNDINGS | _SIGNS | _CUTS)
"""Operations from floats to floats that jump."""

_ORDERS = frozenset({"sort", "argsort", "topk"})
"""Elements change places in them with their equals alone, but the more there are, the closer they lie."""
_SPARED_NAMESPACES = frozenset({"quantized_decomposed", "kernelpress"})
"""int8 values are judged by steps; their quantization may be part of a layer."""


@dataclass(frozen=True)
class Comparison:
    """How far an emitted graph is from the original one."""

    error: float
    """The largest relative error of an output, and of an element (to itself and the root mean square) that a decision
    is taken on."""
    turned: float
    """The largest share of a decision's elements that turned over; 0 where no more than `FEWEST_TURNED` did."""
    decision: str
    """Which decision that was."""
    differing: int
    """Elements of integer and boolean outputs that differ, decisions left to the emitted graph."""
    elements: int
    """How many elements these outputs have."""


@dataclass(frozen=True)
class _Decision:
    target: Any
    operands: list[Any]
    result: Any
    jumps: bool
    """Whether its floats jump as well."""


class _Original(Interpreter):
    """Notes the decisions."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module)
        self.decisions: dict[str, _Decision] = {}

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        operands, jumps = pytree.tree_leaves(self.fetch_args_kwargs_from_env(node)), _jumps(node)
        if jumps or _decides(node, operands, result):
            self.decisions[node.name] = _Decision(node.target, operands, result, jumps)
        return result


class _Emitted(Interpreter):
    """Takes the decisions given, and notes how near its own were."""

    def __init__(self, graph_module: GraphModule, decisions: dict[str, _Decision], bound: float) -> None:
        super().__init__(graph_module)
        self._decisions, self._bound = decisions, bound
        self.error = 0.0
        self.turned: tuple[float, str] = (0.0, "")

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        decision = self._decisions.get(node.name)
        if decision is None or decision.target is not node.target:
            return result
        operands = pytree.tree_leaves(self.fetch_args_kwargs_from_env(node))
        for a, b in zip(operands, decision.operands, strict=True):
            if isinstance(b, Tensor) and b.numel():
                self.error = max(self.error, float(_distances(a, b).max()) if a.shape == b.shape else math.inf)
        own, spec = pytree.tree_flatten(result)
        given = pytree.tree_leaves(decision.result)
        decided = [isinstance(b, Tensor) and (decision.jumps or not _is_float(b)) for b in given]
        for a, b in [(a, b) for a, b, is_decided in zip(own, given, decided, strict=True) if is_decided]:
            count = _differing(a, b, self._bound)
            if a.shape == b.shape and count > FEWEST_TURNED and _name(node) not in _ORDERS:
                self.turned = max(self.turned, (count / b.numel(), node.name))
        return pytree.tree_unflatten([b if d else a for a, b, d in zip(own, given, decided, strict=True)], spec)


class _Rounded(_Emitted):
    """The original itself, what it quantizes rounded otherwise."""

    def __init__(self, original: GraphModule, decisions: dict[str, _Decision], bound: float, seed: int) -> None:
        super().__init__(original, decisions, bound)
        self._drawn = torch.Generator().manual_seed(seed)

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        if not any(map(is_rounding, node.users)):
            return result
        noise = torch.randn(result.shape, generator=self._drawn).to(result)
        return result + ROUNDING * result.square().mean().sqrt() * noise


def moved_by_rounding(original: GraphModule, inputs: Sequence[Any], bound: float) -> float:
    """The error, as `compare` counts it, of a quantized graph to itself where floats are rounded otherwise before they
    are quantized: some take the other step, and layers behind carry that on."""
    with torch.no_grad():
        judge = _Original(original)
        expected = pytree.tree_leaves(_run(judge, inputs))
        runners = [_Rounded(original, judge.decisions, bound, seed) for seed in range(ROUNDINGS)]
        return max(_error(runner, pytree.tree_leaves(_run(runner, inputs)), expected) for runner in runners)


def _error(runner: _Emitted, result: Sequence[Any], expected: Sequence[Any]) -> float:
    """The largest of the outputs and of what `runner` decided on."""
    pairs = zip(result, expected, strict=True)
    return max([runner.error, *(relative_error(a, b) for a, b in pairs if isinstance(b, Tensor))])


def compare(original: GraphModule, emitted: GraphModule, inputs: Sequence[Any], bound: float) -> Comparison:
    """Runs both on flat `inputs`, without gradients. Floats that a decision makes, a remainder for example, count as
    turned over where they are further apart than `bound`, relative to themselves and the root mean square."""
    with torch.no_grad():
        judge = _Original(original)
        expected = pytree.tree_leaves(_run(judge, inputs))
        runner = _Emitted(emitted, judge.decisions, bound)
        result = pytree.tree_leaves(_run(runner, inputs))
        free = pytree.tree_leaves(_run(Interpreter(emitted), inputs)) if judge.decisions else result
    error = _error(runner, result, expected)
    whole = [(a, b) for a, b in zip(free, expected, strict=True) if isinstance(b, Tensor) and not _is_float(b)]
    share, decision = runner.turned
    return Comparison(error, share, decision, sum(_differing(a, b) for a, b in whole), sum(b.numel() for _, b in whole))


def _run(interpreter: Interpreter, inputs: Sequence[Any]) -> Any:
    """The graph's outputs; each run draws the same random numbers and finds the same buffers."""
    with random_state_kept(), writes_undone(interpreter.module):  # type: ignore[arg-type]
        torch.manual_seed(0)
        return interpreter.run(*inputs, enable_io_processing=False)


def _jumps(node: Node) -> bool:
    """Whether the floats that `node` computes from floats may jump."""
    if isinstance(node.target, HigherOrderOperator):
        return True
    name = _name(node)
    if name == "div":
        return node.kwargs.get("rounding_mode") is not None
    if name.startswith("grid_sampler"):
        return bool(node.args[2] == 1)
    return name in _JUMPING or "fake_quantize" in name


def _name(node: Node) -> str:
    """Of PyTorch's operation, without its overload; empty for anything else."""
    is_aten = isinstance(node.target, OpOverload) and node.target.namespace == "aten"
    return str(node.target._opname) if is_aten else ""  # type: ignore[union-attr]


def _decides(node: Node, operands: Sequence[Any], result: Any) -> bool:
    """Whether `node` makes integers or booleans of floats, and does not hand on what another made of them."""
    is_made = node.op == "call_function" and node.target is not operator.getitem
    if not is_made or getattr(node.target, "namespace", None) in _SPARED_NAMESPACES:
        return False
    made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    return any(map(_is_float, operands)) and not all(map(_is_float, made))


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _distances(a: Any, b: Tensor) -> Tensor:
    """Per element |a − b|, relative to |b| + the root mean square of all; infinite where only one is NaN or infinite,
    or values that are no floats differ."""
    a, b = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (a.detach(), b.detach()))
    is_same = (a == b) | ((a != a) & (b != b))
    if not b.is_floating_point():
        return torch.where(is_same, 0.0, math.inf)
    a, b = a.double(), b.double()
    finite = b[b.isfinite()]
    size = float(finite.square().mean().sqrt()) if len(finite) else 0.0
    return torch.where(is_same, 0.0, ((a - b).abs() / (b.abs() + (size or 1.0))).nan_to_num(math.inf, math.inf))


def _differing(a: Tensor, b: Tensor, bound: float = 0.0) -> int:
    """How many elements are further apart than `bound`; of tensors of two sizes, the difference."""
    return int((_distances(a, b) > bound).sum()) if a.shape == b.shape else max(1, abs(a.numel() - b.numel()))
