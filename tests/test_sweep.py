"""Sweeps and searches: which trials there are, what failed ones say, who is best; recipes that ship, shortened."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("pydantic", reason="recipes take pydantic: pip install 'kernelpress[all]'")
pytest.importorskip("sklearn", reason="the digits are part of scikit-learn: pip install 'kernelpress[all]'")

from kernelpress import cli
from kernelpress.bench import describe_machine
from kernelpress.press import (
    RecipeError,
    SweepError,
    known_passes,
    load_recipe,
    press,
    ray_trials,
    search,
    sweep,
    sweeps,
)
from kernelpress.press.options import with_options
from kernelpress.press.reading import read_recipe
from kernelpress.press.sections import SweepSection
from kernelpress.press.sweeps import SWEEP_HTML, SWEEP_JSON, Planned, planned
from kernelpress.report import Limits, Reached, SweepReport, Trial, render_sweep

RECIPES = Path(__file__).parent.parent / "recipes"
BASE = """
data: {source: digits, image_size: 8, train_fraction: 0.1}
model: resnet20
seed: 3
steps:
  - train: {epochs: 1, lr: 0.1}
  - prune_channels: {ratio: 0.4, round_to: 4}
  - emit
  - measure: {rounds: 1, budget_seconds: 0.01, peers: [eager]}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Callable[[str], Path]:
    def write(sweep: str) -> Path:
        (tmp_path / "recipe.yaml").write_text(f"{BASE}sweep:\n  {sweep}\n", encoding="utf-8")
        return tmp_path / "recipe.yaml"

    return write


def trials(file: Path) -> list[Planned]:
    read = read_recipe(file)
    section = read.checked().sweep
    assert section is not None
    return planned(read, section, read.checked().seed)


class TestOptions:
    RAW: dict[str, Any] = {"model": "resnet20", "steps": [{"train": {"epochs": 1}}, "emit", {"measure": None}]}  # noqa: RUF012

    @pytest.mark.parametrize(
        ("path", "value", "expected"),
        [
            ("steps.0.train.epochs", 3, {"steps": [{"train": {"epochs": 3}}, "emit", {"measure": None}]}),
            ("steps.0.train.lr", 0.1, {"steps": [{"train": {"epochs": 1, "lr": 0.1}}, "emit", {"measure": None}]}),
            ("steps.1.emit.batch", 8, {"steps": [{"train": {"epochs": 1}}, {"emit": {"batch": 8}}, {"measure": None}]}),
            ("steps.2.measure.rounds", 1, {"steps": [{"train": {"epochs": 1}}, "emit", {"measure": {"rounds": 1}}]}),
            ("model.options.width", 8, {"model": {"name": "resnet20", "options": {"width": 8}}}),
            ("model", "resnet8", {"model": "resnet8"}),
            ("data.image_size", 8, {"data": {"image_size": 8}}),
        ],
    )
    def test_paths_reach_options_through_lists_and_short_forms(self, path: str, value: Any, expected: Any) -> None:
        assert with_options(self.RAW, {path: value}) == {**self.RAW, **expected}
        assert self.RAW["steps"][0] == {"train": {"epochs": 1}}

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("steps.3.emit", r"steps.3.emit: expected a number below 3, of an item of steps, got '3'"),
            ("steps.train.epochs", r"expected a number below 3, of an item of steps, got 'train'"),
            ("steps.0.train.epochs.0", r"expected a mapping or a list at steps.0.train.epochs, got 1"),
        ],
    )
    def test_path_that_leads_nowhere_is_refused(self, path: str, message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            with_options(self.RAW, {path: 1})

    def test_what_shares_an_alias_changes_alone(self, tmp_path: Path) -> None:
        (tmp_path / "r.yaml").write_text("model: x\nsteps: [train: &t {epochs: 1}, finetune: *t]\n")
        recipe = load_recipe(tmp_path / "r.yaml", {"steps.1.finetune.epochs": 5})
        assert [step.section.epochs for step in recipe.steps] == [1, 5]


class TestTrials:
    def test_every_combination_is_one_in_each_case(self, recipe_file: Any) -> None:
        found = trials(
            recipe_file(
                "{cases: {plain: {}, greedy: {steps.1.prune_channels.schedule: greedy}},"
                " options: {steps.1.prune_channels.ratio: [0.2, 0.4], steps.0.train.lr: [0.1]}}"
            )
        )
        assert [trial.name for trial in found] == [
            f"{case}, ratio={ratio}, lr=0.1" for case in ("plain", "greedy") for ratio in (0.2, 0.4)
        ]
        last = found[-1].recipe
        assert not isinstance(last, RecipeError)
        assert (last.steps[1].section.schedule, last.steps[1].section.ratio) == ("greedy", 0.4)
        assert len({trial.folder for trial in found}) == 4

    def test_options_of_one_name_are_told_apart(self, recipe_file: Any) -> None:
        (trial,) = trials(recipe_file("options: {steps.0.train.epochs: [2], steps.3.measure.rounds: [1], seed: [7]}"))
        assert trial.name == "epochs=2, rounds=1, seed=7"
        file = recipe_file("options: {steps.0.train: [{epochs: 2}], model: [resnet8], data.source: [digits]}")
        assert trials(file)[0].name == "train={epochs: 2}, model=resnet8, source=digits"

    def test_draws_follow_from_the_seed_and_more_go_on(self, recipe_file: Any) -> None:
        drawn = (
            "options: {steps.0.train.lr: {low: 0.001, high: 0.1, log: true}, steps.0.train.epochs: {low: 2, high: 9}}"
        )
        few, more = trials(recipe_file(f"{{{drawn}, trials: 5}}")), trials(recipe_file(f"{{{drawn}, trials: 8}}"))
        assert [trial.folder for trial in few] == [trial.folder for trial in more[:5]]
        assert len({trial.name for trial in more}) == 8
        for trial in more:
            rate, epochs = trial.options.values()
            assert 0.001 <= rate <= 0.1
            assert epochs in range(2, 10)

    def test_draws_end_where_there_is_nothing_new(self, recipe_file: Any) -> None:
        assert len(trials(recipe_file("{options: {seed: [1, 2]}, trials: 9}"))) == 2

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{}", r"recipe.yaml:\d+: sweep: expected cases or options, got neither"),
            ("options: {seed: []}", r"options: expected at least one value of seed, got none"),
            (
                "options: {seed: {low: 1, high: 2}}",
                r"trials: expected how many to draw from the range of seed, got none",
            ),
            ("{options: {seed: {low: 2, high: 1}}, trials: 1}", r"expected low < high, got 2 and 1"),
            ("{options: {seed: {low: 0, high: 1, log: true}}, trials: 1}", r"expected 0 < low < high, got 0 and 1"),
            ("{option: {seed: [1]}}", r"sweep.option: unknown key, did you mean 'options'"),
            ("options: {steps.9.emit: [1]}", r"steps.9.emit: expected a number below 4"),
        ],
    )
    def test_mistake_is_named(self, recipe_file: Any, text: str, message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            trials(recipe_file(text))

    def test_more_than_anybody_can_wait_for_is_refused(self, recipe_file: Any) -> None:
        many = str(list(range(101)))
        with pytest.raises(RecipeError, match=r"at most 10000 combinations without trials, got 10201"):
            trials(recipe_file(f"options: {{seed: {many}, steps.0.train.epochs: {many}}}"))

    def test_recipe_without_the_section_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "recipe.yaml").write_text(BASE)
        with pytest.raises(RecipeError, match=r"recipe.yaml: sweep: expected this section"):
            sweep(tmp_path / "recipe.yaml", output=tmp_path / "out")


def reached(latency: float = 1.0, accuracy: float = 0.9, flops: int = 100) -> Reached:
    return Reached(accuracy, 0.95, latency, flops, 10, 3.0, 2.0, 4.0)


def report(*found: Reached | None, **limits: float) -> SweepReport:
    each = tuple(Trial(str(i), {}, f"trials/{i}", r, "" if r else "no memory") for i, r in enumerate(found))
    return SweepReport("a sweep", "today", None, describe_machine(), Limits(**limits), each)


class TestSweepReport:
    FOUND = (reached(3, 0.95, 90), reached(2, 0.93, 95), reached(1, 0.80, 50), reached(4, 0.94, 70), None)

    @pytest.mark.parametrize(
        ("limits", "best"),
        [
            ({}, None),
            ({"max_ms": 2.5}, "1"),
            ({"max_ms": 1.0}, "2"),
            ({"max_ms": 0.5}, None),
            ({"min_accuracy": 0.93}, "1"),
            ({"min_accuracy": 0.94}, "0"),
            ({"max_drop": 0.02}, "1"),
            ({"max_drop": 0.0, "max_ms": 3}, "0"),
            ({"min_accuracy": 0.99}, None),
        ],
    )
    def test_best_keeps_to_the_limits(self, limits: dict[str, float], best: str | None) -> None:
        made = report(*self.FOUND, **limits)
        found = made.best()
        assert (found and found.name) == best
        assert bool(made.verdict()) == bool(limits)
        assert ("no trial keeps" in made.verdict()) == (bool(limits) and best is None)

    def test_front_has_what_nothing_beats(self) -> None:
        made = report(*self.FOUND)
        assert [trial.name for trial in made.front(lambda r: r.latency_ms)] == ["2", "1", "0"]
        assert [trial.name for trial in made.front(lambda r: r.flops)] == ["2", "3", "0"]

    def test_of_two_alike_one_is_on_the_front(self) -> None:
        assert len(report(reached(), reached()).front(lambda r: r.latency_ms)) == 1

    def test_page_is_self_contained_and_names_failures(self) -> None:
        page = render_sweep(report(*self.FOUND, max_ms=2.5))
        assert page.count("data:image/svg+xml;base64,") == 2
        assert not re.search(r'(?:src|href)="(?!data:)', page)
        assert page.count('<tr class="ours">') == 1
        assert "no memory" in page
        assert "at most 2.50 ms" in page

    def test_json_says_who_is_on_which_front(self) -> None:
        told = json.loads(report(*self.FOUND, min_accuracy=0.93).to_json())
        assert told["best"] == "1"
        assert told["fronts"] == {"latency": ["2", "1", "0"], "FLOPs": ["2", "3", "0"]}
        assert told["trials"][4] == {
            "name": "4", "options": {}, "folder": "trials/4", "reached": None, "failure": "no memory",
        }  # fmt: skip


@pytest.fixture
def quick_press(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs that are over at once, of networks that are as fast as their seed is small; the folders of those so far."""
    done: list[str] = []

    def run(recipe: Any, *, output: Path, **_: Any) -> Any:
        done.append(output.name)
        if recipe.seed == 13:
            raise MemoryError("thirteen")
        points = [SimpleNamespace(accuracy=0.95, flops=100, parameters=10)] * 2
        speedup = SimpleNamespace(measured=2.0, theoretical=4.0)
        profile = SimpleNamespace(latency=SimpleNamespace(median=float(max(recipe.seed, 1))))

        class Comparison:
            profiles = (SimpleNamespace(name="dense emitted"),)

            def against(self, name: str) -> Any:
                return self

            def speedup(self, name: str) -> Any:
                return speedup

            def __getitem__(self, name: str) -> Any:
                return profile

        return SimpleNamespace(comparison=Comparison(), pressed="pressed", points=points)

    monkeypatch.setattr(sweeps, "press", run)
    return done


class TestSweep:
    def test_a_failed_trial_ends_no_other(self, recipe_file: Any, quick_press: list[str], tmp_path: Path) -> None:
        lines: list[str] = []
        file = recipe_file("options: {seed: [13, 2, -1.5, 3]}")
        made = sweep(file, output=tmp_path / "out", limits=Limits(max_ms=5, min_accuracy=0.9), tell=lines.append)
        first, second, third, _ = made.trials
        assert first.failure == "MemoryError: thirteen"
        assert second.reached is not None
        assert re.search(r"recipe.yaml:4: seed: input should be a valid integer.*got -1.5", third.failure)
        assert len(quick_press) == 3
        assert made.best() is second
        assert "trial 2 of 4: seed=2" in lines
        stored = json.loads((tmp_path / "out" / SWEEP_JSON).read_text())
        assert stored["best"] == "seed=2"
        assert "seed=2" in (tmp_path / "out" / SWEEP_HTML).read_text()

    def test_where_all_fail_each_has_its_reason(self, recipe_file: Any, quick_press: list[str], tmp_path: Path) -> None:
        file = recipe_file("options: {seed: [13], steps.1.prune_channels.ratio: [0.3, 1.5]}")
        with pytest.raises(SweepError) as caught:
            sweep(file, output=tmp_path / "out", tell=lambda _: None)
        told = str(caught.value).splitlines()
        assert told[0] == "sweep: each of the 2 trials failed"
        assert told[1] == "  seed=13, ratio=0.3: MemoryError: thirteen"
        assert re.search(
            r"ratio=1.5: .*recipe.yaml:7: steps\[1\].prune_channels.ratio: input .* less than 1, got 1.5", told[2]
        )

    def test_command_prints_the_table_and_the_best(
        self, recipe_file: Any, quick_press: list[str], tmp_path: Path, capsys: Any
    ) -> None:
        command = ["sweep", str(recipe_file("options: {seed: [4, 2]}")), "--output", str(tmp_path / "out")]
        assert cli.main([*command, "--min-accuracy", "0.9"]) == 0
        out = capsys.readouterr().out
        assert "best with accuracy of at least 90.00%: seed=2, 2.00 ms, 95.00%" in out
        assert "realisation" in out
        assert cli.main([*command, "--max-ms", "1", "--set", "sweep.options.seed=[9]"]) == 1
        assert "no trial keeps to the limits: at most 1.00 ms" in capsys.readouterr().out
        assert quick_press[-1].startswith("seed=9-")

    @pytest.mark.parametrize("option", ["seed", "=3", "seed=[1"])
    def test_what_sets_nothing_is_refused(self, option: str, capsys: Any) -> None:
        with pytest.raises(SystemExit):
            cli.main(["sweep", "recipe.yaml", "--set", option])
        assert "expected" in capsys.readouterr().err

    @pytest.mark.slow
    def test_trials_share_their_first_steps_and_are_not_done_again(self, recipe_file: Any, tmp_path: Path) -> None:
        file = recipe_file("options: {steps.1.prune_channels.criterion: [l1, l2]}")

        lines: list[str] = []
        made = sweep(file, output=tmp_path / "out", tell=lines.append, progress=False)
        told = "\n".join(lines)
        assert told.count("train: started") == 1
        assert told.count("train: skipped, finished in") == 1
        assert all(trial.reached is not None for trial in made.trials)
        assert all((tmp_path / "out" / trial.folder / "report.html").is_file() for trial in made.trials)
        lines.clear()
        again = sweep(file, output=tmp_path / "out", tell=lines.append, progress=False)
        assert again.trials == made.trials
        assert not [line for line in lines if "started" in line or "again" in line]


class TestRay:
    def test_where_it_is_absent_that_says_what_installs_it(
        self, recipe_file: Any, monkeypatch: Any, tmp_path: Path
    ) -> None:
        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(ImportError, match=r"pip install kernelpress\[ray\]"):
            sweep(recipe_file("options: {seed: [1]}"), output=tmp_path, ray="local")

    def test_trials_take_whole_nodes_of_the_largest_kind(self) -> None:
        nodes = [
            {"Alive": True, "Resources": {"CPU": 8.0, "memory": 1e9}},
            {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
            {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}},
        ]
        assert ray_trials._largest_node(nodes) == {"cpu": 4.0, "gpu": 1.0}
        assert ray_trials._largest_node(nodes[:1]) == {"cpu": 8.0}

    def test_a_process_that_ends_is_a_failed_trial(
        self, recipe_file: Any, quick_press: list[str], monkeypatch: Any, tmp_path: Path
    ) -> None:
        def ran(attempt: Any, count: int, folder: Path, address: str) -> list[Any]:
            assert (address, folder) == ("ray://head:10001", tmp_path / "out")
            return [attempt(0), "Ray: the node died", *map(attempt, range(2, count))]

        monkeypatch.setattr(sweeps, "run_on_ray", ran)
        lines: list[str] = []
        file = recipe_file("options: {seed: [3, 2, 1]}")
        made = sweep(file, output=tmp_path / "out", ray="ray://head:10001", tell=lines.append)
        assert [trial.failure for trial in made.trials] == ["", "Ray: the node died", ""]
        assert "seed=2: failed: Ray: the node died" in lines
        assert "seed=1: reached: accuracy 95.00%, 1 ms" in lines

    @pytest.mark.slow
    def test_trials_run_on_a_ray_of_this_machine(self, recipe_file: Any, tmp_path: Path) -> None:
        pytest.importorskip("ray.tune", reason="Ray Tune is not installed: pip install 'kernelpress[ray]'")
        file = recipe_file("options: {steps.1.prune_channels.ratio: [0.3, 0.4]}")
        made = sweep(file, output=tmp_path / "out", ray="local", tell=lambda _: None)
        assert [trial.failure for trial in made.trials] == ["", ""]
        assert [trial.options["steps.1.prune_channels.ratio"] for trial in made.trials] == [0.3, 0.4]
        again = sweep(file, output=tmp_path / "out", tell=lambda _: None, progress=False)
        assert again.trials == made.trials


class TestSearch:
    def test_all_cases_are_tried_alike(self, quick_press: list[str], monkeypatch: Any, tmp_path: Path) -> None:
        seen: list[Any] = []
        run = sweeps.press

        def watched(recipe: Any, **options: Any) -> Any:
            seen.append(recipe)
            return run(recipe, **options)

        monkeypatch.setattr(sweeps, "press", watched)
        monkeypatch.setattr("kernelpress.press.searches.shutil.copyfile", lambda *_: None)
        files = [RECIPES / f"{name}.yaml" for name in ("methods", "sparse")]
        made = search("mobilenet_v1", latency_ms=2, recipes=files, epochs=4, threads=1, output=tmp_path)
        names = [trial.name for trial in made.trials]
        assert names[0] == "methods: svd"
        assert names[-1] == "sparse"
        assert len(names) > 20
        assert made.best() is not None
        for recipe in seen:
            assert (recipe.model.name, recipe.data.image_size, recipe.steps[0].section.epochs) == (
                "mobilenet_v1",
                32,
                4,
            )
            assert recipe.last_emission().section.threads == 1
            assert recipe.require.min_accuracy is None

    @pytest.mark.parametrize(("latency", "status"), [("2ms", 0), ("0.5ms", 1)])
    def test_command_keeps_the_best_or_says_that_there_is_none(
        self, latency: str, status: int, quick_press: list[str], monkeypatch: Any, tmp_path: Path, capsys: Any
    ) -> None:
        kept: list[Path] = []
        monkeypatch.setattr("kernelpress.press.searches.shutil.copyfile", lambda *paths: kept.extend(paths))
        command = ["search", "resnet20", "--latency", latency, "--recipes", str(RECIPES / "digits.yaml")]
        assert cli.main([*command, "--output", str(tmp_path)]) == status
        assert [path.name for path in kept] == ["emit-2.pt2", "best.pt2"][: 2 * (not status)]
        out = capsys.readouterr().out
        assert ("best with at most 2.00 ms, at most 1.00% of accuracy lost: digits" in out) == (not status)

    def test_weights_take_the_place_of_training(self, quick_press: list[str], tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.setattr("kernelpress.press.searches.shutil.copyfile", lambda *_: None)
        made = search(
            "resnet20", latency_ms=2, recipes=[RECIPES / "sparse.yaml"], weights=tmp_path / "w.safetensors",
            output=tmp_path / "out", tell=lambda _: None,
        )  # fmt: skip
        assert made.trials[0].reached is not None
        assert len(quick_press) == 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"latency_ms": 0.0}, "latency_ms: expected more than 0, got 0.0"),
            ({"latency_ms": 1.0, "max_drop": 2.0}, "max_drop: expected 0 to 1, got 2.0"),
            ({"latency_ms": 1.0, "epochs": 0}, "epochs: expected more than 0, got 0"),
        ],
    )
    def test_arguments_out_of_range_are_named(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            search("resnet20", **arguments)

    @pytest.mark.parametrize(("text", "time"), [("2ms", 2.0), ("350us", 0.35), ("0.5 s", 500.0), ("3", 3.0)])
    def test_times_have_units(self, text: str, time: float) -> None:
        options = cli._parser().parse_args(["search", "resnet20", "--latency", text])
        assert options.latency == pytest.approx(time)

    @pytest.mark.parametrize("text", ["", "fast", "-1ms", "2h", "0", "ms", "inf"])
    def test_what_is_no_time_is_refused(self, text: str, capsys: Any) -> None:
        with pytest.raises(SystemExit):
            cli._parser().parse_args(["search", "resnet20", f"--latency={text}"])
        assert "expected a time such as 2ms" in capsys.readouterr().err

    def test_recipes_ship(self) -> None:
        from kernelpress.press.searches import shipped_recipes

        try:
            files = shipped_recipes()
        except FileNotFoundError:
            pytest.skip("the environment was installed before recipes shipped: make build installs anew")
        assert [file.read_bytes() for file in files] == [(RECIPES / file.name).read_bytes() for file in files]


LEAST: dict[str, Any] = {
    "epochs": 2,
    "rounds": 1,
    "rewind_epoch": 1,
    "seeds": 1,
    "budget_seconds": 0.01,
    "samples": 32,
    "batches": 1,
    "whiten": 1,
}


def shortened(value: Any) -> Any:
    """The same with the least of everything."""
    if isinstance(value, dict):
        small = {key: min(part, LEAST[key]) if key in LEAST else shortened(part) for key, part in value.items()}
        return small | ({"peers": ["eager"]} if "peers" in small else {})
    return [shortened(part) for part in value] if isinstance(value, list) else value


def shortened_recipe(raw: dict[str, Any]) -> dict[str, Any]:
    """The same steps, done in seconds."""
    data = {"source": "digits", "image_size": 8, "train_fraction": 0.1}
    return {**shortened(raw), "require": {}, "data": data, "model": "resnet8"}


def shipped() -> list[Any]:
    """Every recipe that ships and each of its cases, shortened."""
    found: list[Any] = []
    for path in sorted(RECIPES.glob("*.yaml")):
        file = read_recipe(path)
        section = file.checked().sweep or SweepSection(cases={path.stem: {}})
        trials = planned(file, section, 0, shortened_recipe)
        found += [pytest.param(trial, id=f"{path.stem}-{trial.name}".replace(" ", "_")) for trial in trials]
    return found


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("trial", shipped())
def test_recipe_that_ships_runs(trial: Planned, shared_folder: Path) -> None:
    assert not isinstance(trial.recipe, RecipeError), str(trial.recipe)
    others = [folder for folder in shared_folder.iterdir() if folder.name != trial.folder]
    made = press(trial.recipe, output=shared_folder / trial.folder, shared=others, tell=lambda _: None, progress=False)
    passes = [step.id for step in trial.recipe.run_steps() if step.name in known_passes()]
    assert list(made.passes) == passes
    assert made.points[-1].flops <= made.points[0].flops
