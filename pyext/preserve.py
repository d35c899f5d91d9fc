"""Running or exporting somebody's model without a trace: modes, attributes, buffers, example tensors and random states
are given back."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kernelpress.runtime.torch_private import pytree

__all__ = [
    "evaluation",
    "outside_modes",
    "own_tensors",
    "preserved",
    "random_state_kept",
    "run_apart",
    "undone_on_error",
]

_CONTAINERS = frozenset({dict, OrderedDict, list, set})


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
    """Runs the block, then gives back each submodule's attributes (mode, hooks, parameters), the values of its buffers
    and of the tensors in `inputs`, and random states.

    Tensors lose the marks that torch's compilers left on them. Copies of buffers and inputs are held meanwhile; values
    written into parameters stay.
    """
    parts = [] if module is None else list(module.modules())
    attributes = [(part, _contents(vars(part))) for part in parts]
    held = {id(x): x for part in parts for x in part._buffers.values() if x is not None}
    held |= {id(x): x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)}
    with torch.no_grad():
        values = [(tensor, tensor.clone(), dict(vars(tensor))) for tensor in held.values()]
    with random_state_kept():
        try:
            yield
        finally:
            for part, contents in attributes:
                _restore_attributes(vars(part), contents)
            for tensor, value, marks in values:
                _restore(tensor, value, marks)


@contextmanager
def undone_on_error(module: nn.Module) -> Iterator[None]:
    """If the block raises, gives each submodule its attributes back: hooks, parts, parameters, not their values."""
    attributes = [(part, _contents(vars(part))) for part in module.modules()]
    try:
        yield
    except BaseException:
        for part, contents in attributes:
            _restore_attributes(vars(part), contents)
        raise


@contextmanager
def outside_modes(model: nn.Module) -> Iterator[None]:
    """`preserved`, with `torch.autocast` off and without `torch.inference_mode`, whose tensors can neither be exported
    nor trained: the model's own ones are replaced by copies."""
    devices = {t.device.type for t in (*model.parameters(), *model.buffers())} | {"cpu"}
    with ExitStack() as modes:
        for device in sorted(devices & {"cpu", "cuda"}):
            modes.enter_context(torch.autocast(device, enabled=False))
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(preserved(model))
        copies: dict[Tensor, Tensor] = {}
        for part in model.modules():
            tables: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
            for table in tables:
                for name, t in table.items():
                    if t is not None and t.is_inference():
                        copy = nn.Parameter(t.clone(), False) if isinstance(t, nn.Parameter) else t.clone()
                        table[name] = copies.setdefault(t, copy)
        yield


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


def own_tensors(inputs: Any) -> Any:
    """The same nest of inputs on dense copies of the tensors, so that nobody marks or writes to the caller's."""
    return pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), inputs)


def run_apart(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """The model's output for copies of `inputs`, without gradients. It writes to copies of its buffers, and draws the
    same random numbers at each run."""
    copies = own_tensors(inputs)
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    with torch.no_grad(), random_state_kept():
        return torch.func.functional_call(model, buffers, copies) if buffers else model(*copies)


def _contents(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Each attribute, and what a container holds."""
    return {name: (value, value.copy() if type(value) in _CONTAINERS else None) for name, value in attributes.items()}


def _restore_attributes(attributes: dict[str, Any], before: dict[str, tuple[Any, Any]]) -> None:
    for name in [name for name in attributes if name not in before]:
        del attributes[name]
    for name, (value, contents) in before.items():
        attributes[name] = value
        if isinstance(value, list):
            value[:] = contents
        elif contents is not None:
            value.clear()
            value.update(contents)


def _restore(tensor: Tensor, value: Tensor, marks: dict[str, Any]) -> None:
    vars(tensor).clear()
    vars(tensor).update(marks)
    is_readable = tensor.layout is torch.strided and not tensor.is_meta
    # A comparison also sees what was written through `.data`, which no version counter does.
    if is_readable and not torch.equal(tensor, value):
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            tensor.copy_(value)
