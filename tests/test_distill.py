"""Distillation as a pass: students by name, copies, their records and files; as steps of a recipe."""

from __future__ import annotations

import copy
import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kernelpress import compress, models
from kernelpress.compress.changes import copied, mask_layer, replay
from kernelpress.compress.record import PassRecord, add_record
from kernelpress.compress.resize import named_tensors
from kernelpress.measure import Promise

pytest.importorskip("accelerate", reason="training needs: pip install 'kernelpress[train]'")

X = torch.randn(2, 1, 8, 8)
TRAINING = {"epochs": 1, "lr": 0.02, "progress": False}


@pytest.fixture
def teacher() -> nn.Module:
    torch.manual_seed(3)
    return models.resnet8(num_classes=4, in_channels=1, width=8)


@pytest.fixture
def loader() -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(24, 1, 8, 8), torch.randint(0, 4, (24,))), batch_size=8, shuffle=True)


def loaded(model: nn.Module, architecture: nn.Module, tmp_path: Path) -> nn.Module:
    compress.save(model, tmp_path / "model.safetensors")
    return compress.load(tmp_path / "model.safetensors", architecture)


def assert_computes_the_same(first: nn.Module, second: nn.Module) -> None:
    with torch.no_grad():
        assert torch.equal(copied(first).eval()(X), copied(second).eval()(X))


class TestStudents:
    def test_a_student_takes_the_models_place_and_its_file_builds_it_again(self, teacher, loader, tmp_path):
        losses = [compress.ResponseLoss(2), compress.AttentionLoss(["layer2"])]
        student = compress.distill(
            teacher.eval(), X, loader, student="resnet8", options={"width": 4}, losses=losses, **TRAINING
        )
        assert student.conv1.out_channels == 4
        assert student(X).shape == (2, 4)
        assert not student.training
        record = compress.record_of(student)[-1]
        assert record.name == "distill"
        assert record.flops_after < 0.4 * record.flops_before
        assert record.parameters_after == sum(p.numel() for p in student.parameters())
        assert record.arguments["losses"][0] == "ResponseLoss(temperature=2, weight=1.0)"
        assert record.arguments["epochs"] == 1
        assert "the whole model → resnet8" in str(record)
        again = loaded(student, copy.deepcopy(teacher), tmp_path)
        assert_computes_the_same(again, student)
        assert compress.record_of(again) == compress.record_of(student)
        compress.finetune(again, loader, **TRAINING)

    def test_a_student_is_another_at_each_seed_and_the_same_at_one(self, teacher, loader):
        first, same, other = (
            compress.distill(teacher, X, loader, student="resnet8", seed=seed, **TRAINING) for seed in (0, 0, 1)
        )
        assert_computes_the_same(first, same)
        assert not torch.equal(first.conv1.weight, other.conv1.weight)

    def test_the_caller_s_random_state_and_model_stay(self, teacher, loader):
        before = {name: value.clone() for name, value in teacher.state_dict().items()}
        torch.manual_seed(5)
        drawn = torch.rand(3)
        torch.manual_seed(5)
        compress.distill(teacher, X, loader, student="resnet8", **TRAINING)
        assert torch.equal(torch.rand(3), drawn)
        assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
        assert compress.record_of(teacher) == ()

    def test_without_a_student_a_copy_learns(self, teacher, loader, tmp_path):
        small = compress.prune_channels(teacher, X, ratio=0.4, round_to=2)
        learnt = compress.distill(small, X, loader, teacher=teacher, losses=[compress.DKDLoss()], **TRAINING)
        assert [record.name for record in compress.record_of(learnt)] == ["prune_channels", "distill"]
        assert not torch.equal(learnt.fc.weight, small.fc.weight)
        assert compress.record_of(learnt)[-1].changes == ()
        assert_computes_the_same(loaded(learnt, copy.deepcopy(teacher), tmp_path), learnt)

    def test_a_masked_copy_keeps_its_zeros(self, teacher, loader, tmp_path):
        sparse = copy.deepcopy(teacher)
        mask = (torch.rand_like(sparse.layer2[0].conv1.weight) > 0.7).float()
        change = mask_layer(sparse, "layer2.0.conv1", mask)
        add_record(sparse, PassRecord("mask", {}, 1, 1, 1, 1, (change,), promises=(Promise("layer2.0.conv1", 0.3),)))
        learnt = compress.distill(sparse, X, loader, teacher=teacher, **TRAINING)
        assert torch.equal(learnt.layer2[0].conv1.weight != 0, mask.bool())
        assert compress.record_of(learnt)[0].promises
        assert_computes_the_same(loaded(learnt, copy.deepcopy(teacher), tmp_path), learnt)
        # Of a student, whose layers are others, nothing is promised any more.
        student = compress.distill(learnt, X, loader, student="resnet8", **TRAINING)
        assert [record.name for record in compress.record_of(student)] == ["mask", "distill", "distill"]
        assert not any(record.promises for record in compress.record_of(student))
        assert_computes_the_same(loaded(student, copy.deepcopy(teacher), tmp_path), student)

    @pytest.mark.slow
    def test_passes_go_on_from_a_student(self, teacher, loader, tmp_path):
        student = compress.distill(teacher, X, loader, student="mobilenet_v2", options=SMALL, **TRAINING)
        pruned = compress.prune_channels(student, X, ratio=0.3, round_to=2)
        assert_computes_the_same(loaded(pruned, copy.deepcopy(teacher), tmp_path), pruned)

    @pytest.mark.parametrize("name", models.names())
    def test_every_network_is_built_again_without_values_of_its_own(self, name: str, teacher):
        """Whatever a network has beside its state dict would stay on the meta device."""
        again = replay(teacher, [compress.Rebuilt(name, {"num_classes": 4, "in_channels": 1})])
        tensors = dict(named_tensors(again))
        assert all(tensor.is_meta for tensor in tensors.values())
        assert tensors.keys() == again.state_dict().keys()

    def test_unknown_students_and_options_are_named(self, teacher, loader):
        with pytest.raises(
            ValueError, match=r"^student: expected one of alexnet, .*, got 'resnet9', did you mean 'resnet"
        ):
            compress.distill(teacher, X, loader, student="resnet9", **TRAINING)
        with pytest.raises(TypeError, match=r"^options: resnet8 has no depth"):
            compress.distill(teacher, X, loader, student="resnet8", options={"depth": 2}, **TRAINING)
        with pytest.raises(ValueError, match=r"^width: expected"):
            compress.distill(teacher, X, loader, student="resnet8", options={"width": 0}, **TRAINING)
        with pytest.raises(ValueError, match=r"^options: expected them with a student, got \{'width': 4\}"):
            compress.distill(teacher, X, loader, options={"width": 4}, **TRAINING)
        with pytest.raises(ValueError, match=r"^teacher_output: expected .* \[8, 5\], got \[8, 4\]"):
            compress.distill(teacher, X, loader, student="resnet8", options={"num_classes": 5}, **TRAINING)

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"weights": "/etc/passwd"}, "resnet8 has no weights"),
            ({"width": 2**40}, "not made of"),
            ({"width": 2**31 - 1}, ""),
            ({"width": "16"}, ""),
            ({"num_classes": 4}, "they differ in"),
        ],
    )
    def test_files_of_strangers_build_nothing_else(self, teacher, tmp_path, options, reason):
        saved = copy.deepcopy(teacher)
        add_record(saved, PassRecord("distill", {}, 1, 1, 1, 1, (compress.Rebuilt("resnet8", options),)))
        with pytest.raises(ValueError, match=f"CifarResNet is not the architecture saved in .*{reason}"):
            loaded(saved, teacher, tmp_path)
        add_record(saved, PassRecord("distill", {}, 1, 1, 1, 1, (compress.Rebuilt("os:system", {}),)))
        with pytest.raises(ValueError, match=r"CifarResNet is not the architecture saved in"):
            loaded(saved, teacher, tmp_path)


SMALL = {"width_mult": 0.35, "small_input": True}

RECIPE = """
title: distilled
data: {source: digits, image_size: 8, batch_size: 64, train_fraction: 0.2}
model: {name: resnet20, options: {width: 4}}
steps:
  - train: {epochs: 1, lr: 0.1}
  - distill: {student: resnet8, options: {width: 4}, epochs: 1, losses: [response, attention: {layers: [layer1]}]}
  - prune_channels: {ratio: 0.3, round_to: 1}
  - distill: {epochs: 1, teacher: distill, cache_mb: 1, losses: [dkd: {temperature: 2}], target_weight: 0.5}
  - emit: {threads: 1}
  - measure: {rounds: 1, budget_seconds: 0.01, peers: [eager, emitted]}
"""


class Interruption(BaseException):
    """Stands for the signal that ends a process in the middle of a run."""


@pytest.mark.slow
class TestRecipe:
    @pytest.fixture(autouse=True)
    def _needs(self, monkeypatch, tmp_path):
        pytest.importorskip("pydantic", reason="recipes take pydantic: pip install 'kernelpress[all]'")
        pytest.importorskip("sklearn", reason="the digits are part of scikit-learn: pip install 'kernelpress[all]'")
        monkeypatch.setenv("KERNELPRESS_CACHE", str(tmp_path / "cache"))

    def recipe(self, tmp_path: Path, text: str = RECIPE) -> Path:
        (tmp_path / "recipe.yaml").write_text(text)
        return tmp_path / "recipe.yaml"

    def test_students_and_copies_are_steps_that_go_on_where_they_stopped(self, tmp_path, monkeypatch):
        from kernelpress.press import press

        asked = []
        finetune = compress.distill.__globals__["finetune"]

        def watched(model: nn.Module, loader: DataLoader, **options: object) -> object:
            asked.append((options["teacher"].conv1.out_channels, len(loader.dataset)))
            if len(asked) == 2:
                finetune(model, loader, **options)
                raise Interruption
            return finetune(model, loader, **options)

        monkeypatch.setitem(compress.distill.__globals__, "finetune", watched)
        lines: list[str] = []
        with pytest.raises(Interruption):
            press(self.recipe(tmp_path), output=tmp_path / "out", tell=lines.append, progress=False)
        [checkpoints] = (tmp_path / "out" / "checkpoints").iterdir()
        assert checkpoints.name.startswith("distill-2-")
        report = press(self.recipe(tmp_path), output=tmp_path / "out", tell=lines.append, progress=False)
        assert not checkpoints.exists()
        assert list(report.passes) == ["distill", "prune_channels", "distill-2"]
        assert report.passes["distill"].rows == (("", "the whole model → resnet8"),)
        assert [count for _, count in asked] == [287] * 3
        assert report.layers == ()
        dense, *_, pressed = report.points
        assert pressed.flops < 0.5 * dense.flops
        assert sum(line.startswith("train: finished") for line in lines) == 1
        assert (tmp_path / "out" / "report.html").exists()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("losses: [atention]", r":9: .*losses: loss: expected .*'atention', did you mean 'attention'"),
            ("losses: [response: {temprature: 2}]", r":9: .*losses: loss: response is not made of .*temprature"),
            ("losses: [response: {temperature: 0}]", r":9: .*losses: temperature: expected a finite number above 0"),
            ("losses: [hint]", r":9: .*losses: loss: hint is not made of"),
            ("losses: []", r":9: .*losses: expected at least one loss"),
            ("losses: [{response: , dkd: }]", r":9: .*losses: expected at least one loss, one for each item"),
            ("cache_mb: -1", r":9: .*cache_mb: input should be greater than or equal to 0"),
            ("studnet: resnet8", r":9: .*studnet: unknown key, did you mean 'student'"),
        ],
    )
    def test_mistake_is_named_with_its_line(self, tmp_path, text, message):
        from kernelpress.press import RecipeError, load_recipe

        line = "  - distill: {epochs: 1, " + text + "}\n"
        recipe = self.recipe(tmp_path, re.sub(r"  - distill: \{epochs.*\n", lambda _: line, RECIPE))
        with pytest.raises(RecipeError, match=message):
            load_recipe(recipe)

    def test_a_run_of_distillation_alone_has_nobody_to_learn_from(self, tmp_path):
        from kernelpress.press import RecipeError, load_recipe

        with pytest.raises(RecipeError, match=r"train: expected this section"):
            load_recipe(self.recipe(tmp_path, "model: resnet20\nsteps: [distill: {epochs: 1}]\n"))

    def test_an_unknown_step_as_teacher_is_named(self, tmp_path):
        from kernelpress.press import press

        text = RECIPE.replace("teacher: distill", "teacher: tarin")
        with pytest.raises(ValueError, match=r"step: expected one of start, train, .*, got 'tarin'"):
            press(self.recipe(tmp_path, text), output=tmp_path / "out", tell=lambda _: None, progress=False)

    def test_the_recipe_that_ships_is_valid(self, request):
        from kernelpress.press import load_recipe

        recipe = load_recipe(request.config.rootpath / "recipes" / "distill.yaml")
        assert [step.name for step in recipe.steps] == ["train", "distill", "emit", "measure"]
        assert recipe.steps[1].section.student == "resnet8"


def test_a_share_of_the_images_is_drawn_by_the_seed() -> None:
    pytest.importorskip("pydantic", reason="recipes take pydantic: pip install 'kernelpress[all]'")
    pytest.importorskip("sklearn", reason="the digits are part of scikit-learn: pip install 'kernelpress[all]'")
    from kernelpress.press.recipe import recipe_class
    from kernelpress.press.steps import Run

    def drawn(seed: int, fraction: float) -> list[Tensor]:
        plain = {"seed": seed, "model": "resnet8", "train": {"epochs": 1}}
        recipe = recipe_class().model_validate(plain | {"data": {"image_size": 8, "train_fraction": fraction}})
        run = Run(recipe, None, print, False)
        assert run.classes == tuple("0123456789")
        assert len(run.loaders[1].dataset) == 360
        return [image for image, _ in run.loaders[0].dataset]

    tenth, again, other = drawn(0, 0.1), drawn(0, 0.1), drawn(1, 0.1)
    assert len(tenth) == 144
    assert all(torch.equal(a, b) for a, b in zip(tenth, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(tenth, other, strict=True))
    assert len(drawn(0, 1.0)) == 1437


@pytest.mark.slow
def test_the_benchmark_compares_students_of_one_seed(tmp_path, monkeypatch) -> None:
    pytest.importorskip("rich", reason="benchmarks take rich: pip install 'kernelpress[all]'")
    pytest.importorskip("sklearn", reason="the digits are part of scikit-learn: pip install 'kernelpress[all]'")
    import distill as benchmark
    import recording

    monkeypatch.setattr(benchmark, "TEACHER_EPOCHS", 1)
    monkeypatch.setattr(benchmark, "STUDENT_EPOCHS", 2)
    monkeypatch.setattr(benchmark, "FRACTION", 0.03)
    monkeypatch.setattr(benchmark, "save", partial(recording.save, folder=tmp_path))
    benchmark.main(["--seeds", "2", "--losses", "response", "response + attention"])
    [file] = tmp_path.glob("*/distill.json")
    content = json.loads(file.read_text())
    assert (content["images"], content["tested"]) == (43, 1797 - 43)
    teacher, alone, *others = content["results"]
    assert [row["name"] for row in (teacher, alone)] == ["teacher", "student alone"]
    assert teacher["gains"] == alone["gains"] == []
    for row in others:
        pairs = zip(row["accuracies"], alone["accuracies"], strict=True)
        assert row["gains"] == pytest.approx([100 * (mine - theirs) for mine, theirs in pairs])
    page = (tmp_path / "README.md").read_text()
    assert "| response + attention | 2 | 2 |" in page
    assert [row["epochs"] for row in content["results"]] == [1, 2, 2, 2]
