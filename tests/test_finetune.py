"""Training: what it learns, its schedule, teachers, resumption after an interruption, several processes, refusals."""

import json
import math
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from kernelpress import compress
from kernelpress.compress.checkpoint import read_record
from kernelpress.compress.finetune import CHECKPOINT_NAME, learning_rate_factor

pytest.importorskip("accelerate", reason="training needs: pip install 'kernelpress[train]'")
pytest.importorskip("safetensors", reason="training needs: pip install 'kernelpress[train]'")

CLASSES = 3


class NoisyImages(Dataset[tuple[Tensor, int]]):
    """Images whose brightest third tells the class, with noise drawn anew at every reading as augmentation does."""

    def __init__(self, count: int = 50, *, fails_at: int | None = None) -> None:
        generator = torch.Generator().manual_seed(1)
        self.targets = torch.randint(0, CLASSES, (count,), generator=generator)
        self.images = torch.randn(count, 1, 6, 6, generator=generator) * 0.3
        for image, target in zip(self.images, self.targets.tolist(), strict=True):
            image[:, 2 * target : 2 * target + 2] += 1
        self.fails_at = fails_at
        self.readings = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.readings += 1
        if self.readings == self.fails_at:
            raise InterruptedError("the power went out")
        return self.images[index] + 0.05 * torch.randn(1, 6, 6), int(self.targets[index])


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, CLASSES)
    )


def noisy_loader(**options: int) -> DataLoader[tuple[Tensor, int]]:
    return DataLoader(NoisyImages(**options), batch_size=8, shuffle=True)


def train(model: nn.Module, loader: DataLoader[tuple[Tensor, int]], **options: object) -> compress.FinetuneResult:
    return compress.finetune(model, loader, **{"epochs": 4, "lr": 0.05, "progress": False, **options})


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_learns_what_the_images_show(optimizer: str) -> None:
    model, loader = small_network(), noisy_loader()
    before = compress.evaluate(model, loader)
    result = train(
        model, loader, epochs=6, lr=0.05 if optimizer == "sgd" else 0.01, optimizer=optimizer, val_loader=loader
    )
    assert before < 0.7
    assert compress.evaluate(model, loader) > 0.95
    assert result.best_accuracy == max(entry.accuracy for entry in result.history)
    assert result.history[-1].loss < 0.5 * result.history[0].loss
    assert [entry.epoch for entry in result.history] == list(range(6))
    assert result.seconds == pytest.approx(sum(entry.seconds for entry in result.history))


def test_accuracy_is_absent_without_a_validation_set() -> None:
    result = train(small_network(), noisy_loader(), epochs=1)
    assert result.best_accuracy is None
    assert result.history[0].accuracy is None


def test_training_depends_on_the_seed_alone_and_leaves_the_callers_random_state() -> None:
    first, second, other = small_network(), small_network(), small_network()
    torch.manual_seed(5)
    train(first, noisy_loader(), epochs=2)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)
    torch.manual_seed(6)
    train(second, noisy_loader(), epochs=2)
    train(other, noisy_loader(), epochs=2, seed=1)
    assert_same_weights(first, second)
    assert not torch.equal(first[0].weight, other[0].weight)


def test_model_and_teacher_keep_their_modes() -> None:
    model, teacher = small_network().eval(), small_network().train()
    train(model, noisy_loader(), epochs=1, teacher=teacher, losses=[mean_squared_error])
    assert not any(module.training for module in model.modules())
    assert all(module.training for module in teacher.modules())


def test_frozen_parameters_stay() -> None:
    model = small_network()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone(), model[4].weight.clone()
    train(model, noisy_loader(), epochs=1)
    assert torch.equal(model[0].weight, before[0])
    assert not torch.equal(model[4].weight, before[1])


def test_l1_on_the_scales_of_norms_pulls_them_to_zero_at_one_speed() -> None:
    """With a loss that is flat, the penalty is all that moves a scale."""
    model = small_network()
    nn.init.zeros_(model[4].weight)
    with torch.no_grad():
        model[1].weight[:] = torch.tensor([2.0, 1.0, -1.0, 0.5])
    blank = DataLoader(TensorDataset(torch.zeros(6, 1, 6, 6), torch.tensor([0, 1, 2] * 2)), batch_size=6)
    train(model, blank, epochs=2, lr=0.1, momentum=0, warmup=0, weight_decay=0.0, bn_l1=0.2)
    moved = 0.2 * 0.1 * sum(learning_rate_factor(step, 2, 0.0) for step in range(2))
    torch.testing.assert_close(model[1].weight, torch.tensor([2 - moved, 1 - moved, moved - 1, 0.5 - moved]))


def test_l1_on_scales_wants_scales() -> None:
    with pytest.raises(ValueError, match="bn_l1: expected 0 for Sequential, which has no BatchNorm with scales"):
        train(nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES)), noisy_loader(), bn_l1=0.1)


def test_weight_decay_spares_norms_and_biases() -> None:
    """With a loss that is flat, decay is all that moves a weight."""
    model = small_network()
    nn.init.ones_(model[4].bias)
    nn.init.zeros_(model[4].weight)
    before = {key: value.clone() for key, value in model.named_parameters()}
    blank = TensorDataset(torch.zeros(6, 1, 6, 6), torch.tensor([0, 1, 2] * 2))
    train(model, DataLoader(blank, batch_size=6), epochs=2, weight_decay=0.5)
    assert model[0].weight.norm() < 0.99 * before["0.weight"].norm()
    torch.testing.assert_close(model[1].weight, before["1.weight"])
    torch.testing.assert_close(model[4].bias, before["4.bias"])


def test_learning_rate_rises_linearly_and_falls_along_a_cosine_to_zero() -> None:
    factors = [learning_rate_factor(step, 100, 0.1) for step in range(100)]
    rises = [b - a for a, b in pairwise(factors[:11])]
    assert rises == pytest.approx([1 / 11] * 10)
    assert factors[10] == max(factors) == 1
    assert factors[55] == pytest.approx(0.5)
    assert factors[32] == pytest.approx(0.5 * (1 + math.cos(math.pi * 22 / 90)))
    assert 0 < factors[-1] < 0.001
    assert learning_rate_factor(0, 10, 0.0) == 1
    assert all(a > b for a, b in pairwise(factors[10:]))


def test_history_shows_the_learning_rate_of_the_schedule() -> None:
    result = train(small_network(), noisy_loader(), epochs=3, lr=0.2, warmup=0.0)
    steps = [7 * (epoch + 1) - 1 for epoch in range(3)]
    expected = [0.2 * learning_rate_factor(step, 21, 0.0) for step in steps]
    assert [entry.learning_rate for entry in result.history] == pytest.approx(expected)


def test_label_smoothing_raises_the_loss_of_a_perfect_classifier() -> None:
    images, targets = torch.eye(CLASSES) * 100, torch.arange(CLASSES)
    loader = DataLoader(TensorDataset(images, targets), batch_size=CLASSES)
    losses = []
    for smoothing in (0.0, 0.3):
        model = nn.Linear(CLASSES, CLASSES)
        nn.init.eye_(model.weight)
        nn.init.zeros_(model.bias)
        losses.append(train(model, loader, epochs=1, label_smoothing=smoothing).history[0].loss)
    assert losses == pytest.approx([0.0, 100 * 0.3 * 2 / 3])


def mean_squared_error(student_output: Tensor, teacher_output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(student_output, teacher_output)


def test_losses_pull_the_student_towards_its_teacher() -> None:
    teacher = small_network()
    train(teacher, noisy_loader())
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    x = NoisyImages().images
    distances = []
    for options in ({}, {"teacher": teacher, "losses": [mean_squared_error]}):
        student = nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES))
        train(student, noisy_loader(), epochs=8, lr=0.01, **options)
        with torch.no_grad():
            distances.append(F.mse_loss(student(x), teacher.eval()(x)).item())
    assert distances[1] < 0.5 * distances[0]
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_interrupted_training_goes_on_to_the_same_weights(tmp_path: Path, optimizer: str) -> None:
    straight, broken, resumed = small_network(), small_network(), small_network()
    options = {"optimizer": optimizer, "lr": 0.02, "checkpoint_dir": tmp_path / "run"}
    expected = train(straight, noisy_loader(), **{**options, "checkpoint_dir": None})
    with pytest.raises(InterruptedError):
        train(broken, noisy_loader(fails_at=50 * 2 + 20), **options)
    loader = noisy_loader()
    result = train(resumed, loader, **options)
    assert loader.dataset.readings == 50 * 2
    assert_same_weights(resumed, straight)
    assert [entry.loss for entry in result.history] == [entry.loss for entry in expected.history]


def test_finished_training_is_not_repeated(tmp_path: Path) -> None:
    first, second, loader = small_network(), small_network(), noisy_loader()
    done = train(first, noisy_loader(), checkpoint_dir=tmp_path)
    assert train(second, loader, checkpoint_dir=tmp_path) == done
    assert loader.dataset.readings == 0
    assert_same_weights(first, second)


def test_checkpoint_of_other_settings_is_refused_by_name(tmp_path: Path) -> None:
    train(small_network(), noisy_loader(), epochs=1, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match=r"^checkpoint_dir: .* belongs to a training with lr = 0\.05, got 0\.1"):
        train(small_network(), noisy_loader(), epochs=1, lr=0.1, checkpoint_dir=tmp_path)


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    train(small_network(), noisy_loader(), epochs=1, checkpoint_dir=tmp_path)
    other = nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES))
    with pytest.raises(ValueError, match="written for another model"):
        train(other, noisy_loader(), epochs=1, checkpoint_dir=tmp_path)


def test_damaged_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    train(small_network(), noisy_loader(), epochs=1, checkpoint_dir=tmp_path)
    file = tmp_path / CHECKPOINT_NAME
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{CHECKPOINT_NAME}: not a complete checkpoint"):
        train(small_network(), noisy_loader(), epochs=1, checkpoint_dir=tmp_path)


def test_full_disk_leaves_the_older_checkpoint_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import kernelpress.compress.checkpoint as checkpoint

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    train(small_network(), noisy_loader(), epochs=1, checkpoint_dir=tmp_path)
    file = tmp_path / CHECKPOINT_NAME
    before = file.read_bytes()
    model = small_network()
    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save_checkpoint(file, model, torch.optim.SGD(model.parameters()), {})
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_accuracy_counts_every_image_once_and_keeps_the_mode() -> None:
    images = torch.eye(CLASSES).repeat(7, 1)
    targets = torch.cat([torch.arange(CLASSES).repeat(6), torch.zeros(CLASSES, dtype=torch.int64)])
    model = nn.Sequential(nn.Dropout(0.9), nn.Identity()).train()
    loader = DataLoader(TensorDataset(images, targets), batch_size=4)
    assert compress.evaluate(model, loader) == pytest.approx(19 / 21)
    assert compress.evaluate(lambda x: -x, loader) < 0.5
    assert model.training


def test_accuracy_of_nothing_is_refused() -> None:
    empty = DataLoader(TensorDataset(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"^loader: expected at least one batch"):
        compress.evaluate(nn.Identity(), empty)


def test_loss_that_explodes_stops_the_training_with_advice() -> None:
    class Exploding(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(1)) * math.inf

    with pytest.raises(FloatingPointError, match=r"the loss became nan in epoch 1: lower lr, now 0\.05"):
        train(Exploding(36, CLASSES), noisy_loader())


def test_clipped_gradients_are_no_longer_than_their_channels_allow() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES))
    with torch.no_grad():
        model[1].weight[0] = 0
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    options = {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "warmup": 0.0}
    train(model, DataLoader(NoisyImages(8), batch_size=8), epochs=1, clip=0.01, **options)
    for name, parameter in model.named_parameters():
        dims = 1 if parameter.dim() == 2 else 0
        moved, length = (t.detach().norm(dim=dims) for t in (parameter - before[name], before[name]))
        assert (moved > 0).all()
        assert (moved <= 0.0101 * length.clamp_min(1e-3)).all()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("epochs", 0),
        ("lr", 0.0),
        ("lr", math.nan),
        ("weight_decay", -1e-4),
        ("bn_l1", -1e-4),
        ("clip", -0.01),
        ("clip", math.nan),
        ("optimizer", "adam"),
        ("momentum", 1.0),
        ("warmup", -0.1),
        ("label_smoothing", 1.0),
        ("losses", [mean_squared_error]),
        ("teacher", nn.Identity()),
    ],
)
def test_setting_out_of_range_is_named(option: str, value: object) -> None:
    named = {"losses": "teacher", "teacher": "losses"}.get(option, option)
    with pytest.raises(ValueError, match=rf"^{named}: expected "):
        train(small_network(), noisy_loader(), **{option: value})


def test_model_without_parameters_and_loaders_without_batches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^model: expected parameters to train, Identity has none"):
        train(nn.Identity(), noisy_loader())
    with pytest.raises(TypeError, match=r"^loader: expected a torch DataLoader, got list"):
        train(small_network(), [1, 2])
    with pytest.raises(ValueError, match=r"^loader: expected at least one batch"):
        train(small_network(), DataLoader(NoisyImages(5), batch_size=8, drop_last=True))


WORKER = """
import atexit, json, os, sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import torch.distributed as distributed
from kernelpress import compress

folder, is_caller_s = sys.argv[1], sys.argv[2] == "the caller"

def at_the_end():
    threads = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    record.update(connected=distributed.is_initialized(), working=sum("gloo" in name for name in threads))
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(record, file)
    if is_caller_s:
        os._exit(0)

atexit.register(at_the_end)
torch.set_num_threads(1)
if is_caller_s:
    distributed.init_process_group("gloo")
generator = torch.Generator().manual_seed(1)
images = torch.randn(37, 6, generator=generator)
targets = (images[:, :3]).argmax(dim=1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
loader = DataLoader(TensorDataset(images, targets), batch_size=4, shuffle=True)
ordered = DataLoader(TensorDataset(images, targets), batch_size=4)
for epochs in (1, 12):
    result = compress.finetune(model, loader, epochs=epochs, lr=0.1, val_loader=ordered,
                               checkpoint_dir=f"{folder}/{epochs}", progress=False)
rank = distributed.get_rank()
whole = (model(images).argmax(dim=1) == targets).sum().item() / 37
record = {"processes": distributed.get_world_size(), "accuracy": result.history[-1].accuracy, "whole": whole,
          "shared": compress.evaluate(model, ordered), "loss": result.history[-1].loss,
          "checksum": sum(value.double().sum().item() for value in model.state_dict().values())}
"""


@pytest.mark.slow
@pytest.mark.parametrize("maker", ["the training", "the caller"])
def test_two_processes_train_one_model_and_a_group_is_ended_by_who_made_it(tmp_path: Path, maker: str) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    # A session of its own, so that a hang ends the workers as well as their launcher.
    run = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, tmp_path, maker],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        printed, _ = run.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        raise
    assert run.returncode == 0, printed[-4000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["processes"] == 2
    assert first["accuracy"] == first["whole"] == first["shared"]
    assert first["whole"] > 0.8
    settings = read_record(tmp_path / "12" / CHECKPOINT_NAME)["settings"]
    assert settings["steps_per_epoch"] == 5, "37 images in 10 batches of 4, shared by two"
    assert first["connected"] == (maker == "the caller")
    lives_on = maker == "the caller" and torch.__version__ >= "2.11"  # before that its threads have no names
    assert (first["working"] > 0) == lives_on, "a thread of the group lives on as the interpreter ends"


def test_weights_come_back_in_the_layout_they_had() -> None:
    first, second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1).to(memory_format=torch.channels_last)
    third = nn.Conv2d(4, 5, 3)
    seen = []
    third.register_forward_hook(lambda layer, *_: seen.append(is_channels_last(layer.weight)))
    train(nn.Sequential(first, second, third, nn.Flatten(), nn.Linear(20, CLASSES)), noisy_loader(), epochs=1)
    assert seen == [True] * 7
    assert is_channels_last(second.weight)
    assert third.weight.is_contiguous()


def is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last)
