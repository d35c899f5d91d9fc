"""Passes that change a network's mathematics and return ordinary, trainable PyTorch."""

from kernelpress.compress.bake_masks import bake_masks
from kernelpress.compress.changes import Change, Masked, Rebuilt, Replaced, Resized, Unmasked
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
from kernelpress.compress.quantize import convert_qat, quantize
from kernelpress.compress.record import DecomposedLayer, LayerError, PassRecord, SkippedLayers, load, record_of, save
from kernelpress.compress.teacher import EMATeacher

__all__ = [
    "WEIGHT_CRITERIA",
    "AttentionLoss",
    "Change",
    "DISTLoss",
    "DKDLoss",
    "DecomposedLayer",
    "EMATeacher",
    "EpochRecord",
    "FSPLoss",
    "FinetuneResult",
    "Gradual",
    "HintLoss",
    "Iterative",
    "LayerError",
    "LayerLoss",
    "Masked",
    "PassRecord",
    "RKDAngleLoss",
    "RKDDistanceLoss",
    "Rebuilt",
    "Replaced",
    "Resized",
    "ResponseLoss",
    "Sensitivity",
    "SimilarityLoss",
    "SkippedLayers",
    "TeacherLoss",
    "Unmasked",
    "VIDLoss",
    "bake_masks",
    "convert_qat",
    "create_loss",
    "decompose",
    "distill",
    "evaluate",
    "finetune",
    "load",
    "lottery",
    "prune_channels",
    "prune_weights",
    "quantize",
    "record_of",
    "save",
    "sensitivity",
]
