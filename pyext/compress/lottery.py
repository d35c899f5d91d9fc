"""Lottery tickets: iterative magnitude pruning with weights or learning rate rewound, and what it is compared with."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kernelpress.compress.changes import copied
from kernelpress.compress.finetune import finetune
from kernelpress.compress.masks import settle_masks
from kernelpress.compress.prune_weights.cutting import Cutter, checked_settings
from kernelpress.compress.prune_weights.pruning import add_pruning_record
from kernelpress.compress.prune_weights.scopes import check_share

__all__ = ["METHODS", "lottery"]

METHODS = ("imp", "rewind", "learning_rate", "reinit", "random_ticket")
_CONTROLS = ("reinit", "random_ticket")

State = Mapping[str, Tensor]


def lottery(
    model: nn.Module,
    loader: DataLoader[Any],
    val_loader: DataLoader[Any],
    example_inputs: Tensor | tuple[Any, ...] | None = None,
    *,
    epochs: int,
    rounds: int = 6,
    share: float = 0.4,
    methods: Sequence[str] = ("imp", "rewind", "reinit"),
    rewind_epoch: int = 1,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    ticket: str = "rewind",
    ignore: Iterable[str] = (),
    folder: str | os.PathLike[str] | None = None,
    **training: Any,
) -> nn.Module:
    """Prunes an untrained `model` in `rounds`, each time the `share` of smallest magnitude of what is left in all
    layers together, after a training of `epochs`, by several methods with several seeds; returns the sparsest network
    that the method `ticket` led to with the first seed, trained and under its masks.

    - `"imp"`: the weights that stay go back to their initial values, and train again (Frankle & Carbin,
      arXiv:1803.03635, section 1);
    - `"rewind"`: they go back to their values after `rewind_epoch` epochs, and train on from there (Frankle et al.,
      arXiv:1903.01611, section 3);
    - `"learning_rate"`: they stay as they are, the learning rate goes back to that epoch (Renda et al.,
      arXiv:2003.02389, section 3);
    - `"reinit"`, a control: the masks of `"imp"` over weights drawn anew;
    - `"random_ticket"`, a control: the initial weights under masks that keep as many of each layer, anywhere.

    What is drawn anew are a layer's own initial weights in random order, and so is the beginning of every seed but the
    first. The record's argument `curves` has, by method, a pair for the dense network and after each round: the share
    of weights left, and the accuracy after the last epoch for each seed.

    `folder`: where every training keeps its checkpoints; the same call goes on from there. `training`: further
    arguments of `finetune`. Raises `ValueError` for arguments out of range, and as `finetune` does.
    """
    check_share("share", share)
    if share == 0:
        raise ValueError("share: expected a fraction above 0, got 0")
    unknown = [method for method in (*methods, ticket) if method not in METHODS]
    if unknown or not methods:
        wrong = ", ".join(map(repr, unknown)) or "none"
        raise ValueError(f"methods, ticket: expected some of {', '.join(METHODS)}, got {wrong}")
    if ticket not in methods:
        raise ValueError(f"ticket: expected one of the methods {', '.join(methods)}, got {ticket!r}")
    if any(method in _CONTROLS for method in methods) and "imp" not in methods:
        raise ValueError(f"methods: expected 'imp' among them, whose masks the controls take, got {', '.join(methods)}")
    if rounds < 1 or not seeds:
        raise ValueError(f"rounds, seeds: expected at least one, got {rounds} and {list(seeds)}")
    if not 0 < rewind_epoch < epochs:
        raise ValueError(f"rewind_epoch: expected one above 0, below epochs = {epochs}, got {rewind_epoch}")
    ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    with torch.inference_mode(False), torch.no_grad():
        course = _Course(
            model,
            loader,
            val_loader,
            epochs,
            rounds,
            share,
            rewind_epoch,
            ignore,
            Path(folder) if folder else None,
            training,
        )
        curves: dict[str, list[list[float]]] = {method: [[] for _ in range(rounds + 1)] for method in methods}
        left: dict[str, list[float]] = {method: [] for method in methods}
        winner: _Trial | None = None
        for index, seed in enumerate(seeds):
            masks: list[list[Tensor]] = []
            for method in sorted(methods, key=METHODS.index):
                trial = _Trial(course, method, seed, is_first=index == 0)
                accuracies, shares = trial.run(masks)
                left[method] = shares
                for found, accuracy in zip(curves[method], accuracies, strict=True):
                    found.append(accuracy)
                if index == 0 and method == ticket:
                    winner = trial
        assert winner is not None
        arguments = {
            "epochs": epochs, "rounds": rounds, "share": share, "rewind_epoch": rewind_epoch, "seeds": list(seeds),
            "ticket": ticket, "ignore": sorted(ignore),
            "curves": {method: list(map(list, zip(left[method], curves[method], strict=True))) for method in methods},
        }  # fmt: skip
        add_pruning_record("lottery", winner.model, example_inputs, winner.cutter, arguments)
    return winner.model


@dataclass(frozen=True)
class _Course:
    """What all trials share."""

    model: nn.Module
    loader: DataLoader[Any]
    val_loader: DataLoader[Any]
    epochs: int
    rounds: int
    share: float
    rewind_epoch: int
    ignore: tuple[str, ...]
    folder: Path | None
    training: Mapping[str, Any]


@dataclass
class _Trial:
    """One method with one seed, on a network of its own."""

    course: _Course
    method: str
    seed: int
    is_first: bool
    model: nn.Module = field(init=False)
    cutter: Cutter = field(init=False)

    def __post_init__(self) -> None:
        self.model = copied(self.course.model)
        final = 1 - (1 - self.course.share) ** self.course.rounds
        settings = checked_settings(final, "magnitude", "global", "element", None, self.seed)
        self.cutter = Cutter.of(self.model, settings, self.course.ignore, None, torch.nn.functional.cross_entropy)

    def run(self, masks: list[list[Tensor]]) -> tuple[list[float], list[float]]:
        """The accuracies of the dense network and after each round, and the shares of weights left. `"imp"` fills
        `masks`, which the controls read."""
        if not self.is_first:
            self._draw_anew(torch.Generator().manual_seed(self.seed))
        initial, first = self._state(), 0
        if self.method in ("rewind", "learning_rate"):
            first = self.course.rewind_epoch
            self._train("early", 0, first)
        rewound = self._state()
        accuracies, shares = [self._train("0", first, self.course.epochs)], [self._left()]
        for done in range(1, self.course.rounds + 1):
            if self.method in _CONTROLS:
                self._begin_anew(initial, masks[done - 1], torch.Generator().manual_seed(1000 * (self.seed + 1) + done))
            else:
                self.cutter.cut(lambda _, done=done: 1 - (1 - self.course.share) ** done)  # type: ignore[misc]
                if self.method != "learning_rate":
                    self._rewind(rewound)
            if self.method == "imp":
                masks.append([target.alive() for target in self.cutter.targets])
            accuracies.append(self._train(str(done), first, self.course.epochs))
            shares.append(self._left())
        return accuracies, shares

    def _train(self, name: str, first: int, end: int) -> float:
        folder = self.course.folder and self.course.folder / f"{self.seed}-{self.method}-{name}"
        result = finetune(
            self.model,
            self.course.loader,
            epochs=self.course.epochs,
            span=(first, end),
            val_loader=self.course.val_loader,
            checkpoint_dir=folder,
            seed=self.seed,
            progress=False,
            **self.course.training,
        )
        accuracy = result.history[-1].accuracy
        assert accuracy is not None
        return accuracy

    def _state(self) -> State:
        """The state of the network without its masks."""
        masks = {f"{path}.{name}_mask".lstrip(".") for target in self.cutter.targets for path, _, name in target.owners}
        return {name: value.clone() for name, value in self.model.state_dict().items() if name not in masks}

    def _rewind(self, state: State) -> None:
        self.model.load_state_dict(state, strict=False)
        settle_masks(self.model)

    def _begin_anew(self, initial: State, masks: Sequence[Tensor], generator: torch.Generator) -> None:
        """A control's weights and masks."""
        for target, whole in zip(self.cutter.targets, self.cutter.start, strict=True):
            target.reset(whole)
        self._rewind(initial)
        if self.method == "reinit":
            self._draw_anew(generator)
        for target, mask in zip(self.cutter.targets, masks, strict=True):
            target.reset(mask if self.method == "reinit" else _shuffled(mask, generator))

    def _draw_anew(self, generator: torch.Generator) -> None:
        for target in self.cutter.targets:
            target.original.copy_(_shuffled(target.original.detach(), generator))
        settle_masks(self.model)

    def _left(self) -> float:
        alive = [target.alive() for target in self.cutter.targets]
        return sum(int(mask.count_nonzero()) for mask in alive) / sum(mask.numel() for mask in alive)


def _shuffled(x: Tensor, generator: torch.Generator) -> Tensor:
    return x.flatten()[torch.randperm(x.numel(), generator=generator).to(x.device)].view_as(x)
