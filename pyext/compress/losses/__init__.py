"""Losses of distillation: what a student is told by its teacher, beside the targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kernelpress.compress.losses.base import LayerLoss, TeacherLoss
from kernelpress.compress.losses.feature import AttentionLoss, HintLoss, SimilarityLoss, VIDLoss
from kernelpress.compress.losses.relation import FSPLoss, RKDAngleLoss, RKDDistanceLoss
from kernelpress.compress.losses.response import DISTLoss, DKDLoss, ResponseLoss
from kernelpress.files.plain import did_you_mean

__all__ = [
    "LOSSES",
    "AttentionLoss",
    "DISTLoss",
    "DKDLoss",
    "FSPLoss",
    "HintLoss",
    "LayerLoss",
    "RKDAngleLoss",
    "RKDDistanceLoss",
    "ResponseLoss",
    "SimilarityLoss",
    "TeacherLoss",
    "VIDLoss",
    "create_loss",
]

LOSSES: Mapping[str, Callable[..., TeacherLoss | LayerLoss]] = {
    "response": ResponseLoss,
    "dkd": DKDLoss,
    "dist": DISTLoss,
    "hint": HintLoss,
    "attention": AttentionLoss,
    "similarity": SimilarityLoss,
    "vid": VIDLoss,
    "rkd_distance": RKDDistanceLoss,
    "rkd_angle": RKDAngleLoss,
    "fsp": FSPLoss,
}
"""Every loss by the name that recipes give it."""


def create_loss(name: str, **options: Any) -> TeacherLoss | LayerLoss:
    """A loss by name, with the options of its class.

    Raises `ValueError` for an unknown name or a value out of range, `TypeError` for options it does not have.
    """
    if name not in LOSSES:
        raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, got {name!r}{did_you_mean(name, LOSSES)}")
    try:
        return LOSSES[name](**options)
    except TypeError as error:
        raise TypeError(f"loss: {name} is not made of {options}: {error}") from error
