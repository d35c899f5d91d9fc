"""Tables of results, as a console shows them and as a page has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kernelpress.bench.contest import OURS
from kernelpress.measure.units import ABSENT, ratio_text

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Cells", "console_table", "layer_cells", "markdown", "number_text"]

_TEXT = frozenset({"all peers, ms", "backend", "best peer", "layer", "model", "network", "path", "recorded"})
_TEXT |= {"family", "instructions", "kernel", "of", "remark", "runtime", "settings", "trial"}
"""Columns that are aligned to the left."""

_WRAPPED = frozenset({"best peer", "network", "settings"})

Cells = tuple[list[str], list[list[str]]]
"""The names of the columns, and the rows."""


def layer_cells(rows: Sequence[Mapping[str, Any]], unit: str = "GFLOP/s") -> Cells:
    """Rows of a contest as result files have them, the rate in GFLOP/s or TFLOP/s, without columns that none fills."""
    header = ["network", "layer", "batch", "backend", "best ms", "spread", unit, "GB/s", "of roofline"]
    header += ["realisation", "unfused ÷ ours", "Triton ÷ ours", "best peer ÷ ours", "best peer"]
    cells = [_cells_of(row, {"GFLOP/s": 1e-6, "TFLOP/s": 1e-9}[unit]) for row in rows]
    filled = [index for index in range(len(header)) if any(row[index] != ABSENT for row in cells)]
    return [header[index] for index in filled], [[row[index] for index in filled] for row in cells]


def _cells_of(row: Mapping[str, Any], scale: float) -> list[str]:
    ms, fraction = row["ms"], row["roofline_fraction"]
    failures = [entry["reason"] for entry in row["contestants"] if entry["name"] == OURS and entry.get("reason")]
    return [
        row["network"],
        f"{row['op']} {row['layer']}",
        str(row.get("batch", ABSENT)),
        f"failed: {failures[0]}" if failures else row["backend"],
        number_text(ms, ".4f"),
        number_text(row.get("spread"), ".0%"),
        number_text(ms and row["flops"] / ms * scale, ".1f"),
        number_text(ms and row["traffic_bytes"] / ms * 1e-6, ".1f"),
        ABSENT if fraction is None else f"{fraction:.0%} {row['limited_by']}",
        number_text(row.get("realisation"), ".2f"),
        *(ratio_text(row.get(name)) for name in ("unfused_ratio", "triton_ratio", "ratio")),
        row["best_peer"] or ABSENT,
    ]


def number_text(value: float | None, form: str) -> str:
    """The number, or a dash for none."""
    return ABSENT if value is None else format(value, form)


def console_table(title: str, cells: Cells, caption: str) -> Table:
    """A table to be printed by rich."""
    from rich.table import Table

    header, rows = cells
    view = Table(title=title, caption=caption)
    for name in header:
        view.add_column(name, justify="left" if name in _TEXT else "right", no_wrap=name not in _WRAPPED)
    for row in rows:
        view.add_row(*row)
    return view


def markdown(cells: Cells) -> list[str]:
    """The lines of a table in Markdown."""
    header, rows = cells
    rule = [":--" if name in _TEXT else "--:" for name in header]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [header, rule, *rows]]
