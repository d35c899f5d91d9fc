"""How plans are copied and sent: as the emitted model and the inputs to capture it for."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from kernelpress.emit.emitted import EmittedModel
from kernelpress.emit.examples import Example

__all__ = ["fingerprint", "recapture", "reduced"]


def fingerprint(body: GraphModule) -> bytes:
    """Tells the values of all parameters and buffers from any others."""
    digest = hashlib.blake2b(digest_size=16)
    for name, t in [*body.named_parameters(), *body.named_buffers()]:
        digest.update(f"{name} {t.dtype} {list(t.shape)}".encode())
        values = t.detach().cpu().contiguous()
        if values.numel():  # not through numpy: that makes the parameter's storage one that cannot be resized
            digest.update((ctypes.c_char * values.nbytes).from_address(values.data_ptr()))
    return digest.digest()


def reduced(
    model: EmittedModel,
    captured: bytes,
    examples: Sequence[Example],
    chains: Sequence[tuple[int, int]] = (),
    shared: bool = False,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A plan as `pickle` and `copy` take it apart. `captured` is the fingerprint of the weights that it reads.

    Raises `TypeError` where the model has others by now: the plan holds its own only in the form that kernels read.
    """
    if fingerprint(model.body) != captured:
        raise TypeError(
            "plan: cannot be copied or pickled, since its emitted model (plan.model) was given other weights after the "
            "plan was captured; send the emitted model, and capture it again there: kernelpress.capture(model, x)"
        )
    return recapture, (model, tuple(examples), tuple(chains), shared)


def recapture(model: EmittedModel, examples: Sequence[Example], chains: Sequence[tuple[int, int]], shared: bool) -> Any:
    """The plan of `model` for inputs of these forms, streamed by rows and in shares of the batch where the plan that it
    is a copy of was."""
    from kernelpress.emit.plans.plan import plan_of

    return plan_of(model, [_blank(x) for x in examples], chains=chains, shared=shared)


def _blank(x: Example) -> Any:
    if x.dtype is None:
        return x.plain
    return torch.empty_strided(x.shape, x.stride, dtype=x.dtype, device=x.device).zero_()
