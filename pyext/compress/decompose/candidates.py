"""A layer that may be taken apart, the chains that could take its place, what they cost and what they lose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernelpress.compress.decompose.chains import Geometry, Ranks, chain, make, total_flops
from kernelpress.compress.decompose.factorizations import composed, factorize, relative_error
from kernelpress.compress.decompose.inputs import Layer
from kernelpress.compress.decompose.ranks import Weights
from kernelpress.compress.record import DecomposedLayer

__all__ = ["Candidate", "Chain", "Job"]


@dataclass(frozen=True)
class Candidate:
    """A chain that could take a layer's place, with its costs at the example inputs."""

    method: str
    ranks: Ranks
    layers: tuple[Geometry, ...]
    flops: int
    parameters: int

    def __str__(self) -> str:
        return f"{self.method}, rank {', '.join(map(str, self.ranks))}"


@dataclass(frozen=True, eq=False)
class Chain:
    """The modules of a candidate, and their relative errors."""

    candidate: Candidate
    modules: tuple[nn.Module, ...]
    weight_error: float
    output_error: float


@dataclass(frozen=True, eq=False)
class Job:
    """A layer that may be taken apart."""

    layer: Layer
    weights: Weights
    layers: tuple[Geometry, ...]
    """What is there now: the layer, or the chain that stands for it."""
    seed: int

    @property
    def geometry(self) -> Geometry:
        """The layer's own."""
        return self.weights.layer

    @property
    def flops(self) -> int:
        """Of what is there now, at the example inputs."""
        return self._flops(self.layers)

    @property
    def parameters(self) -> int:
        """Of what is there now."""
        return sum(layer.parameters for layer in self.layers)

    def candidate(self, method: str, ranks: Ranks) -> Candidate:
        """The chain of this method and these ranks."""
        layers = chain(self.geometry, method, ranks)
        return Candidate(method, ranks, layers, self._flops(layers), sum(layer.parameters for layer in layers))

    def is_cheaper(self, candidate: Candidate) -> bool:
        """Whether it takes neither more FLOPs nor more parameters than what is there."""
        if len(self.layers) > 1 and candidate.flops == self.flops:
            return False
        return candidate.flops <= self.flops and candidate.parameters <= self.parameters

    def made(self, candidate: Candidate) -> Chain:
        """The chain itself."""
        weights, last = self.weights, self.layer.parts[-1]
        weight: Tensor = last.weight
        groups = [
            [f.to(weight.dtype) for f in factorize(w, candidate.method, candidate.ranks, gram, seed=self.seed)]
            for w, gram in zip(weights.weights, weights.grams, strict=True)
        ]
        modules = tuple(
            make(
                geometry,
                torch.cat(factors).to(weight.device),
                last.bias if geometry.has_bias else None,
                trains=weight.requires_grad,
            ).train(last.training)
            for geometry, *factors in zip(candidate.layers, *groups, strict=True)
        )
        found = [composed([factor.double() for factor in factors]) for factors in groups]
        lost = relative_error(found, weights.weights, [None] * len(found))
        if weights.is_whitened:
            lost_outputs = relative_error(found, weights.weights, weights.grams)
        else:
            lost_outputs = self._output_error(modules)
        return Chain(candidate, modules, lost, lost_outputs)

    def expected_loss(self, candidate: Candidate) -> float:
        """About the squared relative error: what ranks cut of the singular values; CP's is only known afterwards."""
        if candidate.method == "cp":
            return self.made(candidate).output_error ** 2
        cut = whole = 0.0
        for group in self.weights.spectra(candidate.method, of_outputs=True):
            cut += sum(float((values[rank:] ** 2).sum()) for values, rank in zip(group, candidate.ranks, strict=True))
            whole += float((group[0] ** 2).sum())
        return cut / whole if whole > 0 else 0.0

    def told(self, made: Chain, milliseconds: tuple[float, ...]) -> DecomposedLayer:
        """What the record says of it."""
        return DecomposedLayer(
            layer=self.layer.path,
            method=made.candidate.method,
            ranks=made.candidate.ranks,
            weight_error=made.weight_error,
            output_error=made.output_error,
            flops_before=self.flops,
            flops_after=made.candidate.flops,
            parameters_before=self.parameters,
            parameters_after=made.candidate.parameters,
            milliseconds=milliseconds,
            is_whitened=self.weights.is_whitened,
        )

    def costs(self, candidate: Candidate) -> str:
        """Both costs before and after."""
        return f"FLOPs {self.flops:,} → {candidate.flops:,}, parameters {self.parameters:,} → {candidate.parameters:,}"

    def _flops(self, layers: Sequence[Geometry]) -> int:
        return sum(count * total_flops(layers, size) for count, size in self.layer.sizes)

    def _output_error(self, modules: Sequence[nn.Module]) -> float:
        """On what the layer read at the example inputs, its bias aside."""
        bias = self.layer.parts[-1].bias
        shift = 0 if bias is None else bias if self.geometry.is_linear else bias[:, None, None]
        expected = self.layer.module(self.layer.probe) - shift
        lost = nn.Sequential(*modules)(self.layer.probe) - shift - expected
        return float(lost.double().norm() / expected.double().norm().clamp_min(1e-300))
