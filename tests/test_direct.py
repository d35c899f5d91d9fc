"""Emitted models run without the dispatcher: when they do, when they must not, and what they notice."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from emitting import FUSED_BACKENDS, emit_fused
from support import assert_close, with_random_norms
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import kernelpress as kp
from kernelpress import ops
from kernelpress.emit import EmittedModel
from kernelpress.emit.direct import Direct
from kernelpress.ops import registry
from kernelpress.ops.calls import prepared
from kernelpress.runtime import native
from kernelpress.runtime.torch_private import OpOverload, TorchDispatchMode, neg_view


class Net(nn.Module):
    """Convolutions, a residual, a torch operation in between, a weight used twice, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        y = self.twice(y) + y
        y = self.twice(torch.flip(y, (2,))).relu()
        return self.head(y.mean((2, 3)))


def image(batch: int = 2, size: int = 6) -> Tensor:
    return torch.randn(batch, 3, size, size)


@pytest.fixture(params=FUSED_BACKENDS)
def pair(request: pytest.FixtureRequest) -> tuple[EmittedModel, nn.Module]:
    model = with_random_norms(Net())
    return emit_fused(model, image(), request.param), model


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each run of an emitted model without the dispatcher."""
    seen: list[Any] = []
    may_run = Direct.may_run

    def counted(self: Direct, *given: Any) -> bool:
        answer = may_run(self, *given)
        seen.extend([self] if answer else [])
        return answer

    monkeypatch.setattr(Direct, "may_run", counted)
    return seen


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_runs_compute_what_the_graph_does(
    pair: tuple[EmittedModel, nn.Module], mode: Callable[[], Any], runs: list[Any]
) -> None:
    emitted, _ = pair
    with mode():
        nhwc = image().contiguous(memory_format=torch.channels_last)
        for x in (image(), image(), image(3), image(1), nhwc, image(2, 12)[:, :, ::2, ::2]):
            assert torch.equal(emitted(x), emitted.body(x))
    assert len(runs) == 6


def test_no_call_goes_through_the_dispatcher(pair: tuple[EmittedModel, nn.Module]) -> None:
    emitted, _ = pair
    overloads = {n.target for n in emitted.body.graph.nodes if getattr(n.target, "namespace", "") == "kernelpress"}
    code = Direct.of(emitted.body).forward.__globals__
    assert overloads
    assert overloads.isdisjoint(value for value in code.values() if isinstance(value, OpOverload))


@pytest.mark.parametrize(
    "change",
    [
        lambda conv: conv.weight.mul_(2),
        lambda conv: conv.bias.add_(1),
        lambda conv: setattr(conv.weight, "data", torch.randn_like(conv.weight)),
        lambda conv: setattr(conv, "weight", nn.Parameter(torch.randn_like(conv.weight), requires_grad=False)),
        lambda conv: conv.load_state_dict({k: torch.randn_like(v) for k, v in conv.state_dict().items()}),
        lambda conv: conv.load_state_dict({k: torch.randn_like(v) for k, v in conv.state_dict().items()}, assign=True),
        lambda conv: torch.nn.utils.parametrize.register_parametrization(conv, "weight", nn.Tanh()),
    ],
    ids=["in place", "bias in place", "data", "parameter", "loaded", "assigned", "parametrized"],
)
def test_changed_weights_are_noticed(pair: tuple[EmittedModel, nn.Module], change: Callable[[Any], object]) -> None:
    emitted, model = pair
    x = image()
    with torch.no_grad():
        before = emitted(x)
        state = torch.random.get_rng_state()
        change(emitted.body.get_submodule("twice"))
        torch.random.set_rng_state(state)
        change(model.get_submodule("twice"))
        for _ in range(2):
            assert_close(emitted(x), copy.deepcopy(model).double()(x.double()))
        assert not torch.equal(emitted(x), before)


def test_the_state_dict_is_that_of_the_body(pair: tuple[EmittedModel, nn.Module]) -> None:
    emitted, model = pair
    names = {f"body.{name}" for name in model.state_dict()}
    emitted(image())
    assert set(emitted.state_dict()) == names
    assert [type(m).__name__ for m in emitted.children()] == [type(emitted.body).__name__]


def test_copies_run_on_parameters_of_their_own(pair: tuple[EmittedModel, nn.Module], runs: list[Any]) -> None:
    emitted, _ = pair
    x = image()
    with torch.no_grad():
        expected = emitted(x)
        twin = copy.deepcopy(emitted)
        assert torch.equal(twin(x), expected)
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(twin(x), torch.zeros_like(expected))
        assert torch.equal(emitted(x), expected)
    assert len(runs) == 4


def test_a_model_that_has_run_can_be_pickled(pair: tuple[EmittedModel, nn.Module]) -> None:
    emitted, _ = pair
    x = image()
    expected = emitted(x)
    assert torch.equal(pickle.loads(pickle.dumps(emitted))(x), expected)


def test_a_model_in_another_dtype_is_another_model() -> None:
    emitted, x = emit_fused(with_random_norms(Net()), image(), "reference"), image()
    emitted(x)
    with pytest.raises(ValueError, match=r"x: expected torch\.float32 as exported, got torch\.float64"):
        emitted.to(torch.float64)(x.double())
    with pytest.raises(TypeError, match=r"weight: expected the dtype of x, torch\.float32"):
        emitted(x)


def test_gradients_of_inputs_and_of_unfrozen_weights(pair: tuple[EmittedModel, nn.Module]) -> None:
    emitted, model = pair
    x = image()
    emitted(x)
    given = x.clone().requires_grad_()
    emitted(given).square().sum().backward()
    theirs = x.clone().requires_grad_()
    model(theirs).square().sum().backward()
    assert given.grad is not None
    torch.testing.assert_close(given.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    emitted.requires_grad_(True)
    emitted(x).square().sum().backward()
    weight = emitted.body.get_submodule("twice").weight
    torch.testing.assert_close(weight.grad, model.get_submodule("twice").weight.grad, rtol=1e-4, atol=1e-5)


def test_modes_hooks_traces_and_compilers_see_every_operation(
    pair: tuple[EmittedModel, nn.Module], runs: list[Any]
) -> None:
    emitted, _ = pair
    x = image()

    class Listen(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.heard: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.heard.append(func.namespace)
            return func(*args, **(kwargs or {}))

    with torch.no_grad():
        expected = emitted(x)
        runs.clear()
        with Listen() as listen:
            assert torch.equal(emitted(x), expected)
        assert "kernelpress" in listen.heard
        with FlopCounterMode(display=False) as flops:
            emitted(x)
        assert flops.get_total_flops() > 0
        with torch.autograd.profiler.profile() as profile:
            emitted(x)
        assert any("kernelpress::" in event.key for event in profile.key_averages())
        exported = torch.export.export(emitted, (x,), strict=False)
        assert torch.equal(exported.module()(x), expected)
        assert any("kernelpress" in str(node.target) for node in exported.graph.nodes)
        compiled = torch.compile(emitted, backend="aot_eager", fullgraph=True)
        assert_close(compiled(x), expected.double())
        hooked: list[nn.Module] = []
        handle = emitted.body.register_forward_hook(lambda module, *_: hooked.append(module))
        emitted(x)
        handle.remove()
        assert hooked == [emitted.body]
    assert not runs


def test_an_edited_graph_is_run_as_edited(pair: tuple[EmittedModel, nn.Module]) -> None:
    emitted, _ = pair
    x = image()
    before = emitted(x)
    graph = emitted.body.graph
    (out,) = (node for node in graph.nodes if node.op == "output")
    last = out.all_input_nodes[0]
    with graph.inserting_before(out):
        negated = graph.call_function(torch.neg, (last,))
    out.replace_input_with(last, negated)
    emitted.body.recompile()
    assert torch.equal(emitted(x), -before)


def test_a_saved_model_is_bound_after_loading(
    pair: tuple[EmittedModel, nn.Module], tmp_path: Any, runs: list[Any]
) -> None:
    emitted, _ = pair
    x = image()
    expected = emitted(x)
    emitted.save(tmp_path / "m.pt2")
    loaded = kp.load(tmp_path / "m.pt2")
    assert torch.equal(loaded(x), expected)
    assert runs[-1] is loaded._direct


def test_use_backend_leaves_the_measured_choice_alone(pair: tuple[EmittedModel, nn.Module]) -> None:
    emitted, _ = pair
    x = image()
    expected = emitted(x)
    with ops.use_backend("onednn"):
        assert torch.equal(emitted(x), expected)


def test_use_backend_holds_for_operations_that_leave_it_open(monkeypatch: pytest.MonkeyPatch) -> None:
    emitted = emit_fused(nn.Conv2d(3, 4, 3).eval(), image(), "reference")
    for node in emitted.body.graph.nodes:
        if node.op == "call_function":
            node.kwargs = {**node.kwargs, "backend": "auto"}
    emitted.body.recompile()
    asked: list[str] = []
    resolve = registry.resolve.__wrapped__

    def listening(*given: Any) -> Any:
        asked.append(given[-1])
        return resolve(*given)

    listening.cache_clear = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setattr(prepared, "resolve", listening)
    prepared.clear()
    emitted(image())
    with ops.use_backend("reference"):
        emitted(image())
    assert asked == ["auto", "reference"]


def test_clearing_prepared_calls_asks_again(
    pair: tuple[EmittedModel, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    emitted, _ = pair
    asked: list[Any] = []
    prepare = prepared.prepare
    monkeypatch.setattr(prepared, "prepare", lambda *given: asked.append(given) or prepare(*given))
    x = image()
    prepared.clear()
    emitted(x)
    count = len(asked)
    assert count > 0
    emitted(x)
    assert len(asked) == count
    prepared.clear()
    emitted(x)
    assert len(asked) == 2 * count


def test_nan_and_bad_inputs(pair: tuple[EmittedModel, nn.Module]) -> None:
    emitted, model = pair
    x = image()
    emitted(x)
    x[0, 0, 2, 2] = torch.nan
    assert torch.equal(emitted(x).isnan(), model(x).isnan())
    with pytest.raises(ValueError, match=r"x\.shape\[1\]: expected 3 as exported, got 4"):
        emitted(torch.randn(2, 4, 6, 6))
    with pytest.raises(ValueError, match=r"x: expected torch\.float32 as exported, got torch\.float64"):
        emitted(x.double())
    negative = neg_view(image())
    assert torch.equal(emitted(negative), emitted(negative.clone().contiguous()))


def test_threads_with_their_own_shapes_share_a_model(pair: tuple[EmittedModel, nn.Module]) -> None:
    emitted, _ = pair
    images = [image(1 + i) for i in range(6)]
    expected = [emitted.body(x) for x in images]
    failures: list[BaseException] = []

    def work(offset: int) -> None:
        try:
            for i in range(60):
                at = (i + offset) % len(images)
                assert torch.equal(emitted(images[at]), expected[at])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


@pytest.mark.skipif(native.cpu() is None, reason="no native module")
def test_another_instruction_set_packs_anew() -> None:
    module = native.cpu()
    emitted, x, before = emit_fused(with_random_norms(Net()), image(), "cpu"), image(), module.variant()
    expected = emitted(x)
    try:
        for variant in module.variants() * 2:
            module.select(variant)
            torch.testing.assert_close(emitted(x), expected, rtol=1e-4, atol=1e-5)
    finally:
        module.select(before)


def test_inputs_in_containers() -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, inputs: dict[str, Tensor], other: Tensor) -> dict[str, Tensor]:
            return {"sum": self.conv(inputs["x"]) + self.conv(other)}

    model = Pairs().eval()
    x, y = image(), image()
    emitted = emit_fused(model, ({"x": x}, y))
    x.requires_grad_()
    emitted({"x": x}, y)["sum"].sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(emitted({"x": x}, y)["sum"], model({"x": x}, y)["sum"], rtol=1e-4, atol=1e-5)


def test_a_model_made_under_inference_mode() -> None:
    model = with_random_norms(Net())
    with torch.inference_mode():
        emitted = copy.deepcopy(emit_fused(model, image(), FUSED_BACKENDS[-1]))
        x = image()
        assert torch.equal(emitted(x), emitted.body(x))
        assert torch.equal(emitted(x), emitted.body(x))
