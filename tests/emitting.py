"""Helpers of the tests of emission: choosing without timing, weights that matter, exactness against float64."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import kernelpress as kp
from kernelpress.emit import Candidate, EmittedModel
from kernelpress.emit.evaluate import Cost
from kernelpress.runtime import native
from kernelpress.runtime.torch_private import BatchNorm

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


def ops_of(emitted: EmittedModel) -> list[str]:
    """Names of the graph's operations, ours without their namespace."""
    nodes = (node for node in emitted.body.graph.nodes if node.op == "call_function")
    return [str(node.target).removesuffix(".default").removeprefix("kernelpress.") for node in nodes]


def randomize(model: nn.Module) -> nn.Module:
    """Gives BatchNorm layers statistics and weights that matter; eval mode."""
    for module in model.modules():
        if isinstance(module, BatchNorm):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return model.eval()


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
