"""The work of each step of a run; a step reads what earlier ones left on disk, so a resumed run is the same run."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

import kernelpress
from kernelpress import compress, data, measure, models
from kernelpress.emit.cache import device_key
from kernelpress.measure.contestants import TORCH_WAYS, torch_contestants
from kernelpress.preserve import random_state_kept
from kernelpress.press.folder import RunFolder, StepRecord
from kernelpress.press.recipe import Recipe, RunStep
from kernelpress.press.registry import PassContext, known_passes
from kernelpress.press.sections import START, EmitSection, MeasureSection, TrainSection
from kernelpress.runtime.clock import threads_set_to

__all__ = ["PRODUCT", "Run", "dense_name", "depends_on", "do", "emitted_name", "file_of"]

PRODUCT = "pressed"
"""The contestant that is the product of the run: compressed, emitted and captured."""


@dataclass
class Run:
    """One run: its recipe, where it writes, whom it tells, and the records of the steps so far by id."""

    recipe: Recipe
    folder: RunFolder
    tell: Callable[[str], None]
    progress: bool
    records: dict[str, StepRecord] = field(default_factory=dict)

    @cached_property
    def steps(self) -> tuple[RunStep, ...]:
        """All steps in order."""
        return self.recipe.run_steps()

    @cached_property
    def dense(self) -> str:
        """The id of the step that left the dense model: the last one before the first pass."""
        first = next((step for step in self.steps if step.name in known_passes()), self.steps[-1])
        return first.before

    @cached_property
    def loaders(self) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Batches to train on and to test on."""
        return _loaders(self.recipe)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        dataset: Any = self.loaders[0].dataset
        while isinstance(dataset, Subset):
            dataset = dataset.dataset
        return tuple(dataset.classes)

    @cached_property
    def architecture(self) -> nn.Module:
        """The model as it is built, which files of later ones are replayed on copies of."""
        section = self.recipe.model
        with random_state_kept():
            torch.manual_seed(self.recipe.seed)
            channels = int(self.images(1).shape[1])
            return models.build(section.name, section.options, in_channels=channels, classes=len(self.classes))

    def images(self, count: int) -> Tensor:
        """The first test images [count, C, H, W]; a smaller set repeats."""
        dataset: Any = self.loaders[1].dataset
        return torch.stack([dataset[index % len(dataset)][0] for index in range(count)])

    def model(self, step: str) -> nn.Module:
        """The model as the step of this id left it. Raises `ValueError` for a step that is no earlier one."""
        if step not in self.records or not (name := file_of(self.step(step))).endswith(".safetensors"):
            raise ValueError(f"step: expected one of {', '.join(self.records)} that changes the model, got {step!r}")
        return compress.load(self.folder.path / name, copy.deepcopy(self.architecture))

    def step(self, id: str) -> RunStep:
        """The step of this id."""
        return next(step for step in self.steps if step.id == id)


def file_of(step: RunStep) -> str:
    """The file that a step leaves, `""` for none."""
    return f"{step.id}.safetensors" if step.changes_model else f"{step.id}.pt2" if step.name == "emit" else ""


def depends_on(step: RunStep, recipe: Recipe) -> list[Any]:
    """What a step depends on besides earlier steps, as plain values."""
    section = step.section.model_dump(mode="json")
    if step.id == START:
        return [section, recipe.seed, recipe.data.model_dump(mode="json")]
    return [step.name, section, *([device_key(torch.device("cpu"))] if step.section.chooses_by_time else [])]


def do(run: Run, step: RunStep, key: str) -> dict[str, Any]:
    """Does the work of a step, writes its file and returns its results."""
    return _WORK.get(step.name, _compress)(run, step, key)


def dense_name(way: str) -> str:
    """The name under which a way to run the dense model stands in the comparison."""
    return f"dense {'torch.compile' if way == 'compile' else way}"


def emitted_name(emission: RunStep) -> str:
    """The name under which what an earlier step emitted stands in the comparison."""
    return f"emitted after {emission.before}"


def _start(run: Run, step: RunStep, _: str) -> dict[str, Any]:
    model = copy.deepcopy(run.architecture)
    if run.recipe.model.weights is not None:
        _load_weights(model, run.recipe.model.weights)
    return _keep(run, step, model)


def _train(run: Run, step: RunStep, key: str) -> dict[str, Any]:
    """Trains the model, going on from where an interrupted run stopped under the same key."""
    assert isinstance(step.section, TrainSection)
    model = run.model(step.before)
    checkpoints = _checkpoints(run, step, key)
    result = compress.finetune(
        model,
        run.loaders[0],
        **step.section.model_dump(),
        val_loader=run.loaders[1],
        checkpoint_dir=checkpoints,
        seed=run.recipe.seed,
        progress=run.progress,
    )
    shutil.rmtree(checkpoints, ignore_errors=True)
    return _keep(run, step, model) | {"history": [asdict(epoch) for epoch in result.history]}


def _checkpoints(run: Run, step: RunStep, key: str) -> Path:
    """Where a step keeps what it goes on from after an interruption, without what it kept under other keys."""
    folder = run.folder.path / "checkpoints" / f"{step.id}-{key}"
    for stale in folder.parent.glob(f"{step.id}-*"):
        if stale != folder:
            shutil.rmtree(stale, ignore_errors=True)
    return folder


def _compress(run: Run, step: RunStep, key: str) -> dict[str, Any]:
    before = run.model(step.before)
    earlier = len(compress.record_of(before))
    torch.manual_seed(run.recipe.seed)
    checkpoint_dir = _checkpoints(run, step, key)
    context = PassContext(
        step.section,
        *run.loaders,
        (run.images(1),),
        run.recipe.seed,
        run.model,
        run.dense,
        checkpoint_dir,
        progress=run.progress,
    )
    model = known_passes()[step.name].run(before, context)
    if len(compress.record_of(model)) != earlier + 1:
        raise RuntimeError(f"{step.name}: expected the pass to add its record to the model that it returns")
    shutil.rmtree(checkpoint_dir, ignore_errors=True)
    run.tell("  " + compress.record_of(model)[-1].costs())
    return _keep(run, step, model)


def _emit(run: Run, step: RunStep, _: str) -> dict[str, Any]:
    assert isinstance(step.section, EmitSection)
    with threads_set_to(step.section.threads):
        images = run.images(step.section.batch)
        emitted = kernelpress.emit(run.model(step.before), images, progress=run.progress)
    emitted.save(run.folder.path / file_of(step))
    return {"record": emitted.record.to_json()}


def _measure(run: Run, step: RunStep, _: str) -> dict[str, Any]:
    section, emission = step.section, step.emitted_by
    assert isinstance(section, MeasureSection)
    assert emission is not None
    assert isinstance(emission.section, EmitSection)
    images = run.images(emission.section.batch)
    dense, pressed = run.model(run.dense), run.model(step.before)
    product = kernelpress.load(run.folder.path / file_of(emission))
    with threads_set_to(emission.section.threads):
        ways = tuple(way for way in section.peers if way in TORCH_WAYS)
        torch_ways, refusals = torch_contestants(dense, (images,), ways)
        contestants: dict[str, Any] = {dense_name(way): contestant for way, contestant in torch_ways.items()}
        dense_record = None
        if "emitted" in section.peers:
            dense_emitted = kernelpress.emit(dense, images, progress=run.progress)
            dense_record = dense_emitted.record.to_json()
            contestants[dense_name("emitted")] = kernelpress.capture(dense_emitted, images)
        contestants["pressed eager"] = torch_contestants(pressed, (images,), ("eager",))[0]["eager"]
        promised: dict[str, float] = {}
        for earlier in run.recipe.emissions_before(emission):
            name = emitted_name(earlier)
            contestants[name] = kernelpress.capture(kernelpress.load(run.folder.path / file_of(earlier)), images)
            promised[name] = sum(left for _, left in _costs(run.model(earlier.before), images).values())
        contestants[PRODUCT] = kernelpress.capture(product, images)
        costs = _costs(pressed, images)
        promised |= dict.fromkeys(("pressed eager", PRODUCT), sum(left for _, left in costs.values()))
        comparison = measure.compare(
            contestants, images, rounds=section.rounds, budget_seconds=section.budget_seconds, promised=promised
        )
    for name in promised.keys() - {"pressed eager", PRODUCT}:
        run.tell(f"  {comparison.against(name).speedup(PRODUCT).measured:.2f}× as fast as {name}")
    baseline = comparison.fastest(*(dense_name(way) for way in torch_ways))
    return {
        "comparison": comparison.against(baseline.name).to_dict(),
        "accuracy": compress.evaluate(product, run.loaders[1]),
        "dense_record": dense_record,
        "layer_flops": costs,
        "notes": [f"{dense_name(way)}: {reason}" for way, reason in refusals.items()],
    }


_WORK: Mapping[str, Callable[[Run, RunStep, str], dict[str, Any]]] = {
    START: _start,
    "train": _train,
    "finetune": _train,
    "emit": _emit,
    "measure": _measure,
}
"""What is no pass."""


def _keep(run: Run, step: RunStep, model: nn.Module) -> dict[str, Any]:
    """Write `model` and say what it reaches, costs for one image, and promises."""
    compress.save(model, run.folder.path / file_of(step))
    accuracy = compress.evaluate(model, run.loaders[1])
    run.tell(f"  test accuracy {accuracy:.2%}")
    image = run.images(1)
    flops, promises = measure.count_flops(model, image), _promises(model)
    return {
        "accuracy": accuracy,
        "flops": flops,
        "promised_flops": measure.promised_flops(measure.layer_flops(model, image), promises) if promises else flops,
        "parameters": measure.count_parameters(model),
        "layers": [name for name, part in model.named_modules() if name and part._parameters],
        "passes": [asdict(record) for record in compress.record_of(model)],
    }


def _costs(model: nn.Module, images: Tensor) -> dict[str, tuple[int, float]]:
    """FLOPs of each layer, and what is left of them in theory."""
    promises = _promises(model)
    return {
        layer: (flops, measure.promised_flops({layer: flops}, promises))
        for layer, flops in measure.layer_flops(model, images).items()
    }


def _promises(model: nn.Module) -> list[measure.Promise]:
    return [promise for record in compress.record_of(model) for promise in record.promises]


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
    if section.train_fraction < 1:
        count = len(train)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(recipe.seed)).tolist()
        train = Subset(train, order[: max(1, round(section.train_fraction * count))])
    return data.loaders(train, test, batch_size=section.batch_size, workers=section.workers)
