"""What a recipe may say, section by section, and the steps that kernelpress itself has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "OWN_STEPS",
    "START",
    "DataSection",
    "EmitSection",
    "MeasureSection",
    "ModelSection",
    "RangeSection",
    "RequireSection",
    "Section",
    "SweepSection",
    "TrainSection",
]

Fraction = Annotated[float, Field(ge=0, le=1)]
Peer = Literal["eager", "channels_last", "compile", "emitted"]


class Section(BaseModel):
    """A part of a recipe: other keys than its fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def chooses_by_time(self) -> bool:
        """Whether the step decides by times, so that on another device it would decide otherwise."""
        return False


class DataSection(Section):
    """Where images come from: `digits`, or a folder with a sub-folder of images for each class."""

    source: str = "digits"
    test_folder: Path | None = None
    """Images to test on; without it, `test_fraction` of those in the source folder."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    train_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The share of the training images that is used, drawn by the seed."""
    image_size: Annotated[int, Field(ge=1)] = 32
    batch_size: Annotated[int, Field(ge=1)] = 64
    workers: Annotated[int, Field(ge=0)] = 0
    shift: Annotated[int, Field(ge=0)] = 0
    """Training images are moved by up to this many pixels."""


class ModelSection(Section):
    """What `kernelpress.models.build` knows by name; classes and input channels follow from the data unless given."""

    name: str
    options: dict[str, Any] = {}
    weights: Path | None = None
    """A safetensors file to start from."""


class TrainSection(Section):
    """Settings of `kernelpress.compress.finetune`."""

    epochs: Annotated[int, Field(ge=0, description="passes over the training images")]
    lr: Annotated[float, Field(gt=0, description="highest learning rate")] = 0.05
    weight_decay: Annotated[float, Field(ge=0, description="of weights; norms and biases are spared")] = 1e-4
    optimizer: Annotated[Literal["sgd", "adamw"], Field(description="SGD has Nesterov momentum")] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1, description="of SGD")] = 0.9
    warmup: Annotated[float, Field(ge=0, lt=1, description="part of all steps over which lr rises")] = 0.05
    label_smoothing: Annotated[float, Field(ge=0, lt=1, description="of cross-entropy")] = 0.0
    bn_l1: Annotated[float, Field(ge=0, description="weight of the sum of BatchNorm's |γ| (network slimming)")] = 0.0
    clip: Annotated[float | None, Field(ge=0, description="longest gradient of a channel ÷ its weights")] = None


class EmitSection(Section):
    """What the pressed model is emitted and measured for."""

    batch: Annotated[int, Field(ge=1)] = 1
    threads: Annotated[int, Field(ge=1)] | None = None
    """Torch's number of threads; as it is unless given."""

    @property
    def chooses_by_time(self) -> bool:
        """Emission times candidates."""
        return True


class MeasureSection(Section):
    """How contestants are measured: the dense model in these ways, and the pressed one."""

    rounds: Annotated[int, Field(ge=1)] = 5
    budget_seconds: Annotated[float, Field(gt=0)] = 1.0
    peers: tuple[Peer, ...] = get_args(Peer)

    @model_validator(mode="after")
    def _has_baseline(self) -> MeasureSection:
        if "eager" not in self.peers:
            raise ValueError("peers: expected eager among them, the dense model as it stands")
        return self


class RequireSection(Section):
    """What the run must reach, or fail."""

    min_accuracy: Fraction | None = None
    """Test accuracy of the dense model."""
    max_drop: Fraction | None = None
    """Accuracy lost between the dense and the pressed model, as a fraction: 0.01 is one point."""
    min_flops_ratio: Annotated[float, Field(ge=1)] | None = None
    """FLOPs of the dense model ÷ those of the pressed one."""
    faster_than_baseline: Annotated[float, Field(gt=0)] | bool = False
    """Lower latency than the dense model's fastest way in PyTorch; a number asks for at least that speed-up."""
    faster_than_emitted: Annotated[float, Field(gt=0)] | None = None
    """At least this speed-up over what the emit step before the last one emitted, of the model as it was then."""


class RangeSection(Section):
    """Numbers to draw from: integers where both ends are."""

    low: int | float
    high: int | float
    log: bool = False
    """Whether each factor is as likely as any other, not each difference."""

    @model_validator(mode="after")
    def _is_range(self) -> RangeSection:
        if not self.low < self.high or (self.log and self.low <= 0):
            wanted = "0 < low < high" if self.log else "low < high"
            raise ValueError(f"expected {wanted}, got {self.low} and {self.high}")
        return self


class SweepSection(Section):
    """What `kernelpress sweep` changes of the recipe: options by their dotted paths."""

    cases: dict[str, dict[str, Any]] = {}
    """Sets of options that change together, by name."""
    options: dict[str, tuple[Any, ...] | RangeSection] = {}
    """Values of each option; every combination is tried, in every case."""
    trials: Annotated[int, Field(ge=1)] | None = None
    """So many combinations, drawn by the recipe's seed, instead of all."""

    @model_validator(mode="after")
    def _has_trials(self) -> SweepSection:
        if not self.cases and not self.options:
            raise ValueError("expected cases or options, got neither")
        if empty := [path for path, values in self.options.items() if values == ()]:
            raise ValueError(f"options: expected at least one value of {', '.join(empty)}, got none")
        ranges = [path for path, values in self.options.items() if isinstance(values, RangeSection)]
        if ranges and self.trials is None:
            raise ValueError(f"trials: expected how many to draw from the range of {', '.join(ranges)}, got none")
        return self


START = "start"
"""The id of the step that every run begins with: the model as it was built, with the weights to start from."""
OWN_STEPS: Mapping[str, type[Section]] = {
    "train": TrainSection,
    "finetune": TrainSection,
    "emit": EmitSection,
    "measure": MeasureSection,
}
"""The steps that are no pass, besides `start`."""
