"""Unstructured and block pruning: weights become zero where a criterion says that the network needs them least."""

from kernelpress.compress.prune_weights.criteria import WEIGHT_CRITERIA
from kernelpress.compress.prune_weights.pruning import prune_weights
from kernelpress.compress.prune_weights.schedules import Gradual, Iterative
from kernelpress.compress.prune_weights.sensitivity import Sensitivity, sensitivity

__all__ = ["WEIGHT_CRITERIA", "Gradual", "Iterative", "Sensitivity", "prune_weights", "sensitivity"]
