"""Decomposition: chains of layers that compute what one did, ranks by every rule, and what stays with its reason."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support import relative_error
from torch import Tensor, nn

from kernelpress import compress, measure, models
from kernelpress.compress import record_of
from kernelpress.compress.decompose.chains import METHODS

X = torch.randn(2, 12, 17, 19)
EXACT = 1e-5


def _decomposed(model: nn.Module, x: Tensor = X, **arguments: Any) -> tuple[nn.Module, Any]:
    """The copy, and its record."""
    small = compress.decompose(model, x, **arguments)
    return small, record_of(small)[-1]


def _conv(**arguments: Any) -> nn.Sequential:
    """The convolution of pytorch-tensor-decompositions#2, fasterai#24 and musco."""
    geometry = {"stride": (2, 1), "padding": (2, 1), "dilation": (1, 2)} | arguments
    return nn.Sequential(nn.Conv2d(12, 16, (3, 5), **geometry))


def _low_rank(outputs: int, inputs: int, rank: int) -> Tensor:
    return torch.randn(outputs, rank) @ torch.randn(rank, inputs) / (rank * inputs) ** 0.5


class TestGeometry:
    @pytest.mark.parametrize("groups", [1, 4, 2], ids="groups {}".format)
    @pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
    @pytest.mark.parametrize("method", METHODS)
    def test_chain_of_full_rank_computes_the_same(
        self, method: str, padding_mode: str, groups: int, tmp_path: Path
    ) -> None:
        model = _conv(padding_mode=padding_mode, groups=groups)
        small, record = _decomposed(model, method=method, rank=1.0, only_cheaper=False)
        for x in (X, torch.randn(1, 12, 8, 9), torch.randn(12, 11, 13)):
            assert relative_error(small(x), model(x)) <= EXACT
        (chain,) = record.decomposed
        assert chain.weight_error <= EXACT
        assert chain.output_error <= EXACT
        assert [layer.bias is not None for layer in small[0]][:-1] == [False] * (len(small[0]) - 1)
        assert torch.equal(small[0][-1].bias, model[0].bias)
        compress.save(small, tmp_path / "small")
        loaded = compress.load(tmp_path / "small", _conv(padding_mode=padding_mode, groups=groups))
        assert torch.equal(loaded(X), small(X))
        assert record_of(loaded) == record_of(small)

    @pytest.mark.parametrize(
        ("method", "kernels", "strides", "dilations"),
        [
            ("svd", [(3, 5), (1, 1)], [(2, 1), (1, 1)], [(1, 2), (1, 1)]),
            ("spatial_svd", [(3, 1), (1, 5)], [(2, 1), (1, 1)], [(1, 1), (1, 2)]),
            ("tucker2", [(1, 1), (3, 5), (1, 1)], [(1, 1), (2, 1), (1, 1)], [(1, 1), (1, 2), (1, 1)]),
            ("cp", [(1, 1), (3, 1), (1, 5), (1, 1)], [(1, 1), (2, 1), (1, 1), (1, 1)], [(1, 1)] * 2 + [(1, 2), (1, 1)]),
            ("tt", [(1, 1), (3, 1), (1, 5), (1, 1)], [(1, 1), (2, 1), (1, 1), (1, 1)], [(1, 1)] * 2 + [(1, 2), (1, 1)]),
        ],
    )
    def test_stride_and_dilation_are_those_of_the_layer_in_the_middle(
        self, method: str, kernels: Any, strides: Any, dilations: Any
    ) -> None:
        small, _ = _decomposed(_conv(), method=method, rank=3)
        assert [layer.kernel_size for layer in small[0]] == kernels
        assert [layer.stride for layer in small[0]] == strides
        assert [layer.dilation for layer in small[0]] == dilations
        assert [layer.bias is not None for layer in small[0]] == [False] * (len(kernels) - 1) + [True]

    @pytest.mark.parametrize("method", [*METHODS, "auto"])
    @pytest.mark.parametrize(
        "layer",
        [
            nn.Conv2d(12, 16, 1, stride=2, padding=1), nn.Conv2d(12, 16, 1, groups=4, bias=False),
            nn.Conv2d(12, 16, (1, 5), stride=(2, 3), padding=(1, 2)), nn.Conv2d(12, 16, (3, 1), padding=(0, 2)),
            nn.Conv2d(12, 24, 3, groups=12, padding=1), nn.Conv2d(12, 12, 3, groups=12, padding="same"),
            nn.Conv2d(12, 1, 3), nn.Conv2d(12, 16, 3, padding="valid", dtype=torch.float64), nn.Conv2d(12, 5, (5, 7)),
        ],
        ids=str,
    )  # fmt: skip
    def test_narrow_grouped_and_depthwise_kernels_are_exact_at_full_rank(self, layer: nn.Module, method: str) -> None:
        model = nn.Sequential(layer)
        x = X.to(layer.weight.dtype)
        small, record = _decomposed(model, x, method=method, rank=1.0, only_cheaper=False)
        assert relative_error(small(x), model(x)) <= EXACT
        assert record.decomposed
        assert all(part.weight.dtype is layer.weight.dtype for part in small[0])

    @pytest.mark.parametrize("method", METHODS)
    def test_pointwise_layers_have_two_factors(self, method: str) -> None:
        model = nn.Sequential(nn.Conv2d(12, 16, 1), nn.Flatten(), nn.Linear(16 * 17 * 19, 10))
        small, record = _decomposed(model, method=method, rank=4)
        assert [chain.method for chain in record.decomposed] == ["svd", "svd"]
        assert [str(change) for change in record.changes] == [
            "replaced by Conv2d 12→4, Conv2d 4→16", "replaced by Linear 5168→4, Linear 4→10"
        ]  # fmt: skip
        assert small[0][1].bias is not None
        assert small[2][0].bias is None

    @pytest.mark.parametrize(
        ("layer", "x", "reason"),
        [
            (nn.Conv1d(12, 16, 3), torch.randn(2, 12, 9), "no method fits Conv1d"),
            (nn.ConvTranspose2d(12, 16, 3), X, "no method fits ConvTranspose2d"),
            (nn.Conv3d(2, 4, 1), torch.randn(1, 2, 3, 3, 3), "no method fits Conv3d"),
            (nn.Conv2d(12, 16, (2, 3), padding="same"), X, "its padding differs between the sides"),
            (nn.Conv2d(12, 12, 3, groups=12), X, "would cost more: FLOPs .* → .*, parameters 120 → "),
        ],
        ids=lambda value: str(value) if isinstance(value, nn.Module) else "",
    )
    @pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
    def test_what_no_method_fits_stays_with_its_reason(self, layer: nn.Module, x: Tensor, reason: str) -> None:
        small, record = _decomposed(nn.Sequential(layer), x, method="tucker2", rank=1.0)
        assert type(small[0]) is type(layer)
        (skipped,) = record.skipped
        assert skipped.layers == ("0",)
        assert skipped.channels == layer.out_channels
        assert re.search(reason, skipped.reason)

    def test_factors_train_where_the_weight_did(self) -> None:
        model = nn.Sequential(nn.Conv2d(12, 16, 3), nn.Conv2d(16, 16, 3)).train()
        model[0].weight.requires_grad_(False)
        small, _ = _decomposed(model, rank=4)
        assert small[0].training
        assert [p.requires_grad for p in small[0].parameters()] == [False] * (len(small[0])) + [True]
        small(X).sum().backward()
        assert all(p.grad is not None for p in small[1].parameters())


class TestRanks:
    @staticmethod
    def ranks(weight: Tensor, **arguments: Any) -> tuple[int, ...] | str:
        """Those of a linear layer of this weight, or the reason why it stays."""
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight.data.copy_(weight)
        small, record = _decomposed(nn.Sequential(layer), torch.randn(3, weight.shape[1]), **arguments)
        assert (record.decomposed == ()) == isinstance(small[0], nn.Linear)
        return record.decomposed[0].ranks if record.decomposed else record.skipped[0].reason

    @pytest.mark.parametrize("rank", ["energy", "vbmf", 0.5])
    @pytest.mark.parametrize("round_to", [1, 8])
    def test_weights_without_a_spectrum_and_of_rank_one_have_rank_one(self, rank: Any, round_to: int) -> None:
        assert self.ranks(torch.zeros(64, 64), rank=rank, round_to=round_to) == (1,)
        assert self.ranks(torch.outer(torch.randn(64), torch.randn(64)), rank=rank, round_to=round_to) == (1,)

    @pytest.mark.parametrize("rank", ["energy", "vbmf", 1.0, 33])
    def test_white_noise_stays_with_both_counts(self, rank: Any) -> None:
        reason = self.ranks(torch.randn(64, 64), rank=rank)
        assert re.search(r"svd, rank \d+ would cost more: FLOPs 24,576 → .*, parameters 4,160 → [45678],\d\d\d", reason)

    def test_half_rank_costs_as_much_and_is_taken(self) -> None:
        assert self.ranks(torch.randn(64, 64), rank=32) == (32,)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weight_that_is_not_finite_is_named(self, value: float) -> None:
        model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
        model[1][0].weight.data[3, 4] = value
        with pytest.raises(ValueError, match=r"model: 1\.0\.weight holds NaN or Inf"):
            compress.decompose(model, torch.randn(2, 8))
        small, _ = _decomposed(model, torch.randn(2, 8), ignore="1.0", rank=2)
        assert not isinstance(small[0], nn.Linear)

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("rank", ["energy", "vbmf", 0.3])
    def test_ranks_are_multiples_of_eight_or_all(self, method: str, rank: Any) -> None:
        core = torch.randn(12, 10, 3, 3)
        weight = torch.einsum("opij,ao,bp->abij", core, torch.randn(40, 12), torch.randn(20, 10))
        model = nn.Sequential(nn.Conv2d(20, 40, 3, padding=1), nn.Flatten(), nn.Linear(40 * 81, 10))
        model[0].weight.data.copy_(weight + 0.02 * torch.randn_like(weight))
        _, record = _decomposed(model, torch.randn(1, 20, 9, 9), method=method, rank=rank, only_cheaper=False)
        assert record.decomposed
        for chain in record.decomposed:
            all_of = (10,) if chain.layer == "2" else (20, 40, 60, 120)
            assert all(size % 8 == 0 or size in all_of for size in chain.ranks), chain

    def test_grouped_layers_pass_on_multiples_of_eight_channels(self) -> None:
        model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, groups=4))
        model[0].weight.data.copy_(torch.einsum("oi,jk->oijk", torch.cat([_low_rank(16, 16, 3)] * 4), torch.ones(3, 3)))
        rules = {"method": "tucker2", "rank": "energy", "energy": 0.9999}
        small, record = _decomposed(model, torch.randn(1, 64, 8, 8), **rules)
        assert record.decomposed[0].ranks == (3, 3), "not more than it has"
        model[0].weight.data.add_(torch.randn_like(model[0].weight) * 1e-4)
        small, record = _decomposed(model, torch.randn(1, 64, 8, 8), **rules)
        assert record.decomposed[0].ranks == (4, 4)
        assert small[0][0].out_channels == 16

    def test_energy_is_the_share_that_stays(self) -> None:
        weight = torch.diag(torch.tensor([4.0, 2.0, 2.0, 1.0] + [0.0] * 28))
        for energy, rank in ((16 / 25, 1), (0.65, 2), (24 / 25, 3), (1.0, 4)):
            assert self.ranks(weight, rank="energy", energy=energy, round_to=1) == (rank,)

    def test_ranks_by_layer(self) -> None:
        model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(3)], nn.Sequential(nn.Linear(16, 16)))
        small, record = _decomposed(model, torch.randn(2, 16), rank={"0": 3, "1": "energy", "3": (2,)}, energy=0.3)
        assert {chain.layer: chain.ranks for chain in record.decomposed} == {"0": (3,), "1": (8,), "3.0": (2,)}
        assert isinstance(small[2], nn.Linear)
        assert record.skipped[0].reason == "not named in rank"

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [
            ({"rank": 0}, r"rank: expected ranks of at least 1, got 0"),
            ({"rank": (2, -1)}, r"rank: expected ranks of at least 1, got \(2, -1\)"),
            ({"rank": {"0": 0}}, r"rank\['0'\]: expected ranks of at least 1, got 0"),
            ({"rank": 17}, r"rank: 17 is above the largest rank of svd here, 16"),
            ({"rank": {"0": 17}}, r"rank\['0'\]: 17 is above the largest rank of svd here, 16"),
            ({"rank": {"0": 8, "1": 17}}, r"rank\['1'\]: 17 is above the largest rank of svd here, 16"),
            ({"rank": (8, 8)}, r"rank: svd takes 1 ranks here, got \[8, 8\]"),
            ({"rank": 0.0}, r"rank: expected a share of the largest rank in \(0, 1\], got 0\.0"),
            ({"rank": 1.5}, r"rank: expected a share"),
            ({"rank": float("nan")}, r"rank: expected a share"),
            ({"rank": "evbmf"}, r"rank: expected an integer, .* 'energy', 'vbmf', 'flops', 'sensitivity', got 'evbmf'"),
            ({"rank": {"layer": 3}}, r"rank: Sequential has no module named 'layer'"),
            ({"ignore": ["00"]}, r"ignore: Sequential has no module named '00', did you mean '0'\?"),
            ({"method": "tucker"}, r"method: expected one of 'svd', .*'auto', got 'tucker'"),
            ({"energy": 0}, r"energy: expected a share in \(0, 1\], got 0"),
            ({"round_to": 0}, r"round_to: expected a positive integer, got 0"),
            ({"data": []}, r"data: expected at least one batch, got none"),
            ({"data": [torch.full((2, 16), torch.nan)]}, r"data: the inputs of 0 hold NaN or Inf"),
        ],
        ids=str,
    )  # fmt: skip
    def test_bad_arguments_are_named(self, arguments: Any, error: str) -> None:
        with pytest.raises(ValueError, match=error):
            compress.decompose(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), torch.randn(2, 16), **arguments)

    def test_arguments_of_other_types_are_named(self) -> None:
        model = nn.Sequential(nn.Linear(16, 16))
        with pytest.raises(TypeError, match=r"rank: expected an integer, .* got None"):
            compress.decompose(model, torch.randn(2, 16), rank=None)
        with pytest.raises(TypeError, match=r"data: expected batches that are tensors or tuples of at least 1, got"):
            compress.decompose(model, torch.randn(2, 16), data=[{"x": 1}])
        with pytest.raises(ValueError, match=r"model: expected a module with layers in it, got a single Linear"):
            compress.decompose(nn.Linear(16, 16), torch.randn(2, 16))


class Peculiar(nn.Module):
    """Layers that cannot be taken apart, each for a reason of its own, and one that can."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(16, 16)
        self.read = nn.Linear(16, 16)
        self.tied, self.other = nn.Linear(16, 16), nn.Linear(16, 16)
        self.other.weight = self.tied.weight
        self.idle = nn.Linear(16, 16)
        self.masked = torch.nn.utils.prune.l1_unstructured(nn.Linear(16, 16), "weight", 0.5)
        self.hooked = nn.Linear(16, 16)
        self.hooked.register_forward_hook(lambda module, args, output: None)
        self.doubled = Doubled(16, 16)
        self.attention = nn.MultiheadAttention(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(x) + self.read(x) * self.read.weight.mean() + self.tied(x) + self.other(x)
        x = self.masked(x) + self.hooked(x) + self.doubled(x)
        return self.attention(x, x, x)[0]


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class TestModel:
    def test_what_is_not_called_as_a_plain_layer_stays_with_its_reason(self) -> None:
        small, record = _decomposed(Peculiar(), torch.randn(3, 16), rank=4)
        assert [chain.layer for chain in record.decomposed] == ["plain"]
        assert [change.layer for change in record.changes] == ["plain"]
        assert {skipped.layers[0]: skipped.reason for skipped in record.skipped} == {
            "read": "the model reads its attributes, which a chain does not have",
            "tied": "it shares its weight with another layer",
            "other": "it shares its weight with another layer",
            "idle": "it was not called",
            "masked": "its weight is computed or constant",
            "hooked": "it has hooks",
            "doubled": "Doubled computes something else than a plain layer",
            "attention.out_proj": "it was not called",
        }
        assert isinstance(small.read, nn.Linear)

    def test_model_and_random_states_stay_as_they_were(self) -> None:
        model = nn.Sequential(nn.Conv2d(12, 16, 3), nn.BatchNorm2d(16), nn.Dropout()).train()
        before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        first, _ = _decomposed(model, method="cp", rank=6, data=[X])
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert model.training
        assert not model[0]._forward_hooks
        assert not first[0]._forward_hooks
        torch.manual_seed(5)
        again, _ = _decomposed(model, method="cp", rank=6, data=[X])
        assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))

    def test_layer_under_two_names_is_one_chain(self) -> None:
        layer = nn.Linear(16, 16)
        small, record = _decomposed(
            nn.Sequential(nn.Linear(16, 16), layer, nn.ReLU(), layer), torch.randn(2, 16), rank=4
        )
        assert small[1] is small[3]
        by_layer = {chain.layer: chain for chain in record.decomposed}
        assert by_layer["1"].flops_before == 2 * by_layer["0"].flops_before

    def test_costs_of_the_record_are_those_that_are_counted(self) -> None:
        model = models.resnet20(num_classes=10, in_channels=1, width=16).eval()
        x = torch.randn(2, 1, 32, 32)
        for method in ("svd", "spatial_svd", "tucker2", "tt"):
            small, record = _decomposed(model, x, method=method, rank=0.3)
            assert len(record.decomposed) >= 19
            saved = sum(chain.flops_before - chain.flops_after for chain in record.decomposed)
            assert record.flops_before - saved == record.flops_after == measure.count_flops(small, x)
            saved = sum(chain.parameters_before - chain.parameters_after for chain in record.decomposed)
            assert record.parameters_before - saved == record.parameters_after == measure.count_parameters(small)
            assert all("error" in change for _, change in record.layers())
            layer, chain = small.layer2[0].conv2, next(c for c in record.decomposed if c.layer == "layer2.0.conv2")
            assert isinstance(layer, nn.Sequential)
            assert 0 < chain.weight_error < 1

    def test_copies_made_in_inference_mode_train(self) -> None:
        with torch.inference_mode():
            model = nn.Sequential(nn.Linear(16, 16))
            small, _ = _decomposed(model, torch.randn(2, 16), rank=4)
        small(torch.randn(2, 16)).sum().backward()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_comes_back_in_its_dtype(self, dtype: torch.dtype) -> None:
        model = nn.Sequential(nn.Linear(16, 16)).to(dtype)
        small, record = _decomposed(model, torch.randn(4, 16).to(dtype), rank=16, only_cheaper=False)
        assert small[0][0].weight.dtype is dtype
        assert record.decomposed[0].weight_error < 0.02


class TestLatency:
    def test_only_chains_that_are_faster_are_taken(self) -> None:
        asked: list[dict[str, nn.Module]] = []

        def latency(modules: Any, x: Tensor) -> dict[str, float]:
            asked.append(dict(modules))
            assert all(module(x).shape == modules["layer"](x).shape for module in modules.values())
            assert not any(module.training for module in modules.values())
            slow = len(asked) == 1
            return {name: 2.0 if name == "layer" else 3.0 if slow else 1.5 - (name == "tt") for name in modules}

        model = nn.Sequential(nn.Conv2d(12, 64, 1), nn.Conv2d(64, 16, 3))
        small, record = _decomposed(model, rank=0.3, latency=latency)
        assert [[*modules] for modules in asked] == [["layer", "svd"], ["layer", "spatial_svd", "tucker2", "tt"]]
        assert isinstance(small[0], nn.Conv2d)
        assert record.skipped[0].reason == "svd, rank 8 is not faster: 2 → 3 ms"
        assert (record.decomposed[0].method, record.decomposed[0].milliseconds) == ("tt", (2.0, 0.5))
        assert "2 → 0.5 ms" in str(record)


class TestBudgets:
    @staticmethod
    def model() -> nn.Sequential:
        """Two layers of low rank, one of them important, and one that has none."""
        torch.manual_seed(1)
        model = nn.Sequential(*[nn.Conv2d(32, 32, 3, padding=1, bias=False) for _ in range(3)])
        for layer, rank in ((model[0], 4), (model[1], 4)):
            core = torch.randn(rank, rank, 3, 3)
            weight = torch.einsum("opij,ao,bp->abij", core, torch.randn(32, rank), torch.randn(32, rank))
            layer.weight.data.copy_(weight / weight.norm() * 10 + 0.002 * torch.randn_like(weight))
        return model

    X = torch.randn(1, 32, 8, 8)

    @pytest.mark.parametrize("ratio", [0.1, 0.4, 0.55])
    @pytest.mark.parametrize("method", ["tucker2", "auto"])
    def test_flops_are_saved_where_that_loses_least(self, ratio: float, method: str) -> None:
        small, record = _decomposed(self.model(), self.X, method=method, rank="flops", ratio=ratio)
        assert record.flops_after <= (1 - ratio) * record.flops_before
        assert record.flops_after == measure.count_flops(small, self.X)
        assert {chain.layer for chain in record.decomposed} <= {"0", "1"}
        assert [s.reason for s in record.skipped if s.layers == ("2",)] == ["the budget is kept without it"]

    def test_share_that_no_chains_save_is_refused_with_the_most(self) -> None:
        with pytest.raises(ValueError, match=r"ratio: expected at most 0\.\d+, .* got 0\.99"):
            compress.decompose(self.model(), self.X, rank="flops", ratio=0.99)

    def test_accuracy_stays_within_its_budget(self) -> None:
        """The metric counts changes of one layer only: the others are taken as far as they go."""
        model = self.model().train()
        expected, modes = model[0](self.X), set()

        def metric(trial: nn.Module) -> float:
            modes.add(trial.training)
            return 1 - relative_error(trial[0](self.X), expected)

        small, record = _decomposed(model, self.X, method="tucker2", rank="sensitivity", metric=metric, max_drop=0.03)
        assert relative_error(small[0](self.X), expected) <= 0.03
        assert {chain.layer for chain in record.decomposed} == {"0", "1", "2"}
        assert modes == {False}
        assert small.training
        assert small[0].training
        assert next(c for c in record.decomposed if c.layer == "2").output_error > 0.3
        untouched, record = _decomposed(model, self.X, rank="sensitivity", metric=metric, max_drop=0.0)
        assert isinstance(untouched[0], nn.Conv2d)
        assert "no chain keeps the budget" in {skipped.reason for skipped in record.skipped}

    def test_chains_that_are_not_faster_leave_their_part_to_others(self) -> None:
        def latency(modules: Any, x: Tensor) -> dict[str, float]:
            is_first = torch.equal(x, self.X)
            return {name: 1.0 if name == "layer" else 1.2 if is_first else 0.8 for name in modules}

        model = self.model()
        small, record = _decomposed(model, self.X, method="tucker2", rank="flops", ratio=0.3, latency=latency)
        assert isinstance(small[0], nn.Conv2d)
        assert record.flops_after <= 0.7 * record.flops_before
        assert next(s for s in record.skipped if s.layers == ("0",)).reason.endswith("is not faster: 1 → 1.2 ms")
        assert all(chain.milliseconds == (1.0, 0.8) for chain in record.decomposed)

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [
            ({"rank": "flops", "ratio": 1}, r"ratio: expected a share in \(0, 1\), got 1"),
            ({"rank": "sensitivity"}, r"metric: expected a function for rank='sensitivity' alone, got None"),
            ({"metric": len}, r"metric: expected a function for rank='sensitivity' alone, got .*'energy'"),
            ({"rank": "sensitivity", "metric": len, "max_drop": -1}, r"max_drop: expected a number of at least 0"),
            ({"rank": "sensitivity", "metric": lambda _: float("nan")}, r"metric: expected a finite number, got nan"),
            ({"rank": {"0": "flops"}}, r"rank\['0'\]: expected an integer, .*got 'flops'"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_bad_arguments_are_named(self, arguments: Any, error: str) -> None:
        with pytest.raises(ValueError, match=error):
            compress.decompose(self.model(), self.X, **arguments)


class TestAgain:
    @pytest.mark.parametrize("method", ["svd", "spatial_svd", "tucker2", "cp", "tt"])
    def test_chain_is_taken_as_the_layer_that_it_stands_for(self, method: str, tmp_path: Path) -> None:
        def build() -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(12, 16, (3, 5), (2, 1), (2, 1), (1, 2), groups=2, padding_mode="reflect"), nn.ReLU(),
                nn.Flatten(), nn.Linear(16 * 10 * 13, 20),
            )  # fmt: skip

        model = build()
        first, before = _decomposed(model, method=method, rank=0.9, only_cheaper=False, round_to=1)
        again, record = _decomposed(first, method="tucker2", rank=3, data=[X])
        assert [chain.layer for chain in record.decomposed] == ["0", "3"]
        assert [len(again[0]), len(again[3])] == [3, 2]
        assert record.decomposed[0].flops_before == before.decomposed[0].flops_after
        conv = again[0][1]
        assert (conv.stride, conv.padding, conv.dilation, conv.groups) == ((2, 1), (2, 1), (1, 2), 2)
        assert conv.padding_mode == "reflect"
        whole, _ = _decomposed(first, method=method, rank=1.0, only_cheaper=False)
        assert relative_error(whole(X), first(X)) <= EXACT
        compress.save(again, tmp_path / "small")
        loaded = compress.load(tmp_path / "small", build())
        assert torch.equal(loaded(X), again(X))

    def test_chain_whose_ranks_do_not_fall_stays(self) -> None:
        first, _ = _decomposed(nn.Sequential(nn.Linear(64, 64)), torch.randn(2, 64), rank=8)
        again, record = _decomposed(first, torch.randn(2, 64), rank=8)
        assert record.decomposed == ()
        assert "FLOPs 4,096 → 4,096" in record.skipped[0].reason
        assert again[0][0] is not first[0][0]
