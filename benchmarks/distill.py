"""What each loss of distillation gains: a ResNet-56 teaches a ResNet-8 on few and small scans of digits, over seeds.

python benchmarks/distill.py --seeds 5
python benchmarks/distill.py --seeds 5 --epochs 100 --losses response dist similarity "response + attention"

Each seed draws its tenth of the training images; teacher and students learn from these alone, students of one seed from
the same weights on, and every other scan is for testing. The recipe `recipes/distill.yaml` is one such run, with a
longer training of the student.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from bench_models import positive
from recording import mean_and_spread, save
from rich.console import Console
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Subset

from kernelpress import compress, data, models

IMAGE_SIZE, FRACTION, BATCH, SHIFT = 16, 0.1, 16, 2
TEACHER_EPOCHS, STUDENT_EPOCHS = 100, 16
RATE, DECAY = 0.05, 5e-4

STAGES = ("layer1", "layer2", "layer3")
RECIPES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "response": {"response": {"temperature": 4}},
    "dkd": {"dkd": {"temperature": 4}},
    "dist": {"dist": {"beta": 2, "gamma": 2}},
    "hint": {"hint": {"layers": ["layer2"]}},
    "vid": {"vid": {"layers": STAGES}},
    "attention": {"attention": {"layers": STAGES, "weight": 10}},
    "similarity": {"similarity": {"layers": ["layer3"], "weight": 100}},
    "rkd_distance": {"rkd_distance": {"layers": ["avgpool"], "weight": 25}},
    "rkd_angle": {"rkd_angle": {"layers": ["avgpool"], "weight": 50}},
    "fsp": {"fsp": {"layers": STAGES, "weight": 1e-5}},
    "response + attention": {"response": {"temperature": 4}, "attention": {"layers": STAGES, "weight": 10}},
}
"""What is compared with a student that has no teacher: losses by name with their options."""
ALONE, TEACHER = "student alone", "teacher"


@dataclass(frozen=True)
class Gain:
    """Accuracies, 0…1, one for each seed, of a network that learnt with `losses`, and its points over the student alone
    of the same seed."""

    name: str
    losses: dict[str, Any]
    epochs: int
    accuracies: tuple[float, ...]
    gains: tuple[float, ...] = ()

    def __str__(self) -> str:
        gain = f", gain {mean_and_spread(self.gains)} points" if self.gains else ""
        return f"{self.name}: {mean_and_spread([100 * accuracy for accuracy in self.accuracies])} %{gain}"


def loaders(seed: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Batches to train on, of this seed's tenth, and all other scans."""
    shifted = data.digits(IMAGE_SIZE, transform=data.RandomShift(SHIFT))
    order = torch.randperm(len(shifted), generator=torch.Generator().manual_seed(seed)).tolist()
    count = round(FRACTION * len(order))
    others: ConcatDataset[Any] = ConcatDataset(
        [Subset(data.digits(IMAGE_SIZE), order[count:]), data.digits(IMAGE_SIZE, train=False)]
    )
    return data.loaders(Subset(shifted, order[:count]), others, batch_size=BATCH)


def learnt(
    seed: int, epochs: int, train: DataLoader[Any], teacher: nn.Module, losses: Mapping[str, Mapping[str, Any]]
) -> nn.Module:
    """A student of this seed, with these losses."""
    student = fresh("resnet8", seed)
    compress.finetune(
        student,
        train,
        epochs=epochs,
        lr=RATE,
        weight_decay=DECAY,
        teacher=teacher if losses else None,
        losses=[compress.create_loss(name, **options) for name, options in losses.items()],
        cache_mb=500 if losses else 0,
        seed=seed,
        progress=False,
    )
    return student


def fresh(name: str, seed: int) -> nn.Module:
    """A network with the weights of this seed."""
    torch.manual_seed(seed)
    return models.create(name, num_classes=10, in_channels=1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the comparison and writes `distill.json`, anew after each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=positive, default=5)
    parser.add_argument("--epochs", type=positive, default=STUDENT_EPOCHS, help="of students (default %(default)s)")
    parser.add_argument("--losses", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="LOSS")
    options = parser.parse_args(arguments)
    console = Console()
    found = {
        name: Gain(
            name,
            {loss: dict(given) for loss, given in RECIPES.get(name, {}).items()},
            TEACHER_EPOCHS if name == TEACHER else options.epochs,
            (),
        )
        for name in (TEACHER, ALONE, *options.losses)
    }
    for seed in range(options.seeds):
        train, test = loaders(seed)
        teacher = fresh("resnet56", seed)
        compress.finetune(teacher, train, epochs=TEACHER_EPOCHS, lr=RATE, weight_decay=DECAY, seed=seed, progress=False)
        alone = 0.0
        for name, row in found.items():
            model = teacher if name == TEACHER else learnt(seed, options.epochs, train, teacher, RECIPES.get(name, {}))
            accuracy = compress.evaluate(model, test)
            alone = accuracy if name == ALONE else alone
            gains = (*row.gains, 100 * (accuracy - alone)) if name in RECIPES else ()
            found[name] = replace(row, accuracies=(*row.accuracies, accuracy), gains=gains)
            console.print(f"seed {seed}: {found[name]}")
        save(
            "distill",
            list(found.values()),
            images=len(train.dataset),  # type: ignore[arg-type]
            tested=len(test.dataset),  # type: ignore[arg-type]
            image_size=IMAGE_SIZE,
            key=("name", "epochs"),
        )


if __name__ == "__main__":
    main()
