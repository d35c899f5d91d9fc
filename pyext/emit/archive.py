"""Emitted models on disk: a `torch.export` archive of kernelpress operations, the emission record as JSON beside it."""

from __future__ import annotations

import io
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

import kernelpress.ops  # noqa: F401  (an archive can be read only once its operations are registered)
from kernelpress.contract import Contract
from kernelpress.emit.assemble import copy_of, with_constants
from kernelpress.emit.emitted import EmittedModel
from kernelpress.emit.evaluate import Example
from kernelpress.emit.quantized import NAMESPACE, register_quantization
from kernelpress.emit.record import EmissionRecord
from kernelpress.files import write_atomically
from kernelpress.runtime.torch_private import pytree

__all__ = ["load", "save"]

RECORD_FILE = "kernelpress.json"
FORMAT = 1


def save(model: EmittedModel, path: str | os.PathLike[str]) -> None:
    """Writes `model` to `path` as a `.pt2` archive that holds data only: the graph as JSON, the weights as raw bytes.

    The file appears whole or not at all. Raises `OSError` that names the path where it cannot be written (a full disk,
    a missing folder), and leaves the file that was there.
    """
    import torch.export

    inputs = (
        pytree.tree_map(_at_least_two_images, model.example_inputs()) if model.dynamic_batch else model.example_inputs()
    )
    batch = {0: torch.export.Dim.AUTO}
    shapes = pytree.tree_map(lambda x: batch if isinstance(x, Tensor) and x.dim() > 0 else None, inputs)
    with torch.no_grad():
        program = torch.export.export(
            model.body, inputs, dynamic_shapes=shapes if model.dynamic_batch else None, strict=False
        )
    meta = {
        "format": FORMAT,
        "contract": model.contract.to_json(),
        "examples": [_example_to_json(example) for example in model.examples],
        "record": model.record.to_json(),
    }
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # torch warns of every weight in channels_last memory, and writes it rightly.
        warnings.filterwarnings("ignore", message="No complete tensor found in the group")
        torch.export.save(program, buffer, extra_files={RECORD_FILE: json.dumps(meta)})
    write_atomically(path, buffer.getvalue())


def load(path: str | os.PathLike[str]) -> EmittedModel:
    """Reads a model that `EmittedModel.save` wrote. No code is unpickled.

    Raises `FileNotFoundError` for a missing file and `ValueError` for a damaged one or one of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: expected a .pt2 file written by EmittedModel.save, found nothing at {path}")
    extra = {RECORD_FILE: ""}
    try:
        import torch.export

        content = path.read_bytes()
        if NAMESPACE.encode() in content:
            register_quantization()
        program = torch.export.load(io.BytesIO(content), extra_files=extra)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"path: {path} is damaged or no model archive ({_first_line(error)})") from error
    if not extra[RECORD_FILE]:
        raise ValueError(f"path: {path} is a torch.export archive, but no emitted model: it has no {RECORD_FILE}")
    try:
        meta = json.loads(extra[RECORD_FILE])
        if meta["format"] != FORMAT:
            raise ValueError(f"format {meta['format']!r}, this version reads {FORMAT}")
        record = EmissionRecord.from_json(meta["record"])
        examples = tuple(_example_from_json(stored) for stored in meta["examples"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"path: the {RECORD_FILE} of {path} cannot be read ({_first_line(error)})") from error
    unlifted = program.module(check_guards=False)
    assert isinstance(unlifted, GraphModule)
    contract = Contract.from_json(meta["contract"], unlifted._in_spec)
    body = with_constants(unlifted, copy_of(unlifted).graph)
    return EmittedModel(body, record, examples, contract)


def _at_least_two_images(value: Any) -> Any:
    """torch.export takes a batch of one for a constant."""
    return torch.cat([value, value]) if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == 1 else value


def _example_to_json(example: Example) -> dict[str, Any]:
    if example.dtype is None:
        return {"plain": example.plain}
    dtype, device = str(example.dtype).removeprefix("torch."), str(example.device)
    return {"shape": list(example.shape), "stride": list(example.stride), "dtype": dtype, "device": device}


def _example_from_json(stored: dict[str, Any]) -> Example:
    if "plain" in stored:
        return Example(plain=stored["plain"])
    dtype = getattr(torch, stored["dtype"])
    return Example(tuple(stored["shape"]), tuple(stored["stride"]), dtype, torch.device(stored["device"]))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
