"""BatchNorm folded into the convolution before it, kept until one of the two is written to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kernelpress.runtime.snapshot import Snapshot
from kernelpress.runtime.torch_private import DisableTorchFunction

__all__ = ["fold", "folded", "is_foldable", "is_hooked", "kept"]

T = TypeVar("T")


class _Kept(NamedTuple):
    """What was made of tensors, and their `Snapshot`."""

    snapshot: Any
    made: Any


_lock = threading.Lock()
_cache: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


def kept(module: nn.Module, sources: tuple[Tensor, ...], make: Callable[[], T]) -> T:
    """`make()` of `sources`, or what it made for this module before, until one of them changes."""
    if torch.compiler.is_compiling():
        return make()
    known = _cache.get(module)
    # Modes that watch what a model does with tensors are not to take this for the model's doing.
    with DisableTorchFunction():
        if known is None or not known.snapshot(sources):
            snapshot = Snapshot(sources)
            with torch.no_grad():
                known = _Kept(snapshot, make())
            with _lock:
                _cache[module] = known
    found: T = known.made
    return found


def is_foldable(norm: nn.Module | None) -> bool:
    """Whether a norm is absent, or a BatchNorm that applies its running statistics."""
    return norm is None or (isinstance(norm, nn.BatchNorm2d) and not norm.training and norm.running_mean is not None)


def is_hooked(*modules: nn.Module) -> bool:
    """Whether calling one of these modules does more than its `forward`, such as computing its weight under a mask."""
    return any(module._forward_pre_hooks or module._forward_hooks for module in modules)


def fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that computes `norm(convolution(x))` in evaluation mode."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    scale = torch.rsqrt(variance + norm.eps)
    if norm.affine:
        scale = scale * norm.weight
    shift = -mean if convolution.bias is None else convolution.bias - mean
    bias = shift * scale
    if norm.affine:
        bias = bias + norm.bias
    return convolution.weight * scale[:, None, None, None], bias


def folded(convolution: nn.Conv2d, norm: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """The convolution's weight and bias, with `norm` folded in where there is one.

    What was folded is kept, so that the same tensors come back until the convolution or the norm changes.
    """
    if norm is None:
        return convolution.weight, convolution.bias
    assert isinstance(norm, nn.BatchNorm2d)
    tensors = (convolution.weight, convolution.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return kept(norm, tuple([t for t in tensors if t is not None]), lambda: fold(convolution, norm))
