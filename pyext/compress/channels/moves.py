"""What operations that move, combine or reduce elements do with the labels of `walk`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from kernelpress.compress.channels.sets import FIXED, compact, varying_axes
from kernelpress.compress.channels.shuffles import dividing_groups, shuffle_end
from kernelpress.compress.channels.walk import ChannelWalk, along, describe, shape_of
from kernelpress.runtime.torch_private import pytree

__all__ = [
    "at_fixed_positions", "chunk", "concatenate", "expand", "move", "normalise_along", "pad", "pixel_shuffle",
    "pixel_unshuffle", "pointwise", "reduction", "reshape", "same", "spatial", "split", "stack",
]  # fmt: skip

aten = torch.ops.aten


def pointwise(walk: ChannelWalk, node: Node, args: dict[str, Any]) -> Any:
    """Element-wise, though torch does not say so."""
    return walk.pointwise(node)


def same(walk: ChannelWalk, node: Node, args: dict[str, Any]) -> Any:
    """The result has the form of the first argument."""
    return walk.read(_first(node)).expand(shape_of(node))


def move(walk: ChannelWalk, node: Node, args: dict[str, Any]) -> Any:
    """Labels go where their elements go."""
    return walk.apply(node)


def expand(walk: ChannelWalk, node: Node, args: dict[str, Any]) -> Any:
    """The sizes are literals in the graph, though not always in `forward`."""
    if not walk.couple_splits and varying_axes(walk.read(_first(node))):
        walk.sets.freeze(walk.read(_first(node)), f"{describe(node)} states the number of channels")
    return walk.apply(node)


def reshape(walk: ChannelWalk, node: Node, args: dict[str, Any]) -> Any:
    """Channels on several axes afterwards are blocks; the innermost axis counts within a block."""
    if not walk.couple_splits:
        walk.sets.freeze(walk.read(_first(node)), f"{describe(node)} reshapes channels")
    is_shuffle = walk.couple_splits and _shuffled(walk, node)
    moved = walk.canonical(walk.apply(node))
    axes = sorted(varying_axes(moved))
    if len(axes) < 2 or is_shuffle:
        return moved
    first = moved
    for axis in axes[:-1]:
        first = first.narrow(axis, 0, 1)
    walk.sets.unite(compact(moved), compact(first), f"{describe(node)} divides channels")
    return first.expand(moved.shape)


def _shuffled(walk: ChannelWalk, node: Node) -> bool:
    """Whether `node` begins a shuffle; what then has to leave together is united.

    Behind the shuffle, channels of all its groups take turns. They still do once as many neighbours as it has groups
    have left. Where the next convolution has groups, every one of them loses neighbours at the same places, counted
    from its first channel; what is left over at its end stays.
    """
    end = shuffle_end(node)
    if end is None or varying_axes(labels := walk.read(_first(node))) != {1}:
        return False
    count = shape_of(node)[1]
    blocks = walk.only_along(labels, 1, node).view(count, -1).T.reshape(dividing_groups(end), -1)
    whole = blocks.size(1) // count * count
    turns = blocks[:, :whole].reshape(len(blocks), -1, count)
    walk.sets.unite(turns, turns[:1, :, :1], f"{describe(node)} shuffles channels")
    if whole < blocks.size(1):
        walk.sets.freeze(blocks[:, whole:], f"{describe(node)} shuffles channels that its groups do not divide")
    return True


def at_fixed_positions(walk: ChannelWalk, node: Node, args: dict[str, Any]) -> Any:
    """Channels that are named by their place stay; a single one of them is an axis of channels no more."""
    labels = walk.read(_first(node))
    if (args.get("dim") or 0) % labels.dim() not in varying_axes(labels):
        return walk.apply(node)
    walk.sets.freeze(labels, f"{describe(node)} takes channels at fixed positions")
    return pytree.tree_map(_fixed_if_constant, walk.apply(node))


def split(walk: ChannelWalk, node: Node, args: dict[str, Any]) -> Any:
    """Equal parts keep the same channels, if the module states as its `width` how many these are (Res2Net)."""
    labels, size = walk.read(_first(node)), args.get("split_size", args.get("split_sizes"))
    dim = (args.get("dim") or 0) % labels.dim()
    width = size if isinstance(size, int) else size[0] if size else 0
    is_even = width > 0 and labels.size(dim) % width == 0 and size in (width, [width] * (labels.size(dim) // width))
    if not (is_even and walk.couple_splits and varying_axes(labels) == {dim} and walk.states(node, "width", width)):
        return at_fixed_positions(walk, node, args)
    channels = walk.only_along(labels, dim, node)
    walk.alike(channels.view(-1, width), node)
    walk.count(node, "width", channels[:width])
    return walk.apply(node)


def chunk(walk: ChannelWalk, node: Node, args: dict[str, Any]) -> Any:
    """Equal parts, which keep the same channels."""
    labels, dim = walk.read(_first(node)), args.get("dim", 1)
    count = args["chunks"] if "chunks" in args else args["groups"]
    if dim % labels.dim() in varying_axes(labels):
        if walk.couple_splits and labels.size(dim) % count == 0:
            first, *others = (compact(part) for part in labels.chunk(count, dim))
            for part in others:
                walk.sets.unite(first, part, f"{describe(node)} divides channels")
        else:
            walk.sets.freeze(labels, f"{describe(node)} divides channels")
    return walk.apply(node)


def concatenate(walk: ChannelWalk, node: Node, args: dict[str, Any]) -> Any:
    """Along the channels each keeps its own; along another axis all must keep the same."""
    return _joined(walk, node, [walk.read(value) for value in args["tensors"]], args["dim"])


def stack(walk: ChannelWalk, node: Node, args: dict[str, Any]) -> Any:
    """A concatenation along an axis of its own."""
    dim = args["dim"] % len(shape_of(node))
    return _joined(walk, node, [walk.read(value).unsqueeze(dim) for value in args["tensors"]], dim)


def _joined(walk: ChannelWalk, node: Node, tensors: list[Tensor], dim: int) -> Tensor:
    # `torch.cat` passes over vectors without elements, whatever the shape of the others.
    tensors = [labels for labels in tensors if labels.shape != (0,)] or tensors
    dim %= tensors[0].dim()
    varying = set().union(*(varying_axes(labels) for labels in tensors))
    if varying and dim not in varying:
        result = tensors[0].narrow(dim, 0, 1)
        for labels in tensors[1:]:
            result = walk.meet(result, labels.narrow(dim, 0, 1), describe(node))
        if varying_axes(result):
            return result.expand(shape_of(node))
    return torch.cat(tensors, dim)


def pad(walk: ChannelWalk, node: Node, args: dict[str, Any]) -> Any:
    """Zeros around channels stay; other modes, and cuts, name channels by their place."""
    labels = walk.read(_first(node))
    channels = compact(labels)
    sizes = list(args["pad"])
    for k in range(len(sizes) // 2):
        if channels.size(labels.dim() - 1 - k) == 1:
            sizes[2 * k : 2 * k + 2] = [0, 0]
    if any(sizes) and (args.get("mode", "constant") != "constant" or min(sizes) < 0):
        return walk.unknown(node, "takes channels at fixed positions")
    return aten.constant_pad_nd.default(channels, sizes, FIXED).expand(shape_of(node))


def pixel_shuffle(walk: ChannelWalk, node: Node, args: dict[str, Any]) -> Any:
    """Each output channel is made of upscale_factor² neighbours, which leave together."""
    axis = len(shape_of(node)) - 3
    blocks = walk.only_along(walk.read(_first(node)), axis, node).reshape(-1, args["upscale_factor"] ** 2)
    walk.sets.unite(blocks, blocks[:, :1], f"{describe(node)} makes one channel of them")
    return along(blocks[:, 0], axis, shape_of(node))


def pixel_unshuffle(walk: ChannelWalk, node: Node, args: dict[str, Any]) -> Any:
    """The inverse of `pixel_shuffle`."""
    axis = len(shape_of(node)) - 3
    channels = walk.only_along(walk.read(_first(node)), axis, node)
    return along(channels.repeat_interleave(args["downscale_factor"] ** 2), axis, shape_of(node))


def spatial(walk: ChannelWalk, node: Node, dims: int) -> Any:
    """Pooling, interpolation and padding over the last `dims` axes."""
    labels = walk.read(_first(node))
    return _reduced(walk, node, labels, set(range(labels.dim() - dims, labels.dim())), keepdim=True)


def reduction(walk: ChannelWalk, node: Node, args: dict[str, Any]) -> Any:
    """A sum over channels depends on all of them."""
    labels = walk.read(_first(node))
    dims = args.get("dim")
    dims = range(labels.dim()) if dims in (None, []) else [dims] if isinstance(dims, int) else dims
    return _reduced(walk, node, labels, {dim % labels.dim() for dim in dims}, keepdim=args.get("keepdim", False))


def _reduced(walk: ChannelWalk, node: Node, labels: Tensor, axes: set[int], *, keepdim: bool) -> Any:
    is_over_channels = bool(varying_axes(labels) & axes)
    if is_over_channels:
        walk.sets.freeze(labels, f"{describe(node)} reduces over channels")
    for axis in sorted(axes, reverse=True):
        labels = labels.narrow(axis, 0, 1) if keepdim else labels.select(axis, 0)
    if is_over_channels:
        labels = _fixed_if_constant(labels)
    return pytree.tree_map(lambda value: labels.expand(value.shape), node.meta["val"])


def normalise_along(walk: ChannelWalk, node: Node, args: dict[str, Any]) -> Any:
    """Softmax along channels depends on all of them."""
    labels = walk.read(_first(node))
    if labels.dim() and args["dim"] % labels.dim() in varying_axes(labels):
        walk.sets.freeze(labels, f"{describe(node)} normalises over channels")
    return labels


def _fixed_if_constant(labels: Tensor) -> Tensor:
    return labels if varying_axes(labels) else torch.full_like(compact(labels), FIXED).expand(labels.shape)


def _first(node: Node) -> Node:
    value = node.args[0]
    assert isinstance(value, Node)
    return value
