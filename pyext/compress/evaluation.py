"""Top-1 accuracy of a classifier, on one process or shared by many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kernelpress.compress.processes import join_processes
from kernelpress.preserve import evaluation

__all__ = ["evaluate"]


def evaluate(model: Callable[[Tensor], Tensor], loader: DataLoader[Any]) -> float:
    """Top-1 accuracy, 0…1, of `model` over the batches (images, targets) of `loader`.

    A module runs in eval mode on the device of its parameters and gets its modes and buffers back; any other callable
    gets images as the loader gives them. Random states, which loaders draw from, are put back. Started by `torchrun` or
    `accelerate launch`, the processes share the work, and each returns the same number. Raises `ValueError` for an
    empty loader, `ImportError` without accelerate.
    """
    accelerator = join_processes()
    shard = accelerator.prepare_data_loader(loader, device_placement=False)
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    correct = count = 0
    with evaluation(model if isinstance(model, nn.Module) else None), torch.no_grad():
        for images, targets in shard:
            logits = model(images if parameter is None else images.to(parameter.device))
            hits = logits.argmax(dim=1).to(accelerator.device) == targets.to(accelerator.device)
            gathered = accelerator.gather_for_metrics(hits)
            correct += int(gathered.sum())
            count += len(gathered)
    if count == 0:
        raise ValueError("loader: expected at least one batch, got none")
    return correct / count
