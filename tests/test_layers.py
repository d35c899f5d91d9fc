"""Layers against the PyTorch modules they replace: values, gradients, state dicts, export, compilation, copies."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from support import assert_close, called_functions, channels_last, relative_error, run_compiled, with_random_norms
from torch import Tensor, nn

from kernelpress import ops
from kernelpress.kernels import reference
from kernelpress.layers import (
    Conv2d,
    DepthwiseConv2d,
    DepthwiseSeparableConv2d,
    InvertedResidual,
    Linear,
    PointwiseConv2d,
)


def conv_norm_act(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(c_out), nn.ReLU6(inplace=True))


class Bottleneck(nn.Module):
    """An inverted residual with the modules and names of torchvision's."""

    def __init__(self, c_in: int, hidden: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.use_res_connect = stride == 1 and c_in == c_out
        self.conv = nn.Sequential(
            conv_norm_act(c_in, hidden, 1),
            conv_norm_act(hidden, hidden, 3, stride, hidden),
            nn.Conv2d(hidden, c_out, 1, bias=False),
            nn.BatchNorm2d(c_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return x + y if self.use_res_connect else y


def separable(c_in: int = 6, c_out: int = 10) -> nn.Sequential:
    return nn.Sequential(*conv_norm_act(c_in, c_in, 3, 2, c_in), *conv_norm_act(c_in, c_out, 1))


REPLACED: dict[str, tuple[Callable[[], nn.Module], Callable[..., nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(6, 8, 3, 2, 1), Conv2d.from_dense, (2, 6, 9, 7)),
    "conv same, even kernel": (
        lambda: nn.Conv2d(6, 8, (4, 3), padding="same", dilation=(1, 2)),
        Conv2d.from_dense,
        (2, 6, 9, 7),
    ),
    "conv valid": (lambda: nn.Conv2d(6, 8, 3, padding="valid", bias=False), Conv2d.from_dense, (2, 6, 9, 7)),
    "conv in groups": (lambda: nn.Conv2d(6, 8, 3, groups=2), Conv2d.from_dense, (2, 6, 9, 7)),
    "conv, a group per channel": (lambda: nn.Conv2d(6, 12, 3, groups=6), Conv2d.from_dense, (2, 6, 9, 7)),
    "pointwise": (lambda: nn.Conv2d(6, 8, 1), PointwiseConv2d.from_dense, (2, 6, 5, 3)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 5, 2, 2, groups=6), DepthwiseConv2d.from_dense, (2, 6, 9, 7)),
    "depthwise same": (
        lambda: nn.Conv2d(6, 12, 2, padding="same", groups=6),
        DepthwiseConv2d.from_dense,
        (2, 6, 9, 7),
    ),
    "linear": (lambda: nn.Linear(6, 8), Linear.from_dense, (2, 3, 6)),
    "separable": (separable, DepthwiseSeparableConv2d.from_dense, (2, 6, 9, 7)),
    "inverted residual": (lambda: Bottleneck(6, 12, 6, 1), InvertedResidual.from_dense, (2, 6, 9, 7)),
    "inverted residual, stride 2": (lambda: Bottleneck(6, 12, 8, 2), InvertedResidual.from_dense, (2, 6, 9, 7)),
}
replaced = pytest.mark.parametrize("case", REPLACED.values(), ids=REPLACED)
Case = tuple[Callable[[], nn.Module], Callable[..., nn.Module], tuple[int, ...]]


@replaced
def test_from_dense_computes_what_the_module_did(case: Case) -> None:
    make, convert, shape = case
    module = with_random_norms(make())
    layer, x = convert(module), torch.randn(*shape)
    with torch.no_grad():
        expected = copy.deepcopy(module).double()(x.double())
        assert_close(layer(x), expected)
        assert_close(layer(x), expected)
    assert_close(layer(x).detach(), expected)
    assert not layer.training
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(layer.parameters(), module.parameters(), strict=True))


@replaced
def test_state_dicts_load_from_the_module_and_into_copies(case: Case) -> None:
    make, convert, shape = case
    layer, source = convert(make()).eval(), with_random_norms(make())
    layer.load_state_dict(source.state_dict())
    x = torch.randn(*shape)
    with torch.no_grad():
        assert_close(layer(x), source.double()(x.double()))
        before = set(layer.state_dict())
        layer(x)
        assert set(layer.state_dict()) == before
        saved = io.BytesIO()
        torch.save(layer, saved)
        saved.seek(0)
        for twin in (copy.deepcopy(layer), torch.load(saved, weights_only=False)):
            assert torch.equal(twin(x), layer(x))
            next(twin.parameters()).add_(1)
            assert not torch.equal(twin(x), layer(x))


@replaced
def test_layers_train_as_the_module_does(case: Case) -> None:
    make, convert, shape = case
    module = make().double().train()
    layer, x = convert(module), torch.randn(*shape, dtype=torch.float64)
    theirs, ours = module(x), layer(x)
    assert_close(ours, theirs)
    theirs.square().sum().backward()
    ours.square().sum().backward()
    for a, b in zip(layer.parameters(), module.parameters(), strict=True):
        assert a.grad is not None
        assert relative_error(a.grad, b.grad) < 1e-9
    for a, b in zip(layer.buffers(), module.buffers(), strict=True):
        assert torch.allclose(a, b)


@replaced
def test_evaluation_follows_an_optimiser_step_and_changed_statistics(case: Case) -> None:
    make, convert, shape = case
    layer, x = convert(with_random_norms(make())), torch.randn(*shape)
    with torch.no_grad():
        layer(x)
    optimiser = torch.optim.SGD(layer.parameters(), lr=1e-2)
    layer.train()(x).square().mean().backward()
    optimiser.step()
    expected = copy.deepcopy(layer).eval().double()
    for p in expected.parameters():
        p.requires_grad_()
    with torch.no_grad():
        assert_close(layer.eval()(x), expected.requires_grad_(True)(x.double()))


@replaced
def test_export_is_portable_aten_with_dynamic_batch(case: Case) -> None:
    make, convert, shape = case
    layer = convert(with_random_norms(make()))
    for strict in (False, True):
        dynamic = ({0: torch.export.Dim("batch")},)
        exported = torch.export.export(layer, (torch.randn(*shape),), dynamic_shapes=dynamic, strict=strict)
        targets = called_functions(exported.graph)
        assert not any("kernelpress" in target for target in targets), targets
        x = torch.randn(5, *shape[1:])
        assert_close(exported.module()(x).detach(), layer.double()(x.double()).detach())
        layer.float()


@replaced
def test_torch_compile_calls_the_op_without_graph_breaks(case: Case) -> None:
    make, convert, shape = case
    layer, x = convert(with_random_norms(make())), torch.randn(*shape)
    with torch.no_grad():
        out, called = run_compiled(layer, x)
        assert_close(out, layer(x))
    assert any("kernelpress" in target for target in called), called
    assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x).detach(), layer(x).detach())


@replaced
def test_symbolic_trace_reads_plain_pytorch(case: Case) -> None:
    make, convert, shape = case
    layer, x = convert(with_random_norms(make())), torch.randn(*shape)
    traced = torch.fx.symbolic_trace(nn.Sequential(layer))
    assert not [node for node in traced.graph.nodes if "kernelpress" in str(node.target)]
    assert_close(traced(x).detach(), layer(x).detach())


@replaced
def test_dtype_autocast_and_meta(case: Case) -> None:
    make, convert, shape = case
    layer, x = convert(with_random_norms(make())), torch.randn(*shape)
    with torch.no_grad():
        expected = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert relative_error(layer(x), expected) < 0.05
        assert relative_error(layer.to(torch.bfloat16)(x.bfloat16()), expected) < 0.05
        assert layer.to("meta")(x.bfloat16().to("meta")).shape == expected.shape


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activation_residual_and_input_scale(activation: str) -> None:
    x, y, s = channels_last(2, 6, 5, 5), channels_last(2, 6, 5, 5), torch.rand(2, 6)
    layers: list[tuple[nn.Module, tuple[Tensor, ...]]] = [
        (Conv2d(6, 6, 3, padding=1, activation=activation), (x, y)),
        (PointwiseConv2d(6, 6, activation=activation), (x, y, s)),
        (DepthwiseConv2d(6, 3, padding=1, activation=activation), (x, y)),
        (DepthwiseSeparableConv2d(6, 6, padding=1, depthwise_activation=activation, activation=activation), (x, y)),
        (Linear(5, 5, activation=activation), (x, y)),
    ]
    for layer, inputs in layers:
        expected = layer.double()(*[t.double() for t in inputs]).detach()
        with torch.no_grad():
            assert_close(layer.float()(*inputs), expected)
        assert f"activation={activation}" in repr(layer) or activation in repr(layer)


def test_group_norm_between_the_convolutions_is_not_folded() -> None:
    layer = DepthwiseSeparableConv2d(6, 8, padding=1, norm_layer=lambda channels: nn.GroupNorm(2, channels)).eval()
    x = torch.randn(2, 6, 5, 5)
    with torch.no_grad():
        assert_close(layer(x), copy.deepcopy(layer).double()(x.double()))


def test_training_norms_use_the_statistics_of_the_batch_without_gradients_too() -> None:
    block = separable()
    layer, x = DepthwiseSeparableConv2d.from_dense(block), torch.randn(4, 6, 8, 8)
    with torch.no_grad():
        assert_close(layer.train()(x), block.double().train()(x.double()))
    assert torch.allclose(layer.depthwise_norm.running_mean.double(), block[1].running_mean)


def test_frozen_layers_call_the_op_with_gradients_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    original = ops.pointwise_conv2d
    monkeypatch.setattr(ops, "pointwise_conv2d", lambda *args, **kwargs: called.append(1) or original(*args, **kwargs))
    layer = PointwiseConv2d(4, 4)
    layer(torch.randn(1, 4, 3, 3))
    assert not called
    layer.requires_grad_(False)(torch.randn(1, 4, 3, 3))
    assert called


REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "padding mode": (lambda: Conv2d(4, 4, 3, padding_mode="reflect"), ValueError, "padding_mode: expected 'zeros'"),
    "activation": (lambda: Linear(4, 4, activation="elu"), ValueError, "activation: expected one of identity"),
    "multiplier": (lambda: DepthwiseConv2d(4, 3, channel_multiplier=0), ValueError, "channel_multiplier: expected"),
    "not pointwise": (lambda: PointwiseConv2d.from_dense(nn.Conv2d(4, 4, 3)), ValueError, "module: expected a 1×1"),
    "not depthwise": (lambda: DepthwiseConv2d.from_dense(nn.Conv2d(4, 4, 3)), ValueError, "groups = in_channels"),
    "not a convolution": (
        lambda: Conv2d.from_dense(nn.Linear(4, 4)),
        TypeError,
        "expected torch.nn.Conv2d, got Linear",
    ),
    "circular block": (
        lambda: DepthwiseSeparableConv2d.from_dense(
            nn.Sequential(nn.Conv2d(4, 4, 3, groups=4, padding_mode="circular"), nn.Conv2d(4, 4, 1))
        ),
        ValueError,
        "with circular padding",
    ),
    "foreign module": (
        lambda: DepthwiseSeparableConv2d.from_dense(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.MaxPool2d(2))),
        ValueError,
        "got MaxPool2d.* at '1'",
    ),
    "two stages": (
        lambda: InvertedResidual.from_dense(separable()),
        ValueError,
        "block: expected convolutions pointwise",
    ),
    "norm after one": (
        lambda: DepthwiseSeparableConv2d.from_dense(
            nn.Sequential(*conv_norm_act(4, 4, 3, 1, 4), nn.Conv2d(4, 4, 1, bias=False))
        ),
        ValueError,
        "a BatchNorm after every convolution or after none",
    ),
    "residual of stride 2": (
        lambda: InvertedResidual(4, 8, 4, stride=2, residual=True),
        ValueError,
        "residual: expected stride 1",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_a_bad_argument_is_named(case: tuple[Callable[[], object], type[Exception], str]) -> None:
    call, error, message = case
    with pytest.raises(error, match=message):
        call()


def test_one_activation_module_used_twice_counts_twice() -> None:
    act = nn.ReLU()
    block = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), act, nn.Conv2d(4, 4, 1), act)
    layer, x = DepthwiseSeparableConv2d.from_dense(block), torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        assert_close(layer(x), block.double()(x.double()))


def test_a_block_loads_inside_a_model_under_a_prefix() -> None:
    theirs = nn.Sequential(with_random_norms(Bottleneck(6, 12, 6, 1)), nn.Conv2d(6, 4, 1)).eval()
    ours = nn.Sequential(
        InvertedResidual(6, 12, 6, bias=False, norm_layer=nn.BatchNorm2d), PointwiseConv2d(6, 4)
    ).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 6, 7, 7)
    with torch.no_grad():
        assert_close(ours(x), theirs.double()(x.double()))
    with pytest.raises(RuntimeError, match="Missing key"):
        ours.load_state_dict(nn.Sequential(separable(), nn.Conv2d(6, 4, 1)).state_dict())
