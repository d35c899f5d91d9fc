"""Pools: the largest of every window, the mean of all pixels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from kernelpress.emit.fuse.match import Match
from kernelpress.emit.fuse.stages import pair
from kernelpress.emit.graph import arguments, only_user, shape, value

__all__ = ["averaged_image", "max_window", "pools"]

aten = torch.ops.aten

FLATTENS = (aten.flatten.using_ints, aten.reshape.default, aten.view.default, aten.squeeze.dims)


def pools(node: Node) -> Iterator[Match]:
    """The pool that `node` is, or begins."""
    if node.op != "call_function":
        return
    window = max_window(node)
    if window is not None:
        yield Match("max_pool2d", frozenset({node}), node, {"x": node.args[0], **window})
        return
    x = averaged_image(node)
    if x is None:
        return
    if len(shape(node) or ()) == 2:
        yield Match("global_avg_pool2d", frozenset({node}), node, {"x": x})
        return
    flat = only_user(node)
    if flat is not None and flat.target in FLATTENS and flat.args[0] is node and shape(flat) == (shape(node) or ())[:2]:
        yield Match("global_avg_pool2d", frozenset({node, flat}), flat, {"x": x})


def max_window(node: Node) -> dict[str, Any] | None:
    """The options of `max_pool2d` if it can stand for `node`, else None."""
    if node.target is not aten.max_pool2d.default:
        return None
    given, sizes = arguments(node), shape(node)
    if pair(given["dilation"]) != [1, 1] or sizes is None or len(sizes) != 4:
        return None
    kernel = pair(given["kernel_size"])
    window = {"kernel_size": kernel, "stride": pair(given["stride"] or kernel), "padding": pair(given["padding"])}
    return None if given["ceil_mode"] and _sizes_rounded_down(node.args[0], **window) != [*sizes[2:]] else window


def _sizes_rounded_down(x: Any, kernel_size: list[int], stride: list[int], padding: list[int]) -> list[Any]:
    """Rows and columns of the pooled image, where a last window that is not whole gives none."""
    each = zip((shape(x) or ())[2:], kernel_size, stride, padding, strict=True)
    return [(size + 2 * p - k) // s + 1 for size, k, s, p in each]


def averaged_image(node: Node) -> Node | None:
    """x [N, C, H, W] if `node` is its mean over all pixels, of shape [N, C, 1, 1] or [N, C]."""
    if node.target is aten.adaptive_avg_pool2d.default:
        x, is_global = node.args[0], pair(node.args[1]) == [1, 1]
    elif node.target is aten.mean.dim:
        given = arguments(node)
        x = given["self"]
        is_global = given["dim"] is not None and {d % 4 for d in given["dim"]} == {2, 3} and given["dtype"] is None
    else:
        return None
    is_image = isinstance(x, Node) and len(shape(x) or ()) == 4 and value(x).is_floating_point()
    return x if is_global and is_image else None  # type: ignore[return-value]
