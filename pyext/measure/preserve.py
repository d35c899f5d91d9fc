"""Running somebody's model without a trace: modes, buffers, example tensors and random states are given back."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["evaluation", "preserved", "random_state_kept"]


@contextmanager
def evaluation(module: nn.Module | None, inputs: Any = ()) -> Iterator[None]:
    """`preserved`, with every submodule in evaluation mode."""
    with preserved(module, inputs):
        for part in () if module is None else module.modules():
            # Exported graph modules refuse .eval(); the flag is all that is needed.
            part.training = False
        yield


@contextmanager
def preserved(module: nn.Module | None, inputs: Any = ()) -> Iterator[None]:
    """Runs the block, then gives back each submodule's mode and buffers, the tensors in `inputs`, and random states.

    A tensor gets its values back, and loses the marks that torch's compilers left on it. Copies of buffers and inputs
    are held meanwhile.
    """
    parts = [] if module is None else list(module.modules())
    modes = [(part, part.training) for part in parts]
    buffers = [(part, dict(part._buffers)) for part in parts]
    held = {id(x): x for _, own in buffers for x in own.values() if x is not None}
    held |= {id(x): x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)}
    with torch.no_grad():
        values = [(tensor, tensor.clone(), dict(vars(tensor))) for tensor in held.values()]
    with random_state_kept():
        try:
            yield
        finally:
            for part, mode in modes:
                part.training = mode
            for part, own in buffers:
                part._buffers.clear()
                part._buffers.update(own)
            for tensor, value, marks in values:
                _restore(tensor, value, marks)


def _restore(tensor: Tensor, value: Tensor, marks: dict[str, Any]) -> None:
    vars(tensor).clear()
    vars(tensor).update(marks)
    is_readable = tensor.layout is torch.strided and not tensor.is_meta
    # A comparison also sees what was written through `.data`, which no version counter does.
    if is_readable and not torch.equal(tensor, value):
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            tensor.copy_(value)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Runs the block, then puts the random states of torch (CPU and CUDA), Python and NumPy back."""
    numpy = sys.modules.get("numpy")
    states = torch.get_rng_state(), random.getstate(), numpy and numpy.random.get_state()
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        if numpy:
            numpy.random.set_state(states[2])
        if on_cuda is not None:
            torch.cuda.set_rng_state_all(on_cuda)
