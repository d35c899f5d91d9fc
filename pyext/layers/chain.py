"""Reading blocks made of plain PyTorch modules: convolutions in a row, each with a norm and an activation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from kernelpress.layers.common import is_pointwise

__all__ = ["Stage", "load_in_order", "stages_of"]

_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Sigmoid: "sigmoid",
    nn.GELU: "gelu",
}


@dataclass(frozen=True)
class Stage:
    """One convolution of a block, the BatchNorm after it, and the name of the activation after that."""

    convolution: nn.Conv2d
    norm: nn.BatchNorm2d | None = None
    activation: str = "identity"


def stages_of(block: nn.Module, kinds: Sequence[str]) -> list[Stage]:
    """The stages of a block, in the order in which its modules were registered.

    `kinds` says what the convolutions must be, `"depthwise"` or `"pointwise"` each.
    Raises: `ValueError` for another module than convolution, BatchNorm, activation, or for other convolutions.
    """
    stages: list[Stage] = []
    for name, module in block.named_modules(remove_duplicate=False):
        activation = _activation_of(module)
        last = stages[-1] if stages else Stage(nn.Conv2d(1, 1, 1))
        bare = bool(stages) and last.activation == "identity"
        if isinstance(module, nn.Conv2d):
            stages.append(Stage(module))
        elif isinstance(module, nn.BatchNorm2d) and bare and last.norm is None:
            stages[-1] = Stage(last.convolution, module)
        elif activation is not None and bare:
            stages[-1] = Stage(last.convolution, last.norm, activation)
        elif not isinstance(module, nn.Identity) and not list(module.children()):
            raise ValueError(
                f"block: expected convolutions with BatchNorm and activation each, got {module} at {name!r}"
            )
    found = [_kind_of(stage.convolution) for stage in stages]
    if found != list(kinds):
        raise ValueError(f"block: expected convolutions {', '.join(kinds)}, got {', '.join(found) or 'none'}")
    return stages


def _activation_of(module: nn.Module) -> str | None:
    if isinstance(module, nn.GELU) and module.approximate != "none":
        return None
    return _ACTIVATIONS.get(type(module))


def _kind_of(convolution: nn.Conv2d) -> str:
    if convolution.padding_mode != "zeros":
        return f"with {convolution.padding_mode} padding"
    if is_pointwise(convolution):
        return "pointwise"
    if convolution.groups == convolution.in_channels == convolution.out_channels:
        return "depthwise"
    return f"{convolution.kernel_size} in {convolution.groups} groups"


def load_in_order(block: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Rename the entries of a block of another naming, in place, if they are the same tensors in the same order."""
    own = [prefix + key for key in block.state_dict()]
    given = [key for key in state_dict if key.startswith(prefix)]
    same = [key.rpartition(".")[2] for key in own] == [key.rpartition(".")[2] for key in given]
    if same and not set(own) & set(given):
        values = [state_dict.pop(key) for key in given]
        state_dict.update(zip(own, values, strict=True))
