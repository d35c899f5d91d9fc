"""Passes that change a network's mathematics and return ordinary, trainable PyTorch."""

from kernelpress.compress.bake_masks import bake_masks
from kernelpress.compress.changes import Change, Masked, Replaced, Resized, Unmasked
from kernelpress.compress.decompose import decompose
from kernelpress.compress.evaluation import evaluate
from kernelpress.compress.finetune import EpochRecord, FinetuneResult, TeacherLoss, finetune
from kernelpress.compress.lottery import lottery
from kernelpress.compress.prune_channels import prune_channels
from kernelpress.compress.prune_weights import (
    WEIGHT_CRITERIA,
    Gradual,
    Iterative,
    Sensitivity,
    prune_weights,
    sensitivity,
)
from kernelpress.compress.record import DecomposedLayer, PassRecord, SkippedLayers, load, record_of, save

__all__ = [
    "WEIGHT_CRITERIA",
    "Change",
    "DecomposedLayer",
    "EpochRecord",
    "FinetuneResult",
    "Gradual",
    "Iterative",
    "Masked",
    "PassRecord",
    "Replaced",
    "Resized",
    "Sensitivity",
    "SkippedLayers",
    "TeacherLoss",
    "Unmasked",
    "bake_masks",
    "decompose",
    "evaluate",
    "finetune",
    "load",
    "lottery",
    "prune_channels",
    "prune_weights",
    "record_of",
    "save",
    "sensitivity",
]
