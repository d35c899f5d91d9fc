"""`compress` and `measure` leave the caller's model, tensors and process as they were, also when they refuse."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from unchanged import unchanged

from kernelpress import compress, layers, measure
from kernelpress.measure.contestants import torch_contestants
from kernelpress.runtime.torch_private import mark_dynamic
from kernelpress.trace import TraceError


class Careless(nn.Module):
    """Draws random numbers, counts its calls, replaces a buffer, keeps statistics in eval mode, writes to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.head = nn.Conv2d(16, 4, 1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(1))
        self.conv.eval()
        self.head.weight.requires_grad_(False)
        self.conv.weight.grad = torch.randn(16, 3, 3, 3)
        self.conv.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = self.last + 1
        y = self.norm(self.conv(self.scaled(x)))
        self.norm.running_mean.mul_(0.9)
        return self.head(F.relu(y) + 0.01 * torch.randn_like(y))

    def scaled(self, x: Tensor) -> Tensor:
        return x.mul_(1.5)


class Drawing(Careless):
    """Draws besides from Python's and NumPy's random states."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * random.random() * numpy.random.rand()  # noqa: NPY002


class Raising(Careless):
    """Fails after all that, at the last call that it is allowed."""

    def __init__(self, after: int = 0) -> None:
        super().__init__()
        self.left = [after]

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.left[0] -= 1
        if self.left[0] < 0:
            raise RuntimeError("enough")
        return y


class Branching(Careless):
    """Cannot be exported."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if y.sum() > 0 else -y


def _input() -> Tensor:
    x = torch.randn(2, 3, 8, 8)
    x.note = "mine"
    return x


MEASURES: dict[str, Callable[[Any, Tensor], object]] = {
    "profile": lambda model, x: measure.profile(model, x, repeats=1, rounds=1, threads=2),
    "compare": lambda model, x: measure.compare({"a": model, "b": (model, (x,))}, x, rounds=1, budget_seconds=0.01),
    "profile_layers": lambda model, x: measure.profile_layers(model, x, repeats=1, warmup=1),
    "count_flops": lambda model, x: measure.count_flops(model, x),
    "count_parameters": lambda model, x: measure.count_parameters(model),
}


@pytest.mark.parametrize("measured", MEASURES)
def test_measuring_leaves_no_trace(measured: str) -> None:
    model, x = Drawing(), _input()
    with unchanged(model, (x,)):
        MEASURES[measured](model, x)


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("measured", [name for name in MEASURES if name != "count_parameters"])
def test_measuring_leaves_no_trace_where_the_model_raises(measured: str, after: int) -> None:
    model, x = Raising(after if measured != "count_flops" else 0), _input()
    with pytest.raises(RuntimeError, match="enough"), unchanged(model, (x,)):
        MEASURES[measured](model, x)


def test_timing_a_callable_leaves_random_states() -> None:
    with unchanged():
        measure.time_alternately({"x": lambda: (torch.randn(1), random.random())}, repeats=1, rounds=1)
    with pytest.raises(ZeroDivisionError), unchanged():
        measure.time_alternately({"x": lambda: torch.randn(1) / (1 // 0)}, repeats=1, rounds=1)


@pytest.mark.slow
def test_an_input_that_wants_gradients_has_no_hooks_and_marks_afterwards() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), _input().requires_grad_()
    with unchanged(model, (x,)):
        for measured in MEASURES.values():
            measured(model, x)
    with unchanged(model, {"a": [x]}):
        contestants, refusals = torch_contestants(model, (x,))
    assert set(contestants) | set(refusals) == {"eager", "channels_last", "compile"}


def test_contestants_in_plain_torch_leave_no_trace() -> None:
    model, x = nn.Sequential(layers.DepthwiseConv2d(3, 3), nn.Conv2d(3, 4, 1)).train(), _input()
    with unchanged(model, (x,)):
        torch_contestants(model, (x,), ["eager", "channels_last"])


def _prunable() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 1))
    model[0].eval()
    model[1].weight.requires_grad_(False)
    model[3].weight.grad = torch.randn(4, 16, 1, 1)
    return model


@pytest.mark.parametrize("make", [_prunable, Careless], ids=["plain", "careless"])
def test_pruning_leaves_no_trace(make: Callable[[], nn.Module]) -> None:
    model, x = make(), _input()
    with unchanged(model, (x,)):
        pruned = compress.prune_channels(model, x, ratio=0.3, round_to=1)
    with unchanged(pruned, model, (x,)):
        compress.prune_channels(pruned, x, ratio=0.1, round_to=1)
    assert [part.training for part in pruned.modules()] == [part.training for part in model.modules()]


@pytest.mark.parametrize(
    ("make", "arguments", "error"),
    [
        (Branching, {}, TraceError),
        (Raising, {}, TraceError),
        (_prunable, {"ratio": 0.99}, ValueError),
        (_prunable, {"ignore": ["0"]}, ValueError),
        (_prunable, {"criterion": "l7"}, ValueError),
    ],
    ids=["not exportable", "raises", "ratio", "nothing left", "argument"],
)
def test_refused_pruning_leaves_no_trace(
    make: Callable[[], nn.Module], arguments: dict[str, Any], error: type[Exception]
) -> None:
    model, x = make(), _input()
    with pytest.raises(error), unchanged(model, (x,)):
        compress.prune_channels(model, x, **arguments)


def test_pruning_is_not_misled_by_marks_of_a_compiler() -> None:
    model, x = _prunable(), _input()
    expected = compress.prune_channels(model, x, ratio=0.3, round_to=1)
    mark_dynamic(x, 0)
    with unchanged(model, (x,)):
        pruned = compress.prune_channels(model, x, ratio=0.3, round_to=1)
    assert pruned[0].weight.shape == expected[0].weight.shape


@pytest.mark.parametrize("made_there", [False, True], ids=["made outside", "made inside"])
def test_pruned_and_loaded_under_inference_mode_trains(made_there: bool, tmp_path: Path) -> None:
    with torch.inference_mode(made_there):
        model, twin, x = _prunable(), _prunable(), _input()
    with torch.inference_mode(), unchanged(model, (x,)):
        pruned = compress.prune_channels(model, x, ratio=0.3, round_to=1)
        compress.save(pruned, tmp_path / "small")
        loaded = compress.load(tmp_path / "small", twin)
    for result in (pruned, loaded):
        before = result[0].weight.detach().clone()
        optimizer = torch.optim.SGD(result.parameters(), 0.1)
        result.train()(torch.randn(2, 3, 8, 8)).square().sum().backward()
        optimizer.step()
        assert not torch.equal(result[0].weight, before)
        assert int(result[1].num_batches_tracked) == 1


class Classifier(Drawing):
    """Leaves its input alone, as student and teacher share it."""

    def scaled(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean((2, 3))


def _loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(8, 3, 8, 8), torch.randint(0, 4, (8,))), 4, shuffle=True)


def test_evaluation_leaves_no_trace() -> None:
    model, loader = Classifier(), _loader()
    with unchanged(model, loader.dataset.tensors):
        compress.evaluate(model, loader)
    failing = nn.Sequential(Raising(1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(RuntimeError, match="enough"), unchanged(failing, loader.dataset.tensors):
        compress.evaluate(failing, loader)


def test_training_leaves_the_teacher_modes_and_random_states() -> None:
    model, teacher = nn.Sequential(_prunable(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), Classifier()

    def distance(student: Tensor, output: Tensor, target: Tensor) -> Tensor:
        return (student - output).square().mean()

    modes = [part.training for part in model.modules()]
    loader, val_loader = _loader(), _loader()
    with torch.inference_mode(), unchanged(teacher, loader.dataset.tensors):
        result = compress.finetune(
            model, loader, epochs=1, teacher=teacher, losses=[distance], val_loader=val_loader, progress=False
        )
    assert [part.training for part in model.modules()] == modes
    assert result.best_accuracy is not None
    with torch.no_grad(), unchanged():
        compress.finetune(copy.deepcopy(model), loader, epochs=1, progress=False)


def test_training_of_tensors_that_cannot_be_trained_is_refused() -> None:
    with torch.inference_mode():
        model, loader = Classifier(), _loader()
    with pytest.raises(ValueError, match=r"model: Classifier was made under torch\.inference_mode"), unchanged(model):
        compress.finetune(model, loader, epochs=1, progress=False)


def test_saving_reads_only(tmp_path: Path) -> None:
    model = _prunable()
    with unchanged(model):
        compress.save(model, tmp_path / "plain")
        compress.record_of(model)
    other = nn.Sequential(nn.Conv2d(3, 16, 3))
    with pytest.raises(ValueError, match="not the architecture"), unchanged(other):
        compress.load(tmp_path / "plain", other)
