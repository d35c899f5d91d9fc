"""Benchmarks one family of layers within a time: `python -m gpu.kernels int8 --seconds 60 --out FOLDER`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import torch

from gpu import results, stage_parser
from gpu.contest import family_layers, measure, with_inductor
from gpu.place import DRY, on_device
from gpu.roofline import measure_roofline
from kernelpress.bench import ALL_FAMILIES, Layer, Row
from kernelpress.measure.units import ratio_text

__all__ = ["main"]

INDUCTOR_SHARE = 0.4
"""Of the time given: Inductor compiles for seconds a layer."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures until the time is up, saving what there is; returns 1 where one of our layers failed."""
    parser = stage_parser(__doc__, seconds=60.0)
    parser.add_argument("family", choices=ALL_FAMILIES)
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    torch.manual_seed(0)
    place = DRY if options.dry_run else on_device()
    roofline = measure_roofline(place)
    layers = family_layers(options.family, place)
    rows: list[Row] = []
    measured: list[Layer] = []
    for layer in layers:
        if time.monotonic() - begin > (1 - INDUCTOR_SHARE) * options.seconds:
            break
        rows.append(measure(layer, place, roofline))
        measured.append(layer)
        print(_line(rows[-1]), flush=True)
    left_out = [f"{layer.label} at batch {layer.batch}" for layer in layers[len(rows) :]]
    results.save(options.family, rows, place, roofline, options.out, left_out=left_out)
    for index, layer in enumerate(measured):
        if time.monotonic() - begin > options.seconds or (place.is_dry and index):
            break
        rows[index] = with_inductor(rows[index], layer, place, roofline)
        print(_line(rows[index]), flush=True)
        results.save(options.family, rows, place, roofline, options.out, left_out=left_out)
    return int(any(row.ms is None for row in rows))


def _line(row: Row) -> str:
    time_text = "failed" if row.ms is None else f"{row.ms:.4f} ms"
    fraction = "" if row.roofline_fraction is None else f"{row.roofline_fraction:.0%} of roofline"
    others = ", ".join(map(str, row.contestants))
    return f"{row.op} {row.layer} batch {row.batch}: {time_text} {fraction} {ratio_text(row.ratio)} [{others}]"


if __name__ == "__main__":
    sys.exit(main())
