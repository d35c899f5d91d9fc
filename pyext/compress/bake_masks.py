"""The end of masks: plain weights with zeros in them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod

from kernelpress.compress.changes import Unmasked, copied
from kernelpress.compress.masks import settle_masks
from kernelpress.compress.record import PassRecord, add_record
from kernelpress.measure.cost import count_parameters

__all__ = ["bake_masks"]


def bake_masks(model: nn.Module) -> nn.Module:
    """A copy of `model` without masks of `torch.nn.utils.prune`: the masked weights are parameters like any others,
    under the names that they had, so the state dict loads into the unmasked architecture. Nothing keeps the zeros in
    further training."""
    with torch.inference_mode(False), torch.no_grad():
        plain = copied(model)
        settle_masks(plain)
        changes = [
            Unmasked(path, hook._tensor_name)
            for path, module in plain.named_modules()
            for hook in module._forward_pre_hooks.values()
            if isinstance(hook, BasePruningMethod)
        ]
        for change in changes:
            change.apply(plain)
    before, after = count_parameters(model), count_parameters(plain)
    add_record(plain, PassRecord("bake_masks", {}, 0, 0, before, after, tuple(changes)))
    return plain
