"""Passes that change a network's mathematics and return ordinary, trainable PyTorch."""

from kernelpress.compress.changes import Change, Masked, Rebuilt, Replaced, Resized
from kernelpress.compress.decompose import decompose
from kernelpress.compress.distill import distill
from kernelpress.compress.evaluation import evaluate
from kernelpress.compress.finetune import EpochRecord, FinetuneResult, finetune
from kernelpress.compress.losses import (
    AttentionLoss,
    DISTLoss,
    DKDLoss,
    FSPLoss,
    HintLoss,
    LayerLoss,
    ResponseLoss,
    RKDAngleLoss,
    RKDDistanceLoss,
    SimilarityLoss,
    TeacherLoss,
    VIDLoss,
    create_loss,
)
from kernelpress.compress.prune_channels import prune_channels
from kernelpress.compress.record import DecomposedLayer, PassRecord, SkippedLayers, load, record_of, save
from kernelpress.compress.teacher import EMATeacher

__all__ = [
    "AttentionLoss",
    "Change",
    "DISTLoss",
    "DKDLoss",
    "DecomposedLayer",
    "EMATeacher",
    "EpochRecord",
    "FSPLoss",
    "FinetuneResult",
    "HintLoss",
    "LayerLoss",
    "Masked",
    "PassRecord",
    "RKDAngleLoss",
    "RKDDistanceLoss",
    "Rebuilt",
    "Replaced",
    "Resized",
    "ResponseLoss",
    "SimilarityLoss",
    "SkippedLayers",
    "TeacherLoss",
    "VIDLoss",
    "create_loss",
    "decompose",
    "distill",
    "evaluate",
    "finetune",
    "load",
    "prune_channels",
    "record_of",
    "save",
]
