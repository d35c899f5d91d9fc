"""Time of four layers over the share of zeros in their weights, beside our own dense kernels.

Zeros lie at random, one by one and in 4×1 blocks. Each kernel runs as a step of a plan, in turn with the others of its
layer, in the memory format that it likes.

python benchmarks/sparsity.py --threads 2
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from bench_models import positive
from recording import RESULTS, save, sparsity_cells
from rich.console import Console

from kernelpress.bench.ours import on_backend
from kernelpress.bench.tables import console_table
from kernelpress.measure.race import Heat, race
from kernelpress.ops.sparse_blocks import BlockCsr, conv_matrix
from kernelpress.report.figures import STYLE
from kernelpress.runtime.clock import threads_set_to

SHARES = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
LAYERS = ((512, 1, 14), (128, 1, 56), (128, 3, 28), (256, 3, 14))
"""Channels in and out, kernel size, rows and columns of the image."""
BLOCKS = {"single weights": (1, 1), "4×1 blocks": (4, 1)}
HEATS = (Heat(30, float("inf")),) * 3
FIGURE = Path(__file__).resolve().parent.parent / "docs" / "sparsity.svg"


@dataclass(frozen=True)
class Row:
    """One kind of kernel on one layer: milliseconds at each share of zeros; a dense one has the same at all."""

    layer: str
    kernel: str
    shares: tuple[float, ...]
    milliseconds: tuple[float, ...]
    break_even: float | None = None
    """The least share from which on it is faster than the direct dense kernel."""


def rows_of(channels: int, kernel: int, size: int) -> list[Row]:
    """All kernels of one layer; of those in two memory formats the faster."""
    title = f"{kernel}×{kernel}, {channels} → {channels} channels, {size}×{size}"
    weight = torch.randn(channels, channels, kernel, kernel) / channels**0.5 / kernel
    image, window = torch.randn(1, channels, size, size), {"padding": kernel // 2}
    pixels = image.contiguous(memory_format=torch.channels_last)
    calls: dict[tuple[str, float, str], Callable[[], object]] = {
        ("dense", 0.0, backend): on_backend("conv2d", [pixels, weight], window, backend)
        for backend in (("cpu", "winograd4") if kernel == 3 else ("cpu",))
    }
    for name, block in BLOCKS.items():
        for share in SHARES:
            kept = torch.rand(channels // block[0], channels, kernel, kernel) >= share
            zeroed = weight * kept.repeat_interleave(block[0], dim=0)
            csr = BlockCsr.from_dense(zeroed.flatten(1) if kernel == 1 else conv_matrix(zeroed, block[1]), block)
            for backend, x in (("cpu", pixels), ("planes", image)):
                tensors = [x, csr.row_offsets, csr.columns, csr.blocks]
                options = {"kernel_size": kernel, "out_channels": channels, **window}
                calls[name, share, backend] = on_backend("sparse_conv2d", tensors, options, backend)
    names = {f"{name} {share} {backend}": (name, share, backend) for name, share, backend in calls}
    times = race({told: calls[key] for told, key in names.items()}, [{(told,)} for told in names], heats=HEATS)
    found = {key: times[told] for told, key in names.items()}
    dense = {backend: found["dense", 0.0, backend] for name, _, backend in found if name == "dense"}
    told = {"cpu": "dense", "winograd4": "dense, Winograd F(4×4)"}
    rows = [Row(title, told[backend], SHARES, (ms,) * len(SHARES)) for backend, ms in dense.items()]
    for name in BLOCKS:
        best = tuple(min(found[name, share, backend] for backend in ("cpu", "planes")) for share in SHARES)
        faster = [share for share, ms in zip(SHARES, best, strict=True) if ms < dense["cpu"]]
        rows.append(Row(title, name, SHARES, best, min(faster, default=None)))
    return rows


def draw(rows: Sequence[Row], path: Path) -> None:
    """A panel a layer, as SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    layers = list(dict.fromkeys(row.layer for row in rows))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 7), layout="constrained")
        for axes, layer in zip(figure.subplots(2, 2).flat, layers, strict=True):
            for row in [row for row in rows if row.layer == layer]:
                style = "--" if row.kernel.startswith("dense") else "o-"
                axes.plot(
                    [100 * share for share in row.shares], row.milliseconds, style, label=row.kernel, markersize=4
                )
            axes.set(title=layer, xlabel="zeros [%]", ylabel="time [ms]", ylim=(0, None))
            axes.grid()
            axes.legend(fontsize=9)
        figure.savefig(path, metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> None:
    """Times the layers, prints a table, and writes results and figure unless told not to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="the figure's file")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    with threads_set_to(options.threads):
        rows = [row for layer in LAYERS for row in rows_of(*layer)]
    cells = sparsity_cells([asdict(row) for row in rows])
    Console(width=160).print(console_table("Milliseconds by the share of zeros", cells, ""))
    if not options.no_record:
        draw(rows, options.figure)
        print(f"recorded in {save('sparsity', rows, options.results, threads=options.threads)} and {options.figure}")


if __name__ == "__main__":
    main()
