"""The ways PyTorch itself runs a model: eager in both memory formats, and `torch.compile`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kernelpress.preserve import evaluation, preserved
from kernelpress.trace import trace

__all__ = ["TORCH_WAYS", "torch_contestants"]

TORCH_WAYS = ("eager", "channels_last", "compile")


def torch_contestants(
    module: nn.Module, inputs: tuple[Any, ...], ways: Sequence[str] = TORCH_WAYS
) -> tuple[dict[str, tuple[Callable[..., Any], tuple[Any, ...]]], dict[str, str]]:
    """Contestants for `compare` by way, and the ways that cannot run here with the reason.

    `eager` is the module as it stands, except that layers of kernelpress, which would run on our kernels, give way to
    PyTorch's own operations; `channels_last` a copy with weights and images in that format; `compile` that copy through
    Inductor with its weights frozen, compiled here and now. Raises `ValueError` for an unknown way.
    """
    for way in ways:
        if way not in TORCH_WAYS:
            raise ValueError(f"ways: expected some of {', '.join(TORCH_WAYS)}, got {way!r}")
    contestants: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {}
    refusals: dict[str, str] = {}
    with preserved(module, inputs):
        images = tuple(_channels_last(value) for value in inputs)
        module = _in_plain_torch(module, inputs)
        for way in ways:
            if way == "eager":
                contestants[way] = (module, inputs)
                continue
            twin = _channels_last_copy(module)
            if way == "channels_last":
                contestants[way] = (twin, images)
                continue
            try:
                contestants[way] = (_compiled(twin, images), images)
            # Inductor fails in as many ways as it has parts: no compiler, an operation it lacks, a bug.
            except Exception as error:
                refusals[way] = (
                    f"torch.compile cannot run it: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
                )
    return contestants, refusals


def _in_plain_torch(module: nn.Module, inputs: tuple[Any, ...]) -> nn.Module:
    """`module`, or if it holds layers of kernelpress its graph of PyTorch's operations over the same tensors."""
    if not any(type(part).__module__.startswith("kernelpress.layers.") for part in module.modules()):
        return module
    return trace(module, inputs)


def _channels_last(value: Any) -> Any:
    is_image = isinstance(value, Tensor) and value.ndim == 4
    return value.contiguous(memory_format=torch.channels_last) if is_image else value


def _channels_last_copy(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        # Copying an exported graph makes torch use a name of its own that it deprecates.
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
        twin: nn.Module = copy.deepcopy(module).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return twin


def _compiled(module: nn.Module, inputs: tuple[Any, ...]) -> Callable[..., Any]:
    """`module`, compiled in evaluation mode for `inputs`."""
    from kernelpress.runtime.torch_private import inductor_config

    compiled = torch.compile(module)
    # Given as an option of torch.compile, freezing is ignored.
    with inductor_config.patch(freezing=True), evaluation(module), torch.no_grad():
        compiled(*inputs)
    return compiled
