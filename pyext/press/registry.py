"""What a recipe knows of compression passes: each registers here, once, and nothing else names it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor, nn
from torch.utils.data import DataLoader

from kernelpress.compress import PassRecord
from kernelpress.press.sections import OWN_STEPS, START, Section
from kernelpress.report import Reading

__all__ = ["Pass", "PassContext", "known_passes", "read_record", "register"]

Options = TypeVar("Options", bound=Section)


@dataclass
class PassContext(Generic[Options]):
    """What a pass may look at: its options, batches to train and to test on, images as example inputs, the seed of the
    run, the dense model and the weights of earlier steps. `progress`: whether to show how far it is."""

    options: Options
    train_loader: DataLoader[Any]
    test_loader: DataLoader[Any]
    example_inputs: tuple[Tensor, ...]
    seed: int
    load_step: Callable[[str], nn.Module] = field(repr=False)
    """The model as the step of this id left it; raises `ValueError` for a step that is no earlier one."""
    dense_step: str
    checkpoint_dir: Path
    """A folder of the step's own, for what an interrupted run is to go on from; it goes once the step is finished."""
    progress: bool = True

    @cached_property
    def teacher(self) -> nn.Module:
        """The model before the first pass, in evaluation mode."""
        return self.load_step(self.dense_step).eval()

    def weights(self, step: str) -> dict[str, Tensor]:
        """The state dict after an earlier step, to rewind to: `"start"` is the model before any training."""
        return self.load_step(step).state_dict()


def read_record(record: PassRecord) -> Reading:
    """The costs before and after, each layer that was changed, and what stayed for which reason."""
    return Reading(record.costs(), ("layer", "change"), tuple(record.layers()), tuple(record.kept()))


@dataclass(frozen=True)
class Pass:
    """A step that compresses.

    `options`: what a recipe may say of it, each field with a description. `run`: returns the compressed model, a copy
    or the one it is given, with one more record (`compress.record.add_record`), which says what was done. `read`: how
    that record reads in the report.
    """

    name: str
    options: type[Section]
    run: Callable[[nn.Module, PassContext[Any]], nn.Module]
    read: Callable[[PassRecord], Reading] = read_record

    def __post_init__(self) -> None:
        if silent := [name for name, value in self.options.model_fields.items() if not value.description]:
            raise ValueError(f"options: expected a description of each field, {', '.join(silent)} has none")


_registered: dict[str, Pass] = {}


def register(new: Pass) -> Pass:
    """Makes the pass known to recipes. Raises `ValueError` for a name that is taken."""
    if new.name in (*_registered, *OWN_STEPS, START) or not new.name.isidentifier():
        raise ValueError(f"name: expected one that no step has, of letters, digits and _, got {new.name!r}")
    _registered[new.name] = new
    return new


def known_passes() -> Mapping[str, Pass]:
    """All passes by name: those of `kernelpress.press.passes`, and those registered since."""
    package = importlib.import_module("kernelpress.press.passes")
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
    return dict(_registered)
