"""The state of a training in one safetensors file: weights, optimiser state and, in its header, a JSON record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kernelpress.files import write_atomically

__all__ = ["load_checkpoint", "read_record", "save_checkpoint"]

_RECORD = "kernelpress.finetune"
_MODEL = "model."
_OPTIMIZER = "optimizer."


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, record: dict[str, Any]) -> None:
    """Writes `model`, `optimizer` and the JSON-serialisable `record` to `path`.

    The file replaces an older one only when it is complete: a full disk (`OSError`) leaves the older one intact.
    """
    from safetensors.torch import save

    tensors = {_MODEL + name: tensor for name, tensor in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"{_OPTIMIZER}{index}.{name}": value for name, value in state.items() if isinstance(value, Tensor)}
    # Copies, because safetensors refuses tensors that share memory.
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    content = save(copies, metadata={_RECORD: json.dumps(record)})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restores what `save_checkpoint` wrote into `model` and `optimizer`, made as they were then.

    Raises `ValueError` where the file is damaged or holds another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete checkpoint ({error}); delete it to start over") from error
    weights = {name.removeprefix(_MODEL): value for name, value in tensors.items() if name.startswith(_MODEL)}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path}: written for another model ({error}); use another checkpoint_dir") from error
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(_OPTIMIZER):
            index, entry = name.removeprefix(_OPTIMIZER).split(".", 1)
            state.setdefault(int(index), {})[entry] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def read_record(path: Path) -> dict[str, Any]:
    """The record that `save_checkpoint` was given; `ValueError` where `path` is no such file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        record = json.loads(metadata[_RECORD])
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a complete checkpoint ({error}); delete it to start over") from error
    assert isinstance(record, dict)
    return record
