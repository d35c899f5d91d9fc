"""The step `prune_weights` of recipes: it resumes where it stopped, and the report shows what it did."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pydantic", reason="recipes take pydantic: pip install 'kernelpress[all]'")
pytest.importorskip("sklearn", reason="the digits are part of scikit-learn: pip install 'kernelpress[all]'")

from kernelpress import compress, models
from kernelpress.press import RecipeError, load_recipe, press

BASE = """
data: {source: digits, image_size: 8, batch_size: 64}
model: {name: resnet20, options: {width: 4}}
steps:
  - train: {epochs: 1, lr: 0.1}
"""
GRADUAL = BASE + "  - prune_weights: {sparsity: 0.9, schedule: gradual, every: 4, finetune: {epochs: 2, lr: 0.05}}\n"


class Interruption(BaseException):
    """Stands for the signal that ends a process."""


@pytest.fixture
def run_until(tmp_path: Path) -> Callable[..., Path]:
    """Runs a recipe until a line begins so; the folder."""

    def run(text: str, folder: str, end: str = "emit: started") -> Path:
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")

        def tell(line: str) -> None:
            if line.startswith(end):
                raise Interruption(line)

        with pytest.raises(Interruption):
            press(tmp_path / "recipe.yaml", output=tmp_path / folder, tell=tell, progress=False)
        return tmp_path / folder

    return run


def pruned(folder: Path, step: str = "prune_weights") -> torch.nn.Module:
    return compress.load(folder / f"{step}.safetensors", models.resnet20(width=4, in_channels=1, num_classes=10))


@pytest.mark.slow
def test_gradual_pruning_goes_on_in_the_middle(run_until: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_until(GRADUAL, "whole")
    shutil.copytree(whole, whole.parent / "parts")
    (whole.parent / "parts" / "steps" / "prune_weights.json").unlink()
    train = compress.finetune

    def interrupted(model: Any, loader: Any, *, before_step: Any, **options: Any) -> Any:
        def stopping(step: int, steps: int) -> None:
            if step == steps // 2 + 3:
                raise Interruption
            before_step(step, steps)

        return train(model, loader, before_step=stopping, **options)

    with monkeypatch.context() as patch:
        patch.setattr(compress, "finetune", interrupted)
        parts = run_until(GRADUAL, "parts")
    assert list((parts / "checkpoints").glob("prune_weights-*/gradual/*.safetensors"))
    run_until(GRADUAL, "parts")
    assert not list((parts / "checkpoints").glob("prune_weights-*"))
    first, second = pruned(whole).state_dict(), pruned(parts).state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    arguments = compress.record_of(pruned(whole))[0].arguments
    assert arguments["zeros_after"] == pytest.approx(0.9, abs=1e-4)
    assert arguments["schedule"] == {"kind": "gradual", "begin": 0.0, "end": 0.75, "every": 4}


@pytest.mark.slow
def test_rounds_and_a_scan_of_layers_stand_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNELPRESS_CACHE", str(tmp_path / "cache"))
    text = BASE + (
        "  - prune_weights: {sparsity: 0.75, schedule: iterative, rounds: 2, criterion: first_order, batches: 2,\n"
        "      finetune: {epochs: 1, lr: 0.02}}\n"
        "  - prune_weights: {scope: sensitivity, max_drop: 0.05, granularity: vector, block: [4, 1], batches: 2,\n"
        "      ignore: [fc]}\n"
        "  - emit: {threads: 1}\n"
        "  - measure: {rounds: 1, budget_seconds: 0.01, peers: [eager]}\n"
    )
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    report = press(tmp_path / "recipe.yaml", output=tmp_path / "out", tell=lambda _: None, progress=False)
    first, second = report.passes["prune_weights"], report.passes["prune_weights-2"]
    assert "(75.0% zeros)" in first.headline
    assert not first.figures
    (figure,) = second.figures
    assert len(figure.curves) == len(second.rows) > 10
    assert {curve.points[0][1] for curve in figure.curves} == {figure.curves[0].points[0][1]}
    assert report.points[1].promised_flops < 0.5 * report.points[1].flops
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert 'alt="One layer alone pruned, without training"' in page
    assert "(75.0% zeros)" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("sparsity: 1", r"prune_weights.sparsity: input should be less than 1, got 1"),
        ("schedule: gradual", r"finetune: expected a training for this schedule, got None"),
        ("finetune: {epochs: 1}", r"finetune: expected none with schedule one-shot"),
        ("criterion: size", r"prune_weights.criterion: input should be 'magnitude', .*got 'size'"),
        ("scope: local", r"prune_weights.scope"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path: Path, options: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(BASE + f"  - prune_weights: {{{options}}}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("name", ["sparse"])
def test_recipes_that_come_along_are_read(name: str) -> None:
    recipe = load_recipe(Path(__file__).parent.parent / "recipes" / f"{name}.yaml")
    assert recipe.model.name == "resnet20"
