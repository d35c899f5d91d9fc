"""Whether something of torch could take part in an op's call: a mode, a transform, a trace, a subclass of tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import profiler

__all__ = ["PLAIN_TYPES", "is_intercepted", "is_plain"]

PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})
"""Types of tensors whose operations nobody overrides."""

_is_compiling = torch.compiler.is_dynamo_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transform_level = torch._C._functorch.maybe_current_level
_tracing_state = torch._C._get_tracing_state


def is_intercepted() -> bool:
    """Whether a compiler, mode, transform, trace or profiler wants to see the operations that run now."""
    return (
        _is_compiling()
        or _dispatch_modes() > 0
        or _function_modes() > 0
        or _transform_level() is not None
        or _tracing_state() is not None
        or profiler._is_profiler_enabled
    )


def is_plain(t: Tensor) -> bool:
    """Whether `t` is a tensor on the CPU or a CUDA device whose memory holds its values."""
    return type(t) in PLAIN_TYPES and (t.is_cpu or t.is_cuda) and not t.is_neg()
