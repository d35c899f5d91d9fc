"""Emitted models on disk: one `.pt2` file that `torch.export.load` reads too, and `load` without torch's loader.

Besides what torch writes, the archive holds the graph in our own words (`graph_json`), and digests of all entries
(`container`). Weights lie in it once. docs/files.md describes the format.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import warnings
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kernelpress.ops  # noqa: F401  (a graph can be read only once its operations are registered)
from kernelpress.emit.emitted import EmittedModel
from kernelpress.emit.examples import Example
from kernelpress.emit.files.container import pack, unpack
from kernelpress.emit.files.graph_json import graph_from_json, graph_to_json, value_from_json, value_to_json
from kernelpress.emit.record import EmissionRecord
from kernelpress.files import write_atomically
from kernelpress.files.plain import printable
from kernelpress.files.sealed import parse_json
from kernelpress.runtime.torch_private import pytree
from kernelpress.trace.contract import Contract
from kernelpress.trace.export import symbolic_batch, with_batch_of_two

__all__ = ["load", "save"]

DESCRIPTION = "archive/extra/kernelpress.json"
LARGEST_DESCRIPTION = 32 << 20
"""Bytes; fx takes about a second to make a module of each megabyte."""
WEIGHT = "archive/kernelpress/weight_{}"
"""What torch did not write as we read it."""


def save(model: EmittedModel, path: str | os.PathLike[str]) -> None:
    """Writes `model` to `path` as a `.pt2` archive that holds data only: the graph as JSON, the weights as raw bytes.

    The file appears whole or not at all. Raises `OSError` that names the path where it cannot be written (a full disk,
    a missing folder), and leaves the file that was there; `ValueError` for a graph that has no place in a file, such as
    one that returns a structure of its own kind which is not registered with `torch.export`.
    """
    tensors: list[Tensor] = []
    graph = graph_to_json(model.body, tensors)
    entries = _torch_entries(model)
    places: dict[bytes, list[str]] = {}
    for name, data in entries.items():
        places.setdefault(hashlib.sha256(data).digest(), []).append(name)
    rows: list[dict[str, Any]] = []
    for i, tensor in enumerate(tensors):
        row, data = _tensor_to_json(tensor)
        same = places.get(hashlib.sha256(data).digest())
        entry = same.pop() if same else WEIGHT.format(i)
        entries.setdefault(entry, data)
        rows.append({"entry": entry, **row})
    description = json.dumps({"model": _model_to_json(model), "tensors": rows, "graph": graph}).encode()
    _check_size(description)
    write_atomically(path, pack({DESCRIPTION: description, **entries}))


def load(path: str | os.PathLike[str], *, operators: Collection[str] = ()) -> EmittedModel:
    """Reads a model that `EmittedModel.save` wrote. Nothing in the file is unpickled, executed or evaluated, and
    torch's loader is not asked.

    `operators`: names such as `"mylib::nms"` of operators that the graph may call besides those of torch that only
    compute, and kernelpress's own. What they do when the model runs is up to them.

    Raises `FileNotFoundError` for a missing file, and `ValueError` for one that is damaged, truncated, of another
    format or none of ours, for operators that this torch does not have and a device that this machine does not have.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: expected a .pt2 file written by EmittedModel.save, found nothing at {path}")
    entries = unpack(path.read_bytes(), f"path: {path}")
    try:
        _check_size(entries[DESCRIPTION])
        description = parse_json(bytes(entries[DESCRIPTION]), DESCRIPTION)
        tensors = _tensors_from_json(description["tensors"], entries)
        body = graph_from_json(description["graph"], tensors, operators)
        model = EmittedModel(body, **_model_from_json(description["model"], body._in_spec))
        if len(model.examples) != body._in_spec.num_leaves:
            raise ValueError("the model has another number of inputs than examples")
    except Exception as error:
        # Whatever rises here rises from a content that has the digests it states, but is none of ours.
        raise ValueError(f"path: {path} cannot be used, though it is whole: {_first_line(error)}") from error
    return model


def _check_size(description: bytes | memoryview) -> None:
    if len(description) > LARGEST_DESCRIPTION:
        raise ValueError(f"a graph takes {len(description)} bytes in a file, expected at most {LARGEST_DESCRIPTION}")


def _model_to_json(model: EmittedModel) -> dict[str, Any]:
    """All of a model but its graph, as plain values."""
    return {
        "contract": model.contract.to_json(),
        "examples": [_example_to_json(example) for example in model.examples],
        "record": model.record.to_json(),
    }


def _model_from_json(stored: Any, structure: pytree.TreeSpec) -> dict[str, Any]:
    """The arguments of `EmittedModel` after its body; raises `ValueError`, `KeyError` or `TypeError` for others."""
    return {
        "contract": Contract.from_json(stored["contract"], structure),
        "examples": tuple(_example_from_json(example) for example in stored["examples"]),
        "record": EmissionRecord.from_json(stored["record"]),
    }


def _torch_entries(model: EmittedModel) -> dict[str, bytes | memoryview]:
    """What `torch.export.save` writes of a model, by entries."""
    import torch.export

    carriers = model.contract.batch_carriers
    inputs = with_batch_of_two(model.example_inputs(), carriers)
    with torch.no_grad():
        program = torch.export.export(model.body, inputs, dynamic_shapes=symbolic_batch(inputs, carriers), strict=False)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # torch warns of every weight in channels_last memory, and writes it rightly.
        warnings.filterwarnings("ignore", message="No complete tensor found in the group")
        torch.export.save(program, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _tensor_to_json(tensor: Tensor) -> tuple[dict[str, Any], memoryview]:
    """The form of a tensor, and the bytes from its first element to its last as they lie in memory."""
    span = _span(tensor.shape, tensor.stride())
    if span < tensor.numel():
        tensor, span = tensor.contiguous(), tensor.numel()
    flat = tensor.detach().as_strided((span,), (1,)).cpu()
    row = {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "device": str(tensor.device),
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
    }
    return row, flat.view(torch.uint8).numpy().data


def _tensors_from_json(stored: Any, entries: Mapping[str, memoryview]) -> list[Tensor]:
    """Tensors in memory of their own; each takes an entry of its own, so that all are no larger than the file."""
    names = [row["entry"] for row in stored]
    if len(set(names)) != len(names):
        raise ValueError("two weights have one entry")
    return [_tensor_from_json(row, entries[row["entry"]]) for row in stored]


def _tensor_from_json(row: Any, data: memoryview) -> Tensor:
    dtype, device = value_from_json({"dtype": row["dtype"]}), value_from_json({"device": row["device"]})
    shape, stride = _sizes(row["shape"]), _sizes(row["stride"])
    count, span = math.prod(shape), _span(shape, stride)
    if len(shape) != len(stride) or count > span or span * dtype.itemsize != len(data):
        raise ValueError(f"a weight of shape {shape} and strides {stride} does not fit its {len(data)} bytes")
    if dtype == torch.bool and set(bytes(data)) - {0, 1}:
        raise ValueError("a weight of type bool holds other bytes than 0 and 1")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"it was emitted for {device}, and this machine has no CUDA device")
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8).clone() if span else torch.empty(0, dtype=torch.uint8)
    return flat.to(device).view(dtype).as_strided(shape, stride)


def _span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last."""
    return 0 if 0 in shape else 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=False))


def _sizes(stored: Any) -> tuple[int, ...]:
    if not isinstance(stored, list) or len(stored) > 64 or not all(type(x) is int and 0 <= x < 2**48 for x in stored):
        raise ValueError(f"expected the sizes of a tensor, got {str(stored)[:80]}")
    return tuple(stored)


def _example_to_json(example: Example) -> dict[str, Any]:
    if example.dtype is None:
        return {"plain": value_to_json(example.plain)}
    dtype, device = str(example.dtype).removeprefix("torch."), str(example.device)
    return {"shape": list(example.shape), "stride": list(example.stride), "dtype": dtype, "device": device}


def _example_from_json(stored: Any) -> Example:
    if "plain" in stored:
        return Example(plain=value_from_json(stored["plain"]))
    dtype, device = value_from_json({"dtype": stored["dtype"]}), value_from_json({"device": stored["device"]})
    return Example(_sizes(stored["shape"]), _sizes(stored["stride"]), dtype, device)


def _first_line(error: Exception) -> str:
    return printable((str(error).splitlines() or [""])[0][:300]) or type(error).__name__
