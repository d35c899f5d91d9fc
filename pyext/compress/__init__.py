"""Passes that change a network's mathematics and return ordinary, trainable PyTorch."""

from kernelpress.compress.changes import Change, Masked, Replaced, Resized
from kernelpress.compress.decompose import decompose
from kernelpress.compress.evaluation import evaluate
from kernelpress.compress.finetune import EpochRecord, FinetuneResult, TeacherLoss, finetune
from kernelpress.compress.prune_channels import prune_channels
from kernelpress.compress.record import DecomposedLayer, PassRecord, SkippedLayers, load, record_of, save

__all__ = [
    "Change",
    "DecomposedLayer",
    "EpochRecord",
    "FinetuneResult",
    "Masked",
    "PassRecord",
    "Replaced",
    "Resized",
    "SkippedLayers",
    "TeacherLoss",
    "decompose",
    "evaluate",
    "finetune",
    "load",
    "prune_channels",
    "record_of",
    "save",
]
