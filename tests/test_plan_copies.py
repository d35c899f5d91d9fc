"""Plans and emitted models copied, pickled and sent: equal ones, or an error that says what to send instead."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
import torch.multiprocessing
from emitting import FUSED_BACKENDS, emit_fused
from torch import Tensor, nn

import kernelpress as kp
from kernelpress.emit import Candidate, EmittedModel
from kernelpress.emit.plans import native_steps, streaming
from kernelpress.emit.plans.plan import Plan
from kernelpress.runtime import native


class Net(nn.Module):
    """Inputs in a container beside a number, operations of torch in between, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.table = nn.Embedding(4, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, image: dict[str, Tensor], index: Tensor, factor: float) -> dict[str, Tensor]:
        y = self.stem(image["x"]).relu().mean((2, 3)) * factor
        return {"logits": self.head(y + self.table(index)), "pooled": y}


def inputs() -> tuple[Any, ...]:
    x = torch.randn(2, 3, 6, 5).contiguous(memory_format=torch.channels_last)
    return {"x": x}, torch.tensor([1, 3]), 0.5


@pytest.fixture(scope="module", params=[*FUSED_BACKENDS, "onednn"])
def captured(request: pytest.FixtureRequest) -> tuple[EmittedModel, Plan]:
    emitted = emit_fused(Net().eval(), inputs(), request.param)
    return emitted, kp.capture(emitted, *inputs())


def by_processes(plan: Any) -> Any:
    """As a queue of `torch.multiprocessing` sends it, weights in shared memory."""
    return pickle.loads(ForkingPickler.dumps(plan))


def by_torch(plan: Any) -> Any:
    file = io.BytesIO()
    torch.save(plan, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda plan: pickle.loads(pickle.dumps(plan)),
    "queue": by_processes,
    "torch.save": by_torch,
}


def assert_equal(result: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(result) == set(expected)
    for name in expected:
        assert torch.equal(result[name], expected[name])


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
def test_a_copy_is_an_equal_plan(captured: tuple[EmittedModel, Plan], copied: Callable[[Any], Any]) -> None:
    _, plan = captured
    state = torch.get_rng_state()
    same = copied(plan)
    assert torch.equal(torch.get_rng_state(), state)
    assert (same.steps, same.chains, same.arena_bytes) == (plan.steps, plan.chains, plan.arena_bytes)
    for _ in range(2):
        given = inputs()
        assert_equal(same(*given), plan(*given))
    with pytest.raises(ValueError, match="shape"):
        same({"x": torch.randn(1, 3, 6, 5)}, *given[1:])


def test_a_deep_copy_has_a_model_of_its_own(captured: tuple[EmittedModel, Plan]) -> None:
    emitted, plan = captured
    both = copy.deepcopy({"model": emitted, "plan": plan})
    assert both["plan"].model is both["model"]
    assert copy.copy(plan).model is emitted
    given = inputs()
    expected = plan(*given)
    with torch.no_grad():
        for p in both["model"].parameters():
            p.zero_()
    assert_equal(plan(*given), expected)
    assert_equal(both["plan"](*given), expected)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps], ids=["copy", "deepcopy", "pickle"])
def test_a_plan_whose_model_was_given_other_weights_says_what_to_send(copied: Callable[[Any], Any]) -> None:
    emitted = emit_fused(Net().eval(), inputs(), FUSED_BACKENDS[-1])
    plan = kp.capture(emitted, *inputs())
    weight = next(p for p in emitted.parameters() if p.dim() == 4)
    value = weight.data.view(-1)[100].clone()
    weight.data.view(-1)[100] += 1.0
    with pytest.raises(TypeError, match=r"plan: cannot be copied or pickled.*send the emitted model, and capture it"):
        copied(plan)
    weight.data.view(-1)[100] = value
    copied(plan)


@pytest.mark.skipif(native.cpu() is None, reason="no native module")
def test_chains_are_kept_and_not_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def single_layers(candidate: Candidate) -> float:
        return len(candidate.nodes) * (
            1.0 if candidate.name in ("conv2d", "depthwise_conv2d", "pointwise_conv2d") else 9.0
        )

    model, x = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1)),
        torch.randn(1, 3, 9, 9),
    )
    emitted = kp.emit(model.eval(), x, cost=single_layers, progress=False)
    monkeypatch.setattr(streaming, "LEAST_BYTES", 1)
    monkeypatch.setattr(native_steps, "choose_chains", lambda *arguments: [(1, 3)])
    plan = kp.capture(emitted, x)
    assert [len(chain) for chain in plan.chains] == [2]
    monkeypatch.setattr(native_steps, "choose_chains", lambda *arguments: pytest.fail("timed again"))
    same = copy.deepcopy(plan)
    assert same.chains == plan.chains
    assert torch.equal(same(x), plan(x))
    monkeypatch.setattr(native.cpu(), "Plan", NeverJoins)
    assert pickle.loads(pickle.dumps(plan)).chains == [], (
        "a machine whose kernels cannot be joined runs them one by one"
    )


class NeverJoins:
    """A native plan that takes steps and joins none."""

    def __init__(self) -> None:
        self.count = 0

    def __getattr__(self, name: str) -> Callable[..., None]:
        def step(*arguments: int) -> None:
            self.count += name != "external"

        return step

    def __len__(self) -> int:
        return self.count

    def copy(self) -> NeverJoins:
        return NeverJoins()

    def join(self, first: int, last: int) -> bool:
        return False


@pytest.mark.slow
def test_a_plan_reaches_another_process(captured: tuple[EmittedModel, Plan]) -> None:
    _, plan = captured
    given = inputs()
    program = (
        "import pickle, sys; plan, given = pickle.load(sys.stdin.buffer); pickle.dump(plan(*given), sys.stdout.buffer)"
    )
    sent = pickle.dumps((plan, given))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], input=sent, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert_equal(pickle.loads(done.stdout), plan(*given))


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
def test_a_copy_of_an_emitted_model_computes_the_same(
    captured: tuple[EmittedModel, Plan], copied: Callable[[Any], Any]
) -> None:
    emitted, _ = captured
    given = inputs()
    with torch.no_grad():
        expected = emitted(*given)
        same = copied(emitted)
        assert_equal(same(*given), expected)
        if copied in (COPIES["copy"], COPIES["queue"]):
            return  # they share the weights
        for p in same.parameters():
            p.data.mul_(2)
        assert not torch.equal(same(*given)["logits"], expected["logits"])
        assert_equal(emitted(*given), expected)


@torch.no_grad()
def test_another_processs_writes_to_shared_weights_are_seen() -> None:
    emitted, x = emit_fused(nn.Conv2d(16, 16, 3).eval(), torch.randn(1, 16, 5, 5), FUSED_BACKENDS[-1]), None
    received, x = by_processes(emitted), torch.randn(1, 16, 5, 5)
    expected = [model(x) for model in (emitted, received)]
    for p in received.parameters():  # the same memory, other tensors: what the other process writes
        p.mul_(2)
    for model, before in zip((emitted, received), expected, strict=True):
        torch.testing.assert_close(model(x), 2 * before)
