"""Numbers with their units, and plain-text tables, as measurements are printed."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["count_text", "energy_text", "latency_text", "memory_text", "ratio_text", "text_table"]

ABSENT = "–"


def _scaled(value: float, step: float, prefixes: Sequence[str], unit: str) -> str:
    power = 0
    while abs(value) >= step and power < len(prefixes) - 1:
        value /= step
        power += 1
    digits = 0 if power == 0 or abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f} {prefixes[power]}{unit}".rstrip()


def _three_digits(value: float) -> str:
    return f"{value:#.3g}".rstrip(".") if value < 999.5 else f"{value:.0f}"


def count_text(value: int | None, unit: str = "") -> str:
    """`3504872` as `3.50 M`; `None` as a dash."""
    return ABSENT if value is None else _scaled(value, 1000.0, ("", "k", "M", "G", "T"), unit)


def memory_text(value: int | None) -> str:
    """Bytes in binary multiples: `2097152` as `2.00 MiB`."""
    return ABSENT if value is None else _scaled(value, 1024.0, ("", "Ki", "Mi", "Gi"), "B")


def latency_text(milliseconds: float) -> str:
    """Milliseconds with three significant digits and their unit (µs below a tenth of a millisecond)."""
    if milliseconds < 0.1:
        return f"{_three_digits(milliseconds * 1e3)} µs"
    return f"{_three_digits(milliseconds)} ms"


def energy_text(joules: float | None) -> str:
    """Joules as `12.3 mJ`; `None` as a dash."""
    return ABSENT if joules is None else f"{_three_digits(joules * 1e3)} mJ"


def ratio_text(ratio: float | None) -> str:
    """`2.153` as `2.15×`; `None` as a dash."""
    return ABSENT if ratio is None else f"{ratio:.2f}×"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to one width, the first to the left and the others to the right, under a ruled header."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        numbers = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join([row[0].ljust(widths[0]), *numbers]).rstrip()

    return "\n".join([line(header), "  ".join("─" * width for width in widths), *(line(row) for row in rows)])
