"""Leaves the caller's things as they were: what running or exporting a model changes behind its back."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["own_tensors", "run_apart", "same_random_numbers", "untouched"]

_CONTAINERS = frozenset({dict, OrderedDict, list, set})


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restores, also after an exception, training flags, attributes and hooks of the model's modules, and the random
    numbers to come. Within, no tensor is one of `torch.inference_mode`, which could not be exported or trained: the
    model's own ones are replaced by copies.

    Values written into parameters and buffers stay: see `run_apart`.
    """
    before = [(module, _contents(module.__dict__)) for module in model.modules()]
    with torch.inference_mode(False), same_random_numbers():
        try:
            _replace_inference_tensors(model)
            yield
        finally:
            for module, attributes in before:
                _restore(module.__dict__, attributes)


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Restores the state of torch's, Python's and NumPy's generators."""
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    python_state = random.getstate()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)


def own_tensors(inputs: Any) -> Any:
    """The same nest of inputs on dense copies of the tensors, so that nobody marks or writes to the caller's."""
    return pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), inputs)


def run_apart(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """The model's output for copies of `inputs`, without gradients. It writes to copies of its buffers, and draws the
    same random numbers at each run."""
    copies = own_tensors(inputs)
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    with torch.no_grad(), same_random_numbers():
        return torch.func.functional_call(model, buffers, copies) if buffers else model(*copies)


def _replace_inference_tensors(model: nn.Module) -> None:
    copies: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, t in table.items():
                if t is not None and t.is_inference():
                    copy = nn.Parameter(t.clone(), False) if isinstance(t, nn.Parameter) else t.clone()
                    table[name] = copies.setdefault(t, copy)


def _contents(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Each attribute, and what a container holds."""
    return {name: (value, value.copy() if type(value) in _CONTAINERS else None) for name, value in attributes.items()}


def _restore(attributes: dict[str, Any], before: dict[str, tuple[Any, Any]]) -> None:
    for name in [name for name in attributes if name not in before]:
        del attributes[name]
    for name, (value, contents) in before.items():
        attributes[name] = value
        if isinstance(value, list):
            value[:] = contents
        elif contents is not None:
            value.clear()
            value.update(contents)
