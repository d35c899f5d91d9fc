"""`kernelpress compare`: what it measures, says and writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kernelpress.bench import describe_machine, model_contest
from kernelpress.bench.model_contest import ModelResult, RuntimeResult
from kernelpress.bench.processes import Start
from kernelpress.cli import main
from kernelpress.report import Accuracy, NetworkComparison, render_networks


def comparison(*, energy: float | None = None, accuracies: dict[str, Accuracy] | None = None) -> NetworkComparison:
    reason = None if energy is not None else "this machine exposes no RAPL counters"
    entries = (
        RuntimeResult("eager", "s", (30.0, 31.0), 0.0, 0.0, None, Start(3.0, 0.5, 0.25), 2**28, energy, reason),
        RuntimeResult("torch.compile", skipped="no compiler"),
        RuntimeResult("kernelpress", "s", (12.0, 10.0), 1e-6, 0.0, None, Start(3.0, 0.5, 0.1), 2**27, energy, reason),
    )
    result = ModelResult("alexnet", 1, 224, 2, 0, 30, entries, 1_400_000_000, 61_100_840, 244_403_360, 5.1)
    return NetworkComparison("today", None, describe_machine(), (result,), accuracies or {})


def test_the_table_has_a_row_for_each_runtime_and_dashes_for_what_is_unknown() -> None:
    header, rows = comparison().cells()
    told = [dict(zip(header, row, strict=True)) for row in rows]
    assert [row["speed-up"] for row in told] == ["1.00×", "–", "3.00×"]
    assert told[0]["total"] == "3.75 s"
    assert told[1]["time"] == "no compiler"
    assert told[2]["peak"] == "128 MiB"
    assert told[2]["energy"] == "–"
    assert "no energy: this machine exposes no RAPL counters" in comparison().notes()
    assert any(note.startswith("emission, once: alexnet 5.1 s") for note in comparison().notes())


def test_the_page_shows_four_costs_and_accuracies_only_where_some_are_published() -> None:
    page = render_networks(comparison())
    assert "(a) Inference time" in page
    assert "What they know" not in page
    assert "Not measured; the reason is below the table." in page
    page = render_networks(comparison(energy=0.2, accuracies={"alexnet": Accuracy(56.5, "<somebody>")}))
    assert "Not measured" not in page
    assert "200 mJ" in page
    assert page.count("<img") == 2
    assert "&lt;somebody&gt;" in page


@pytest.mark.slow
def test_networks_are_measured_one_by_one_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(model_contest, "STOCK_AND_OURS", model_contest.STOCK_AND_OURS[::2])
    assert (
        main(["compare", "resnet20", "--size", "16", "--rounds", "1", "--output", str(tmp_path), "--threads", "1"]) == 0
    )
    written = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    (result,) = written["results"]
    assert [entry["runtime"] for entry in result["runtimes"]] == ["eager", "kernelpress"]
    assert all(entry["skipped"] is None for entry in result["runtimes"])
    assert "resnet20" in (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert "kernelpress" in capsys.readouterr().out


def test_an_unknown_network_is_named_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "resnet20", "resnet2", "--output", str(tmp_path / "new")]) == 2
    assert "got 'resnet2'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
