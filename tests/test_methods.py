"""`make methods`: what it asks of sweeps, and the table that it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import methods
import pytest

pytest.importorskip("pydantic", reason="recipes take pydantic: pip install 'kernelpress[all]'")

from kernelpress.bench import describe_machine
from kernelpress.press.reading import load_recipe
from kernelpress.report import Limits, Reached, SweepReport, Trial


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The recipes of the sweeps so far, of which the first method of each reaches something."""
    found: list[Any] = []

    def swept(recipe: Path, *, options: Any, output: Path) -> SweepReport:
        found.append(load_recipe(recipe, options))
        first, *others = found[-1].sweep.cases
        trials = [Trial(first, {}, "trials/x", Reached(0.9, 0.95, 1.5, 100, 10, 3.0, 2.0, 4.0))]
        trials += [Trial(name, {}, "trials/y", None, "ValueError: nothing\nto do") for name in others]
        return SweepReport("", "", None, describe_machine(), Limits(), tuple(trials))

    monkeypatch.setattr(methods, "sweep", swept)
    return found


def run(folder: Path, *arguments: str) -> tuple[list[str], list[Any]]:
    """The lines of the page, and the rows of the result file."""
    page = folder / "page.md"
    page.write_text(f"before\n{methods.MARKS[0]}\nold\n{methods.MARKS[1]}\nafter\n", encoding="utf-8")
    methods.main(["--page", str(page), "--results", str(folder), "--output", str(folder / "runs"), *arguments])
    (results,) = folder.glob("*/methods.json")
    return page.read_text(encoding="utf-8").splitlines(), json.loads(results.read_text(encoding="utf-8"))["results"]


def test_every_method_is_in_the_table_for_both_networks(asked: list[Any], tmp_path: Path) -> None:
    lines, rows = run(tmp_path)
    assert [recipe.model.name for recipe in asked] == ["resnet20", "mobilenet_v2"]
    cases = [case for recipe in asked for case in recipe.sweep.cases]
    assert [row["trial"]["name"] for row in rows] == cases
    assert len(cases) == len(lines) - 6 > 40
    assert (lines[0], lines[-1]) == ("before", "after")
    assert lines[4] == ("| ResNet-20 | svd | 90.00% | 5.00 | 1.50 ms | 3.00× | 2.00× | 4.00× | 0.50 | 100 | 10 |  |")
    assert lines[5].endswith("| – | – | ValueError: nothing to do |")
    assert "| ResNet-20 | svd |" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_one_method_is_tried_quickly(asked: list[Any], tmp_path: Path) -> None:
    _, rows = run(tmp_path, "--networks", "ResNet-20", "--cases", "Tucker", "--quick")
    (recipe,) = asked
    assert list(recipe.sweep.cases) == ["Tucker"]
    assert (recipe.data.image_size, recipe.steps[0].section.epochs) == (8, 1)
    assert len(rows) == 1


def test_the_page_that_ships_has_the_marks() -> None:
    page = methods.PAGE.read_text(encoding="utf-8")
    assert all(page.count(mark) == 1 for mark in methods.MARKS)
