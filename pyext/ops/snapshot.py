"""Remembers a parameter without keeping it alive, to tell later whether it is still the same, unchanged."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Snapshot"]


class Snapshot(NamedTuple):
    """A tensor as it was: its identity, address, shape, strides, and version counter.

    What these do not tell leaves a snapshot valid: writes through `.data`, and writes to tensors made under
    `torch.inference_mode`, which have no version counter.
    """

    reference: weakref.ref[Tensor]
    address: int
    shape: torch.Size
    stride: tuple[int, ...]
    version: int | None

    @classmethod
    def of(cls, t: Tensor, on_death: Callable[[Any], object] | None = None) -> Snapshot:
        """Take one; `on_death` is called when the tensor is collected."""
        version = None if t.is_inference() else t._version
        return cls(weakref.ref(t, on_death), t.data_ptr(), t.shape, t.stride(), version)

    def is_still(self, t: Tensor | None) -> bool:
        """Whether `t` is that tensor and was not written to."""
        reference, address, shape, stride, version = self
        return (
            t is not None
            and reference() is t
            and t.data_ptr() == address
            and (version is None or t._version == version)
            and t.shape == shape
            and t.stride() == stride
        )
