"""The processes that train together: who they are, and the end of what connects them."""

from __future__ import annotations

import atexit
import gc
import os
import weakref
from typing import Any

import torch.distributed as distributed

__all__ = ["join_processes"]


def join_processes(seed: int | None = None, *, has_idle_parameters: bool = False) -> Any:
    """An `accelerate.Accelerator` of this process alone or of all that `torchrun` started; `seed`: of its shuffling,
    `has_idle_parameters`: whether a loss may leave some parameters without a gradient.

    A process group belongs to who makes it: one that was there before is the caller's to end, one that is made here
    stays for later trainings and evaluations and ends with the interpreter. Raises `ImportError` without accelerate.
    """
    try:
        from accelerate import Accelerator
        from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs
    except ImportError as error:
        raise ImportError("training takes accelerate: pip install 'kernelpress[train]'") from error

    configuration = DataLoaderConfiguration(use_seedable_sampler=seed is not None, data_seed=seed)
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)] if has_idle_parameters else []
    if not distributed.is_available() or distributed.is_initialized():
        return Accelerator(dataloader_config=configuration, kwargs_handlers=handlers)
    # Its functions bind the group that is there at its import as a default, and a group that is held never ends.
    import torch.distributed.nn.functional  # noqa: F401

    accelerator = Accelerator(dataloader_config=configuration, kwargs_handlers=handlers)
    if distributed.is_initialized():
        atexit.register(_end_group, weakref.ref(distributed.group.WORLD), os.getpid())
    return accelerator


def _end_group(group: weakref.ref[Any], process: int) -> None:
    """Joins the threads of a group that is still the default one.

    What they hold of the last collective has Python objects; let go while the interpreter ends, it aborts the process.
    """
    if os.getpid() != process or not distributed.is_initialized() or distributed.group.WORLD is not group():
        return
    gc.collect()
    distributed.destroy_process_group()
