"""Measured tile configurations on disk, one JSON file a device: what `search.tune` found overrides the heuristics.

They are filed by shape class: two problems are of one class if they differ in the batch alone, and both batches have
the same next power of two.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from kernelpress.files import cache_folder, write_atomically
from kernelpress.files.plain import from_plain, printable
from kernelpress.files.sealed import seal, unseal
from kernelpress.ops import registry
from kernelpress.ops.checks import TensorSpec, describe
from kernelpress.ops.registry import Problem

__all__ = ["forget", "path_of", "problem_key", "recall", "remember", "shape_class"]

_KIND, _FORMAT = "tuned configurations", 1


@dataclass(frozen=True)
class _Stored:
    device: str
    configurations: dict[str, str]


_unsaved: dict[tuple[Path, str], str] = {}


def path_of(device: str) -> Path:
    """The file of the devices of that name, in `files.cache_folder()`."""
    return cache_folder() / f"configurations-{hashlib.sha256(device.encode()).hexdigest()[:16]}.json"


def shape_class(problem: Problem) -> Problem:
    """The largest problem of the class: the batch, which is every activation's first dimension, is the next power of
    two; all else stays as it is."""
    activations = problem.operator.activations
    tensors = tuple(_rounded(t) if t is not None and at in activations else t for at, t in enumerate(problem.tensors))
    return registry.problem(problem.operator, tensors, problem.options, problem.device, problem.allow_tf32)


def _rounded(t: TensorSpec) -> TensorSpec:
    batch, *others = t.shape
    return t._replace(shape=(1 << (batch - 1).bit_length() if batch > 0 else batch, *others))


def problem_key(kernel: str, problem: Problem) -> str:
    """A kernel on tensors of this shape class, these strides and dtypes with these options, to be read by people too.

    Problems in float32 that may be rounded to TF32 are kept apart from those that may not.
    """
    tensors = ", ".join("-" if t is None else _tensor_key(t) for t in shape_class(problem).tensors)
    options = ", ".join(f"{name}={value}" for name, value in problem.options._asdict().items())
    takes_tf32 = problem.allow_tf32 and any(t is not None and t.dtype == torch.float32 for t in problem.tensors)
    return f"{kernel}: {tensors}; {options}" + ("; tf32" if takes_tf32 else "")


def _tensor_key(t: TensorSpec) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {describe(t.shape)} by {describe(t.stride)}"


def recall(kernel: str, problem: Problem, device: str) -> str | None:
    """The configuration measured fastest for a problem's class on devices of that name; None if none was measured."""
    path, key = path_of(device), problem_key(kernel, problem)
    return _unsaved.get((path, key)) or _read(path, device).get(key)


def remember(kernel: str, problem: Problem, device: str, configuration: str) -> None:
    """Store a measured configuration beside those that other processes store meanwhile.

    Raises `OSError` naming the file if it cannot be written; this process remembers all the same.
    """
    path, key = path_of(device), problem_key(kernel, problem)
    _unsaved[path, key] = configuration
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        known = sorted({**_read.__wrapped__(path, device), key: configuration}.items())
        write_atomically(path, seal(_KIND, _FORMAT, {"device": device, "configurations": dict(known)}))
    _read.cache_clear()
    _unsaved.pop((path, key), None)


def forget() -> None:
    """Read the files anew at the next question."""
    _unsaved.clear()
    _read.cache_clear()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone among all threads and processes that write into a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@functools.lru_cache(maxsize=8)
def _read(path: Path, device: str) -> Mapping[str, str]:
    """A file that is missing counts as empty; so does one that is damaged or none of ours, with a warning."""
    try:
        stored = from_plain(_Stored, unseal(path.read_bytes(), _KIND, _FORMAT, str(path)), str(path))
        if stored.device != device:
            raise ValueError(f"{path} holds configurations for {printable(stored.device)!r}, expected {device!r}")
    except OSError:
        return {}
    except ValueError as error:
        warnings.warn(f"{error}; what was tuned before is forgotten", stacklevel=2)
        return {}
    return stored.configurations
