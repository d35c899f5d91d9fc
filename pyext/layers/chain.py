"""Reading blocks made of plain PyTorch modules: convolutions in a row, each with a norm and an activation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from kernelpress.layers.common import is_pointwise

__all__ = [
    "NormLayer",
    "Stage",
    "activation_module",
    "copy_stages",
    "has_bias",
    "load_in_order",
    "norm_layer_of",
    "read_stages",
    "stages_of",
]

NormLayer = Callable[[int], nn.Module]
"""Makes the norm of so many channels, as `torch.nn.BatchNorm2d` does."""

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


def read_stages(block: nn.Module) -> list[Stage]:
    """The stages of a block, in the order in which its modules were registered.

    Raises: `ValueError` for another module than convolution, BatchNorm, activation.
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
        elif type(module) not in (nn.Identity, nn.Sequential) and not list(module.children()):
            raise ValueError(
                f"block: expected convolutions with BatchNorm and activation each, got {module} at {name!r}"
            )
    return stages


def stages_of(block: nn.Module, kinds: Sequence[str]) -> list[Stage]:
    """The stages of a block whose convolutions must be of these kinds, `"depthwise"` or `"pointwise"` each.

    Raises: `ValueError` for another module than convolution, BatchNorm, activation, or for other convolutions.
    """
    stages = read_stages(block)
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


def activation_module(activation: str) -> nn.Module:
    """The module of an activation's name; `torch.nn.Identity` for `"identity"`."""
    for kind, name in _ACTIVATIONS.items():
        if name == activation:
            return kind()
    return nn.Identity()


def norm_layer_of(stages: list[Stage]) -> NormLayer | None:
    """What makes norms like those of the stages, all or none of which have one. Raises `ValueError` otherwise."""
    norms = [stage.norm for stage in stages if stage.norm is not None]
    if not norms:
        return None
    if len(norms) != len(stages):
        raise ValueError("block: expected a BatchNorm after every convolution or after none")
    remaining = iter(norms)

    def make(channels: int) -> nn.Module:
        norm = next(remaining)
        return nn.BatchNorm2d(channels, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)

    return make


def has_bias(stages: list[Stage]) -> bool:
    """Whether the convolutions have biases, all or none of them. Raises `ValueError` otherwise."""
    biases = {stage.convolution.bias is not None for stage in stages}
    if len(biases) != 1:
        raise ValueError("block: expected a bias in every convolution or in none")
    return biases.pop()


def copy_stages(stages: Sequence[Stage], parts: Sequence[tuple[nn.Module, nn.Module | None]]) -> None:
    """Copy weights, whether they are trained, and training flags to `parts`, convolution and norm of each stage."""
    for stage, (convolution, norm) in zip(stages, parts, strict=True):
        for ours, theirs in ((convolution, stage.convolution), (norm, stage.norm)):
            if ours is not None and theirs is not None:
                ours.load_state_dict(theirs.state_dict())
                ours.train(theirs.training)
                for parameter, source in zip(ours.parameters(), theirs.parameters(), strict=True):
                    parameter.requires_grad_(source.requires_grad)


def load_in_order(block: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Rename the entries of a block of another naming, in place, if they are the same tensors in the same order."""
    own = [prefix + key for key in block.state_dict()]
    given = [key for key in state_dict if key.startswith(prefix)]
    same = [key.rpartition(".")[2] for key in own] == [key.rpartition(".")[2] for key in given]
    if same and not set(own) & set(given):
        values = [state_dict.pop(key) for key in given]
        state_dict.update(zip(own, values, strict=True))
