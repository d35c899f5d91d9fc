"""Result files of a device, one JSON file a family, and the Markdown page that shows all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from recording import load_all, markdown, when, write, write_markdown

from gpu import folder_name
from gpu.place import Place
from gpu.roofline import Roofline
from kernelpress import native
from kernelpress.bench.contest import OURS, fraction_text
from kernelpress.measure.units import ABSENT, ratio_text

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
        render = _model_table if name == "models" else _layer_table
        lines += [f"## {TITLES[name]}", "", _provenance(content), "", *render(content["results"]), ""]
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


def _number(value: float | None, form: str) -> str:
    return ABSENT if value is None else format(value, form)


def _layer_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    header = ["network", "layer", "batch", "backend", "ms", "TFLOP/s", "GB/s", "of roofline"]
    header += ["parts ÷ ours", "Triton ÷ ours", "best peer ÷ ours", "best peer"]
    return markdown(header, [_layer_cells(row) for row in rows], text=(0, 1, 3, 11))


def _layer_cells(row: Mapping[str, Any]) -> list[str]:
    why = "; ".join(entry["reason"] for entry in row["contestants"] if entry["name"] == OURS and entry["reason"])
    return [
        row["network"],
        f"{row['op']} {row['layer']}",
        str(row["batch"]),
        row["backend"] if row["ms"] is not None else f"failed: {why}",
        _number(row["ms"], ".4f"),
        _number(row["tflops"], ".1f"),
        _number(row["gbs"], ".0f"),
        fraction_text(row["roofline_fraction"], row["limited_by"]),
        ratio_text(row["unfused_ratio"]),
        ratio_text(row.get("triton_ratio")),
        ratio_text(row["ratio"]),
        row["best_peer"] or ABSENT,
    ]


def _model_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    header = ["model", "batch", "ms", "images/s", "native steps", *("best peer ÷ ours", "best peer", "all peers, ms")]
    cells = [
        [
            row["model"],
            str(row["batch"]),
            _number(row["ms"], ".3f"),
            _number(None if row["ms"] is None else row["batch"] / row["ms"] * 1e3, ".0f"),
            f"{row['native_steps']} of {row['steps']}",
            ratio_text(row["ratio"]),
            row["best_peer"] or ABSENT,
            ", ".join(f"{peer['name']} {_number(peer['ms'], '.3f')}" for peer in row["contestants"]),
        ]
        for row in rows
    ]
    return markdown(header, cells, text=(0, 6, 7))
