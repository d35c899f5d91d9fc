"""Measured tile configurations on disk, one JSON file a device: what `tuning.tune` found overrides the heuristics."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from kernelpress.files import cache_folder, write_atomically
from kernelpress.ops.checks import TensorSpec, describe
from kernelpress.ops.registry import Problem

__all__ = ["forget", "path_of", "problem_key", "recall", "remember"]


def path_of(device: str) -> Path:
    """The file of the devices of that name, in `files.cache_folder()`."""
    return cache_folder() / f"configurations-{hashlib.sha256(device.encode()).hexdigest()[:16]}.json"


def problem_key(kernel: str, problem: Problem) -> str:
    """A kernel on tensors of these shapes, strides and dtypes with these options, to be read by people too."""
    tensors = ", ".join("-" if t is None else _tensor_key(t) for t in problem.tensors)
    return f"{kernel}: {tensors}; {', '.join(f'{k}={v}' for k, v in problem.options._asdict().items())}"


def _tensor_key(t: TensorSpec) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {describe(t.shape)} by {describe(t.stride)}"


def recall(kernel: str, problem: Problem, device: str) -> str | None:
    """The configuration measured fastest for a problem on devices of that name; None if none was measured."""
    return _read(path_of(device), device).get(problem_key(kernel, problem))


def remember(kernel: str, problem: Problem, device: str, configuration: str) -> None:
    """Store a measured configuration. Raises `OSError` naming the file if it cannot be written."""
    path, key = path_of(device), problem_key(kernel, problem)
    forget()  # another process may have measured meanwhile
    content = {"device": device, "configurations": {**_read(path, device), key: configuration}}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1, sort_keys=True).encode())
    forget()


def forget() -> None:
    """Read the files anew at the next question."""
    _read.cache_clear()


@functools.lru_cache(maxsize=8)
def _read(path: Path, device: str) -> Mapping[str, str]:
    """A file that is missing or is none of ours counts as empty."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        found = stored["configurations"] if stored["device"] == device else {}
        return {str(key): str(name) for key, name in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
