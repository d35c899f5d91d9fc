"""Passes that change a network's mathematics and return ordinary, trainable PyTorch."""

from kernelpress.compress.evaluation import evaluate
from kernelpress.compress.finetune import EpochRecord, FinetuneResult, TeacherLoss, finetune

__all__ = ["EpochRecord", "FinetuneResult", "TeacherLoss", "evaluate", "finetune"]
