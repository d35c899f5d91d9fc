"""Passes that change a network's mathematics and return ordinary, trainable PyTorch."""

from kernelpress.compress.evaluation import evaluate
from kernelpress.compress.finetune import EpochRecord, FinetuneResult, TeacherLoss, finetune
from kernelpress.compress.prune_channels import prune_channels
from kernelpress.compress.record import LayerChange, PassRecord, SkippedLayers, load, record_of, save

__all__ = [
    "EpochRecord",
    "FinetuneResult",
    "LayerChange",
    "PassRecord",
    "SkippedLayers",
    "TeacherLoss",
    "evaluate",
    "finetune",
    "load",
    "prune_channels",
    "record_of",
    "save",
]
