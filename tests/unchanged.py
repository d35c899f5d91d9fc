"""`unchanged`: what a call may not leave behind on the caller's modules, tensors and process, also when it raises."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from kernelpress.runtime.torch_private import pytree

__all__ = ["unchanged"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), tuple, torch.dtype, torch.device)


@contextmanager
def unchanged(*things: Any) -> Iterator[None]:
    """Fails if the block, however it ends, changes any of `things` (modules; tensors in any nesting) or the process.

    Of a module: which parameters and buffers it has and their values, layout, `requires_grad`, gradients and marks;
    the training flags, hooks and plain public attributes of every submodule. Of a tensor: the same as of a parameter.
    Of the process: random states, default dtype and device, number of threads, grad, inference and autocast modes,
    the garbage collector.
    """
    before = _state(things)
    try:
        yield
    finally:
        after = _state(things)
        changes = [
            f"{name}: {_short(before.get(name))} became {_short(after.get(name))}"
            for name in before | after
            if name not in before or name not in after or before[name] != after[name]
        ]
        assert not changes, "; ".join(changes)


def _state(things: tuple[Any, ...]) -> dict[str, Any]:
    state = _process()
    for index, thing in enumerate(things):
        if isinstance(thing, nn.Module):
            state |= {f"module {index}, {name}": value for name, value in _module(thing).items()}
            continue
        for path, leaf in pytree.tree_flatten_with_path(thing)[0]:
            if isinstance(leaf, Tensor):
                where = f"tensor {index}{pytree.keystr(path)}"
                state |= {f"{where}, {name}": value for name, value in _tensor(leaf).items()}
    return state


def _process() -> dict[str, Any]:
    kind, keys, *rest = numpy.random.get_state()  # noqa: NPY002 - code under test may draw from the global state
    return {
        "torch's random state": torch.get_rng_state().tolist(),
        "CUDA's random states": [state.tolist() for state in torch.cuda.get_rng_state_all()]
        if torch.cuda.is_initialized()
        else [],
        "Python's random state": random.getstate(),
        "NumPy's random state": (kind, keys.tolist(), rest),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")],
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "garbage collector": gc.isenabled(),
    }


def _module(module: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        own = vars(part)
        name = path or "the module itself"
        state[f"{name}, class"] = type(part)
        state[f"{name}, children"] = [(child, id(value)) for child, value in part._modules.items()]
        for attribute, value in own.items():
            if "hook" in attribute:
                hooks = value.items() if isinstance(value, dict) else [("itself", value)]
                state[f"{name}, {attribute}"] = [(key, id(hook)) for key, hook in hooks]
            elif not attribute.startswith("_") and isinstance(value, _PLAIN):
                state[f"{name}, {attribute}"] = value
        for attribute, tensor in (part._parameters | part._buffers).items():
            known = _tensor(tensor) if tensor is not None else {"value": None}
            state |= {f"{name}, {attribute}, {what}": value for what, value in known.items()}
    return state


def _tensor(tensor: Tensor) -> dict[str, Any]:
    flat = tensor.detach().contiguous().flatten()
    state = {
        "identity": (id(tensor), tensor.data_ptr()),
        "form": (type(tensor), tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride()),
        "value": flat.cpu().view(torch.uint8).numpy().tobytes(),
        "requires_grad": tensor.requires_grad,
        "inference": tensor.is_inference(),
        "marks": {name: repr(value) for name, value in vars(tensor).items()},
        "hooks": list(tensor._backward_hooks or ()),
    }
    if tensor.is_leaf and tensor.grad is not None:
        state |= {f"grad's {name}": value for name, value in _tensor(tensor.grad).items()}
    return state


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"
