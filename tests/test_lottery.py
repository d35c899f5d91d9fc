"""Lottery tickets: what each method trains from, under which masks; resumption, the recipe's step, refusals."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("accelerate", reason="training needs: pip install 'kernelpress[train]'")

from kernelpress import compress
from kernelpress.compress import lottery as lottery_function

KEYS = ("1.weight", "4.weight")


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))


def loader(count: int = 48) -> DataLoader[Any]:
    images = torch.randn(count, 1, 4, 4)
    return DataLoader(TensorDataset(images, images[:, 0, :3].mean(2).argmax(1)), batch_size=16, shuffle=True)


class Trainings(list[tuple[str, tuple[int, int], dict[str, torch.Tensor]]]):
    """What every training began with, in order, by the name of its checkpoints."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        module = sys.modules[lottery_function.__module__]
        train = module.finetune

        def watched(model: nn.Module, *args: Any, checkpoint_dir: Path, **options: Any) -> Any:
            state = {name: value.clone() for name, value in model.state_dict().items()}
            self.append((Path(checkpoint_dir).name, options["span"], state))
            return train(model, *args, checkpoint_dir=checkpoint_dir, **options)

        patch.setattr(module, "finetune", watched)

    def begun(self, name: str) -> dict[str, torch.Tensor]:
        return next(state for found, _, state in self if found == name)


def weights(state: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [state[f"{key}_orig"] for key in KEYS]


def masks(state: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [state[f"{key}_mask"] != 0 for key in KEYS]


OPTIONS: dict[str, Any] = {"epochs": 3, "rounds": 2, "share": 0.5, "seeds": (3, 4), "lr": 0.05}
ALL = ("imp", "rewind", "learning_rate", "reinit", "random_ticket")


def test_each_method_goes_back_to_where_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = network(), loader()
    initial = [value.clone() for name, value in model.state_dict().items() if name in KEYS]
    trainings = Trainings(monkeypatch)
    found = compress.lottery(model, batches, loader(), torch.randn(1, 1, 4, 4), methods=ALL, folder=tmp_path, **OPTIONS)
    for name, span, _ in trainings:
        method, done = name.split("-")[1:]
        late = method in ("rewind", "learning_rate")
        assert span == ((0, 1) if done == "early" else (1, 3) if late else (0, 3))
    total = sum(value.numel() for value in initial)
    for done, left in ((0, 1.0), (1, 0.5), (2, 0.25)):
        for method in ALL:
            state = trainings.begun(f"3-{method}-{done}")
            kept = sum(int(mask.sum()) for mask in masks(state))
            assert kept == round(left * total), (method, done)
            for mask, values, first in zip(masks(state), weights(state), initial, strict=True):
                assert (values[~mask] == 0).all()
                if method in ("imp", "random_ticket"):
                    assert torch.equal(values[mask], first[mask])
                elif done and method == "reinit":
                    assert not torch.equal(values[mask], first[mask])
                    assert torch.isin(values[mask], first).all()
        imp, reinit, drawn = (masks(trainings.begun(f"3-{m}-{done}")) for m in ("imp", "reinit", "random_ticket"))
        assert all(map(torch.equal, imp, reinit))
        if done:
            assert not all(map(torch.equal, imp, drawn))
            assert [int(mask.sum()) for mask in imp] == [int(mask.sum()) for mask in drawn]
    rewound = weights(trainings.begun("3-rewind-0"))
    for values, then, first in zip(weights(trainings.begun("3-rewind-2")), rewound, initial, strict=True):
        mask = values != 0
        assert torch.equal(values[mask], then[mask])
        assert not torch.equal(then[mask], first[mask]), "an epoch has passed"
    stayed, then = weights(trainings.begun("3-learning_rate-1"))[0], weights(trainings.begun("3-learning_rate-0"))[0]
    assert not torch.equal(stayed[stayed != 0], then[stayed != 0])
    other = weights(trainings.begun("4-imp-0"))
    for values, first in zip(other, initial, strict=True):
        assert not torch.equal(values, first)
        assert torch.equal(values.flatten().sort().values, first.flatten().sort().values)

    (record,) = compress.record_of(found)
    assert (record.name, record.flops_after > 0) == ("lottery", True)
    assert list(record.arguments["curves"]) == list(ALL)
    for points in record.arguments["curves"].values():
        assert [left for left, _ in points] == pytest.approx([1, 0.5, 0.25])
        assert all(len(accuracies) == 2 and all(0 <= a <= 1 for a in accuracies) for _, accuracies in points)
    assert record.arguments["zeros_after"] == pytest.approx(0.75)
    assert len(trainings) == 2 * (5 * 3 + 2)
    assert all(map(torch.equal, (model[1].weight, model[4].weight), initial)), "the model stays as it is"
    compress.save(found, tmp_path / "ticket")
    loaded = compress.load(tmp_path / "ticket", network())
    x = torch.randn(5, 1, 4, 4)
    torch.testing.assert_close(loaded.eval()(x), found.eval()(x), rtol=0, atol=0)


def test_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches, test = network(), loader(), loader(24)
    methods: dict[str, Any] = {"methods": ("imp", "rewind", "reinit")}
    whole = compress.lottery(copy.deepcopy(model), batches, test, folder=tmp_path / "whole", **methods, **OPTIONS)
    module = sys.modules[lottery_function.__module__]
    train, done = module.finetune, []

    def stopping(*args: Any, **options: Any) -> Any:
        if len(done) == 9:
            raise InterruptedError
        done.append(options["checkpoint_dir"])
        return train(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, "finetune", stopping)
        with pytest.raises(InterruptedError):
            compress.lottery(copy.deepcopy(model), batches, test, folder=tmp_path / "parts", **methods, **OPTIONS)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("*/*")}
    assert len(before) == 9
    resumed = compress.lottery(copy.deepcopy(model), batches, test, folder=tmp_path / "parts", **methods, **OPTIONS)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items()), (
        "what was trained is not trained again"
    )
    assert compress.record_of(resumed) == compress.record_of(whole)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.0}, "share: expected a fraction above 0"),
        ({"share": 1.0}, r"share: expected a fraction of zeros in \[0, 1\), got 1.0"),
        ({"methods": ("imp", "magic")}, "methods, ticket: expected some of imp, .* got .*magic"),
        ({"methods": ()}, "methods, ticket: expected some of imp, .* got none"),
        ({"ticket": "learning_rate"}, "ticket: expected one of the methods imp, rewind, reinit, got 'learning_rate'"),
        ({"methods": ("rewind", "reinit")}, "methods: expected 'imp' among them"),
        ({"rounds": 0}, "rounds, seeds: expected at least one, got 0"),
        ({"seeds": ()}, "rounds, seeds: expected at least one"),
        ({"rewind_epoch": 3}, "rewind_epoch: expected one above 0, below epochs = 3, got 3"),
        ({"epochs": 1}, "rewind_epoch: expected one above 0, below epochs = 1, got 1"),
        ({"ignore": "9"}, "ignore: Sequential has no module named '9'"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress.lottery(network(), loader(), loader(), **{**OPTIONS, **options})


def test_a_span_of_epochs_continues_a_training_schedule(tmp_path: Path) -> None:
    model, rates = network(), []
    for span in ((0, 1), (1, 3)):
        result = compress.finetune(
            model, loader(), epochs=3, span=span, lr=0.1, checkpoint_dir=tmp_path / str(span), progress=False
        )
        rates += [(epoch.epoch, epoch.learning_rate) for epoch in result.history]
    whole = compress.finetune(network(), loader(), epochs=3, lr=0.1, progress=False)
    assert rates == [(epoch.epoch, epoch.learning_rate) for epoch in whole.history]
    again = compress.finetune(
        model, loader(), epochs=3, span=(1, 3), lr=0.1, checkpoint_dir=tmp_path / "(1, 3)", progress=False
    )
    assert [epoch.epoch for epoch in again.history] == [1, 2]
    for span in ((0, 4), (2, 2), (-1, 2)):
        with pytest.raises(ValueError, match=r"span: expected \(first, end\) with 0 ≤ first < end ≤ epochs = 3"):
            compress.finetune(network(), loader(), epochs=3, span=span)


@pytest.mark.slow
def test_recipe_draws_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pydantic", reason="recipes take pydantic: pip install 'kernelpress[all]'")
    pytest.importorskip("sklearn", reason="the digits are part of scikit-learn: pip install 'kernelpress[all]'")
    from kernelpress.press import RecipeError, load_recipe, press

    monkeypatch.setenv("KERNELPRESS_CACHE", str(tmp_path / "cache"))
    text = (Path(__file__).parent.parent / "recipes" / "lottery.yaml").read_text(encoding="utf-8")
    assert load_recipe(Path(__file__).parent.parent / "recipes" / "lottery.yaml").seed == 0
    for old, new in (
        ("epochs: 8", "epochs: 2"),
        ("rounds: 6", "rounds: 2"),
        ("seeds: 5", "seeds: 2"),
        ("rewind_epoch: 2", "rewind_epoch: 1"),
        ("name: resnet20", "name: resnet20\n  options: {width: 4}"),
        ("rounds: 5, budget_seconds: 0.5", "rounds: 1, budget_seconds: 0.01"),
        (", channels_last, emitted", ""),
    ):
        assert old in text
        text = text.replace(old, new)
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    report = press(file, output=tmp_path / "out", tell=lambda _: None, progress=False)
    reading = report.passes["lottery"]
    (figure,) = reading.figures
    assert [curve.name for curve in figure.curves] == [
        "weights from the beginning", "weights rewound", "masks over random weights",
    ]  # fmt: skip
    assert [point[0] for point in figure.curves[0].points] == pytest.approx([100, 60, 36], rel=1e-4)
    assert any("with 36.0 % of the weights" in remark for remark in reading.remarks)
    assert 'alt="Mean and standard deviation over 2 seeds"' in (tmp_path / "out" / "report.html").read_text()
    assert not list((tmp_path / "out" / "checkpoints").glob("lottery-*"))
    file.write_text(text.replace("ticket: rewind", "ticket: learning_rate"), encoding="utf-8")
    with pytest.raises(RecipeError, match="ticket: expected one of the methods imp, rewind, reinit"):
        load_recipe(file)
