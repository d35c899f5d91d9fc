"""The weights of a model that can be pruned, each under every name that it has, with a mask over it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from kernelpress.compress.masks import lay_mask
from kernelpress.compress.modules import WEIGHTED, layers_in
from kernelpress.compress.record import SkippedLayers
from kernelpress.compress.resize import compute_weights

__all__ = ["Target", "check_finite", "find_targets"]


@dataclass(frozen=True)
class Target:
    """A weight under masks: the module that computes with it, and all (path, module, parameter) that hold it."""

    module: nn.Module
    owners: tuple[tuple[str, nn.Module, str], ...]

    @property
    def layer(self) -> str:
        """The path of the layer."""
        return self.owners[0][0]

    @property
    def name(self) -> str:
        """The qualified name of the weight."""
        return f"{self.layer}.weight" if self.layer else "weight"

    @property
    def original(self) -> nn.Parameter:
        """The parameter below the mask."""
        return self.module.get_parameter("weight_orig")

    @property
    def weight(self) -> Tensor:
        """The present masked weight, detached."""
        mask = self.module.get_buffer("weight_mask")
        return (self.original.detach() * mask).masked_fill(mask == 0, 0.0)

    def alive(self) -> Tensor:
        """What no mask silences, bool; of a tied weight, what some owner still uses."""
        masks = [module.get_buffer(f"{parameter}_mask") != 0 for _, module, parameter in self.owners]
        return torch.stack(masks).any(0)

    @torch.no_grad()
    def keep(self, alive: Tensor) -> None:
        """Silences all that is not `alive`, and makes it zero below the masks."""
        for _, module, parameter in self.owners:
            module.get_buffer(f"{parameter}_mask").masked_fill_(~alive, 0.0)
            compute_weights(module)
        self.original.masked_fill_(~alive, 0.0)

    @torch.no_grad()
    def reset(self, alive: Tensor) -> None:
        """As `keep`, with masks of 1 wherever it is `alive`, whatever they silenced before."""
        for _, module, parameter in self.owners:
            module.get_buffer(f"{parameter}_mask").copy_(alive)
        self.keep(alive)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Gives the weight and its masks back after the block."""
        tensors = [self.original.data, *(module.get_buffer(f"{name}_mask") for _, module, name in self.owners)]
        values = [tensor.clone() for tensor in tensors]
        try:
            yield
        finally:
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
            for _, module, _ in self.owners:
                compute_weights(module)


def find_targets(model: nn.Module, ignore: Sequence[str]) -> tuple[tuple[Target, ...], tuple[SkippedLayers, ...]]:
    """Lays masks over the weights of all convolutions and linear layers outside `ignore`, whose earlier masks stay;
    also the layers that have no weight to mask, with the reason.

    Raises `ValueError` for a name that is no module's and a model without such weights.
    """
    ignored = layers_in(model, ignore, "ignore")
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            plain = name.removesuffix("_orig")
            owned = plain if f"{plain}_mask" in module._buffers else name
            owners.setdefault(id(parameter), []).append((path, module, owned))
    inside_attention = {
        id(part) for other in model.modules() if isinstance(other, nn.MultiheadAttention) for part in other.modules()
    }
    found: dict[int, Target] = {}
    skipped: list[SkippedLayers] = []
    for path, module in model.named_modules():
        if not isinstance(module, WEIGHTED):
            continue
        masked = "weight_mask" in module._buffers
        weight = module._parameters.get("weight_orig" if masked else "weight")
        reason = (
            "MultiheadAttention reads its weight without calling it"
            if id(module) in inside_attention
            else "its weight is computed or constant; make it a plain parameter to prune it"
            if weight is None
            else "its weight has no size before a first call"
            if isinstance(weight, UninitializedParameter)
            else ""
        )
        if reason:
            channels = getattr(module, "out_channels", getattr(module, "out_features", 0))
            skipped.append(SkippedLayers((path,), channels, reason))
        elif weight is not None and id(weight) not in found:
            together = owners[id(weight)]
            if not any(other in ignored for other, _, _ in together):
                mine = [owner for owner in together if owner[1] is module]
                found[id(weight)] = Target(module, (*mine, *(owner for owner in together if owner[1] is not module)))
    if not found:
        why = "; ".join(sorted({s.reason for s in skipped})) or "no convolution or linear layer is left"
        raise ValueError(f"model: {type(model).__name__} has no weight to prune: {why}")
    for target in found.values():
        for _, module, parameter in target.owners:
            earlier = module._buffers.get(f"{parameter}_mask")
            lay_mask(
                module, parameter, torch.ones_like(module.get_parameter(parameter)) if earlier is None else earlier
            )
    return tuple(found.values()), tuple(skipped)


def check_finite(targets: Sequence[Target]) -> None:
    """Raises `ValueError` for a weight with NaN or Inf, which no criterion ranks."""
    for target in targets:
        if not bool(target.weight.isfinite().all()):
            raise ValueError(f"model: {target.name} holds NaN or Inf")
