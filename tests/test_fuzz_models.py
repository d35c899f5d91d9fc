"""Sixty random models and some calls of each: right, or refused with a reason. `make fuzz` tries 2,000."""

import os
from dataclasses import replace

import pytest
import torch
from modelfuzz import verdict
from modelfuzz.generator import draw
from modelfuzz.observing import Changed
from modelfuzz.program import Argument, Call, Program, Step
from modelfuzz.shrink import shrink, snippet
from modelfuzz.verdict import examine
from torch import nn

import kernelpress as kp
from kernelpress.emit import EmittedModel
from kernelpress.runtime import native

BUNDLES, MODELS = 6, 10

FIRST = int(os.environ.get("KERNELPRESS_TEST_SEED", "0")) * BUNDLES * MODELS
"""The same models in every run, so that none fails by chance; `make fuzz` draws others."""


@pytest.mark.slow
@pytest.mark.parametrize("bundle", range(BUNDLES))
def test_random_models_are_right_or_refused(bundle: int) -> None:
    for seed in range(FIRST + bundle * MODELS, FIRST + (bundle + 1) * MODELS):
        program = draw(seed)
        fault = examine(program, count=4).fault
        if fault is not None:
            pytest.fail(f"seed {seed}: {fault}\n\n{snippet(*shrink(program, fault, seconds=20.0))}")


PROGRAM = Program(
    0,
    (Argument("x", "torch.randn(2, 3, 6, 6)"),),
    {"conv1": ("self.conv1 = nn.Conv2d(3, 4, 3)",), "norm2": ("self.norm2 = nn.BatchNorm2d(4)",)},
    (
        Step("assert x.shape[2] == 6\nv2 = x * 1"),
        Step("v3 = self.conv1(v2)"),
        Step("v4 = self.norm2(v3)"),
        Step("v5 = v4 * x.shape[0]"),
        Step("v6 = v5.relu()"),
    ),
    "(v6, v5)",
)


def test_other_roundings_differ_from_trial_to_trial() -> None:
    examiner = verdict._Examiner(PROGRAM, PROGRAM.model(), [], ())
    results = examiner._perturbed(PROGRAM.example, 0, torch.empty(2, 4, 4, 4))
    assert len({tuple(result.flatten().tolist()) for result in results}) == verdict.TRIALS


def test_what_is_changed_goes_on_through_vmap() -> None:
    x = torch.full((3, 4), 2.0)
    with Changed(lambda value: value + 1):
        y = torch.vmap(lambda row: row * row.sum())(x) * 2
    assert torch.equal(y, torch.full((3, 4), 2 * 16.0 + 1))


def test_the_script_that_shows_a_fault_runs(one_thread: None, capsys: pytest.CaptureFixture[str]) -> None:
    module = native.cpu()
    program = PROGRAM if module is None else replace(PROGRAM, kernels=module.variant())
    exec(snippet(program, verdict.Fault("wrong", "numbers", PROGRAM.example)), {"__name__": "shown"})
    assert capsys.readouterr().out.count("tensor(") == 4, "both outputs of the model and of what is emitted"


def _other_weight(emitted: EmittedModel, model: nn.Module) -> None:
    with torch.no_grad():
        next(emitted.parameters()).mul_(1.001)


def _original_written(emitted: EmittedModel, model: nn.Module) -> None:
    with torch.no_grad():
        model.norm2.running_mean.add_(1)


def _no_contract(emitted: EmittedModel, model: nn.Module) -> None:
    object.__setattr__(emitted.contract, "check", lambda inputs: None)


def _random_numbers(emitted: EmittedModel, model: nn.Module) -> None:
    torch.rand(1)


def _crash(emitted: EmittedModel, model: nn.Module) -> None:
    emitted.register_forward_pre_hook(lambda module, inputs: {}["key"])


def _input_written(emitted: EmittedModel, model: nn.Module) -> None:
    def write(module: nn.Module, inputs: tuple[torch.Tensor], output: object) -> None:
        inputs[0].add_(1)

    emitted.register_forward_hook(write)


PLANTED = {
    "emitted: wrong numbers": _other_weight,
    "emit changes the model": _original_written,
    "emit changes torch's random state": _random_numbers,
    "emitted crashes": _crash,
    "emitted: writes to its inputs": _input_written,
    "emitted answers where the original raises": _no_contract,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLANTED)
def test_planted_faults_are_found_and_shrunk(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    emit = kp.emit

    def faulty(model: nn.Module, inputs: tuple[torch.Tensor, ...], **options: object) -> EmittedModel:
        emitted = emit(model, inputs, **options)
        PLANTED[kind](emitted, model)
        return emitted

    calls = [PROGRAM.example, Call("larger images", ("torch.randn(2, 3, 8, 8)",))]
    assert examine(PROGRAM, calls).fault is None
    monkeypatch.setattr(kp, "emit", faulty)
    fault = examine(PROGRAM, calls).fault
    assert fault is not None
    assert fault.kind.startswith(kind)
    smaller, same = shrink(PROGRAM, fault, seconds=30.0)
    assert same.kind == fault.kind
    assert len(smaller.steps) < len(PROGRAM.steps)
    assert smaller.source in snippet(smaller, same)
