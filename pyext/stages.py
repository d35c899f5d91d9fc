"""The work of each stage of a run; a stage reads what earlier ones left on disk, so a resumed run is the same run."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

import kernelpress
from kernelpress import compress, data, measure, models
from kernelpress.compress.record import load, record_of, save
from kernelpress.emit.cache import device_key
from kernelpress.measure.contestants import TORCH_WAYS, torch_contestants
from kernelpress.recipe import Recipe, TrainSection
from kernelpress.runfolder import RunFolder

__all__ = ["PRODUCT", "STAGES", "Context", "Stage", "dense_name"]

DENSE, COMPRESSED, PRESSED = "dense.safetensors", "compressed.safetensors", "pressed.safetensors"
EMITTED = "pressed.pt2"

PRODUCT = "pressed"
"""The contestant that is the product of the run: compressed, emitted and captured."""


@dataclass
class Context:
    """One run: its recipe, where it writes, whom it tells, and the results of the stages so far by name."""

    recipe: Recipe
    folder: RunFolder
    tell: Callable[[str], None]
    progress: bool
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @cached_property
    def loaders(self) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Batches to train on and to test on."""
        return _loaders(self.recipe)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        dataset: Any = self.loaders[0].dataset
        return tuple(getattr(dataset, "dataset", dataset).classes)

    def images(self, count: int) -> Tensor:
        """The first test images [count, C, H, W]; a smaller set repeats."""
        dataset: Any = self.loaders[1].dataset
        return torch.stack([dataset[index % len(dataset)][0] for index in range(count)])


@dataclass(frozen=True)
class Stage:
    """A stage: what of the recipe it depends on (besides earlier stages), its work, and the files this leaves."""

    name: str
    depends_on: Callable[[Recipe], Any]
    work: Callable[[Context], dict[str, Any]]
    files: tuple[str, ...]


def dense_name(way: str) -> str:
    """The name under which a way to run the dense model stands in the comparison."""
    return f"dense {'torch.compile' if way == 'compile' else way}"


def _train(context: Context) -> dict[str, Any]:
    recipe = context.recipe
    torch.manual_seed(recipe.seed)
    model = _create(context)
    if recipe.model.weights is not None:
        _load_weights(model, recipe.model.weights)
    history = _fit(context, "train", model, recipe.train)
    return _keep(context, model, DENSE) | {"history": history}


def _compress(context: Context) -> dict[str, Any]:
    model = _read(context, DENSE)
    for entry in context.recipe.compress:
        model = entry.apply(model, (context.images(1),), context.loaders[0])
        context.tell("  " + str(record_of(model)[-1]).splitlines()[0])
    return _keep(context, model, COMPRESSED) | {"passes": [asdict(record) for record in record_of(model)]}


def _finetune(context: Context) -> dict[str, Any]:
    model = _read(context, COMPRESSED)
    history = _fit(context, "finetune", model, context.recipe.finetune)
    return _keep(context, model, PRESSED) | {"history": history}


def _emit(context: Context) -> dict[str, Any]:
    emitted = kernelpress.emit(
        _read(context, PRESSED), context.images(context.recipe.emit.batch), progress=context.progress
    )
    emitted.save(context.folder.path / EMITTED)
    return {"record": emitted.record.to_json()}


def _measure(context: Context) -> dict[str, Any]:
    recipe = context.recipe.measure
    images = context.images(context.recipe.emit.batch)
    dense, pressed = _read(context, DENSE), _read(context, PRESSED)
    product = kernelpress.load(context.folder.path / EMITTED)
    ways = tuple(way for way in recipe.peers if way in TORCH_WAYS)
    torch_ways, refusals = torch_contestants(dense, (images,), ways)
    contestants: dict[str, Any] = {dense_name(way): contestant for way, contestant in torch_ways.items()}
    dense_record = None
    if "emitted" in recipe.peers:
        dense_emitted = kernelpress.emit(dense, images, progress=context.progress)
        dense_record = dense_emitted.record.to_json()
        contestants[dense_name("emitted")] = kernelpress.capture(dense_emitted, images)
    contestants["pressed eager"] = torch_contestants(pressed, (images,), ("eager",))[0]["eager"]
    contestants[PRODUCT] = kernelpress.capture(product, images)

    comparison = measure.compare(contestants, images, rounds=recipe.rounds, budget_seconds=recipe.budget_seconds)
    baseline = comparison.fastest(*(dense_name(way) for way in torch_ways))
    return {
        "comparison": comparison.against(baseline.name).to_dict(),
        "accuracy": compress.evaluate(product, context.loaders[1]),
        "dense_record": dense_record,
        "notes": [f"{dense_name(way)}: {reason}" for way, reason in refusals.items()],
    }


def _create(context: Context) -> nn.Module:
    section = context.recipe.model
    inferred = {"in_channels": int(context.images(1).shape[1]), "num_classes": len(context.classes)}
    return models.create(section.name, **{**inferred, **section.options})


def _read(context: Context, name: str) -> nn.Module:
    """The model as the stage that wrote the file `name` left it."""
    return load(context.folder.path / name, _create(context))


def _keep(context: Context, model: nn.Module, name: str) -> dict[str, Any]:
    """Write the weights of `model` and say what it reaches and costs."""
    save(model, context.folder.path / name)
    accuracy = compress.evaluate(model, context.loaders[1])
    context.tell(f"  test accuracy {accuracy:.2%}")
    images = context.images(context.recipe.emit.batch)
    return {
        "accuracy": accuracy,
        "flops": measure.count_flops(model, images),
        "parameters": measure.count_parameters(model),
    }


def _load_weights(model: nn.Module, file: Path) -> None:
    """Load a safetensors file with a state dict; `ValueError` where it is damaged or belongs to another model."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise FileNotFoundError(f"weights: {file} does not exist")
    try:
        model.load_state_dict(load_file(file))
    except SafetensorError as error:
        raise ValueError(f"weights: {file} is not a safetensors file: {error}") from error
    except RuntimeError as error:
        raise ValueError(f"weights: {file} does not fit {type(model).__name__}: {error}") from error


def _fit(context: Context, stage: str, model: nn.Module, section: TrainSection | None) -> list[dict[str, Any]]:
    """Train `model` as the recipe says, going on from where an interrupted run stopped."""
    if section is None or section.epochs == 0:
        return []
    train_loader, test_loader = context.loaders
    checkpoints = context.folder.path / "checkpoints" / stage
    marker, settings = checkpoints / "recipe.json", context.recipe.model_dump_json(exclude={"output", "title"})
    if not marker.is_file() or marker.read_text(encoding="utf-8") != settings:
        shutil.rmtree(checkpoints, ignore_errors=True)
        checkpoints.mkdir(parents=True)
        marker.write_text(settings, encoding="utf-8")
    result = compress.finetune(
        model,
        train_loader,
        **section.model_dump(),
        val_loader=test_loader,
        checkpoint_dir=checkpoints,
        seed=context.recipe.seed,
        progress=context.progress,
    )
    shutil.rmtree(checkpoints, ignore_errors=True)
    return [asdict(epoch) for epoch in result.history]


def _loaders(recipe: Recipe) -> tuple[DataLoader[Any], DataLoader[Any]]:
    section = recipe.data
    shift = data.RandomShift(section.shift) if section.shift else None
    train: Dataset[Any]
    test: Dataset[Any]
    if section.source == "digits":
        train = data.digits(section.image_size, train=True, seed=recipe.seed, transform=shift)
        test = data.digits(section.image_size, train=False, seed=recipe.seed)
    else:
        images = data.image_folder(section.source, section.image_size, transform=shift)
        if section.test_folder is not None:
            train, test = images, data.image_folder(section.test_folder, section.image_size)
            if test.classes != images.classes:
                raise ValueError(
                    f"test_folder: expected the classes of {section.source}, {', '.join(images.classes)}; "
                    f"got {', '.join(test.classes)}"
                )
        else:
            plain = copy.copy(images)
            plain.transform = None
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
            held_out = max(1, round(section.test_fraction * len(order)))
            train, test = Subset(images, order[held_out:]), Subset(plain, order[:held_out])
    return data.loaders(train, test, batch_size=section.batch_size, workers=section.workers)


def _on_this_machine(recipe: Recipe) -> list[Any]:
    return [recipe.emit, device_key(torch.device("cpu"))]


STAGES: tuple[Stage, ...] = (
    Stage("train", lambda recipe: [recipe.seed, recipe.data, recipe.model, recipe.train], _train, (DENSE,)),
    Stage("compress", lambda recipe: [recipe.compress], _compress, (COMPRESSED,)),
    Stage("finetune", lambda recipe: [recipe.finetune], _finetune, (PRESSED,)),
    Stage("emit", _on_this_machine, _emit, (EMITTED,)),
    Stage("measure", lambda recipe: [recipe.measure], _measure, ()),
)
"""In the order they run; the report is written from their results."""
