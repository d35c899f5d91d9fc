"""Recipes, the steps of a run and their resumption, passes by their registration, the report."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from dataclasses import replace
from typing import get_args

import pytest
import torch

pytest.importorskip("pydantic", reason="recipes take pydantic: pip install 'kernelpress[all]'")
pytest.importorskip("sklearn", reason="the digits are part of scikit-learn: pip install 'kernelpress[all]'")

from torch import nn

from kernelpress.compress.record import PassRecord, add_record
from kernelpress.emit import CandidateRecord, EmissionRecord, PlaceRecord
from kernelpress.measure import Comparison
from kernelpress.press import RecipeError, RequirementError, load_recipe, press, registry
from kernelpress.press.folder import RunFolder, step_key
from kernelpress.press.steps import depends_on
from kernelpress.report import Gain, layer_realisations, render_html
from kernelpress.report.bars import waterfall_bars

RECIPE = """
title: tiny
data: {source: digits, image_size: 8, batch_size: 64}
model: {name: resnet20, options: {width: 16}}
train: {epochs: 1, lr: 0.1}
compress:
  - prune_channels: {ratio: 0.4, round_to: 4}
finetune: {epochs: 1, lr: 0.02}
emit: {threads: 1}
measure: {rounds: 2, budget_seconds: 0.02, peers: [eager, emitted]}
"""


@pytest.fixture(scope="module")
def timings_cache(tmp_path_factory):
    """Layers timed by one test need not be timed by the next, and nobody else's timings count."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERNELPRESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def recipe_file(tmp_path):
    def write(text: str = RECIPE):
        file = tmp_path / "recipe.yaml"
        file.write_text(text, encoding="utf-8")
        return file

    return write


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, timings_cache):
    """The folder and the report of one whole run."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    report = press(folder / "recipe.yaml", output=folder / "out", tell=lambda _: None, progress=False)
    return folder / "out", report


@pytest.fixture
def run_again(finished_run, recipe_file, tmp_path):
    """A function that runs a recipe over a copy of the finished run's folder; returns the lines told and the report."""
    folder = tmp_path / "out"
    shutil.copytree(finished_run[0], folder)

    def run(text: str = RECIPE, *, fresh: bool = False, stop_at: str | None = None):
        lines: list[str] = []

        def tell(line: str) -> None:
            lines.append(line)
            if stop_at is not None and line.startswith(stop_at):
                raise Interruption(line)

        report = press(recipe_file(text), output=folder, fresh=fresh, tell=tell, progress=False)
        return lines, report

    run.folder = folder
    return run


class Interruption(BaseException):
    """Stands for the signal that ends a process in the middle of a run."""


def steps_run(lines: list[str]) -> list[str]:
    """The steps that did their work, by the lines a run told."""
    return [match[1] for line in lines if (match := re.match(r"([\w-]+): finished in", line))]


class TestRecipe:
    def refused(self, file) -> str:
        with pytest.raises(RecipeError) as caught:
            load_recipe(file)
        return str(caught.value)

    def test_short_forms_stand_for_mappings(self, recipe_file):
        recipe = load_recipe(recipe_file("data: digits\nmodel: resnet20\ntrain: {epochs: 3}\n"))
        assert recipe.data.source == "digits"
        assert recipe.model.name == "resnet20"
        assert recipe.train.epochs == 3

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                "model: x\ntrain:\n  epochs: 1\n  epoch: 3\n",
                r"recipe.yaml:4: train.epoch: unknown key, did you mean 'epochs'",
            ),
            (
                "model: x\nmodle: y\ntrain: {epochs: 1}\n",
                r":2: modle: unknown key, did you mean 'model'\?; known: title",
            ),
            (
                "model: x\ntrain: {epochs: 1}\ncompress:\n  - prune_chanels: {ratio: 0.5}\n",
                r":4: compress\[0\].prune_chanels: unknown key, did you mean 'prune_channels'\?; known: .*prune_",
            ),
            (
                "model: x\ntrain: {epochs: 1}\ncompress:\n  - prune_channels:\n      ratio: 1.5\n",
                r":5: compress\[0\].prune_channels.ratio: input should be less than 1, got 1.5",
            ),
            (
                "model: x\ntrain: {epochs: 1}\ncompress:\n  - {}\n",
                r":4: compress\[0\]: expected one step per list item, got none",
            ),
            ("model: x\nmodel: y\ntrain: {epochs: 1}\n", r":2: model: this key stands twice"),
            ("train: {epochs: 1}\n", "model: this key is required"),
            ("model: x\n", r"train: expected this section with epochs above zero, or model.weights"),
            ("model: x\ntrain: {epochs: one}\n", r":2: train.epochs: input should be a valid integer.*got 'one'"),
            ("model: x\ntrain: {epochs: 1}\nmeasure: {peers: [compile]}\n", "peers: expected eager among them"),
            (
                "model: x\nsteps:\n  - train: {epochs: 1}\n  - {emit: , measure: }\n",
                r":4: steps\[1\]: expected one step per list item, got emit, measure",
            ),
            (
                "model: x\nsteps:\n  - trian: {epochs: 1}\n",
                r":3: steps\[0\].trian: unknown key, did you mean 'train'\?; known: train, finetune, emit, measure",
            ),
            (
                "model: x\nsteps:\n  - prune_channels:\n",
                r":3: steps\[0\].prune_channels.ratio: this key is required",
            ),
            (
                "model: x\nsteps: [{train: {epochs: 1}}, emit, {finetune: {epochs: 1}}, measure]\n",
                "steps: expected emit before measure, after finetune",
            ),
            ("model: x\nsteps: [{train: {epochs: 1}}, measure]\n", "steps: expected emit before measure, after train"),
            (
                "model: x\nsteps: [{train: {epochs: 1}}]\nfinetune: {epochs: 1}\nemit: {batch: 2}\n",
                "steps: expected either this list or the short form, got emit, finetune too",
            ),
            (
                "model: x\nsteps: [emit, measure]\n",
                "train: expected this section with epochs above zero, or model.weights",
            ),
            ("a: [1\nb: 2\n", r":2: this is not YAML"),
            ("\tmodel: x\n", r":1: this is not YAML"),
            ("", "expected a mapping with the keys title, .*, got nothing"),
            ("- model\n", "expected a mapping .*, got list"),
        ],
    )
    def test_mistake_is_named_with_its_line(self, recipe_file, text, message):
        assert re.search(message, self.refused(recipe_file(text)))

    def test_all_mistakes_are_told_at_once(self, recipe_file):
        assert len(self.refused(recipe_file("model: x\ntrain: {epoch: 1}\nsead: 3\n")).splitlines()) == 3

    def test_missing_file_is_named(self, tmp_path):
        assert "absent.yaml: the recipe cannot be read: No such file" in self.refused(tmp_path / "absent.yaml")

    def test_binary_file_is_named(self, tmp_path):
        (tmp_path / "weights.yaml").write_bytes(bytes(range(128, 256)))
        assert "weights.yaml: the recipe cannot be read: it is not UTF-8 text" in self.refused(
            tmp_path / "weights.yaml"
        )

    @pytest.mark.parametrize(
        ("text", "steps"),
        [
            ("train: {epochs: 1}", "start train emit measure"),
            ("train: {epochs: 1}\ncompress: [prune_channels: {ratio: 0.5}]", "start train prune_channels emit measure"),
            ("train: {epochs: 1}\nfinetune: {epochs: 0}", "start train emit measure"),
            ("steps: [{train: {epochs: 1}}]", "start train emit measure"),
            ("steps: [{train: {epochs: 1}}, emit]", "start train emit emit-2 measure"),
            (
                "steps: [emit, measure, {train: {epochs: 1}}, {train: {epochs: 2}}, {prune_channels: {ratio: 0.1}}, "
                "{finetune: {epochs: 1}}, {prune_channels: {ratio: 0.2}}, {finetune: {epochs: 1}}, emit, measure, "
                "measure]",
                "start emit measure train train-2 prune_channels finetune prune_channels-2 finetune-2 emit-2 measure-2 "
                "measure-3",
            ),
        ],
    )
    def test_steps_come_in_any_order_and_number(self, recipe_file, text, steps):
        assert " ".join(step.id for step in load_recipe(recipe_file(f"model: x\n{text}\n")).run_steps()) == steps

    def test_what_was_decided_by_times_is_decided_anew_on_another_device(self, recipe_file, monkeypatch):
        passes = "{prune_channels: {ratio: 0.1}}, {prune_channels: {ratio: 0.1, target: latency}}"
        recipe = load_recipe(recipe_file(f"model: x\nsteps: [{{train: {{epochs: 1}}}}, {passes}, emit, measure]\n"))

        def keys():
            return {step.id: depends_on(step, recipe) for step in recipe.run_steps()}

        before = keys()
        monkeypatch.setattr("kernelpress.press.steps.device_key", lambda device: "another device")
        after = keys()
        assert {step for step in before if after[step] != before[step]} == {"prune_channels-2", "emit"}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("{ratio: 0.5, finetune: {epochs: 1}}", "finetune: expected iterations of at least 2 to train between"),
            ("{ratio: 0.5, target: latency, schedule: greedy}", "schedule: expected one-shot for target: latency"),
            ("{ratio: 0.5, criterion: l3}", "prune_channels.criterion: .*'taylor'"),
        ],
    )
    def test_options_of_pruning_that_exclude_each_other_are_named(self, recipe_file, options, message):
        with pytest.raises(RecipeError, match=message):
            load_recipe(recipe_file(f"model: x\ntrain: {{epochs: 1}}\ncompress: [prune_channels: {options}]\n"))

    def test_criteria_of_recipes_are_all_there_are(self):
        from kernelpress.compress.prune_channels.criteria import CRITERIA
        from kernelpress.press.passes.prune_channels import Criterion

        assert set(get_args(Criterion)) == set(CRITERIA)

    def test_the_recipe_of_the_demo_is_valid(self, request):
        recipe = load_recipe(request.config.rootpath / "recipes" / "digits.yaml")
        assert recipe.require.min_accuracy == 0.97
        assert [step.id for step in recipe.run_steps()] == [
            *("start", "train", "prune_channels", "finetune", "emit", "quantize", "emit-2", "measure")
        ]
        assert [step.id for step in recipe.emissions_before(recipe.last_emission())] == ["emit"]

    def test_emissions_count_alike_the_last_and_of_other_models(self, recipe_file):
        steps = "[{train: {epochs: 1}}, emit, {emit: {batch: 2}}, {prune_channels: {ratio: 0.5}}, emit, emit, measure]"
        recipe = load_recipe(recipe_file(f"model: resnet20\nsteps: {steps}\nrequire: {{faster_than_emitted: 2}}\n"))
        assert [step.id for step in recipe.emissions_before(recipe.last_emission())] == ["emit"]
        with pytest.raises(RecipeError, match="require: faster_than_emitted expects an emit step"):
            load_recipe(recipe_file("model: x\ntrain: {epochs: 1}\nrequire: {faster_than_emitted: 2}\n"))


@pytest.mark.slow
class TestRun:
    def test_all_steps_leave_their_files(self, finished_run):
        folder, _ = finished_run
        files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
        assert files == {
            "start.safetensors", "train.safetensors", "prune_channels.safetensors", "finetune.safetensors", "emit.pt2",
            "report.html", "report.json",
            *(f"steps/{name}.json" for name in ("start", "train", "prune_channels", "finetune", "emit", "measure")),
        }  # fmt: skip

    def test_pressed_model_is_smaller_and_computes(self, finished_run):
        import kernelpress

        folder, report = finished_run
        assert [point.name for point in report.points] == ["dense", "prune_channels", "pressed"]
        dense, compressed, pressed = report.points
        assert pressed.flops <= 0.62 * dense.flops
        assert compressed.flops == pressed.flops
        assert pressed.parameters < dense.parameters
        assert kernelpress.load(folder / "emit.pt2")(torch.randn(3, 1, 8, 8)).shape == (3, 10)
        assert report.comparison.speedup("pressed").theoretical == pytest.approx(dense.flops / pressed.flops, rel=1e-3)

    def test_baseline_is_the_fastest_way_in_pytorch(self, finished_run):
        comparison = finished_run[1].comparison
        assert comparison.baseline == "dense eager"
        assert [p.name for p in comparison.profiles] == ["dense eager", "dense emitted", "pressed eager", "pressed"]

    def test_finished_run_does_nothing_again(self, run_again):
        lines, report = run_again()
        assert steps_run(lines) == []
        assert sum("skipped, finished before" in line for line in lines) == 6
        assert report.comparison.speedup("pressed").measured > 0

    def test_fresh_run_starts_from_the_first_step(self, run_again):
        with pytest.raises(Interruption, match="start: started"):
            run_again(fresh=True, stop_at="start:")

    def test_changed_section_runs_its_step_and_what_follows(self, run_again):
        lines, _ = run_again(RECIPE.replace("rounds: 2", "rounds: 3"))
        assert steps_run(lines) == ["measure"]
        assert any("the recipe, an earlier step" in line for line in lines)

    def test_interrupted_run_goes_on_where_it_stopped(self, run_again):
        text = RECIPE.replace("lr: 0.02", "lr: 0.03")
        with pytest.raises(Interruption, match="emit: again"):
            run_again(text, stop_at="emit:")
        lines, _ = run_again(text)
        assert steps_run(lines) == ["emit", "measure"]

    def test_damaged_file_is_made_again_and_later_steps_stay(self, run_again):
        file = run_again.folder / "prune_channels.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        lines, _ = run_again()
        assert steps_run(lines) == ["prune_channels"]
        again = "prune_channels: again, because"
        assert any(line.startswith(again) and "prune_channels.safetensors is not as" in line for line in lines)

    def test_unmet_requirement_fails_after_the_report_is_written(self, run_again):
        (run_again.folder / "report.json").unlink()
        with pytest.raises(
            RequirementError, match=r"test accuracy, dense: wanted ≥ 100.00%, got .*; speed-up over dense"
        ):
            run_again(RECIPE + "require: {min_accuracy: 1.0, faster_than_baseline: 1000}\n")
        requirements = json.loads((run_again.folder / "report.json").read_text())["requirements"]
        assert [item["is_met"] for item in requirements] == [False, False]

    def test_what_was_emitted_before_is_measured_beside(self, run_again):
        pytest.importorskip("torchao", reason="needs torchao: pip install 'kernelpress[quantize]'")
        text = """
title: tiny
data: {source: digits, image_size: 8, batch_size: 64}
model: {name: resnet20, options: {width: 16}}
steps:
  - train: {epochs: 1, lr: 0.1}
  - prune_channels: {ratio: 0.4, round_to: 4}
  - finetune: {epochs: 1, lr: 0.02}
  - emit: {threads: 1}
  - quantize: {samples: 64}
  - emit: {threads: 1}
  - measure: {rounds: 2, budget_seconds: 0.02, peers: [eager]}
require: {faster_than_emitted: 0.001}
"""
        lines, report = run_again(text)
        assert steps_run(lines) == ["quantize", "emit-2", "measure"]
        assert any(line.endswith("× as fast as emitted after finetune") for line in lines)
        float_one, int8 = report.comparison["emitted after finetune"], report.comparison["pressed"]
        assert float_one.promised_flops > int8.promised_flops
        assert report.points[-2].latency_ms == float_one.latency.median
        (requirement,) = report.requirements
        assert requirement.name == "speed-up over the model emitted after finetune"
        assert requirement.got == f"{float_one.latency.median / int8.latency.median:.2f}×"

    def test_output_that_is_a_file_is_refused(self, recipe_file, tmp_path):
        (tmp_path / "taken").write_text("")
        with pytest.raises(NotADirectoryError, match=r"output: .*taken"):
            press(recipe_file(), output=tmp_path / "taken", tell=lambda _: None)

    def test_missing_image_folder_is_named(self, recipe_file, tmp_path):
        text = RECIPE.replace("source: digits", f"source: {tmp_path}/nowhere")
        with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
            press(recipe_file(text), output=tmp_path / "out", tell=lambda _: None)

    def test_unknown_model_lists_the_known(self, recipe_file, tmp_path):
        with pytest.raises(ValueError, match=r"expected one of .*resnet20.*, got 'resnet21'"):
            press(recipe_file(RECIPE.replace("resnet20", "resnet21")), output=tmp_path / "out", tell=lambda _: None)

    def test_weights_of_another_model_are_refused(self, finished_run, recipe_file, tmp_path):
        weights = finished_run[0] / "prune_channels.safetensors"
        text = RECIPE.replace("name: resnet20", f"weights: {weights}, name: resnet20")
        with pytest.raises(ValueError, match=r"weights: .*prune_channels.safetensors does not fit"):
            press(recipe_file(text), output=tmp_path / "out", tell=lambda _: None)

    def test_image_folder_is_split_for_testing(self, recipe_file, tmp_path):
        image = pytest.importorskip("PIL.Image", reason="image folders take Pillow: pip install 'kernelpress[all]'")
        for index in range(20):
            folder = tmp_path / "images" / ("dark" if index % 2 else "bright")
            folder.mkdir(parents=True, exist_ok=True)
            image.new("RGB", (20, 20), (40, 40, 40) if index % 2 else (220, 220, 220)).save(folder / f"{index}.png")
        text = RECIPE.replace("source: digits", f"shift: 1, test_fraction: 0.3, source: {tmp_path}/images")
        text = text.replace("batch_size: 64", "batch_size: 7").replace("peers: [eager, emitted]", "peers: [eager]")
        report = press(recipe_file(text), output=tmp_path / "out", tell=lambda _: None, progress=False)
        assert report.points[0].accuracy in {count / 6 for count in range(7)}
        assert report.layers == ()


class TestRunFolder:
    @pytest.fixture
    def folder(self, tmp_path):
        folder = RunFolder(tmp_path / "run")
        folder.create()
        folder.write("weights", b"0123456789")
        folder.finish("train", "key", {"accuracy": 0.5}, ("weights",), 1.0)
        return folder

    def test_finished_step_is_found_with_its_results(self, folder):
        assert folder.finished("train", "key").results == {"accuracy": 0.5}

    def test_step_that_never_ran_needs_no_reason(self, folder):
        assert folder.finished("emit", "key") == ""

    def test_other_key_is_no_match(self, folder):
        assert "has changed" in folder.finished("train", "another key")

    @pytest.mark.parametrize("content", [b"012345678", b"012345678X", b""], ids=["truncated", "changed", "emptied"])
    def test_damaged_file_is_noticed(self, folder, content):
        (folder.path / "weights").write_bytes(content)
        assert "weights is not as it was written" in folder.finished("train", "key")

    def test_deleted_file_is_noticed(self, folder):
        (folder.path / "weights").unlink()
        assert "weights is missing" in folder.finished("train", "key")

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"key": "key"}', '{"other": 1}'])
    def test_damaged_record_is_noticed(self, folder, content):
        (folder.path / "steps" / "train.json").write_text(content)
        assert "train.json is damaged" in folder.finished("train", "key")

    def test_full_disk_leaves_the_old_file(self, folder, monkeypatch):
        def full(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"weights could not be written: No space left.*unchanged"):
            folder.write("weights", b"new")
        assert (folder.path / "weights").read_bytes() == b"0123456789"

    def test_key_depends_on_every_part(self):
        keys = {step_key(*parts) for parts in ([1, 2], [2, 1], [12], [1, 2, None], [{"a": 1}], [{"a": 2}])}
        assert len(keys) == 6


@pytest.mark.slow
class TestReport:
    def test_page_is_self_contained(self, finished_run):
        page = (finished_run[0] / "report.html").read_text(encoding="utf-8")
        # Emission may have kept this small model as it was: then there is no place to compare.
        assert page.count("data:image/svg+xml;base64,") == 2
        layers = [layer for layer in finished_run[1].layers if layer.theoretical]
        gains = waterfall_bars(finished_run[1].gains).bars
        assert page.count('<div class="bar ') == len(finished_run[1].comparison.profiles) + len(layers) + len(gains)
        assert not re.search(r'(?:src|href)="(?!data:)', page)
        assert finished_run[1].headline().split(",")[0] in page

    def test_gains_of_the_steps_come_to_the_whole_speed_up(self, finished_run):
        report = finished_run[1]
        speedup = report.comparison.speedup("pressed")
        emission, pruning, training = report.gains
        assert (emission.step, pruning.step, training.step) == ("emission", "prune_channels", "finetune")
        assert emission.theoretical == training.theoretical == 1.0
        assert pruning.theoretical == pytest.approx(speedup.theoretical, rel=1e-3)
        assert pruning.measured is None
        assert training.since == ("prune_channels", "finetune")
        assert emission.measured * training.measured == pytest.approx(speedup.measured)

    def test_json_says_the_same(self, finished_run):
        folder, report = finished_run
        stored = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        assert stored["headline"] == report.headline()
        assert Comparison.from_dict(stored["comparison"]) == report.comparison
        assert EmissionRecord.from_json(stored["emission"]) == report.emission
        assert stored["machine"]["processor"]
        assert {"torch", "kernelpress"} <= {name for name, _ in stored["machine"]["versions"]}

    def test_names_in_the_page_are_escaped(self, finished_run):
        page = render_html(replace(finished_run[1], title="<script>alert(1)</script>"))
        assert "<script>" not in page

    def test_slower_is_called_slower(self, finished_run):
        report = replace(
            finished_run[1], comparison=finished_run[1].comparison.against("pressed"), pressed="dense eager"
        )
        ratio = report.comparison.speedup("dense eager").measured
        assert ("slower" in report.headline()) == (ratio < 1)

    def test_bars_of_a_waterfall_begin_where_those_before_ended(self):
        gains = (
            Gain("emission", 1.0, 2.0, ("emission",)),
            Gain("prune", 4.0, None, ()),
            Gain("finetune", 1.0, 0.5, ("prune", "finetune")),
            Gain("quantize", 2.0, 4.0, ("quantize",)),
        )
        scale = waterfall_bars(gains)
        bars = {bar.name: (round(bar.start, 2), round(bar.length, 2), bar.label, bar.tone) for bar in scale.bars}
        step = round(100 / 4, 2)  # from ½ to 8
        assert bars == {
            "emission, measured": (step, step, "2.00×", "ours"),
            "prune, in theory": (step, 2 * step, "4.00×", ""),
            "prune + finetune, measured": (step, step, "0.50×", "loss"),
            "quantize, in theory": (3 * step, step, "2.00×", ""),
            "quantize, measured": (step, 2 * step, "4.00×", "ours"),
        }

    def place(self, modules, flops, milliseconds, original_ms):
        candidates = (CandidateRecord("aten[contiguous]", original_ms, 0.0), CandidateRecord("x", 0.1, 0.0))
        names = (f"node_{milliseconds}",)
        return PlaceRecord(modules[0], names, (1, 1), flops, "x", "", milliseconds, candidates, modules)

    def test_layers_are_matched_by_path_across_covers_and_changes(self):
        """One layer became two, two were fused, a sum runs by itself in one of the models."""
        dense = EmissionRecord(
            (
                self.place(("a", "relu"), 100, 1.0, 4.0),
                self.place(("b",), 200, 1.0, 2.0),
                self.place(("",), 0, 0.5, 1.0),
            ),
            "cpu",
        )
        pressed = EmissionRecord(
            (self.place(("a.0",), 20, 0.5, 9.0), self.place(("a.1", "relu", "b", "add"), 80, 1.5, 9.0)), "cpu"
        )
        (layer,) = layer_realisations(dense, pressed, ("a", "b"), {})
        assert (layer.name, layer.dense_flops, layer.dense_ms, layer.pressed_ms) == ("a + b", 300, 7.0, 2.0)
        assert (layer.theoretical, layer.measured, layer.realisation) == (3.0, 3.5, 3.5 / 3.0)

    def test_layers_are_held_to_what_passes_promise(self):
        dense = EmissionRecord((self.place(("a",), 100, 1.0, 4.0), self.place(("b",), 200, 1.0, 2.0)), "cpu")
        first, second = layer_realisations(dense, dense, ("b", "a"), {"a": (100, 25.0), "c": (1, 0.0)})
        assert (first.name, first.theoretical, second.name, second.theoretical) == ("b", 1.0, "a", 4.0)
        assert second.realisation == 1.0


class TestModels:
    def test_function_of_a_module_makes_the_model(self, recipe_file, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "my_networks.py").write_text(
            "from torch import nn\n"
            "def small(width):\n"
            "    return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), "
            "nn.Linear(width, 10))\n"
        )
        text = RECIPE.replace("name: resnet20, options: {width: 16}", "name: 'my_networks:small', options: {width: 8}")
        with pytest.raises(Interruption, match="prune_channels: started"):
            press(recipe_file(text), output=tmp_path / "out", tell=_stop_at("prune_channels:"), progress=False)
        assert (tmp_path / "out" / "train.safetensors").is_file()

    def test_checking_a_recipe_imports_nothing(self, recipe_file, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "hostile_networks.py").write_text("open('executed', 'w')\n")
        load_recipe(recipe_file(RECIPE.replace("name: resnet20", "name: 'hostile_networks:f'")))
        assert not (tmp_path / "executed").exists()


def _stop_at(start: str):
    def tell(line: str) -> None:
        if line.startswith(start):
            raise Interruption(line)

    return tell


class TestPass:
    """The list "A compression pass" in CONTRIBUTING.md, walked with a pass that is thrown away."""

    TEXT = """
title: thrown away
data: {source: digits, image_size: 8, batch_size: 64}
model: {name: resnet20, options: {width: 16}}
steps:
  - train: {epochs: 1, lr: 0.1}
  - silence: {share: 0.5}
  - prune_channels: {ratio: 0.3, round_to: 4}
  - silence: {share: 0.75}
  - emit: {threads: 1}
  - measure: {rounds: 1, budget_seconds: 0.01, peers: [eager]}
"""

    @pytest.fixture
    def silence(self, monkeypatch):
        """A pass that zeroes a share of every weight of the first convolution; and what its context held."""
        from pydantic import Field

        from kernelpress.compress.changes import mask_layer
        from kernelpress.measure import Promise
        from kernelpress.press import Pass, PassContext, Section, known_passes, register

        class Silence(Section):
            share: float = Field(description="of weights that become zero")

        seen: list[PassContext] = []

        def run(model: nn.Module, context: PassContext) -> nn.Module:
            seen.append(context)
            share = context.options.share
            mask = (torch.rand_like(model.conv1.weight) > share).float()
            change, promise = mask_layer(model, "conv1", mask), Promise("conv1", density=1 - share)
            add_record(model, PassRecord("silence", {"share": share}, 1, 1, 1, 1, (change,), promises=(promise,)))
            return model

        monkeypatch.setattr(registry, "_registered", dict(known_passes()))
        register(Pass("silence", Silence, run))
        return seen

    @pytest.mark.slow
    def test_pass_runs_from_its_registration_alone(self, silence, recipe_file, tmp_path, timings_cache):
        file = recipe_file(self.TEXT.replace("share: 0.5", "shear: 0.5"))
        with pytest.raises(RecipeError, match=r"steps\[1\].silence.shear: unknown key, did you mean 'share'"):
            load_recipe(file)

        with pytest.raises(Interruption, match="emit: started"):
            press(recipe_file(self.TEXT), output=tmp_path / "out", tell=_stop_at("emit:"), progress=False)
        first, second = silence
        assert (first.seed, first.example_inputs[0].shape, second.dense_step) == (0, (1, 1, 8, 8), "train")
        assert len(first.train_loader) > len(first.test_loader) > 0
        assert not second.teacher.training
        assert second.weights("start").keys() == second.weights("train").keys() != second.weights("silence").keys()
        with pytest.raises(ValueError, match=r"step: expected one of start, train, .*, got 'measure'"):
            second.weights("measure")

        lines: list[str] = []
        report = press(recipe_file(self.TEXT), output=tmp_path / "out", tell=lines.append, progress=False)
        assert steps_run(lines) == ["emit", "measure"]
        assert len(silence) == 2, "what was finished was not done again"
        assert list(report.passes) == ["silence", "prune_channels", "silence-2"]
        ((layer, change),) = report.passes["silence"].rows
        assert layer == "conv1"
        assert re.fullmatch(r"weight masked: \d+ of 144 left \(\d+\.\d% zeros\)", change)
        dense, silenced, pruned, pressed = report.points
        assert silenced.promised_flops < silenced.flops == dense.flops
        assert pressed.promised_flops < pruned.promised_flops < pruned.flops == pressed.flops
        page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
        assert "silence-2" in page
        assert "weight masked" in page

    def test_options_without_help_and_names_taken_are_refused(self):
        from kernelpress.press import Pass, Section, register

        class Silent(Section):
            share: float = 0.5

        with pytest.raises(ValueError, match="options: expected a description of each field, share has none"):
            Pass("silent", Silent, lambda model, context: model)
        with pytest.raises(ValueError, match="name: expected one that no step has"):
            register(registry.known_passes()["prune_channels"])
