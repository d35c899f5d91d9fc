"""Disjoint sets of channels, and tensors of their labels: the arithmetic under `dependency`."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["FIXED", "ChannelSets", "compact", "varying_axes"]

FIXED = 0


class ChannelSets:
    """Channels as integers, united where one cannot be removed without the other.

    Label `FIXED` stands for everything that is no removable channel. A set that is united with it, or frozen, stays;
    the reason is kept. `last_change` is the reason of the latest union or freeze that changed anything.
    """

    def __init__(self) -> None:
        self._parent = torch.zeros(1, dtype=torch.int64)
        self._frozen: dict[int, str] = {FIXED: "a single channel"}
        self.last_change: str | None = None

    def fresh(self, count: int) -> Tensor:
        """`count` new labels, each a set of its own: [count]."""
        start = len(self._parent)
        labels = torch.arange(start, start + count)
        self._parent = torch.cat([self._parent, labels])
        return labels

    def find(self, labels: Tensor) -> Tensor:
        """The representative of each label, in the shape of `labels`."""
        roots = self._parent[labels]
        while not torch.equal(roots, above := self._parent[roots]):
            roots = above
        return roots

    def unite(self, a: Tensor, b: Tensor, reason: str) -> None:
        """Makes `a[i]` and `b[i]`, after broadcasting, one set; sets that meet `FIXED` are frozen for `reason`."""
        pairs = torch.stack([roots.flatten() for roots in torch.broadcast_tensors(self.find(a), self.find(b))])
        for x, y in torch.unique(pairs[:, pairs[0] != pairs[1]], dim=1).T.tolist():
            low, high = sorted((self._root(x), self._root(y)))
            if low == high:
                continue
            if low == FIXED:
                self._freeze_root(high, reason)
                continue
            self._parent[high] = low
            self.last_change = reason
            if high in self._frozen:
                self._frozen.setdefault(low, self._frozen[high])

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Keeps every channel in `labels`."""
        for root in torch.unique(self.find(labels)).tolist():
            self._freeze_root(root, reason)

    def frozen_because(self, root: int) -> str | None:
        """Why the set of representative `root` must stay, or None if it may go."""
        return self._frozen.get(root)

    def unfrozen(self, labels: Tensor) -> Tensor:
        """The representative of each label, `FIXED` where it must stay, in the shape of `labels`."""
        roots = self.find(labels)
        for root in roots.unique().tolist():
            if root in self._frozen:
                roots = roots.masked_fill(roots == root, FIXED)
        return roots

    def _freeze_root(self, root: int, reason: str) -> None:
        if root not in self._frozen:
            self._frozen[root] = reason
            self.last_change = reason

    def _root(self, label: int) -> int:
        while (above := int(self._parent[label])) != label:
            label = above
        return label


def varying_axes(labels: Tensor) -> set[int]:
    """The axes of `labels` along which they are not constant."""
    return {axis for axis, size in enumerate(compact(labels).shape) if size > 1}


def compact(labels: Tensor) -> Tensor:
    """`labels` with every axis along which they are constant reduced to size 1."""
    for axis in range(labels.dim()):
        if labels.size(axis) > 1:
            first = labels.narrow(axis, 0, 1)
            if labels.stride(axis) == 0 or bool((labels == first).all()):
                labels = first
    return labels
