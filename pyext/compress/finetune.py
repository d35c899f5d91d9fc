"""Training of a classifier, from random weights or after compression, on one process or many, with resumption."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kernelpress.compress.checkpoint import load_checkpoint, read_record, save_checkpoint
from kernelpress.compress.evaluation import evaluate
from kernelpress.compress.losses.base import LayerLoss, TeacherLoss, described
from kernelpress.compress.masks import settle_masks
from kernelpress.compress.objective import Objective
from kernelpress.compress.processes import join_processes
from kernelpress.compress.quantization.training import trains_rounding
from kernelpress.compress.teacher import EMATeacher, teacher_of
from kernelpress.files.plain import from_plain
from kernelpress.preserve import evaluation, random_state_kept
from kernelpress.runtime.torch_private import BatchNorm

__all__ = ["EpochRecord", "FinetuneResult", "finetune", "learning_rate_factor"]

CHECKPOINT_NAME = "finetune.safetensors"

CLIP_WITHOUT_NORMS = 0.01
SHORTEST_CHANNEL = 1e-3
"""Shorter ones, zeros among them, are clipped as if they were so long."""


@dataclass(frozen=True)
class EpochRecord:
    """One pass over the training set.

    `loss`: mean over its batches; `accuracy`: 0…1, None without a `val_loader`; `learning_rate`: at its last step.
    """

    epoch: int
    loss: float
    accuracy: float | None
    learning_rate: float
    seconds: float


@dataclass(frozen=True)
class FinetuneResult:
    """What a training did: `best_accuracy` is the highest of any epoch, None without a `val_loader`."""

    history: tuple[EpochRecord, ...]
    best_accuracy: float | None
    seconds: float


@dataclass(frozen=True)
class _Settings:
    """What fixes the course of a training; a checkpoint goes on only under the same."""

    epochs: int
    steps_per_epoch: int
    lr: float
    weight_decay: float
    optimizer: str
    momentum: float
    warmup: float
    label_smoothing: float
    target_weight: float
    losses: str
    bn_l1: float
    clip: float
    seed: int

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs: expected at least 1, got {self.epochs}")
        if not self.lr > 0:
            raise ValueError(f"lr: expected above 0, got {self.lr}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay: expected zero or more, got {self.weight_decay}")
        if not 0 <= self.target_weight < math.inf:
            raise ValueError(f"target_weight: expected zero or more, got {self.target_weight}")
        if not self.target_weight and not self.losses:
            raise ValueError("target_weight: expected above 0 where no losses compare with a teacher, got 0")
        if not 0 <= self.bn_l1 < math.inf:
            raise ValueError(f"bn_l1: expected zero or more, got {self.bn_l1}")
        if not self.clip >= 0:
            raise ValueError(f"clip: expected zero or more, or None, got {self.clip}")
        if self.optimizer not in ("sgd", "adamw"):
            raise ValueError(f"optimizer: expected sgd or adamw, got {self.optimizer!r}")
        for name in ("momentum", "warmup", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 0 and below 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class _Record:
    """What a checkpoint tells of the training so far."""

    settings: dict[str, Any]
    history: tuple[EpochRecord, ...]


def finetune(
    model: nn.Module,
    loader: DataLoader[Any],
    *,
    epochs: int,
    span: tuple[int, int] | None = None,
    lr: float = 0.05,
    weight_decay: float = 1e-4,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    momentum: float = 0.9,
    warmup: float = 0.05,
    label_smoothing: float = 0.0,
    bn_l1: float = 0.0,
    clip: float | None = None,
    target_weight: float = 1.0,
    teacher: nn.Module | str | os.PathLike[str] | None = None,
    losses: Sequence[TeacherLoss | LayerLoss] = (),
    cache_mb: float = 0.0,
    val_loader: DataLoader[Any] | None = None,
    before_step: Callable[[int, int], None] | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> FinetuneResult:
    """Trains `model` in place on the batches (images, class indices) of `loader` and leaves it with its last weights.

    The loss is `target_weight` times cross-entropy, plus every one of `losses`: a `LayerLoss` compares outputs of
    layers, any other callable gets (student output, teacher output, target); parameters of a loss that is a module are
    trained along. The `teacher` is a module, a `.pt2` file of `EmittedModel.save`, an `EMATeacher`, or the model
    itself, which then learns from its weights of now. It runs in evaluation mode without gradients and comes back as it
    was. `cache_mb`: megabytes of memory for what it says of images; one that comes again unchanged is not shown to it
    again (equal to rounding).

    To the loss is added `bn_l1` times the sum of |γ| over all BatchNorms: it drives scales to zero, and
    `prune_channels` then finds these channels by "bn_scale" (network slimming, Liu et al., ICCV 2017, arXiv:1708.06519,
    eq. 1).

    `clip`: the gradient of an output channel's weights is at most so many times as long as these are (0: as it is;
    adaptive gradient clipping, Brock et al., ICML 2021, arXiv:2102.06171, eq. 3). None: `CLIP_WITHOUT_NORMS` for what
    `quantize(..., method="qat")` returned, whose BatchNorms are folded and no longer keep steps small, else 0.

    SGD has Nesterov momentum; weight decay spares BatchNorm and biases. The learning rate rises linearly to `lr` over
    the first `warmup` part of all steps, then falls to zero along a half cosine (Loshchilov & Hutter 2017, eq. 5). A
    run depends on `seed` and the data alone: shuffling and augmentation by torch's generator are seeded anew at each
    epoch.

    `span` = (first, end): only these of the `epochs` are trained, as if the ones before had been; the optimizer begins
    anew.

    `before_step` is called ahead of each step with its number and that of all steps; it may change the model, as
    `compress.Gradual` does. What masks silence is zero in the end, under whichever optimizer.

    With `checkpoint_dir`, each epoch ends with a checkpoint there, and a call with the same settings goes on from it.
    Started by `torchrun` or `accelerate launch`, every process trains on its share of the batches on its own device
    (so the batch is that of `loader` times the processes) and the model comes back on its own.

    Raises `ValueError` for settings out of range, an empty loader, a checkpoint of another training, outputs of student
    and teacher that cannot be compared, `FloatingPointError` where the loss stops being finite, `ImportError` without
    accelerate.
    """
    _check_parts(model, loader, teacher, losses, cache_mb)
    settings = _Settings(
        epochs=epochs,
        steps_per_epoch=len(loader),
        lr=lr,
        weight_decay=weight_decay,
        optimizer=optimizer,
        momentum=momentum,
        warmup=warmup,
        label_smoothing=label_smoothing,
        bn_l1=bn_l1,
        clip=(CLIP_WITHOUT_NORMS if trains_rounding(model) else 0.0) if clip is None else clip,
        target_weight=target_weight,
        losses=", ".join(map(described, losses)),
        seed=seed,
    )
    if bn_l1 and not _norm_scales(model):
        raise ValueError(
            f"bn_l1: expected 0 for {type(model).__name__}, which has no BatchNorm with scales, got {bn_l1}"
        )
    first, end = (0, epochs) if span is None else span
    if not 0 <= first < end <= epochs:
        raise ValueError(f"span: expected (first, end) with 0 ≤ first < end ≤ epochs = {epochs}, got {span}")
    accelerator = join_processes(seed=seed, has_idle_parameters=not target_weight)
    checkpoint = Path(checkpoint_dir) / CHECKPOINT_NAME if checkpoint_dir is not None else None
    history: list[EpochRecord] = []
    # Whatever mode the caller is in, this is training.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        random_state_kept(),
        _teaching(teacher, model) as asked,
        _restored(model),
    ):
        _weights_to_channels_last(model)
        objective = Objective(
            model,
            teacher=None if asked is None else asked.to(accelerator.device),
            losses=losses,
            target_weight=target_weight,
            label_smoothing=label_smoothing,
            cache_mb=cache_mb,
        ).to(accelerator.device)
        if asked is not None:
            first_batch = [tensor.to(accelerator.device) for tensor in _first_batch(loader)]
            torch.manual_seed(seed)
            objective.prepare(*first_batch)
        wrapped, steps, batches = accelerator.prepare(objective, _optimizer(objective, settings), loader)
        settings = replace(settings, steps_per_epoch=len(batches))
        if checkpoint is not None and checkpoint.exists():
            history = _history_of(checkpoint, settings, first)
            load_checkpoint(checkpoint, objective, steps)
        with _progress_bar(progress and accelerator.is_main_process, settings, first + len(history)) as advance:
            for epoch in range(first + len(history), end):
                started = time.perf_counter()
                torch.manual_seed((seed * epochs + epoch) * accelerator.num_processes + accelerator.process_index)
                batches.set_epoch(epoch)
                loss = _train_epoch(
                    accelerator, wrapped, objective, steps, batches, settings, epoch, before_step, advance
                )
                accuracy = evaluate(model, val_loader) if val_loader is not None else None
                rate = steps.param_groups[0]["lr"]
                history.append(EpochRecord(epoch, loss, accuracy, rate, time.perf_counter() - started))
                if checkpoint is not None and accelerator.is_main_process:
                    record = {"settings": asdict(settings), "history": [asdict(entry) for entry in history]}
                    save_checkpoint(checkpoint, objective, steps, record)
                accelerator.wait_for_everyone()
    settle_masks(model)
    accuracies = [entry.accuracy for entry in history if entry.accuracy is not None]
    return FinetuneResult(
        history=tuple(history),
        best_accuracy=max(accuracies, default=None),
        seconds=sum(entry.seconds for entry in history),
    )


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Factor of the learning rate at `step`: linear rise over `warmup` · `steps`, then half a cosine to zero."""
    warmup_steps = round(warmup * steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def _train_epoch(
    accelerator: Any,
    wrapped: nn.Module,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    batches: DataLoader[Any],
    settings: _Settings,
    epoch: int,
    before_step: Callable[[int, int], None] | None,
    advance: Callable[[str], None],
) -> float:
    """Trains over all batches once; returns the mean loss of all processes, on which `wrapped` is `objective`."""
    wrapped.train()
    steps = settings.epochs * settings.steps_per_epoch
    total = torch.zeros((), device=accelerator.device)
    for index, (images, target) in enumerate(batches):
        step = epoch * settings.steps_per_epoch + index
        if before_step is not None:
            before_step(step, steps)
        factor = learning_rate_factor(step, steps, settings.warmup)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * factor
        loss = wrapped(images, target)
        if settings.bn_l1:
            loss = loss + settings.bn_l1 * _size_of_scales(objective.model)
        optimizer.zero_grad()
        accelerator.backward(loss)
        if settings.clip:
            accelerator.unscale_gradients(optimizer)
            _clip_gradients(objective.model, settings.clip)
        optimizer.step()
        if objective.average is not None:
            objective.average.update(objective.model)
        total += loss.detach()
        advance(f"epoch {epoch + 1}/{settings.epochs}")
    mean = float(accelerator.reduce(total, "mean")) / settings.steps_per_epoch
    if not math.isfinite(mean):
        raise FloatingPointError(
            f"the loss became {mean} in epoch {epoch + 1}: lower lr, now {settings.lr}, or check the images"
        )
    return mean


@torch.no_grad()
def _clip_gradients(model: nn.Module, clip: float) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            longest = clip * _lengths(parameter).clamp_min(SHORTEST_CHANNEL)
            parameter.grad.mul_((longest / _lengths(parameter.grad).clamp_min(1e-12)).clamp_max(1))


def _lengths(t: Tensor) -> Tensor:
    """Norms of the output channels of a weight, or of all of a vector, to broadcast with it."""
    return torch.linalg.vector_norm(t, dim=tuple(range(min(1, t.dim() - 1), t.dim())), keepdim=True)


def _size_of_scales(model: nn.Module) -> Tensor:
    """Σ |γ| over all BatchNorms."""
    return torch.stack([scales.abs().sum() for scales in _norm_scales(model)]).sum()


def _norm_scales(model: nn.Module) -> list[Tensor]:
    norms = (part for part in model.modules() if isinstance(part, BatchNorm))
    return [norm.weight for norm in norms if norm.affine]


def _check_parts(
    model: nn.Module,
    loader: DataLoader[Any],
    teacher: nn.Module | str | os.PathLike[str] | None,
    losses: Sequence[TeacherLoss | LayerLoss],
    cache_mb: float,
) -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"model: expected parameters to train, {type(model).__name__} has none")
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError(
            f"model: {type(model).__name__} was made under torch.inference_mode, its tensors cannot be trained; "
            "make, load or copy (copy.deepcopy) it outside"
        )
    if not isinstance(loader, DataLoader):
        raise TypeError(f"loader: expected a torch DataLoader, got {type(loader).__name__}")
    if len(loader) == 0:
        raise ValueError("loader: expected at least one batch, got none")
    if isinstance(losses, str) or not isinstance(losses, Sequence):
        raise TypeError(f"losses: expected a list of losses, got {losses!r}")
    if teacher is None and losses:
        raise ValueError(f"teacher: expected a module for the {len(losses)} losses that compare with it, got None")
    if teacher is not None and not losses:
        raise ValueError("losses: expected at least one that compares with the teacher, got none")
    for index, loss in enumerate(losses):
        if isinstance(loss, type) or not callable(loss):
            raise TypeError(f"losses[{index}]: expected a loss, such as ResponseLoss(temperature=4), got {loss!r}")
    if not 0 <= cache_mb < math.inf:
        raise ValueError(f"cache_mb: expected zero or more, got {cache_mb}")
    if cache_mb and isinstance(teacher, EMATeacher):
        raise ValueError(
            f"cache_mb: expected 0 with an EMATeacher, which says something else each time, got {cache_mb}"
        )


def _optimizer(model: nn.Module, settings: _Settings) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr)
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0)


def _history_of(checkpoint: Path, settings: _Settings, first: int) -> list[EpochRecord]:
    stored = from_plain(_Record, read_record(checkpoint), f"{checkpoint}: its record")
    for name, value in asdict(settings).items():
        written = stored.settings.get(name)
        if written != value:
            raise ValueError(
                f"checkpoint_dir: {checkpoint} belongs to a training with {name} = {written!r}, got {value!r}; "
                "use the same settings or another folder"
            )
    if [entry.epoch for entry in stored.history] != list(range(first, first + len(stored.history))):
        raise ValueError(f"checkpoint_dir: {checkpoint} has no history of epochs; delete it to start over")
    return list(stored.history)


def _weights_to_channels_last(model: nn.Module) -> None:
    """Training is about 1.5 times as fast so, on a CPU as on a GPU with tensor cores."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


def _first_batch(loader: DataLoader[Any]) -> tuple[Tensor, Tensor]:
    """Images and targets as the training will see them; a generator of the loader's own comes back as it was."""
    state = None if loader.generator is None else loader.generator.get_state()
    images, target = next(iter(loader))
    if state is not None:
        loader.generator.set_state(state)
    return images, target


@contextmanager
def _teaching(teacher: nn.Module | str | os.PathLike[str] | None, student: nn.Module) -> Iterator[nn.Module | None]:
    """Whom to ask, in evaluation mode. A module comes back as it was, but for an `EMATeacher`, which is to follow."""
    module = None if teacher is None else teacher_of(teacher, student)
    if isinstance(module, EMATeacher):
        module.begin(student)
    with _restored(module), evaluation(None if isinstance(module, EMATeacher) else module):
        yield module


@contextmanager
def _restored(module: nn.Module | None) -> Iterator[None]:
    """Gives `module` its device, its modes and the memory layout of its weights back."""
    if module is None:
        yield
        return
    device = next((parameter.device for parameter in module.parameters()), None)
    modes = [(child, child.training) for child in module.modules()]
    contiguous = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_contiguous()]
    try:
        yield
    finally:
        for child, mode in modes:
            child.training = mode
        for tensor in contiguous:
            tensor.data = tensor.data.contiguous()
        module.to(device)


@contextmanager
def _progress_bar(shown: bool, settings: _Settings, epochs_done: int) -> Iterator[Callable[[str], None]]:
    """Gives a function to call after each step, with what to print beside the bar."""
    if not shown:
        yield lambda _: None
        return
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        steps = settings.epochs * settings.steps_per_epoch
        task = bar.add_task("", total=steps, completed=epochs_done * settings.steps_per_epoch)
        yield lambda text: bar.update(task, advance=1, description=text)
