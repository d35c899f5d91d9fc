"""Masks over parameters: what they silence is exactly 0.0, whatever optimisers write below them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from kernelpress.compress.resize import compute_weights

__all__ = ["ZeroMask", "lay_mask", "mask_hooks", "settle_masks"]


class ZeroMask(BasePruningMethod):
    """A mask in the form of `torch.nn.utils.prune`: the parameter `weight_orig` and the buffer `weight_mask`, of which
    `weight` is computed before each call.

    A product alone makes −0.0 of what momentum has left below a zero of the mask. And while torch copies no weight that
    was computed with gradients, `copy.deepcopy` of a model with these masks copies its value.
    """

    PRUNING_TYPE = "unstructured"
    _made: Tensor | None = None

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """What was masked before stays so, and nothing else."""
        return default_mask

    def apply_mask(self, module: nn.Module) -> Tensor:
        """The masked weight."""
        mask, original = (getattr(module, f"{self._tensor_name}_{part}") for part in ("mask", "orig"))
        self._made = made = (original * mask).masked_fill(mask == 0, 0.0)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> ZeroMask:
        # A module's hooks are copied ahead of what was set on it later, such as this weight.
        if self._made is not None:
            memo[id(self._made)] = self._made.detach().clone()
        twin = ZeroMask()
        twin._tensor_name = self._tensor_name
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {"_tensor_name": self._tensor_name}


def mask_hooks(module: nn.Module, parameter: str) -> dict[int, BasePruningMethod]:
    """Those of `torch.nn.utils.prune` on this parameter, by their number among the hooks of `module`."""
    hooks = module._forward_pre_hooks.items()
    return {k: hook for k, hook in hooks if isinstance(hook, BasePruningMethod) and hook._tensor_name == parameter}


def lay_mask(module: nn.Module, parameter: str, mask: Tensor) -> None:
    """Computes `parameter` from now on under `mask` alone, which takes the place of earlier masks."""
    if f"{parameter}_mask" not in module._buffers:
        original = module._parameters.pop(parameter)
        module.register_parameter(f"{parameter}_orig", original)
    original = module.get_parameter(f"{parameter}_orig")
    module.register_buffer(f"{parameter}_mask", mask.detach().to(original.device, original.dtype, copy=True))
    if not any(isinstance(hook, ZeroMask) for hook in module._forward_pre_hooks.values()):
        module.register_load_state_dict_post_hook(_renew)
    for number in mask_hooks(module, parameter):
        del module._forward_pre_hooks[number]
    hook = ZeroMask()
    hook._tensor_name = parameter
    module.register_forward_pre_hook(hook)
    with torch.no_grad():
        hook(module, ())


def _renew(module: nn.Module, _: Any) -> None:
    """What is loaded below a mask shows at once."""
    compute_weights(module)


@torch.inference_mode(False)
@torch.no_grad()
def settle_masks(model: nn.Module) -> None:
    """Makes masked weights those of the present values, and zero what lies under a zero of a mask."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod):
                original, mask = (getattr(module, f"{hook._tensor_name}_{part}") for part in ("orig", "mask"))
                original.masked_fill_(mask == 0, 0.0)
                hook(module, ())
