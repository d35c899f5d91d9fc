"""How many channels the layers of a chain pass on: rules that look at one layer, its weight or its inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from kernelpress.compress.decompose import vbmf
from kernelpress.compress.decompose.chains import Geometry, Ranks, most_ranks, useful_ranks
from kernelpress.compress.decompose.factorizations import spectra

__all__ = ["RULES", "Rank", "Unranked", "Weights", "check_rank", "energy_ranks", "ranks_for"]

Rank = int | float | tuple[int, ...] | Literal["energy", "vbmf"]
RULES = ("energy", "vbmf")


class Unranked(ValueError):  # noqa: N818 (it is told as a reason, not as a mistake)
    """Why a rule gives a layer no ranks."""


@dataclass(frozen=True, eq=False)
class Weights:
    """The weight of each group of a layer, in float64, with the second moments of its inputs if they are known."""

    layer: Geometry
    weights: tuple[Tensor, ...]
    grams: tuple[Tensor | None, ...]
    precision: float
    """The distance of one from the next number in the dtype of the weight."""
    known: dict[tuple[str, bool], list[list[Tensor]]] = field(default_factory=dict)
    """Spectra that were computed before."""

    @property
    def is_whitened(self) -> bool:
        """Whether the second moments of all inputs are known."""
        return all(gram is not None for gram in self.grams)

    def spectra(self, method: str, *, of_outputs: bool) -> list[list[Tensor]]:
        """For each group the singular values that each rank cuts."""
        key = method, of_outputs and self.is_whitened
        if key not in self.known:
            grams = self.grams if key[1] else [None] * len(self.weights)
            self.known[key] = [spectra(weight, method, gram) for weight, gram in zip(self.weights, grams, strict=True)]
        return self.known[key]


def check_rank(rank: object, name: str = "rank", further: tuple[str, ...] = ()) -> None:
    """Raises `TypeError` or `ValueError` for what is no rank nor the name of a rule, `further` ones being told."""
    if isinstance(rank, Mapping):
        for layer, value in rank.items():
            check_rank(value, f"rank[{layer!r}]")
        return
    sizes = rank if isinstance(rank, (tuple, list)) else [rank] if type(rank) is int else []
    if sizes:
        if any(type(size) is not int or size < 1 for size in sizes):
            raise ValueError(f"{name}: expected ranks of at least 1, got {rank!r}")
    elif type(rank) is float:
        if not 0 < rank <= 1:
            raise ValueError(f"{name}: expected a share of the largest rank in (0, 1], got {rank!r}")
    elif not isinstance(rank, str) or rank not in RULES:
        kinds = f"an integer, a share, a tuple of integers or one of {', '.join(map(repr, (*RULES, *further)))}"
        raise (ValueError if isinstance(rank, str) else TypeError)(f"{name}: expected {kinds}, got {rank!r}")


def ranks_for(rank: Rank, method: str, weights: Weights, *, energy: float, round_to: int) -> Ranks:
    """The ranks of `method` by the rule `rank`. Raises `Unranked` where it gives none."""
    most = most_ranks(method, weights.layer)
    if type(rank) is int or isinstance(rank, (tuple, list)):
        sizes = tuple(rank) if isinstance(rank, (tuple, list)) else (min(rank, max(most)),) * len(most)
        if len(sizes) != len(most):
            raise Unranked(f"{method} takes {len(most)} ranks here, got {[*sizes]}")
        if (type(rank) is int and rank > max(most)) or (type(rank) is not int and any(map(int.__gt__, sizes, most))):
            shown = [*sizes] if isinstance(rank, (tuple, list)) else rank
            raise Unranked(f"{shown} is above the largest rank of {method} here, {', '.join(map(str, most))}")
        return useful_ranks(tuple(map(min, sizes, most)), method, weights.layer)
    if isinstance(rank, float):
        found = [math.ceil(rank * size) for size in most]
    elif rank == "energy":
        return energy_ranks(energy, method, weights, round_to=round_to)
    else:
        found = [max(sizes) for sizes in zip(*_variational(method, weights), strict=True)]
    return _usable(found, method, weights, round_to)


def energy_ranks(energy: float, method: str, weights: Weights, *, round_to: int) -> Ranks:
    """The least ranks whose squared singular values come to a share `energy` of all."""
    groups = [[_energy_rank(values, energy) for values in group] for group in weights.spectra(method, of_outputs=True)]
    return _usable([max(sizes) for sizes in zip(*groups, strict=True)], method, weights, round_to)


def _energy_rank(values: Tensor, energy: float) -> int:
    shares = (values**2).cumsum(0)
    return 1 + int((shares < energy * shares[-1] * (1 - 1e-12)).sum()) if bool(shares[-1] > 0) else 1


def _variational(method: str, weights: Weights) -> list[list[int]]:
    """The ranks by `vbmf` of each group; all of a weight in which nothing stands out of the noise."""
    shapes = _shapes(method, weights.layer)
    whole = most_ranks(method, weights.layer)
    whole = whole * len(shapes) if len(whole) < len(shapes) else whole
    return [
        [
            vbmf.rank(values, rows, columns) or (most if bool(weight.any()) else 1)
            for values, (rows, columns), most in zip(group, shapes, whole, strict=True)
        ]
        for group, weight in zip(weights.spectra(method, of_outputs=False), weights.weights, strict=True)
    ]


def _shapes(method: str, layer: Geometry) -> list[tuple[int, int]]:
    """Of the matrices whose singular values `spectra` gives."""
    outputs, inputs, rows, columns = layer.weight_shape
    inner, outer = (inputs, outputs * rows * columns), (outputs, inputs * rows * columns)
    middle = (inputs * rows, outputs * columns)
    return {
        "svd": [outer],
        "spatial_svd": [middle],
        "tucker2": [inner, outer],
        "cp": [inner, outer],
        "tt": [inner, middle, outer],
    }[method]


def _usable(found: Sequence[int], method: str, weights: Weights, round_to: int) -> Ranks:
    """Rounded up to whole multiples of channels, never beyond the rank that the weight has."""
    layer, most = weights.layer, most_ranks(method, weights.layer)
    unit = round_to // math.gcd(round_to, layer.groups)
    if method == "cp":
        # Of a tensor nobody knows the rank; it is that of a matrix where one axis is left.
        found, held = [max(found)], [most[0]]
        if not any(weight.any() for weight in weights.weights):
            held = [1]
        elif all(
            _held(values, weights.precision) == 1
            for group in weights.spectra(method, of_outputs=False)
            for values in group
        ):
            held = [min(layer.kernel)]
    else:
        groups = [
            [_held(values, weights.precision) for values in group]
            for group in weights.spectra(method, of_outputs=False)
        ]
        held = [max(sizes) for sizes in zip(*groups, strict=True)]
    rounded = (math.ceil(size / unit) * unit for size in found)
    return useful_ranks(tuple(map(min, rounded, most, held)), method, layer)


def _held(values: Tensor, precision: float) -> int:
    """How many singular values are no rounding of the weight's dtype, a random matrix of below 0.6 `precision` of its
    norm; at least one."""
    return max(1, int((values > values[0] * precision).sum()))
