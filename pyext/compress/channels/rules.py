"""Which rule of `layers` and `moves` stands for which ATen operation."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from kernelpress.compress.channels import layers, moves
from kernelpress.compress.channels.walk import ChannelWalk, Rule

__all__ = ["RULES"]

_INTERPOLATIONS = {1: "upsample_linear1d", 2: "upsample_bilinear2d upsample_bicubic2d", 3: "upsample_trilinear3d"}


def _rules() -> dict[Any, Rule]:
    names: dict[Rule, str] = {
        layers.convolution_or_linear: "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear",
        layers.channel_normalisation: "batch_norm instance_norm",
        layers.group_norm: "group_norm",
        layers.last_axes_normalisation: "layer_norm rms_norm",
        layers.prelu: "prelu",
        moves.pointwise: "hardswish log_sigmoid rsub threshold where true_divide divide multiply",
        moves.same: "clone contiguous detach alias to type_as _to_copy lift_fresh_copy zeros_like ones_like full_like "
        "empty_like rand_like randn_like bernoulli dropout feature_dropout alpha_dropout feature_alpha_dropout",
        moves.move: "permute transpose t swapaxes swapdims movedim unsqueeze squeeze flatten flip",
        moves.expand: "expand expand_as",
        moves.reshape: "reshape view unflatten reshape_as view_as",
        moves.at_fixed_positions: "slice select narrow unbind",
        moves.split: "split split_with_sizes",
        moves.chunk: "chunk channel_shuffle native_channel_shuffle",
        moves.concatenate: "cat concat concatenate",
        moves.stack: "stack",
        moves.pad: "pad constant_pad_nd",
        moves.pixel_shuffle: "pixel_shuffle",
        moves.pixel_unshuffle: "pixel_unshuffle",
        moves.reduction: "mean sum amax amin max min var std prod",
        moves.normalise_along: "softmax log_softmax",
    }
    rules = {
        overload: rule for rule, packets in names.items() for name in packets.split() for overload in _overloads(name)
    }
    for dims in (1, 2, 3):
        pools = f"max_pool{dims}d max_pool{dims}d_with_indices avg_pool{dims}d adaptive_avg_pool{dims}d"
        pads = f"adaptive_max_pool{dims}d reflection_pad{dims}d replication_pad{dims}d upsample_nearest{dims}d"
        for name in f"{pools} {pads} {_INTERPOLATIONS[dims]}".split():
            rules |= dict.fromkeys(_overloads(name), partial(_over_last, dims))
    return rules


def _over_last(dims: int, walk: ChannelWalk, node: Node, args: dict[str, Any]) -> Any:
    return moves.spatial(walk, node, dims)


def _overloads(name: str) -> list[Any]:
    packet = getattr(torch.ops.aten, name, None)
    return [getattr(packet, overload) for overload in packet.overloads()] if packet is not None else []


RULES: Mapping[Any, Rule] = _rules()
"""ATen overload → its rule; element-wise operations that torch tags as such have none."""
