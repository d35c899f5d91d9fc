"""The HTML page and the JSON file of a report."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from kernelpress.measure.units import ABSENT, count_text, latency_text, memory_text, ratio_text
from kernelpress.report.bars import latency_bars, realisation_bars, waterfall_bars
from kernelpress.report.figures import accuracy_figure, curves_figure
from kernelpress.report.record import Report

__all__ = ["render_html", "render_json", "rendered"]

_ASIDES = (1, 3)
"""Columns of a comparison below whose values the next one's stand: latency, speed-up."""


def render_html(report: Report) -> str:
    """One self-contained page for windows of any width: its figures are embedded, nothing is fetched.

    Raises `ImportError` without jinja2, matplotlib or PyYAML.
    """
    try:
        import yaml
    except ImportError as error:
        raise ImportError(f"the report takes {error.name}: pip install 'kernelpress[all]'") from error
    comparison = report.comparison
    header, rows = comparison.cells()
    columns = [i for i in range(len(header)) if i - 1 not in _ASIDES and any(row[i] != ABSENT for row in rows)]
    return rendered(
        "run.html.j2",
        report=report,
        headline=report.headline().split(", ", 1) if ", " in report.headline() else (report.headline(), ""),
        comparison=comparison,
        base=comparison[comparison.baseline],
        pressed=comparison[report.pressed],
        pressed_index=[profile.name for profile in comparison.profiles].index(report.pressed),
        header=[header[column] for column in columns],
        rows=[[(row[column], row[column + 1] if column in _ASIDES else "") for column in columns] for row in rows],
        latencies=latency_bars(comparison, report.pressed),
        gains=waterfall_bars(report.gains),
        realisations=realisation_bars(report.layers),
        figures={against: accuracy_figure(report.points, against=against) for against in ("latency", "flops")},
        pictures={
            step: [(f.title, curves_figure(f)) for f in reading.figures] for step, reading in report.passes.items()
        },
        recipe_text=yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True),
    )


def rendered(template: str, **values: Any) -> str:
    """A page from a template of this folder. Raises `ImportError` without jinja2 or matplotlib."""
    try:
        import jinja2
        import matplotlib as _  # noqa: F401
    except ImportError as error:
        raise ImportError(f"the report takes {error.name}: pip install 'kernelpress[all]'") from error
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(
            lambda name: resources.files("kernelpress.report").joinpath(name).read_text(encoding="utf-8")
        ),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": count_text,
        "latency": latency_text,
        "memory": memory_text,
        "ratio": ratio_text,
    }
    return environment.get_template(template).render(**values)


def render_json(report: Report) -> str:
    """The same report as JSON."""
    return json.dumps(report.to_dict(), indent=1, ensure_ascii=False)
