"""The state of a training in one safetensors file: weights, optimiser state and, in its header, a JSON record."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn, optim

from kernelpress.files import write_atomically
from kernelpress.files.sealed import seal_tensors, unseal_tensors

__all__ = ["load_checkpoint", "read_record", "save_checkpoint"]

_KIND, _FORMAT = "training checkpoint", 1
_OPTIMIZER = "optimizer."
_STATES = frozenset({"momentum_buffer", "step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"})


def save_checkpoint(path: Path, model: nn.Module, optimizer: optim.Optimizer, record: dict[str, Any]) -> None:
    """Writes `model`, `optimizer` and the JSON-serialisable `record` to `path`.

    The file replaces an older one only when it is complete: a full disk (`OSError`) leaves the older one intact.
    """
    tensors = model.state_dict()
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"{_OPTIMIZER}{index}.{name}": value for name, value in state.items() if isinstance(value, Tensor)}
    content = seal_tensors(_KIND, _FORMAT, tensors, record)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


def load_checkpoint(path: Path, model: nn.Module, optimizer: optim.Optimizer) -> None:
    """Restores what `save_checkpoint` wrote into `model` and `optimizer`, made as they were then.

    Raises `ValueError` where the file is damaged, truncated, of another format or holds another model.
    """
    tensors, _ = _read(path)
    weights = {name: value for name, value in tensors.items() if not name.startswith(_OPTIMIZER)}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path}: written for another model ({error}); use another checkpoint_dir") from error
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name in tensors.keys() - weights.keys():
        index, _, entry = name.removeprefix(_OPTIMIZER).partition(".")
        is_known = re.fullmatch("[0-9]{1,9}", index) and int(index) < len(trained) and entry in _STATES
        if not is_known or tensors[name].shape not in ((), trained[int(index)].shape):
            raise ValueError(f"{path}: written for another optimizer ({name[:80]!r}); use another checkpoint_dir")
        state.setdefault(int(index), {})[entry] = tensors[name]
    try:
        if len({frozenset(entries) for entries in state.values()}) > 1:
            raise ValueError("parameters differ in what is known of them")
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    except (ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: written for another optimizer ({error}); use another checkpoint_dir") from error


def read_record(path: Path) -> dict[str, Any]:
    """The record that `save_checkpoint` was given; `ValueError` where `path` is no such file."""
    return _read(path)[1]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        return unseal_tensors(path.read_bytes(), _KIND, _FORMAT, path.name)
    except ValueError as error:
        raise ValueError(f"{path}: not a complete checkpoint ({error}); delete it to start over") from error
