"""The mathematics of decomposition against optima that are known, and against slow numeric solutions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from kernelpress import compress
from kernelpress.compress import record_of
from kernelpress.compress.decompose import cp, vbmf
from kernelpress.compress.decompose.chains import Geometry, most_ranks, useful_ranks
from kernelpress.compress.decompose.factorizations import composed, factorize, relative_error


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _lost(weight: Tensor, method: str, ranks: tuple[int, ...], gram: Tensor | None = None) -> float:
    return relative_error([composed(factorize(weight, method, ranks, gram))], [weight], [gram])


def _tail(matrix: Tensor, rank: int) -> float:
    """The least error of rank `rank`, by Eckart and Young."""
    values = torch.linalg.svdvals(matrix)
    return float(values[rank:].norm() / values.norm())


class TestFactorizations:
    def test_svd_and_spatial_svd_are_the_best_of_their_rank(self) -> None:
        weight = _random(10, 7, 3, 5)
        unfolded = weight.permute(0, 3, 1, 2).reshape(50, 21)
        for rank in (1, 4, 9):
            assert _lost(weight, "svd", (rank,)) == pytest.approx(_tail(weight.flatten(1), rank), rel=1e-9)
            assert _lost(weight, "spatial_svd", (rank,)) == pytest.approx(_tail(unfolded, rank), rel=1e-9)

    @pytest.mark.parametrize(
        ("method", "ranks"),
        [("tucker2", (4, 5)), ("tt", (4, 6, 5)), ("spatial_svd", (6,)), ("svd", (5,)), ("cp", (3,))],
    )
    def test_weight_of_low_rank_is_found_again(self, method: str, ranks: tuple[int, ...]) -> None:
        torch.manual_seed(3)
        shapes = {
            "tucker2": [(4, 7, 1, 1), (5, 4, 3, 5), (9, 5, 1, 1)],
            "tt": [(4, 7, 1, 1), (6, 4, 3, 1), (5, 6, 1, 5), (9, 5, 1, 1)],
            "spatial_svd": [(6, 7, 3, 1), (9, 6, 1, 5)],
            "svd": [(5, 7, 3, 5), (9, 5, 1, 1)],
            "cp": [(3, 7, 1, 1), (3, 1, 3, 1), (3, 1, 1, 5), (9, 3, 1, 1)],
        }[method]
        weight = composed([_random(*shape) for shape in shapes])
        assert _lost(weight, method, ranks) < (1e-4 if method == "cp" else 1e-9)
        below = tuple(rank - 1 for rank in ranks)
        assert _lost(weight, method, below) > 1e-2

    def test_tucker_iterates_beyond_the_higher_order_svd(self) -> None:
        weight = _random(12, 12, 3, 3)
        inner = torch.linalg.svd(weight.movedim(1, 0).flatten(1)).U[:, :3]
        outer = torch.linalg.svd(weight.flatten(1)).U[:, :3]
        start = torch.einsum("oijk,ia,ba,op,qp->qbjk", weight, inner, inner, outer, outer)
        assert _lost(weight, "tucker2", (3, 3)) < 0.999 * float((start - weight).norm() / weight.norm())

    @pytest.mark.parametrize("method", ["svd", "spatial_svd", "tucker2", "tt", "cp"])
    def test_whitened_factors_lose_less_of_the_outputs(self, method: str) -> None:
        weight = _random(10, 8, 3, 3)
        inputs = _random(8, 8) @ torch.diag(torch.logspace(0, -2, 8, dtype=torch.float64))
        patches = torch.einsum("ab,nbt->nat", inputs, _random(2000, 8, 9)).flatten(1)
        gram = patches.T @ patches
        layer = Geometry(8, 10, (3, 3))
        ranks = useful_ranks(tuple(max(1, rank // 3) for rank in most_ranks(method, layer)), method, layer)
        plain = composed(factorize(weight, method, ranks))
        whitened = composed(factorize(weight, method, ranks, gram))
        assert relative_error([whitened], [weight], [gram]) < 0.9 * relative_error([plain], [weight], [gram])
        assert (
            relative_error([whitened], [weight], [None]) > relative_error([plain], [weight], [None]) or method == "cp"
        )

    def test_whitened_svd_is_the_best_for_the_outputs(self) -> None:
        """Among all of rank 3: the outputs' own principal components."""
        weight, x = _random(9, 12, 1, 1), _random(500, 12) @ _random(12, 12)
        outputs = x @ weight[:, :, 0, 0].T
        assert _lost(weight, "svd", (3,), x.T @ x) == pytest.approx(_tail(outputs, 3), rel=1e-9)

    @pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
    def test_second_moments_are_those_of_padded_strided_patches(self, padding_mode: str) -> None:
        """The error by moments is that of the outputs on the data."""
        model = nn.Sequential(
            nn.Conv2d(8, 12, (3, 5), (2, 1), (2, 1), (1, 2), groups=2, padding_mode=padding_mode), nn.Flatten(),
            nn.Linear(12 * 9 * 6, 16, bias=False),
        ).double()  # fmt: skip
        x = _random(6, 8, 16, 12)
        batches = [(x[:4], torch.zeros(4)), [x[4:], None]]
        small = compress.decompose(model, x[:1], method="svd", rank=3, data=batches)
        first, second = record_of(small)[-1].decomposed
        bias = model[0].bias[:, None, None]
        model.requires_grad_(False)
        expected = (model[0](x) - bias).unflatten(1, (2, 6)).transpose(0, 1).flatten(1)
        lost = (small[0](x) - bias).unflatten(1, (2, 6)).transpose(0, 1).flatten(1) - expected
        assert first.output_error == pytest.approx(float((lost.norm() / expected.norm()).detach()), rel=1e-6)
        # The second layer was whitened by what it reads in the original.
        hidden = model[:2](x)
        assert second.output_error == pytest.approx(_tail(model[2](hidden), 3), rel=1e-6)


class TestCp:
    def test_correction_keeps_the_error_and_shrinks_what_cancels(self) -> None:
        """Two products of 50 times the tensor's size cancel each other up to a hundredth of them."""
        torch.manual_seed(0)
        factors = [_random(6, 4) for _ in range(4)]
        for axis, factor in enumerate(factors):
            factor[:, 3] = factor[:, 2] + (0.01 * _random(6) if axis else 0)
        factors[0][:, 2] *= 50
        factors[0][:, 3] *= -50
        tensor = torch.einsum("or,cr,hr,wr->ochw", *factors)
        error = 0.02 * float(tensor.norm())
        corrected = cp.corrected(tensor, factors, error)
        found = torch.einsum("or,cr,hr,wr->ochw", *corrected)
        assert float((found - tensor).norm()) <= error * (1 + 2 * cp.SLACK)
        assert cp.sensitivity(corrected) < 0.1 * cp.sensitivity(factors)

    def test_decomposition_is_corrected(self) -> None:
        tensor = _random(6, 5, 3, 3)
        plain, corrected = (cp.decomposition(tensor, 12, correct=correct) for correct in (False, True))
        lost = [float((torch.einsum("or,cr,hr,wr->ochw", *f) - tensor).norm()) for f in (plain, corrected)]
        assert lost[1] <= lost[0] * (1 + 2 * cp.SLACK)
        assert cp.sensitivity(corrected) < cp.sensitivity(plain)

    def test_sensitivity_is_the_change_that_noise_makes(self) -> None:
        factors = [_random(size, 3) for size in (5, 4, 3, 2)]
        tensor = torch.einsum("or,cr,hr,wr->ochw", *factors)
        small = 1e-4
        changes = [
            (torch.einsum("or,cr,hr,wr->ochw", *[f + small * torch.randn_like(f) for f in factors]) - tensor).norm()
            ** 2
            for _ in range(2000)
        ]
        measured = float(torch.stack(changes).mean()) / small**2
        assert measured == pytest.approx(cp.sensitivity(factors), rel=0.1)

    def test_same_seed_gives_the_same_factors(self) -> None:
        tensor = _random(6, 5, 3, 3)
        first, again, other = (cp.decomposition(tensor, 12, seed=seed) for seed in (1, 1, 2))
        assert all(map(torch.equal, first, again))
        assert len(other) == 4

    def test_zero_tensor_has_zero_factors(self) -> None:
        factors = cp.decomposition(torch.zeros(4, 3, 2, 2, dtype=torch.float64), 2)
        assert all(bool(factor.isfinite().all()) for factor in factors)
        assert not torch.einsum("or,cr,hr,wr->ochw", *factors).any()


def _component(gamma: float, rows: int, columns: int, variance: float) -> tuple[float, float]:
    """The least free energy (eq. of the paper's scalar problem) of one component, and its mean, by brute force: the
    variational updates with empirical priors, from several starts; the null solution has the energy 0."""
    best = (0.0, 0.0)
    for start in (0.3, 1.0, 3.0):
        a = b = start * math.sqrt(gamma)
        va = vb = 0.1
        for _ in range(3000):
            # Empirical Bayes: priors that fit the posterior, each of all rows or columns.
            ca, cb = a * a / columns + va, b * b / rows + vb
            va = 1 / ((b * b + rows * vb) / variance + 1 / ca)
            a = va / variance * gamma * b
            vb = 1 / ((a * a + columns * va) / variance + 1 / cb)
            b = vb / variance * gamma * a
        ca, cb = a * a / columns + va, b * b / rows + vb
        energy = (
            columns * math.log(ca / va) + rows * math.log(cb / vb)
            + (a * a + columns * va) / ca + (b * b + rows * vb) / cb - (rows + columns)
            + (-2 * a * b * gamma + (a * a + columns * va) * (b * b + rows * vb)) / variance
        )  # fmt: skip
        best = min(best, (energy, a * b))
    return best


class TestVbmf:
    @pytest.mark.parametrize("ratio", [1.0, 0.5, 0.1, 0.01])
    def test_threshold_is_that_of_the_paper(self, ratio: float) -> None:
        """τ̲ ≈ 2.5129 √α, the zero of Φ(τ) + Φ(τ ÷ α)."""
        tau = 2.5129 * math.sqrt(ratio)
        assert vbmf.threshold(ratio) == pytest.approx((1 + tau) * (1 + ratio / tau), rel=0.03 if ratio < 1 else 1e-4)

    @pytest.mark.parametrize(("rows", "columns"), [(20, 20), (20, 50), (8, 100)])
    def test_components_stay_from_the_threshold_on_that_a_numeric_solution_has(self, rows: int, columns: int) -> None:
        """The free energy of one component falls below that of none exactly there."""
        variance = 0.7
        gamma = math.sqrt(columns * variance * vbmf.threshold(rows / columns))
        assert _component(0.99 * gamma, rows, columns, variance)[0] == 0.0
        energy, mean = _component(1.01 * gamma, rows, columns, variance)
        assert energy < 0
        # Their closed form of what is left of γ.
        g = 1.01 * gamma
        noise = (rows + columns) * variance / g**2
        shrunk = g / 2 * (1 - noise + math.sqrt((1 - noise) ** 2 - 4 * rows * columns * variance**2 / g**4))
        assert mean == pytest.approx(shrunk, rel=1e-3)
        for factor, rank in ((0.999, 0), (1.001, 1)):
            assert vbmf.rank(torch.tensor([factor * gamma] + [0.0] * (rows - 1)), rows, columns, variance) == rank

    def test_noise_variance_has_the_least_free_energy_of_all(self) -> None:
        for rows, columns, rank in ((20, 20, 3), (16, 60, 5), (40, 10, 0), (12, 30, 12)):
            matrix = 2 * _random(rows, rank) @ _random(rank, columns) + 0.5 * _random(rows, columns)
            values = torch.linalg.svdvals(matrix)
            found = vbmf.noise_variance(values, rows, columns)
            short, long = sorted((rows, columns))
            squares = values**2
            most = float(squares.sum()) / (short * long)
            grid = [most * 0.002 * step for step in range(1, 501)]
            least = min(vbmf.free_energy(squares, variance, short, long) for variance in grid)
            assert vbmf.free_energy(squares, found, short, long) <= least + 1e-6

    @pytest.mark.parametrize(("rows", "columns"), [(64, 64), (40, 200), (200, 40)])
    @pytest.mark.parametrize("rank", [1, 5, 12])
    def test_rank_under_noise_is_found(self, rows: int, columns: int, rank: int) -> None:
        matrix = _random(rows, rank) @ _random(rank, columns) + 0.3 * _random(rows, columns)
        assert vbmf.rank(torch.linalg.svdvals(matrix), rows, columns) == rank
        assert vbmf.rank(torch.linalg.svdvals(matrix) * 1e-6, rows, columns) == rank, "whatever the scale"

    def test_matrices_that_are_noise_or_nothing_have_rank_zero(self) -> None:
        assert vbmf.rank(torch.zeros(30), 30, 50) == 0
        assert vbmf.rank(torch.linalg.svdvals(_random(64, 64)), 64, 64) == 0
        assert vbmf.rank(torch.tensor([3.0] + [0.0] * 29), 30, 50) == 1
        assert vbmf.rank(torch.tensor([3.0]), 1, 1) <= 1
