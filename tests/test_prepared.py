"""Prepared calls recalled natively: when they are, when they must not be, and what holds without that."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from emitting import emit_fused
from support import assert_close, channels_last, expected_output, with_random_norms
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kernelpress import ops
from kernelpress.ops import registry
from kernelpress.ops.calls import prepared
from kernelpress.runtime import native
from kernelpress.runtime.snapshot import Snapshot
from kernelpress.runtime.torch_private import TensorBase, TorchDispatchMode, efficient_zero_tensor, neg_view

recalls_natively = pytest.mark.skipif(
    not native.load().reads_tensors, reason="no native module, or a torch that publishes no DLPack exchange"
)


class Recall:
    """A call of `pointwise_conv2d`, and whether its last run was recalled natively, without the dispatcher."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.x = channels_last(2, 6, 3, 4)
        self.weight = nn.Parameter(torch.randn(6, 6, 1, 1), requires_grad=False)
        self.bias: Tensor | None = torch.randn(6)
        self.options: dict[str, Any] = {}
        self.recalled = False
        attempt, run = prepared.attempt, prepared.run

        def watched(*given: Any) -> Tensor | None:
            y = attempt(*given)
            self.recalled = y is not None
            return y

        def run_by_the_dispatcher(*given: Any) -> Tensor:
            y = run(*given)
            self.recalled = False
            return y

        monkeypatch.setattr(prepared, "attempt", watched)
        monkeypatch.setattr(prepared, "run", run_by_the_dispatcher)

    def run(self) -> Tensor:
        self.recalled = False
        return ops.pointwise_conv2d(self.x, self.weight, self.bias, **self.options)

    def check(self) -> None:
        """A run's values are those of the reference."""
        y = self.run()
        options = {name: value for name, value in self.options.items() if name != "backend"}
        tensors = tuple(t if t is None else t.detach().resolve_neg() for t in (self.x, self.weight, self.bias))
        assert_close(y.detach(), expected_output("pointwise_conv2d", tensors, **options))


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Recall:
    made = Recall(monkeypatch)
    made.check()
    return made


@recalls_natively
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_second_call_is_recalled(call: Recall, mode: Callable[[], Any]) -> None:
    with mode():
        assert not call.run().requires_grad
        assert call.recalled
        call.x = call.x.clone()
        call.check()
        assert call.recalled


class Subclass(Tensor):
    pass


CHANGES: dict[str, Callable[[Recall], object]] = {
    "x of another size": lambda c: setattr(c, "x", channels_last(2, 6, 3, 5)),
    "x of other strides": lambda c: setattr(c, "x", torch.randn(2, 6, 3, 4)),
    "x a channel slice": lambda c: setattr(c, "x", channels_last(2, 9, 3, 4)[:, 2:8]),
    "x of no element": lambda c: setattr(c, "x", channels_last(0, 6, 3, 4)),
    "x of a subclass": lambda c: setattr(c, "x", c.x.as_subclass(Subclass)),
    "x with a negative bit": lambda c: setattr(c, "x", neg_view(c.x)),
    "x wants a gradient": lambda c: c.x.requires_grad_(),
    "weight wants a gradient": lambda c: c.weight.requires_grad_(),
    "weight written to": lambda c: c.weight.mul_(2),
    "weight of other data": lambda c: setattr(c.weight, "data", torch.randn_like(c.weight)),
    "weight transposed": lambda c: setattr(c.weight, "data", c.weight.data.transpose(0, 1)),
    "weight cut": lambda c: (setattr(c.weight, "data", c.weight.data[:5]), setattr(c, "bias", None)),
    "another weight": lambda c: setattr(c, "weight", c.weight * 2),
    "bias written to": lambda c: c.bias.add_(1),
    "another bias": lambda c: setattr(c, "bias", torch.randn(6)),
    "no bias": lambda c: setattr(c, "bias", None),
    "another option": lambda c: c.options.update(activation="relu"),
    "another backend": lambda c: c.options.update(backend="reference"),
    "everything forgotten": lambda c: prepared.clear(),
}


@recalls_natively
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_other_calls_are_not_recalled(call: Recall, change: Callable[[Recall], object]) -> None:
    call.run()
    assert call.recalled
    change(call)
    call.check()
    assert not call.recalled
    call.check()


@recalls_natively
def test_a_gradient_is_wanted_only_where_gradients_are_on(call: Recall) -> None:
    call.weight.requires_grad_()
    assert call.run().requires_grad
    assert not call.recalled
    with torch.no_grad():
        assert not call.run().requires_grad
        assert call.recalled


@recalls_natively
def test_a_forced_backend_is_asked_for_anew(call: Recall) -> None:
    with ops.use_backend("reference"):
        call.check()
        assert not call.recalled
    call.check()
    assert call.recalled


class DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@recalls_natively
@pytest.mark.parametrize("mode", [DispatchMode, FunctionMode, torch.autograd.profiler.profile])
def test_what_listens_hears_every_call(call: Recall, mode: Callable[[], Any]) -> None:
    call.run()
    assert call.recalled
    with mode():
        call.check()
        assert not call.recalled


@recalls_natively
def test_transforms_see_every_call(call: Recall) -> None:
    batched = torch.stack([call.x, 2 * call.x])
    results = torch.func.vmap(lambda x: ops.pointwise_conv2d(x, call.weight, call.bias))(batched)
    for x, y in zip(batched, results, strict=True):
        assert_close(y, expected_output("pointwise_conv2d", (x, call.weight, call.bias)))
    assert not call.recalled


@recalls_natively
def test_a_tensor_without_memory_is_not_recalled(call: Recall) -> None:
    """Its address is null, and a kernel would read there."""
    zeros = efficient_zero_tensor(2, 6, 3, 4)
    table, snapshot = native.cpu().CallTable((0,)), Snapshot((None, call.weight))
    assert table.remember((zeros, call.weight), (), "auto", len, snapshot) is None
    assert table((zeros, call.weight), (), "auto") is None


@recalls_natively
def test_a_table_forgets_calls_whose_parameters_are_dead() -> None:
    table, x, weight = native.cpu().CallTable((0,)), torch.randn(2), torch.randn(3)

    class Run:
        def __call__(self, tensors: Any) -> int:
            return len(tensors)

    run = Run()
    gone = weakref.ref(run)
    word = table.remember((x, weight, None), ("relu",), "cpu", run, Snapshot((None, weight, None)))
    del run
    assert table((x, weight, None), ("relu",), "cpu") == 3
    table.forget(word)
    assert table((x, weight, None), ("relu",), "cpu") == 3
    assert table((x, weight, weight), ("relu",), "cpu") is None
    assert table((x, None, weight), ("relu",), "cpu") is None
    assert table((x, weight), ("relu",), "cpu") is None
    assert table((x, weight, None), (["relu"],), "cpu") is None
    assert table((x, weight, None), ("relu",), "auto") is None
    del weight
    table.forget(word)
    assert gone() is None


@pytest.mark.skipif(native.cpu() is None, reason="no native module")
def test_bad_kernel_calls_are_refused() -> None:
    kernel_call, form = native.cpu().KernelCall, torch.empty(1)
    with pytest.raises(ValueError, match="expected a kernel, got 'conv9d'"):
        kernel_call("conv9d", (), 0, (), (), torch.empty_like, form)
    with pytest.raises(TypeError, match="global_avg_pool2d: expected 6 integers, got 2"):
        kernel_call("global_avg_pool2d", (0, 0), 1, ((0, 0),), (), torch.empty_like, form)
    with pytest.raises(ValueError, match="expected words below 6"):
        kernel_call("global_avg_pool2d", (0,) * 6, 9, ((0, 0),), (), torch.empty_like, form)
    ready = kernel_call("global_avg_pool2d", (0,) * 6, 1, ((0, 0),), (), torch.empty_like, form)
    with pytest.raises(ValueError, match="tensors: expected more than 0, got 0"):
        ready([])


@recalls_natively
def test_kernels_run_where_torch_publishes_no_exchange() -> None:
    module, x, weight = native.cpu(), channels_last(1, 4, 3, 3), torch.randn(6, 4, 1, 1)
    operator = registry.operator("pointwise_conv2d")
    tensors = (x, weight, None, None, None, None)
    try:
        assert not module.read_tensors(TensorBase, nn.Parameter, torch.is_grad_enabled)
        for _ in range(2):
            assert prepared.attempt(operator, tensors, ("identity",), "cpu") is None
            y = ops.pointwise_conv2d(x, weight, backend="cpu")
            assert_close(y, expected_output("pointwise_conv2d", (x, weight)))
    finally:
        assert module.read_tensors(torch.Tensor, nn.Parameter, torch.is_grad_enabled)


CONV_CHANGES: dict[str, Callable[[nn.Conv2d], object]] = {
    "in place": lambda conv: conv.weight.mul_(2),
    "data": lambda conv: setattr(conv.weight, "data", torch.ones_like(conv.weight)),
    "transposed": lambda conv: setattr(conv.weight, "data", conv.weight.data.transpose(0, 1)),
    "replaced": lambda conv: setattr(conv, "weight", nn.Parameter(torch.ones_like(conv.weight), requires_grad=False)),
}


@pytest.mark.parametrize("change", CONV_CHANGES.values(), ids=CONV_CHANGES.keys())
def test_emitted_models_notice_changed_parameters(change: Callable[[nn.Conv2d], object]) -> None:
    model, x = (
        with_random_norms(nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3))),
        channels_last(1, 6, 5, 5),
    )
    emitted = emit_fused(model, x)
    with torch.no_grad():
        before = emitted(x)
        assert torch.equal(emitted(x), before)
        change(emitted.body.get_submodule("0"))
        change(model[0])
        for _ in range(2):
            assert_close(emitted(x), model.double()(x.double()))
            model.float()


def test_a_model_that_its_own_parameter_refers_to_is_collected() -> None:
    emitted = emit_fused(with_random_norms(nn.Conv2d(3, 4, 3)), torch.randn(1, 3, 6, 6))
    emitted(torch.randn(1, 3, 6, 6))
    next(emitted.parameters()).owner = emitted
    gone = weakref.ref(emitted)
    del emitted
    gc.collect()
    assert gone() is None
