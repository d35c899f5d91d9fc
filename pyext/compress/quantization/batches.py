"""Calibration data: checked against what the model was exported for, and the examples that are used of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from kernelpress.runtime.torch_private import pytree
from kernelpress.trace.contract import Contract

__all__ = ["calibration_batches"]

ROWS = 32
"""In a batch that is cut from one tensor."""


def calibration_batches(
    data: Tensor | Iterable[Any] | None, inputs: tuple[Any, ...], contract: Contract, samples: int
) -> list[tuple[Any, ...]]:
    """At least `samples` examples of `data`, fewer if it has fewer, as batches of what `forward` takes.

    `data`: one tensor of examples, or batches: tensors, or sequences that begin with what `forward` takes (labels
    behind it are left out). Raises `TypeError` for another kind of data, `ValueError` for none, for batches of a shape
    or dtype that the model is not called with, and for NaN and infinity.
    """
    if data is None:
        raise ValueError("data: expected calibration batches, a DataLoader or tensors, got None")
    if not isinstance(data, Tensor) and not isinstance(data, Iterable):
        raise TypeError(f"data: expected a DataLoader, a Tensor or an iterable of batches, got {type(data).__name__}")
    device = next(x.device for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor))
    batches: list[tuple[Any, ...]] = []
    count = 0
    for index, batch in enumerate(_batches(data)):
        given = (batch,) if isinstance(batch, Tensor) else tuple(batch) if isinstance(batch, (tuple, list)) else None
        if given is None or len(given) < len(inputs):
            raise TypeError(
                f"data: expected batches that are a Tensor or begin with the {len(inputs)} arguments of forward, "
                f"got {type(batch).__name__} as batch {index}"
            )
        taken = pytree.tree_map_only(Tensor, lambda x: x.detach().to(device), given[: len(inputs)])
        tensors = [x for x in pytree.tree_leaves(taken) if isinstance(x, Tensor)]
        rows = max((len(x) for x in tensors if x.dim()), default=0)
        if rows == 0:
            continue
        try:
            contract.require(taken)
        except ValueError as error:
            raise ValueError(f"data: batch {index} is not what the model takes: {error}") from error
        if any(x.is_floating_point() and not bool(x.isfinite().all()) for x in tensors):
            raise ValueError(f"data: batch {index} holds NaN or infinity")
        batches.append(taken)
        count += rows
        if count >= samples:
            break
    if not batches:
        raise ValueError("data: expected at least one batch with examples, got none")
    return batches


def _batches(data: Tensor | Iterable[Any]) -> Iterator[Any]:
    if not isinstance(data, Tensor):
        yield from data
    elif data.dim():
        with torch.no_grad():
            yield from data.split(ROWS)
