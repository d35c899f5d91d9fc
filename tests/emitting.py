"""Helpers of the tests of emission: choosing without timing, weights that matter, exactness against float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kernelpress as kp
from kernelpress.emit import Candidate, EmittedModel
from kernelpress.emit.canonical import canonicalize
from kernelpress.emit.evaluate import Cost
from kernelpress.emit.fold import fold
from kernelpress.emit.fuse import find_matches
from kernelpress.runtime import native
from kernelpress.trace import trace

FUSED_BACKENDS = ["reference", "cpu"] if native.cpu() is not None else ["reference"]


def prefer(backend: str) -> Cost:
    """A cost under which the fewest layers of one backend win."""

    def cost(candidate: Candidate) -> float:
        return 1.0 if candidate.variant == backend else 10.0 * len(candidate.nodes)

    return cost


def emit_fused(model: nn.Module, x: Any, backend: str = "reference", **options: Any) -> EmittedModel:
    """`model` emitted onto layers of one backend wherever it has them."""
    emitted = kp.emit(model, x, cost=prefer(backend), progress=False, **options)
    assert not emitted.record.kept_original, emitted.record.reason
    return emitted


def prefer_ops(*names: str) -> Cost:
    """A cost under which layers of these ops win, on the reference backend."""

    def cost(candidate: Candidate) -> float:
        return 1.0 if candidate.name in names and candidate.variant == "reference" else 10.0 * len(candidate.nodes)

    return cost


def emit_onto(model: nn.Module, x: Any, *names: str) -> EmittedModel:
    """`model` emitted onto layers of these ops wherever they fit."""
    emitted = kp.emit(model, x, cost=prefer_ops(*names), progress=False)
    assert not emitted.record.kept_original, emitted.record.reason
    return emitted


def matches(model: nn.Module, x: Any) -> list[Any]:
    """What emission recognises in the model."""
    return list(find_matches(fold(canonicalize(trace(model.eval(), x)))))


def matched_ops(model: nn.Module, x: Any) -> set[str]:
    """The ops of that."""
    return {match.op for match in matches(model, x)}


def ops_of(emitted: EmittedModel) -> list[str]:
    """Names of the graph's operations, ours without their namespace."""
    nodes = (node for node in emitted.body.graph.nodes if node.op == "call_function")
    return [str(node.target).removesuffix(".default").removeprefix("kernelpress.") for node in nodes]


def torch_steps(emitted: EmittedModel, x: Tensor) -> list[str]:
    """What a plan of the model calls torch for."""
    return [step for step in kp.capture(emitted, x).steps if step.startswith("torch")]


class Apply(nn.Module):
    """Any function of the input and of these layers."""

    def __init__(self, function: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x, *self.layers)


class Exactness:
    """What a float32 model computes on `inputs`, how far off the float64 truth that is, and who else is as close."""

    def __init__(self, model: nn.Module, *inputs: Tensor, factor: float = 4.0) -> None:
        with torch.no_grad():
            self.truth = copy.deepcopy(model).double()(*(x.double() for x in inputs))
            self.original = model(*inputs)
        self.inputs = inputs
        self.bound = factor * max(self.error(self.original), 2e-7)

    def error(self, result: Tensor) -> float:
        """‖result − truth‖ / ‖truth‖."""
        return float((result.double() - self.truth).norm() / self.truth.norm())

    def check(self, compute: Any) -> None:
        """`compute(*inputs)` is no further from the truth than a small multiple of the original."""
        with torch.no_grad():
            result = compute(*self.inputs)
        assert result.shape == self.original.shape
        assert result.dtype == self.original.dtype
        assert self.error(result) <= self.bound


def assert_as_exact_as(emitted: Any, model: nn.Module, *inputs: Tensor, factor: float = 4.0) -> None:
    """The emitted float32 model is no further from the float64 truth than a small multiple of the original."""
    Exactness(model, *inputs, factor=factor).check(emitted)


def assert_saving_and_capture_keep(emitted: EmittedModel, folder: Path, x: Tensor) -> None:
    """Saved and loaded, at another batch, and as a plan, the model computes the same."""
    emitted.save(folder / "model.pt2")
    loaded = kp.load(folder / "model.pt2")
    assert ops_of(loaded) == ops_of(emitted)
    assert emitted.dynamic_batch
    for inputs in (x, torch.cat([x, x[:1]])):
        torch.testing.assert_close(loaded(inputs), emitted(inputs), rtol=0, atol=0)
    torch.testing.assert_close(kp.capture(emitted, x)(x), emitted(x), rtol=1e-5, atol=1e-5)
