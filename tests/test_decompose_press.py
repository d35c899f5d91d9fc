"""The step `decompose` of recipes, and chains timed as plans."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pydantic", reason="recipes take pydantic: pip install 'kernelpress[all]'")
pytest.importorskip("sklearn", reason="the digits are part of scikit-learn: pip install 'kernelpress[all]'")

from torch import nn

from kernelpress import compress, models
from kernelpress.emit import plan_latencies
from kernelpress.press import RecipeError, load_recipe, press

RECIPE = """
title: tiny
data: {source: digits, image_size: 8, batch_size: 64}
model: {name: resnet20, options: {width: 16}}
steps:
  - train: {epochs: 1, lr: 0.1}
  - decompose: {rank: energy, energy: 0.9, whiten: 2, ignore: [fc]}
  - finetune: {epochs: 1, lr: 0.02}
  - decompose: {method: tucker2, rank: flops, ratio: 0.2, round_to: 4}
  - decompose: {method: svd, rank: sensitivity, max_drop: 0.5, ignore: [layer1, layer2]}
"""


class Interruption(BaseException):
    """Ends a run where nothing more is to be seen."""


def _stop_at_emit(line: str) -> None:
    if line.startswith("emit"):
        raise Interruption


@pytest.mark.slow
def test_steps_take_a_little_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setenv("KERNELPRESS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    with pytest.raises(Interruption):
        press(tmp_path / "recipe.yaml", output=tmp_path / "out", tell=_stop_at_emit, progress=False)
    model = models.resnet20(num_classes=10, in_channels=1, width=16)
    small = compress.load(tmp_path / "out" / "decompose-3.safetensors", model)
    records = compress.record_of(small)
    assert [record.name for record in records] == ["decompose"] * 3
    assert all(chain.is_whitened for chain in records[0].decomposed)
    assert "fc" not in {chain.layer for chain in records[0].decomposed}
    assert records[1].flops_before == records[0].flops_after
    assert records[1].flops_after <= 0.8 * records[1].flops_before
    assert records[2].flops_after < records[1].flops_after
    assert small(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_the_recipe_that_ships_is_valid(request):
    recipe = load_recipe(request.config.rootpath / "recipes" / "decompose.yaml")
    names = [step.name for step in recipe.run_steps()]
    assert names == ["start", "train", "decompose", "finetune", "decompose", "finetune", "emit", "measure"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{rank: 0}", r":4: steps\[1\].decompose: .*rank: expected ranks of at least 1, got 0"),
        ("{rank: {fc: -1}}", r"rank\['fc'\]: expected ranks of at least 1, got -1"),
        ("{method: tucker}", r":4: steps\[1\].decompose.method: .*'tucker2'"),
        ("{energie: 0.5}", r"unknown key, did you mean 'energy'"),
    ],
)
def test_mistake_is_named_with_its_line(tmp_path, options, message):
    text = f"model: resnet20\nsteps:\n  - train: {{epochs: 1}}\n  - decompose: {options}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "recipe.yaml")


def test_plans_are_timed_in_turn(tmp_path, monkeypatch):
    monkeypatch.setenv("KERNELPRESS_CACHE", str(tmp_path))
    modules = {
        "one": nn.Conv2d(4, 64, 3).eval(),
        "many": nn.Sequential(nn.Conv2d(4, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 1)).eval(),
    }
    times = plan_latencies(modules, torch.randn(1, 4, 16, 16))
    assert times.keys() == modules.keys()
    assert all(time > 0 for time in times.values())


@pytest.mark.slow
def test_layers_are_timed_as_plans(tmp_path, monkeypatch):
    """Which one is faster is for the clock to say: what it said is what was done."""
    monkeypatch.setenv("KERNELPRESS_CACHE", str(tmp_path))
    model = nn.Sequential(nn.Conv2d(256, 256, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Conv2d(256, 16, 1)).eval()
    rank = {"0": (24, 24), "2": 15}
    small = compress.decompose(model, torch.randn(1, 256, 14, 14), method="tucker2", rank=rank, latency=plan_latencies)
    (record,) = compress.record_of(small)
    for chain in record.decomposed:
        before, after = chain.milliseconds
        assert after < before
    stayed = {skipped.layers[0]: skipped.reason for skipped in record.skipped}
    assert stayed.keys() | {chain.layer for chain in record.decomposed} == {"0", "2"}
    assert all("is not faster" in reason for reason in stayed.values())
