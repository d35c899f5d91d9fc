"""What layers do with the labels of `walk`: convolutions, linear layers and normalisations."""

from __future__ import annotations

import math
import re
from typing import Any

from torch import Tensor, nn
from torch.fx import Node
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm

from kernelpress.compress.channels.sets import varying_axes
from kernelpress.compress.channels.shuffles import is_shuffled_next
from kernelpress.compress.channels.walk import Axis, ChannelWalk, LayerCall, along, describe, shape_of
from kernelpress.trace import module_of

__all__ = ["channel_normalisation", "convolution_or_linear", "group_norm", "last_axes_normalisation", "prelu"]


def convolution_or_linear(walk: ChannelWalk, node: Node, args: dict[str, Any]) -> Any:
    """Labels in along the weight's input axis, fresh labels out along its output axis."""
    weight = args["weight"]
    convolves = "stride" in args
    weight_shape, out_shape = shape_of(weight), shape_of(node)
    channel_axis = len(out_shape) - (len(weight_shape) - 1) if convolves else len(out_shape) - 1
    factors = walk.factors(weight)
    why = "" if factors else f"has a weight {_how_computed(walk, node)}"
    if isinstance(walk.modules.get(module_of(node)), nn.MultiheadAttention):
        why = "is part of a MultiheadAttention, which insists on its width"
    if why:
        walk.opaque[module_of(node)] = (out_shape[channel_axis], f"{describe(node)} {why}")
        return walk.unknown(node, why)
    # A constant weight, such as a selection of channels, says nothing of which matter.
    name = next((factor for factor in factors if factor in walk.trained), factors[0])
    transposed = convolves and "transpose" in str(node.target)
    groups = args.get("groups", 1)
    entering = walk.only_along(walk.read(args["input"]), channel_axis, node)
    multiplier = out_shape[channel_axis] // groups
    # Groups that have come down to one channel each are no depthwise convolution's: their channels leave together.
    is_plain = multiplier == 1 and not walk.is_checking
    is_depthwise = groups > 1 and groups == len(entering)
    is_depthwise = is_depthwise and (is_plain or _united(walk, entering.view(groups, 1)) > 1)
    if is_depthwise:
        out_dim, in_dim = 0, 1
        made = walk.axis(name, 0, weight_shape[0])
        walk.sets.unite(
            made, entering.repeat_interleave(1 if transposed else multiplier), f"{describe(node)} is depthwise"
        )
        leaving = made.repeat_interleave(multiplier) if transposed else made
        for attribute in ("groups", "channels"):
            if walk.states(node, attribute, groups):
                walk.count(node, attribute, entering)
    else:
        out_dim, in_dim = (1, 0) if transposed else (0, 1)
        blocks = walk.alike(entering.reshape(groups, -1), node)
        walk.tie(name, in_dim, blocks.flatten() if transposed else blocks[0])
        made = walk.axis(name, out_dim, weight_shape[out_dim])
        if transposed:
            leaving = made.repeat(groups)
        elif is_shuffled_next(node):
            leaving = walk.alike_in_number(made.view(groups, -1), node).flatten()
        else:
            leaving = walk.alike(made.view(groups, -1), node).flatten()
    if name in walk.trained:
        walk.producers[Axis(name, out_dim)] = None
        walk.weights[name] = weight
    for other in factors:
        for dim in (0, 1):
            if other != name and Axis(name, dim) in walk.axes and walk.sizes[other][dim] == weight_shape[dim]:
                walk.tie(other, dim, walk.axes[Axis(name, dim)])
    walk.tie_vectors(node, [args["bias"]], leaving)
    positions = math.prod(shape_of(args["input"]) if transposed else out_shape)
    flops = 2 * positions * math.prod(weight_shape) // weight_shape[0]
    axes = Axis(name, out_dim), Axis(name, in_dim)
    walk.calls.append(LayerCall(*axes, flops, node.name, channel_axis, entering, leaving, is_depthwise))
    return along(leaving, channel_axis, out_shape)


def _how_computed(walk: ChannelWalk, node: Node) -> str:
    module = walk.modules.get(module_of(node))
    by: list[object] = []
    if module is not None and parametrize.is_parametrized(module):
        by += [step for steps in module.parametrizations.values() for step in steps]
    if module is not None:
        by += [
            hook for hook in module._forward_pre_hooks.values() if isinstance(hook, SpectralNorm | BasePruningMethod)
        ]
    names = [re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(step).__name__.strip("_")).lower() for step in by]
    if not names:
        return "that is computed"
    return f"parametrised by {', '.join(names)}; make it a plain parameter to prune it"


def _united(walk: ChannelWalk, blocks: Tensor) -> int:
    """How many sets there are once those of each row of `blocks` are one, all channels that stay being one too."""
    blocks = walk.sets.unfrozen(blocks)
    if blocks.size(1) == 1:
        return len(blocks.unique())
    found: list[set[int]] = []
    for row in map(set, blocks.tolist()):
        touching = [other for other in found if other & row]
        found = [other for other in found if not other & row] + [row.union(*touching)]
    return len(found)


def channel_normalisation(walk: ChannelWalk, node: Node, args: dict[str, Any]) -> Any:
    """BatchNorm and InstanceNorm: every channel by itself."""
    channels = walk.only_along(walk.read(args["input"]), 1, node)
    walk.tie_vectors(node, [args[key] for key in ("weight", "bias", "running_mean", "running_var")], channels)
    if walk.states(node, "num_features", len(channels)):
        walk.count(node, "num_features", channels)
    return along(channels, 1, shape_of(node))


def group_norm(walk: ChannelWalk, node: Node, args: dict[str, Any]) -> Any:
    """Whole groups leave, so that the statistics of the others stay.

    Where their number cannot change (a literal in `forward`, or groups that can only leave all together), every group
    keeps the same number of channels.
    """
    channels = walk.only_along(walk.read(args["input"]), 1, node)
    groups = args["num_groups"]
    blocks = channels.reshape(groups, -1)
    if groups > 1 and walk.states(node, "num_groups", groups) and _united(walk, blocks) > 1:
        walk.sets.unite(blocks, blocks[:, :1], f"{describe(node)} normalises channels together")
        walk.count(node, "num_groups", blocks[:, 0])
    else:
        walk.alike(blocks, node)
    walk.tie_vectors(node, [args["weight"], args["bias"]], channels)
    if walk.states(node, "num_channels", len(channels)):
        walk.count(node, "num_channels", channels)
    return along(channels, 1, shape_of(node))


def last_axes_normalisation(walk: ChannelWalk, node: Node, args: dict[str, Any]) -> Any:
    """LayerNorm and RMSNorm: where channels are among the axes, the statistics are those of the channels that stay."""
    labels, sizes = walk.read(args["input"]), tuple(args["normalized_shape"])
    first = labels.dim() - len(sizes)
    axes = {axis for axis in varying_axes(labels) if axis >= first}
    if not axes:
        return labels
    is_stated = walk.states(node, "normalized_shape", sizes)
    if len(axes) > 1 or not (is_stated or walk.couple_splits):
        walk.sets.freeze(labels, f"{describe(node)} normalises over channels")
        return labels
    (axis,) = axes
    channels = walk.only_along(labels, axis, node)
    walk.tie_vectors(node, [args["weight"], args.get("bias")], channels, axis - first)
    if is_stated:
        walk.count(node, "normalized_shape", channels, axis - first)
    return along(channels, axis, shape_of(node))


def prelu(walk: ChannelWalk, node: Node, args: dict[str, Any]) -> Any:
    """A slope for all channels, or one for each."""
    labels = walk.read(args["self"])
    if math.prod(shape_of(args["weight"])) > 1:
        walk.tie_vectors(node, [args["weight"]], walk.only_along(labels, 1, node))
    return labels
