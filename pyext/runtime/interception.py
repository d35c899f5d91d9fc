"""Whether something of torch could take part in an op's call: a mode, a transform, a trace, a subclass of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelpress.runtime.torch_private import (
    dispatch_modes,
    function_modes,
    profiler,
    tracing_state,
    transform_level,
)

__all__ = ["PLAIN_TYPES", "is_intercepted", "is_plain"]

PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})
"""Types of tensors whose operations nobody overrides."""

_is_compiling = torch.compiler.is_dynamo_compiling


def is_intercepted() -> bool:
    """Whether a compiler, mode, transform, trace or profiler wants to see the operations that run now."""
    return (
        _is_compiling()
        or dispatch_modes() > 0
        or function_modes() > 0
        or transform_level() is not None
        or tracing_state() is not None
        or profiler._is_profiler_enabled
    )


def is_plain(t: Tensor) -> bool:
    """Whether `t` is a tensor on the CPU or a CUDA device whose memory holds its values."""
    return type(t) in PLAIN_TYPES and (t.is_cpu or t.is_cuda) and not t.is_neg()
