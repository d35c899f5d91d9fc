"""Weight pruning: which weights leave, that their zeros stay, what the record says, what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import relative_error
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from kernelpress import compress, layers, measure
from kernelpress.compress.prune_weights.patterns import pattern_of

CRITERIA_OF_DATA = ("first_order", "taylor", "movement", "snip", "obd", "fisher", "obs")


def network() -> nn.Module:
    """A convolution 8→16 and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 4),
    )  # fmt: skip


def loader(batch_size: int = 8) -> DataLoader[Any]:
    images = torch.randn(32, 8, 6, 6)
    return DataLoader(TensorDataset(images, images[:, :4].mean((2, 3)).argmax(1)), batch_size=batch_size, shuffle=True)


def zeros(model: nn.Module) -> dict[str, Tensor]:
    """Where the weights of convolutions and linear layers are zero."""
    kinds = (nn.Conv2d, nn.Linear)
    return {name: layer.weight == 0 for name, layer in model.named_modules() if isinstance(layer, kinds)}


def share_of_zeros(model: nn.Module) -> float:
    found = torch.cat([mask.flatten() for mask in zeros(model).values()])
    return float(found.double().mean())


def assert_zero_exactly(model: nn.Module, where: dict[str, Tensor]) -> None:
    """The same positions are 0.0, and none is −0.0 or tiny."""
    for name, layer in model.named_modules():
        if name in where:
            assert torch.equal(layer.weight == 0, where[name])
            assert not torch.signbit(layer.weight[where[name]]).any()


class TestZerosStay:
    """The case "Zeros stay zero" of the reports."""

    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    def test_through_training_files_and_copies(self, optimizer: Any, tmp_path: Path) -> None:
        pytest.importorskip("accelerate", reason="training needs: pip install 'kernelpress[train]'")
        model = network()
        pruned = compress.prune_weights(model, torch.randn(1, 8, 6, 6), sparsity=0.8)
        where = zeros(pruned)
        assert round(share_of_zeros(pruned) * (16 * 8 * 9 + 64)) == round(0.8 * (16 * 8 * 9 + 64))
        before = copy.deepcopy(pruned).eval()(torch.ones(1, 8, 6, 6))
        compress.finetune(pruned, loader(), epochs=3, lr=0.05, weight_decay=1e-4, optimizer=optimizer, progress=False)
        assert_zero_exactly(pruned, where)
        assert not torch.equal(pruned.eval()(torch.ones(1, 8, 6, 6)), before), "it has learnt"

        assert_zero_exactly(copy.deepcopy(pruned), where)
        compress.save(pruned, tmp_path / "small")
        loaded = compress.load(tmp_path / "small", network())
        assert_zero_exactly(loaded, where)
        assert compress.record_of(loaded) == compress.record_of(pruned)
        again = compress.prune_weights(network(), sparsity=0.1)
        again.load_state_dict(pruned.state_dict())
        assert_zero_exactly(again, where)
        assert torch.equal(again[0].weight, pruned[0].weight)
        plain = network()
        plain.load_state_dict(compress.bake_masks(pruned).state_dict())
        assert_zero_exactly(plain, where)
        torch.testing.assert_close(
            plain.eval()(torch.ones(1, 8, 6, 6)), pruned(torch.ones(1, 8, 6, 6)), rtol=1e-6, atol=1e-6
        )

    @pytest.mark.parametrize(
        "make",
        [
            lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-4, nesterov=True),
            lambda p: torch.optim.AdamW(p, 0.01, weight_decay=1e-2),
        ],
        ids=["SGD", "AdamW"],
    )
    def test_under_momentum_from_before_the_pruning(self, make: Callable[..., torch.optim.Optimizer]) -> None:
        model = network()
        x, target = next(iter(loader(32)))

        def train(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            for _ in range(3):
                optimizer.zero_grad()
                F.cross_entropy(module(x), target).backward()
                optimizer.step()

        dense = make(model.parameters())
        train(model, dense)
        pruned = compress.prune_weights(model, sparsity=0.8)
        where = zeros(pruned)
        names = [name.removesuffix("_orig") for name, _ in pruned.named_parameters()]
        order = [
            dict(pruned.named_parameters())[f"{n}_orig" if f"{n}_orig" in dict(pruned.named_parameters()) else n]
            for n, _ in model.named_parameters()
        ]
        assert sorted(names) == sorted(name for name, _ in model.named_parameters())
        optimizer = make(order)
        optimizer.load_state_dict(dense.state_dict())
        train(pruned, optimizer)
        assert (pruned[0].weight_orig[where["0"]] != 0).any(), "momentum moves what lies below the mask"
        pruned(x)
        assert_zero_exactly(pruned, where)
        copied = copy.deepcopy(pruned)
        copied(x)
        assert_zero_exactly(copied, where)
        assert_zero_exactly(compress.bake_masks(pruned), where)

    def test_in_mixed_precision(self) -> None:
        pruned = compress.prune_weights(network(), sparsity=0.8)
        where = zeros(pruned)
        optimizer = torch.optim.SGD(pruned.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
        for x, target in loader():
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(pruned(x), target)
            loss.backward()
            optimizer.step()
        pruned.eval()(x)
        assert_zero_exactly(pruned, where)
        half = pruned.bfloat16()
        half(x.bfloat16())
        assert_zero_exactly(half, where)

    def test_in_blocks_that_compute_in_one_op_without_gradients(self) -> None:
        """They read the weights of layers that they do not call."""
        block = layers.DepthwiseSeparableConv2d(8, 16, 3, padding=1, norm_layer=nn.BatchNorm2d)
        shuffle = layers.ShuffleUnit(16, 16, groups=2, norm_layer=nn.BatchNorm2d)
        ghost = layers.GhostModule(16, 16, norm_layer=nn.BatchNorm2d)
        model = nn.Sequential(block, shuffle, ghost).eval()
        pruned = compress.prune_weights(model, sparsity=0.5)
        x = torch.randn(2, 8, 6, 6)
        with torch.no_grad():
            first = pruned(x)
            for parameter in pruned.parameters():
                parameter.mul_(1.1)
            assert relative_error(pruned(x), first) > 1e-3, "not computed with the weights of the call before"
            torch.testing.assert_close(pruned(x), compress.bake_masks(pruned)(x), rtol=1e-4, atol=1e-4)

    def test_on_weights_that_layers_share(self, tmp_path: Path) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embedding = nn.Embedding(10, 6)
                self.conv = nn.Conv1d(6, 6, 1)
                self.same = self.conv
                self.head = nn.Linear(6, 10, bias=False)
                self.head.weight = self.embedding.weight

            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.same(self.conv(self.embedding(x).mT)).mean(2))

        x = torch.randint(0, 10, (4, 5))
        pruned = compress.prune_weights(Tied(), x, sparsity=0.5, scope="layer")
        assert pruned.head.weight_orig is pruned.embedding.weight_orig
        for _ in range(2):
            pruned(x).square().sum().backward()
            torch.optim.SGD(pruned.parameters(), 0.1).step()
        pruned(x)
        assert torch.equal(pruned.head.weight, pruned.embedding.weight)
        assert int((pruned.head.weight == 0).sum()) == 30
        assert pruned.same is pruned.conv
        compress.save(pruned, tmp_path / "tied")
        loaded = compress.load(tmp_path / "tied", Tied())
        assert loaded.head.weight_orig is loaded.embedding.weight_orig
        torch.testing.assert_close(loaded(x), pruned(x))
        ignored = compress.prune_weights(Tied(), sparsity=0.5, ignore="embedding")
        assert isinstance(ignored.head.weight, nn.Parameter)


class TestMasksThatAreThere:
    def test_twice_half_is_three_quarters_and_the_record_says_so(self) -> None:
        model = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 10))
        once = compress.prune_weights(model, sparsity=0.5)
        twice = compress.prune_weights(once, sparsity=0.5)
        assert (share_of_zeros(once), share_of_zeros(twice)) == (0.5, 0.75)
        first, second = compress.record_of(twice)
        assert (first.arguments["zeros_before"], first.arguments["zeros_after"]) == (0, 0.5)
        assert (second.arguments["zeros_before"], second.arguments["zeros_after"]) == (0.5, 0.75)
        assert "masks leave 150 of 600 (75.0% zeros)" in str(second)
        densities = [promise.density for record in (first, second) for promise in record.promises]
        left = {n: 1 - float(mask.double().mean()) for n, mask in zeros(twice).items()}
        assert densities[0] * densities[2] == pytest.approx(left["0"])
        assert densities[1] * densities[3] == pytest.approx(left["2"])
        assert share_of_zeros(model) == 0, "the model that was pruned stays as it is"

    @pytest.mark.parametrize("sparsity", [0.0, 0.5])
    def test_masks_of_torch_are_kept(self, sparsity: float) -> None:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
        prune.l1_unstructured(model[0], "weight", 0.5)
        prune.random_unstructured(model[0], "weight", 0.5)
        prune.ln_structured(model[1], "weight", 2, n=2, dim=0)
        earlier = [layer.weight == 0 for layer in model]
        with torch.no_grad():
            model[0].weight_orig.neg_()
        pruned = compress.prune_weights(model, sparsity=sparsity, scope="layer")
        for layer, mask in zip(pruned, earlier, strict=True):
            alive = int((~mask).sum())
            assert (layer.weight[mask] == 0).all()
            assert not layer.weight[mask].signbit().any()
            assert int((layer.weight == 0).sum()) == mask.numel() - (alive - round(sparsity * alive))
        assert torch.equal(model[0].weight_mask == 0, earlier[0])

    def test_masks_of_torch_on_top_of_ours_and_their_removal(self) -> None:
        pruned = compress.prune_weights(nn.Sequential(nn.Linear(10, 10)), sparsity=0.5)
        where = pruned[0].weight == 0
        prune.l1_unstructured(pruned[0], "weight", 10)
        assert int((pruned[0].weight == 0).sum()) == 60
        assert (pruned[0].weight[where] == 0).all()
        prune.remove(pruned[0], "weight")
        assert int((pruned[0].weight == 0).sum()) == 60

    def test_channels_are_pruned_after_weights_and_weights_after_channels(self, tmp_path: Path) -> None:
        def build() -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
                nn.Conv2d(16, 4, 1),
            ).eval()  # fmt: skip

        x = torch.randn(2, 8, 6, 6)
        model = compress.prune_weights(build(), x, sparsity=0.5)
        model = compress.prune_channels(model, x, ratio=0.3, round_to=1)
        assert model[0].weight_mask.shape == model[0].weight_orig.shape != (16, 8, 3, 3)
        model = compress.bake_masks(compress.prune_weights(model, x, sparsity=0.5))
        compress.save(model, tmp_path / "small")
        loaded = compress.load(tmp_path / "small", build())
        torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
        names = [record.name for record in compress.record_of(loaded)]
        assert names == ["prune_weights", "prune_channels", "prune_weights", "bake_masks"]


def regression(noise: float = 0.0) -> tuple[nn.Linear, list[tuple[Tensor, Tensor]], Tensor]:
    """y = w·x ± 1 with correlated inputs, the model at the optimum; batches, and the Hessian E[x xᵀ] of ½(y − w·x)²."""
    x = torch.randn(200, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    # Each input twice, with residuals +1 and −1: the optimum is w itself, and the mean of g gᵀ is the Hessian.
    x = torch.cat([x, x])
    model = nn.Linear(6, 1, bias=False, dtype=torch.float64)
    signs = torch.cat([torch.ones(200, 1), -torch.ones(200, 1)]).double()
    y = (model(x) + signs).detach() + noise
    return model, [(x[i : i + 80], y[i : i + 80]) for i in range(0, 400, 80)], x.mT @ x / 400


def half_squares(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output - target).square().mean()


class TestCriteria:
    def scores(self, criterion: str, model: nn.Module, data: Any) -> list[Tensor]:
        from kernelpress.compress.prune_weights.derivatives import Problem
        from kernelpress.compress.prune_weights.targets import find_targets

        small = copy.deepcopy(model)
        targets, _ = find_targets(small, ())
        generator = torch.Generator().manual_seed(0)
        return compress.WEIGHT_CRITERIA[criterion](
            Problem(small, targets, data, half_squares, generator, criterion)
        ).values

    def test_first_order_ones_are_products_with_the_gradient(self) -> None:
        model, data, _ = regression(noise=0.3)
        # ∂L/∂w = E[(w·x − y) x] = −0.3 E[x].
        product = -0.3 * torch.cat([x for x, _ in data]).mean(0) * model.weight.detach()
        for name, expected in (
            ("first_order", product.abs()),
            ("taylor", product.square()),
            ("movement", -product),
            ("snip", product.abs() / product.abs().sum()),
        ):
            (score,) = self.scores(name, model, data)
            torch.testing.assert_close(score, expected, rtol=1e-9, atol=1e-12)

    def test_second_order_ones_know_the_hessian(self) -> None:
        model, data, hessian = regression()
        (fisher,) = self.scores("fisher", model, data)
        expected = 0.5 * hessian.diagonal() * model.weight.detach().square()
        torch.testing.assert_close(fisher, expected, rtol=1e-9, atol=0)
        (obs,) = self.scores("obs", model, data)
        inverse = torch.linalg.inv(hessian).diagonal()
        torch.testing.assert_close(obs, model.weight.detach().square() / (2 * inverse), rtol=1e-3, atol=0)

    def test_obd_is_exact_where_the_hessian_is_diagonal(self) -> None:
        model, _, _ = regression()
        x = torch.diag(torch.arange(1.0, 7.0, dtype=torch.float64))
        (score,) = self.scores("obd", model, [(x, torch.randn(6, 1, dtype=torch.float64))])
        expected = 0.5 * torch.arange(1.0, 7.0).double().square() / 6 * model.weight.detach().square()
        torch.testing.assert_close(score, expected, rtol=1e-9, atol=0)

    @pytest.mark.parametrize("leave", [1, 3])
    def test_obs_leaves_the_best_of_all_fits_to_what_stays(self, leave: int) -> None:
        """For squares of a linear model the second order is the whole truth."""
        model, data, _ = regression()
        pruned = compress.prune_weights(
            model, sparsity=leave / 6, criterion="obs", data=data, loss=half_squares, scope="layer"
        )
        stays = (pruned.weight != 0).flatten()
        assert int(stays.sum()) == 6 - leave
        x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
        best = torch.linalg.lstsq(x[:, stays], y).solution.flatten()
        torch.testing.assert_close(pruned.weight.detach().flatten()[stays], best, rtol=1e-4, atol=1e-4)

        def error(w: Tensor) -> float:
            return float((x @ w.mT - y).square().mean())

        if leave == 1:
            singles = []
            for i in range(6):
                others = [j for j in range(6) if j != i]
                w = torch.zeros(1, 6, dtype=torch.float64)
                w[0, others] = torch.linalg.lstsq(x[:, others], y).solution.flatten()
                singles.append(error(w))
            assert error(pruned.weight.detach()) == pytest.approx(min(singles), rel=1e-6)

    @pytest.mark.parametrize("criterion", CRITERIA_OF_DATA)
    def test_of_data_prune_networks_and_leave_them_as_they_are(self, criterion: str) -> None:
        model, batches = network().train(), list(loader())
        before = {name: value.clone() for name, value in model.state_dict().items()}
        model[5].weight.requires_grad_(False)
        state = torch.get_rng_state()
        pruned = compress.prune_weights(model, sparsity=0.7, criterion=criterion, data=iter(batches))
        assert torch.equal(torch.get_rng_state(), state)
        assert share_of_zeros(pruned) == pytest.approx(0.7, abs=1e-3)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        after = pruned.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("1."))
        assert pruned.training
        assert not pruned[5].weight_orig.requires_grad
        again = compress.prune_weights(model, sparsity=0.7, criterion=criterion, data=batches)
        assert all(torch.equal(a, b) for a, b in zip(zeros(again).values(), zeros(pruned).values(), strict=True))

    def test_random_depends_on_the_seed_alone(self) -> None:
        model = network()
        first, same, other = (
            compress.prune_weights(model, sparsity=0.5, criterion="random", seed=seed) for seed in (1, 1, 2)
        )
        assert torch.equal(first[0].weight, same[0].weight)
        assert not torch.equal(first[0].weight, other[0].weight)


class TestScopes:
    def test_global_ranks_all_weights_against_each_other(self) -> None:
        model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
        with torch.no_grad():
            model[1].weight.mul_(1e-3)
            model[0].weight.add_(model[0].weight.sign())
        pruned = compress.prune_weights(model, sparsity=0.4)
        assert [int((layer.weight == 0).sum()) for layer in pruned] == [0, 80]
        assert pruned[1].weight.abs()[pruned[1].weight != 0].min() > model[1].weight.abs()[pruned[1].weight == 0].max()
        with pytest.warns(UserWarning, match=r"every weight of 1 is gone"):
            emptied = compress.prune_weights(model, sparsity=0.5)
        assert [p.density for p in compress.record_of(emptied)[0].promises] == [1.0, 0.0]

    def test_layer_takes_the_same_share_of_each(self) -> None:
        pruned = compress.prune_weights(network(), sparsity=0.75, scope="layer")
        assert [float(mask.double().mean()) for mask in zeros(pruned).values()] == [0.75, 0.75]

    def test_erk_follows_the_formula_and_fills_small_layers(self) -> None:
        model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(16, 32, 3), nn.Conv2d(32, 64, 3), nn.Linear(64, 10))
        pruned = compress.prune_weights(model, sparsity=0.8, scope="erk")
        assert share_of_zeros(pruned) == pytest.approx(0.8, abs=2e-4)
        density = [1 - float(mask.double().mean()) for mask in zeros(pruned).values()]
        assert density[0] == 1
        raw = [(16 + 32 + 6) / (16 * 32 * 9), (32 + 64 + 6) / (32 * 64 * 9)]
        assert density[1] / density[2] == pytest.approx(raw[0] / raw[1], rel=2e-3)

    def test_a_mapping_names_layers(self) -> None:
        pruned = compress.prune_weights(network(), scope={"0": 0.5})
        assert [float(mask.double().mean()) for mask in zeros(pruned).values()] == [0.5, 0]
        assert compress.record_of(pruned)[0].arguments["scope"] == {"0": 0.5}

    def test_ignored_layers_stay(self) -> None:
        pruned = compress.prune_weights(network(), sparsity=0.5, ignore="5")
        assert isinstance(pruned[5].weight, nn.Parameter)
        assert float((pruned[0].weight == 0).double().mean()) == 0.5

    def test_layers_whose_weight_no_mask_reaches_are_named(self) -> None:
        model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
        pruned = compress.prune_weights(model, sparsity=0.5)
        (skipped,) = compress.record_of(pruned)[0].skipped
        assert skipped.layers == ("0",)
        assert "computed or constant" in skipped.reason
        attention = nn.TransformerEncoderLayer(8, 2, 16)
        (skipped,) = compress.record_of(compress.prune_weights(attention, sparsity=0.5))[0].skipped
        assert skipped.layers == ("self_attn.out_proj",)


class TestGranularity:
    def groups(self, weight: Tensor, granularity: str) -> Iterator[Tensor]:
        """The groups of a weight [C_out, C_in, KH, KW], written out."""
        if granularity == "kernel":
            yield from weight.flatten(0, 1)
        elif granularity == "filter":
            yield from weight

    @pytest.mark.parametrize("granularity", ["kernel", "filter"])
    @pytest.mark.parametrize("criterion", ["l1", "l2"])
    def test_kernels_and_filters_leave_as_a_whole(self, granularity: str, criterion: str) -> None:
        model = nn.Conv2d(6, 10, 3)
        pruned = compress.prune_weights(model, sparsity=0.5, granularity=granularity, criterion=criterion)
        order = 1 if criterion == "l1" else 2
        norms = torch.stack([g.detach().norm(order) for g in self.groups(model.weight, granularity)])
        gone = torch.stack([(g == 0).all() for g in self.groups(pruned.weight, granularity)])
        assert float((pruned.weight == 0).double().mean()) == 0.5
        assert int(gone.sum()) == len(gone) // 2
        assert norms[gone].max() < norms[~gone].min()

    @pytest.mark.parametrize("block", [(16, 16), (8, 32), (4, 1), (64, 64), (1, 4), (3, 2)], ids=str)
    @pytest.mark.parametrize("scope", ["global", "layer"])
    def test_blocks_that_do_not_divide_the_sizes_are_those_of_the_sparse_layers(
        self, block: tuple[int, int], scope: str
    ) -> None:
        """The case "sizes that no block divides": conv 3→20, a weight of 20 × 27."""
        conv = nn.Conv2d(3, 20, 3, padding=1)
        pruned = compress.prune_weights(conv, sparsity=0.6, granularity="block", block=block, scope=scope)
        rows, columns = -(-20 // block[0]), -(-3 // block[1])
        kept = {(o // block[0], i // block[1], h, w) for o, i, h, w in (pruned.weight != 0).nonzero().tolist()}
        sparse = layers.BlockSparseConv2d.from_dense(pruned, block)
        assert len(sparse.blocks) == len(kept)
        assert (
            abs(float((pruned.weight == 0).double().mean()) - 0.6) <= 0.5 * min(20, block[0]) * min(3, block[1]) / 540
        )
        assert len(kept) < rows * columns * 9
        x = torch.randn(2, 3, 9, 7)
        with torch.no_grad():
            assert relative_error(sparse(x), pruned(x)) < 1e-6
            plain = F.conv2d(x, conv.weight * (pruned.weight != 0), conv.bias, padding=1)
            assert relative_error(pruned(x), plain) < 1e-6

    def test_vectors_and_default_blocks(self) -> None:
        layer = nn.Linear(64, 64)
        pruned = compress.prune_weights(layer, sparsity=0.5, granularity="vector")
        assert ((pruned.weight == 0).view(16, 4, 64).sum(1) % 4 == 0).all()
        pruned = compress.prune_weights(layer, sparsity=0.5, granularity="vector", block=(1, 8))
        assert ((pruned.weight == 0).view(64, 8, 8).sum(2) % 8 == 0).all()
        pruned = compress.prune_weights(layer, sparsity=0.5, granularity="block")
        assert compress.record_of(pruned)[0].arguments["block"] == [16, 16]
        assert ((pruned.weight == 0).view(4, 16, 4, 16).sum((1, 3)) % 256 == 0).all()

    @pytest.mark.parametrize("make", [lambda: nn.Linear(10, 6), lambda: nn.Conv2d(10, 6, 3)], ids=["linear", "conv"])
    def test_at_most_two_of_four_inputs_stay(self, make: Callable[[], Any]) -> None:
        layer = make()
        pruned = compress.prune_weights(layer, granularity="2:4")
        weight, kept = layer.weight.detach().movedim(1, -1), (pruned.weight != 0).movedim(1, -1)
        for start, size in ((0, 4), (4, 4), (8, 2)):
            part, stays = weight[..., start : start + size], kept[..., start : start + size]
            assert (stays.sum(-1) == 2).all()
            assert torch.equal(
                part.abs().topk(2).indices.sort().values, stays.nonzero()[:, -1].view(*part.shape[:-1], 2)
            )
        again = compress.prune_weights(pruned, granularity="2:4")
        assert torch.equal(again.weight, pruned.weight)

    def test_filters_of_transposed_convolutions_are_output_channels(self) -> None:
        layer = nn.ConvTranspose2d(6, 8, 3, groups=2)
        pruned = compress.prune_weights(layer, sparsity=0.5, granularity="filter")
        gone = (pruned.weight == 0).view(2, 3, 4, 9).permute(0, 2, 1, 3).flatten(2)
        assert int(gone.all(2).sum()) == 4
        assert torch.equal(gone.any(2), gone.all(2))
        numbers = pattern_of("filter", None).groups(layer, (6, 4, 3, 3))
        assert sorted(numbers.unique().tolist()) == list(range(8))


class TestSchedules:
    def test_gradual_follows_the_cubic_and_ends_exactly(self) -> None:
        pytest.importorskip("accelerate", reason="training needs: pip install 'kernelpress[train]'")
        model, seen = network(), list[float]()

        def train(small: nn.Module, before_step: Callable[[int, int], None]) -> None:
            def watched(step: int, steps: int) -> None:
                before_step(step, steps)
                seen.append(share_of_zeros(small))

            compress.finetune(small, loader(), epochs=5, lr=0.05, before_step=watched, progress=False)

        schedule = compress.Gradual(train, begin=0.1, end=0.6, every=2)
        pruned = compress.prune_weights(model, sparsity=0.9, schedule=schedule)
        expected = [0.0, 0.0]
        for step in range(2, 13):
            at = step - step % 2
            expected.append(0.9 * (1 - (1 - (at - 2) / 10) ** 3))
        expected += [0.9] * 7
        assert seen == pytest.approx(expected, abs=1e-3)
        assert share_of_zeros(pruned) == pytest.approx(0.9, abs=5e-4)
        assert compress.record_of(pruned)[0].arguments["schedule"]["kind"] == "gradual"
        lazy = compress.Gradual(lambda small, before_step: None)
        assert share_of_zeros(compress.prune_weights(model, schedule=lazy)) == pytest.approx(0.9, abs=5e-4)

    @pytest.mark.parametrize("criterion", ["magnitude", "first_order", "random"])
    def test_gradual_goes_on_from_its_checkpoint_as_if_nothing_had_been(self, criterion: str, tmp_path: Path) -> None:
        pytest.importorskip("accelerate", reason="training needs: pip install 'kernelpress[train]'")
        model, batches, data = network(), loader(), list(loader())

        def run(folder: Path, stop_at: int | None = None) -> nn.Module:
            def train(small: nn.Module, before_step: Callable[[int, int], None]) -> None:
                def stopping(step: int, steps: int) -> None:
                    if step == stop_at:
                        raise InterruptedError
                    before_step(step, steps)

                compress.finetune(
                    small, batches, epochs=4, lr=0.05, before_step=stopping, checkpoint_dir=folder, progress=False
                )

            schedule = compress.Gradual(train, every=3)
            return compress.prune_weights(model, criterion=criterion, data=data, schedule=schedule)

        whole = run(tmp_path / "whole")
        with pytest.raises(InterruptedError):
            run(tmp_path / "parts", stop_at=9)
        resumed = run(tmp_path / "parts")
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name

    def test_iterative_prunes_the_same_share_of_the_rest_each_round(self) -> None:
        seen = []
        schedule = compress.Iterative(lambda small, round: seen.append((round, share_of_zeros(small))), rounds=4)
        compress.prune_weights(network(), sparsity=1 - 0.5**4, schedule=schedule)
        assert [done for done, _ in seen] == [0, 1, 2, 3]
        assert [share for _, share in seen] == pytest.approx([0.5, 0.75, 0.875, 0.9375], abs=1e-3)


class TestSensitivity:
    def test_tells_what_each_layer_can_do_without(self) -> None:
        model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        asked = []

        def worth(small: nn.Module) -> float:
            shares = [float((layer.weight == 0).double().mean()) for layer in small]
            asked.append(shares)
            return 0.9 - 0.1 * shares[0] - shares[1] ** 2

        found = compress.sensitivity(model, worth, sparsities=(0.8, 0.5))
        assert asked == [[0, 0], [0.5, 0], [0.8, 0], [0, 0.5], [0, 0.8]]
        assert found.base == 0.9
        assert found.accuracies["0"] == pytest.approx((0.85, 0.82))
        assert found.within(0.08) == {"0": 0.8, "1": 0.0}
        assert found.within(0.3) == {"0": 0.8, "1": 0.5}
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        pruned = compress.prune_weights(model, scope=found.within(0.3))
        assert [float((layer.weight == 0).double().mean()) for layer in pruned] == [0.8, 0.5]


def _with_nan(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model[0].weight[1, 2, 0, 0] = float("nan")
    return model


def _nan_loss(output: Tensor, target: Tensor) -> Tensor:
    return output.sum() * float("nan")


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "all of it": ({"sparsity": 1.0}, ValueError, r"sparsity: expected a fraction of zeros in \[0, 1\), got 1.0"),
    "more than all": ({"sparsity": 1.5}, ValueError, r"sparsity: expected .* got 1.5"),
    "less than none": ({"sparsity": -0.1}, ValueError, r"sparsity: expected .* got -0.1"),
    "no number": ({"sparsity": float("nan")}, ValueError, r"sparsity: expected .* got nan"),
    "a truth": ({"sparsity": True}, TypeError, r"sparsity: expected a number in \[0, 1\), got True"),
    "criterion": ({"criterion": "size"}, ValueError, r"criterion: expected one of 'magnitude', .* got 'size'"),
    "scope": ({"scope": "local"}, ValueError, r"scope: expected 'global', 'layer', 'erk'.* got 'local'"),
    "layer": ({"scope": {"9": 0.5}}, ValueError, r"scope: expected layers of 0, 5, got '9'"),
    "layer's share": ({"scope": {"0": 1.0}}, ValueError, r"scope\['0'\]: expected a fraction"),
    "both": ({"scope": {"0": 0.5}, "sparsity": 0.5}, ValueError, r"sparsity: expected None where scope"),
    "granularity": ({"granularity": "row"}, ValueError, r"granularity: expected one of 'element', .* got 'row'"),
    "4:2": ({"granularity": "4:2"}, ValueError, r"granularity: expected n:m with 0 < n < m, got '4:2'"),
    "n:m's": ({"granularity": "2:4", "sparsity": 0.9}, ValueError, r"sparsity: expected None or 0.5, which '2:4'"),
    "n:m by erk": ({"granularity": "2:4", "scope": "erk"}, ValueError, r"scope: expected 'global' or 'layer' with"),
    "block": ({"granularity": "block", "block": (0, 4)}, ValueError, r"block: expected \(outputs, inputs\), two"),
    "one size": ({"granularity": "block", "block": 4}, ValueError, r"block: expected \(outputs, inputs\), two"),
    "no vector": ({"granularity": "vector", "block": (2, 4)}, ValueError, r"block: expected \(k, 1\) or \(1, k\)"),
    "block of elements": ({"block": (4, 1)}, ValueError, r"block: expected None for granularity='element'"),
    "ignored": ({"ignore": "head"}, ValueError, r"ignore: Sequential has no module named 'head'"),
    "everything ignored": ({"ignore": ["0", "5"]}, ValueError, r"model: Sequential has no weight to prune"),
    "images alone": ({"criterion": "obd", "data": [torch.ones(1)]}, TypeError, r"data: expected batches \(inputs, t"),
    "empty data": ({"criterion": "obd", "data": []}, ValueError, r"data: the criterion 'obd' needs at least one batch"),
    "end": (
        {"schedule": lambda: compress.Gradual(lambda m, s: None, begin=0.8, end=0.2)},
        ValueError,
        r"begin, end: expected 0 ≤ begin ≤ end ≤ 1, got 0.8 and 0.2",
    ),
    "every": ({"schedule": lambda: compress.Gradual(lambda m, s: None, every=0)}, ValueError, "every: expected a posi"),
    "rounds": ({"schedule": lambda: compress.Iterative(lambda m, r: None, rounds=0)}, ValueError, "rounds: expected a"),
    "n:m by and by": (
        {"granularity": "2:4", "schedule": lambda: compress.Iterative(lambda m, r: None)},
        ValueError,
        r"schedule: expected None for granularity='2:4'",
    ),
}  # fmt: skip


class TestBadInput:
    @pytest.mark.parametrize("name", BAD)
    def test_is_refused_by_name(self, name: str) -> None:
        arguments, kind, message = BAD[name]
        model = network()
        with pytest.raises(kind, match=message):
            compress.prune_weights(
                model, **{key: make() if key == "schedule" else make for key, make in arguments.items()}
            )
        assert not model[0]._forward_pre_hooks

    def test_nothing_is_a_mask_that_keeps_everything(self) -> None:
        pruned = compress.prune_weights(network(), sparsity=0)
        assert share_of_zeros(pruned) == 0
        assert (pruned[0].weight_mask == 1).all()

    @pytest.mark.parametrize("criterion", CRITERIA_OF_DATA)
    def test_data_that_a_criterion_needs_is_missed(self, criterion: str) -> None:
        with pytest.raises(ValueError, match=f"data: the criterion '{criterion}' needs batches"):
            compress.prune_weights(network(), criterion=criterion)

    @pytest.mark.parametrize("criterion", ["magnitude", "obs", "random"])
    def test_weights_that_are_not_finite_are_named(self, criterion: str) -> None:
        with pytest.raises(ValueError, match=r"model: 0.weight holds NaN or Inf"):
            compress.prune_weights(_with_nan(network()), criterion=criterion, data=list(loader()))

    @pytest.mark.parametrize("criterion", CRITERIA_OF_DATA)
    def test_gradients_that_are_not_finite_are_named(self, criterion: str) -> None:
        with pytest.raises(ValueError, match=r"data: the derivatives of the loss by 0.weight hold NaN or Inf"):
            compress.prune_weights(network(), criterion=criterion, data=list(loader()), loss=_nan_loss)

    def test_layers_that_the_loss_does_not_reach_are_named(self) -> None:
        class Aside(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body, self.aside = network(), nn.Linear(3, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.body(x)

        model = Aside()
        with pytest.raises(ValueError, match=r"the loss does not depend on aside.weight; name its layer in `ignore`"):
            compress.prune_weights(model, criterion="taylor", data=list(loader()))

    @pytest.mark.parametrize("criterion", compress.WEIGHT_CRITERIA)
    def test_a_layer_pruned_to_nothing_still_runs_trains_and_is_pruned_again(self, criterion: str) -> None:
        model, data = network(), list(loader())
        with pytest.warns(UserWarning, match="every weight of 5 is gone"):
            emptied = compress.prune_weights(
                model, torch.randn(1, 8, 6, 6), scope={"5": 0.999}, criterion=criterion, data=data
            )
        assert (emptied[5].weight == 0).all()
        emptied(data[0][0]).sum().backward()
        again = compress.prune_weights(emptied, sparsity=0.5, scope="layer", criterion=criterion, data=data)
        assert float((again[0].weight == 0).double().mean()) == 0.5
        flops = measure.layer_flops(again, torch.randn(1, 8, 6, 6))
        promises = [promise for record in compress.record_of(again) for promise in record.promises]
        assert measure.promised_flops(flops, promises) == 0.5 * flops["0"]

    def test_a_sensitivity_of_a_fixed_pattern_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"granularity: expected one that leaves the sparsity open, got '2:4'"):
            compress.sensitivity(network(), lambda small: 1.0, granularity="2:4")
        with pytest.raises(ValueError, match=r"sparsities: expected a fraction"):
            compress.sensitivity(network(), lambda small: 1.0, sparsities=(0.5, 1))


def test_models_made_under_inference_mode_train_after_pruning() -> None:
    with torch.inference_mode():
        pruned = compress.prune_weights(network(), sparsity=0.5)
    pruned(torch.randn(2, 8, 6, 6)).sum().backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())
