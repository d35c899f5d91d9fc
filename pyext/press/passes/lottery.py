"""The step `lottery`: tickets in the network as it was before any training, beside controls, over several seeds."""

from __future__ import annotations

import statistics
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from torch import nn

from kernelpress import compress
from kernelpress.press.registry import Pass, PassContext, read_record, register
from kernelpress.press.sections import START, Section, TrainSection
from kernelpress.report import Curve, Curves, Reading

Method = Literal["imp", "rewind", "learning_rate", "reinit", "random_ticket"]
NAMES = {
    "imp": "weights from the beginning",
    "rewind": "weights rewound",
    "learning_rate": "learning rate rewound",
    "reinit": "masks over random weights",
    "random_ticket": "random masks",
}


class Lottery(Section):
    """`kernelpress.compress.lottery`, from the model as it was built."""

    training: Annotated[TrainSection, Field(description="every training: of the dense network and after each round")]
    rounds: Annotated[int, Field(ge=1, description="how often weights leave")] = 6
    share: Annotated[float, Field(gt=0, lt=1, description="share of the weights left that leaves in a round")] = 0.4
    methods: Annotated[tuple[Method, ...], Field(min_length=1, description="what is compared")] = (
        "imp",
        "rewind",
        "reinit",
    )
    rewind_epoch: Annotated[int, Field(ge=1, description="the epoch that weights or learning rate go back to")] = 1
    seeds: Annotated[int, Field(ge=1, description="how many seeds, from that of the run on")] = 5
    ticket: Annotated[Method, Field(description="the method whose last network the run goes on with")] = "rewind"
    ignore: Annotated[tuple[str, ...], Field(description="layers that stay as they are")] = ()

    @model_validator(mode="after")
    def _has_ticket(self) -> Lottery:
        if self.ticket not in self.methods:
            raise ValueError(f"ticket: expected one of the methods {', '.join(self.methods)}, got {self.ticket!r}")
        if self.rewind_epoch >= self.training.epochs:
            raise ValueError(f"rewind_epoch: expected below {self.training.epochs} epochs, got {self.rewind_epoch}")
        if {"reinit", "random_ticket"} & set(self.methods) and "imp" not in self.methods:
            raise ValueError(f"methods: expected 'imp' for the masks of the controls, got {', '.join(self.methods)}")
        return self


def _run(model: nn.Module, context: PassContext[Lottery]) -> nn.Module:
    if compress.record_of(model):
        raise ValueError("lottery: it begins with the network as it was built; let no other pass stand before it")
    options = context.options
    plain: dict[str, Any] = options.model_dump(exclude={"training", "seeds"})
    return compress.lottery(
        context.load_step(START),
        context.train_loader,
        context.test_loader,
        context.example_inputs,
        **plain,
        **options.training.model_dump(),
        seeds=range(context.seed, context.seed + options.seeds),
        folder=context.checkpoint_dir,
    )


def _read(record: compress.PassRecord) -> Reading:
    """With the curves, and their last points in words."""
    reading, arguments = read_record(record), record.arguments
    curves, remarks = [], []
    for method, points in arguments["curves"].items():
        found = [(100 * left, *_spread(accuracies)) for left, accuracies in points]
        curves.append(Curve(NAMES[method], tuple((x, mean, mean - by, mean + by) for x, mean, by in found)))
        (_, dense, by_dense), (x, mean, by) = found[0], found[-1]
        remarks.append(
            f"{NAMES[method]}: {mean:.2f} ± {by:.2f} % with {x:.1f} % of the weights, "
            f"{dense:.2f} ± {by_dense:.2f} % with all of them"
        )
    count = len(arguments["seeds"])
    figure = Curves(
        f"Mean and standard deviation over {count} {'seed' if count == 1 else 'seeds'}",
        "weights remaining [%]", "test accuracy [%]", tuple(curves), percent_left=True,
    )  # fmt: skip
    return Reading(reading.headline, reading.header, reading.rows, (*reading.remarks, *remarks), (figure,))


def _spread(accuracies: list[float]) -> tuple[float, float]:
    """Mean and standard deviation, in %."""
    values = [100 * accuracy for accuracy in accuracies]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


register(Pass("lottery", Lottery, _run, _read))
