"""Channel shuffles between grouped convolutions, as they stand in an exported graph."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node

from kernelpress.compress.channels.walk import arguments, shape_of

__all__ = ["dividing_groups", "is_shuffled_next", "shuffle_end"]

aten = torch.ops.aten

_RESHAPES = frozenset({aten.reshape.default, aten.view.default, aten.unflatten.int, aten.flatten.using_ints})
_COPIES = frozenset({aten.clone.default, aten.contiguous.default})
_CONVOLUTIONS = frozenset({aten.conv1d.default, aten.conv2d.default, aten.conv3d.default})


def shuffle_end(node: Node) -> Node | None:
    """The last node of the shuffle that `node` begins: [N, C, …] → [N, groups, C / groups, …], the two axes change
    places, → [N, C, …]. None where it begins none."""
    source = node.args[0]
    if node.target not in _RESHAPES or not isinstance(source, Node):
        return None
    before, divided = shape_of(source), shape_of(node)
    if len(divided) != len(before) + 1 or divided[:1] + divided[3:] != before[:1] + before[2:]:
        return None
    swap = _only_user(node)
    if swap is None or shape_of(swap) != (divided[0], divided[2], divided[1], *divided[3:]):
        return None
    if swap.target is not aten.transpose.int and swap.target is not aten.permute.default:
        return None
    end = _only_user(swap)
    while end is not None and end.target in _COPIES:
        end = _only_user(end)
    return end if end is not None and end.target in _RESHAPES and shape_of(end) == before else None


def is_shuffled_next(node: Node) -> bool:
    """Whether a shuffle is what next moves the channels of `node`, behind norms and activations."""
    return any(shuffle_end(user) is not None for _, user in _followed(node))


def dividing_groups(node: Node) -> int:
    """The groups of the next convolution that is not depthwise, where only what keeps channels apart lies before it;
    else 1."""
    for source, user in _followed(node):
        if user.target in _CONVOLUTIONS and shape_of(user)[1] != arguments(user)["groups"] > 1:
            return int(arguments(user)["groups"]) if shape_of(source)[1] % arguments(user)["groups"] == 0 else 1
    return 1


def _followed(node: Node) -> Iterator[tuple[Node, Node]]:
    """Every (node, user) behind `node`, as long as channels keep their number and place."""
    for user in node.users:
        yield node, user
        keeps_apart = user.target not in _CONVOLUTIONS or arguments(user)["groups"] == shape_of(user)[1]
        if keeps_apart and user.target not in _RESHAPES and _channels(user) == _channels(node):
            yield from _followed(user)


def _channels(node: Node) -> int | None:
    value = node.meta.get("val")
    return value.shape[1] if isinstance(value, torch.Tensor) and value.dim() > 1 else None


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
