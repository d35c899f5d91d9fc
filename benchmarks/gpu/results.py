"""Result files of a device, one JSON file a family, and the Markdown page that shows all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from recording import load_all, when, write, write_markdown

from gpu import folder_name
from gpu.place import Place
from gpu.roofline import Roofline
from kernelpress.bench.tables import Cells, layer_cells, markdown, number_text
from kernelpress.measure.units import ABSENT, ratio_text
from kernelpress.runtime import native

__all__ = ["save", "write_page"]

TITLES: Mapping[str, str] = {
    "dense": "Dense layers, bfloat16",
    "depthwise": "Depthwise layers, bfloat16",
    "separable": "Separable layers and inverted residuals, bfloat16",
    "grouped": "Grouped convolutions and channel shuffles, bfloat16",
    "ghost": "Ghost modules, bfloat16",
    "sparse": "Block-sparse layers, bfloat16",
    "int8": "int8 layers",
    "models": "Whole models, captured, bfloat16",
}


def save(
    name: str, results: Sequence[Any], place: Place, roofline: Roofline, folder: Path, *, left_out: Sequence[str] = ()
) -> Path:
    """Writes `results` (dataclasses) as `<folder>/<device>/<name>.json`; returns the path. `left_out`: what there was
    no time for."""
    path = folder / folder_name(place.name) / f"{name}.json"
    write(path, {"device": _device(place)}, results, roofline=roofline, left_out=list(left_out))
    write_page(path.parent)
    return path


def _device(place: Place) -> dict[str, Any]:
    described: dict[str, Any] = {"name": place.name, "torch": torch.__version__, "cuda": torch.version.cuda}
    if place.is_dry:
        return described
    properties = torch.cuda.get_device_properties(place.device)
    module = native.cuda()
    return described | {
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cudnn": torch.backends.cudnn.version(),
        "driver": None if module is None else module.driver_version(),
        "compiled_for": None if module is None else module.architectures(),
    }


def write_page(folder: Path) -> Path:
    """Writes `README.md` from the JSON files that lie beside it."""
    loaded = load_all(folder, TITLES)
    device = next(iter(loaded.values()))["device"] if loaded else {"name": folder.name}
    lines = [
        f"# {device['name']}",
        "",
        "Written by `make gpu` from the JSON files beside this page, never by hand; losses stay in. Times are medians",
        "of the best round, by CUDA events around one CUDA graph, from a flushed second-level cache (whole models: not",
        "flushed). Ratios are the other's time ÷ ours: above 1× ours is faster. “Triton” is our own Triton kernel of",
        "the op, tuned; CUDA kernels run as their heuristics choose.",
        "",
    ]
    for name, content in loaded.items():
        rows = content["results"]
        cells = _model_cells(rows) if name == "models" else layer_cells(rows, "TFLOP/s")
        lines += [f"## {TITLES[name]}", "", _provenance(content), "", *markdown(cells), ""]
        if content["left_out"]:
            lines += [f"No time was left for: {', '.join(content['left_out'])}.", ""]
    page = folder / "README.md"
    write_markdown(page, lines)
    return page


def _provenance(content: Mapping[str, Any]) -> str:
    device, roofline = content["device"], content["roofline"]
    return (
        f"{when(content)}; torch {device['torch']}. Measured ceilings: copy "
        f"{roofline['copy_gbs']:.0f} GB/s, bfloat16 {roofline['bf16_tflops']:.0f} TFLOP/s, int8 "
        f"{roofline['int8_tops']:.0f} TOP/s."
    )


def _model_cells(rows: Sequence[Mapping[str, Any]]) -> Cells:
    header = ["model", "batch", "ms", "images/s", "native steps", *("best peer ÷ ours", "best peer", "all peers, ms")]
    cells = [
        [
            row["model"],
            str(row["batch"]),
            number_text(row["ms"], ".3f"),
            number_text(None if row["ms"] is None else row["batch"] / row["ms"] * 1e3, ".0f"),
            f"{row['native_steps']} of {row['steps']}",
            ratio_text(row["ratio"]),
            row["best_peer"] or ABSENT,
            ", ".join(f"{peer['name']} {number_text(peer['ms'], '.3f')}" for peer in row["contestants"]),
        ]
        for row in rows
    ]
    return header, cells
