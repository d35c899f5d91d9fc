"""Grouped convolution, channel shuffle and the shuffle units: ops against float64, layers against PyTorch's modules."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import (
    MAKERS,
    Maker,
    assert_close,
    assert_matches,
    channel_slice,
    channels_last,
    relative_error,
    run_compiled,
    run_native,
    with_random_norms,
)
from torch import Tensor, nn

from kernelpress import ops
from kernelpress.kernels import reference
from kernelpress.kernels.reference import ACTIVATIONS
from kernelpress.layers import ChannelShuffle, GroupedConv2d, ShuffleUnit, ShuffleUnitV2

many = settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
in_place = (channels_last, channel_slice)


@st.composite
def grouped_convolutions(draw: st.DrawFn) -> dict[str, Any]:
    groups = draw(st.sampled_from([1, 2, 3, 4, 9]))
    per_group = draw(st.sampled_from([1, 2, 3, 8, 19]))
    out_per_group = draw(st.sampled_from([1, 2, 6, 17, 40]))
    c_out = groups * out_per_group
    kernel = draw(st.sampled_from([(1, 1), (1, 1), (3, 3), (2, 5)]))
    return {
        "groups": groups,
        "shuffle": draw(st.sampled_from([divisor for divisor in (1, 2, 3, 4, c_out) if c_out % divisor == 0])),
        "channels": groups * per_group,
        "c_out": c_out,
        "kernel": kernel,
        "stride": draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 3)])),
        "padding": draw(st.one_of(st.just((0, 0)), st.tuples(st.integers(0, 2), st.integers(0, 3)))),
        "dilation": draw(st.sampled_from([(1, 1), (2, 1)])),
        "size": (draw(st.integers(5, 9)), draw(st.integers(5, 9))),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "parts": draw(st.tuples(st.booleans(), st.booleans(), st.booleans())),
        "make": draw(st.sampled_from(MAKERS)),
    }


def drawn(case: dict[str, Any]) -> tuple[list[Tensor | None], dict[str, Any]]:
    """Tensors and options of a case."""
    c_out, (has_bias, has_scale, has_residual) = case["c_out"], case["parts"]
    tensors = [
        case["make"](2, case["channels"], *case["size"]),
        torch.randn(c_out, case["channels"] // case["groups"], *case["kernel"]),
        torch.randn(c_out) if has_bias else None,
        torch.rand(c_out) + 0.5 if has_scale else None,
        None,
    ]
    options = {name: case[name] for name in ("stride", "padding", "dilation", "groups", "shuffle", "activation")}
    if has_residual:
        tensors[4] = channel_slice(*ops.allocate("grouped_conv2d", tensors, options).shape)
    return tensors, options


@pytest.mark.parametrize("backend", ["reference", "onednn"])
@settings(max_examples=40)
@given(case=grouped_convolutions(), seeds=st.random_module())
def test_grouped_of_any_geometry(backend: str, case: dict[str, Any], seeds: object) -> None:
    tensors, options = drawn(case)
    reason = ops.why_not("grouped_conv2d", *tensors, **options)[backend]
    if reason is None:
        assert_matches("grouped_conv2d", tensors, options, ops.grouped_conv2d(*tensors, **options, backend=backend))
    else:
        assert tensors[4] is not None or "computes wrongly" in reason


@many
@given(case=grouped_convolutions(), seeds=st.random_module())
def test_native_grouped_of_any_geometry_writes_its_channels_only(
    cpu_variant: str, case: dict[str, Any], seeds: object
) -> None:
    tensors, options = drawn(case)
    outputs = [ops.grouped_conv2d(*tensors, **options, backend="cpu")]
    if case["make"] in in_place:
        outputs.append(run_native("grouped_conv2d", tensors, **options))
    assert_matches("grouped_conv2d", tensors, options, *outputs)


@many
@given(
    width=st.sampled_from([2, 4, 8]),
    groups=st.sampled_from([2, 3, 4, 7, 13]),
    size=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    stride=st.sampled_from([(1, 1), (2, 2)]),
    padding=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    activation=st.sampled_from(ACTIVATIONS),
    parts=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    make=st.sampled_from(MAKERS),
    seeds=st.random_module(),
)
def test_native_3x3_in_narrow_groups(
    cpu_variant: str,
    width: int,
    groups: int,
    size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    activation: str,
    parts: tuple[bool, ...],
    make: Maker,
    seeds: object,
) -> None:
    case = {"channels": width * groups, "c_out": width * groups, "kernel": (3, 3), "dilation": (1, 1), "shuffle": 1}
    geometry = {"groups": groups, "size": size, "stride": stride, "padding": padding, "activation": activation}
    tensors, options = drawn({**case, **geometry, "parts": parts, "make": make})
    outputs = [ops.grouped_conv2d(*tensors, **options, backend="cpu")]
    if make in in_place:
        outputs.append(run_native("grouped_conv2d", tensors, **options))
    assert_matches("grouped_conv2d", tensors, options, *outputs)


@pytest.mark.parametrize("kernel", [1, 3])
def test_native_grouped_maps_larger_than_the_cache_run_by_steps(cpu_variant: str, kernel: int) -> None:
    tensors = [
        channels_last(1, 96, 57, 56),
        torch.randn(240, 32, kernel, kernel),
        None,
        None,
        channels_last(1, 240, 57, 56),
    ]
    for shuffle in (1, 3):
        options = {"padding": (kernel // 2, kernel // 2), "groups": 3, "shuffle": shuffle, "activation": "relu"}
        out = ops.grouped_conv2d(*tensors, **options, backend="cpu")
        assert_matches("grouped_conv2d", tensors, options, out)


@pytest.mark.parametrize("kernel", [1, 3])
def test_nan_and_infinity_stay_in_their_group(cpu_variant: str, kernel: int) -> None:
    x = channels_last(1, 12, 9, 8)
    x[0, 4, 2, 2], x[0, 5, 8, 7] = torch.nan, torch.inf
    weight = torch.rand(12, 4, kernel, kernel) + 0.1
    options: dict[str, Any] = {"padding": kernel // 2, "groups": 3, "shuffle": 3}
    out = ops.grouped_conv2d(x, weight, **options, backend="cpu")
    expected = ops.grouped_conv2d(x, weight, **options, backend="reference")
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())
    assert not out[:, 0::3].isnan().any()


def test_shuffle_moves_the_convolution_s_channels_and_its_bias_but_not_the_residual() -> None:
    convolution, residual = nn.Conv2d(6, 12, 1, groups=3), torch.randn(2, 12, 4, 5)
    x = torch.randn(2, 6, 4, 5)
    with torch.no_grad():
        expected = (nn.ChannelShuffle(3)(convolution(x)) + residual).relu()
        out = ops.grouped_conv2d(
            *(x, convolution.weight, convolution.bias, None, residual), groups=3, shuffle=3, activation="relu"
        )
    assert_close(out, expected)


@many
@given(
    groups=st.one_of(st.integers(1, 9), st.sampled_from([16, 17, 40])),
    per_group=st.integers(1, 70),
    size=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    make=st.sampled_from(MAKERS),
    seeds=st.random_module(),
)
def test_channel_shuffle_is_that_of_pytorch(
    cpu_variant: str, groups: int, per_group: int, size: tuple[int, int], make: Maker, seeds: object
) -> None:
    x = make(2, groups * per_group, *size)
    expected = nn.ChannelShuffle(groups)(x)
    for backend in ("cpu", "reference"):
        assert torch.equal(ops.channel_shuffle(x, groups=groups, backend=backend), expected)
    if make in in_place:
        assert torch.equal(run_native("channel_shuffle", (x,), groups=groups), expected)


@many
@given(
    c_a=st.integers(1, 70),
    groups=st.one_of(st.integers(1, 9), st.just(24)),
    equal=st.booleans(),
    make=st.sampled_from(MAKERS),
    seeds=st.random_module(),
)
def test_shuffle_concat_is_a_concatenation_and_a_shuffle(
    cpu_variant: str, c_a: int, groups: int, equal: bool, make: Maker, seeds: object
) -> None:
    c_b = c_a if equal else groups - c_a % groups
    groups = 2 if equal else groups
    a, b = make(2, c_a, 3, 5), channel_slice(2, c_b, 3, 5)
    expected = nn.ChannelShuffle(groups)(torch.cat((a, b), 1))
    for backend in ("cpu", "reference"):
        out = ops.shuffle_concat(a, b, groups=groups, backend=backend)
        assert torch.equal(out, expected)
        assert out.is_contiguous(memory_format=torch.channels_last)
    if make in in_place:
        assert torch.equal(run_native("shuffle_concat", (a, b), groups=groups), expected)


def test_an_empty_batch_gives_an_empty_output() -> None:
    x = torch.empty(0, 4, 8, 8)
    for backend in ("auto", "cpu", "onednn", "reference"):
        out = ops.grouped_conv2d(x, torch.randn(8, 2, 3, 3), groups=2, shuffle=2, backend=backend)
        assert out.shape == (0, 8, 6, 6)
    assert ops.channel_shuffle(x, groups=2).shape == x.shape
    assert ops.shuffle_concat(x, x).shape == (0, 8, 8, 8)


X, W = torch.zeros(2, 4, 5, 5), torch.zeros(6, 2, 3, 3)
BAD: dict[str, tuple[Callable[[], object], str]] = {
    "groups": (lambda: ops.grouped_conv2d(X, W, groups=3), "groups: expected a divisor of the 4 channels of x, got 3"),
    "no groups": (lambda: ops.grouped_conv2d(X, W, groups=0), "groups: expected a divisor of the 4"),
    "weight": (
        lambda: ops.grouped_conv2d(X, W),
        r"weight: expected .* 4 channels of x in 1 groups, got \[6, 2, 3, 3\]",
    ),
    "rows": (lambda: ops.grouped_conv2d(X, W[:5], groups=2), r"weight: expected C_out divisible by groups = 2"),
    "shuffle": (
        lambda: ops.grouped_conv2d(X, W, groups=2, shuffle=4),
        "shuffle: expected a divisor of the 6 channels of the output, got 4",
    ),
    "bias": (lambda: ops.grouped_conv2d(X, W, torch.zeros(4), groups=2), r"bias: expected \[6\]"),
    "residual": (lambda: ops.grouped_conv2d(X, W, None, None, X, groups=2), "residual: expected the shape of the"),
    "rank": (lambda: ops.channel_shuffle(X[0], groups=2), r"x: expected \[N, C, H, W\]"),
    "shuffle groups": (lambda: ops.channel_shuffle(X, groups=-1), "groups: expected a divisor of the 4 channels of x"),
    "other map": (lambda: ops.shuffle_concat(X, X[:, :, :3]), r"b: expected \[2, C, 5, 5\] as a has it, got \[2, 4, 3"),
    "other rank": (lambda: ops.shuffle_concat(X, X[0]), r"b: expected \[N, C, H, W\] with at least one channel"),
    "odd": (lambda: ops.shuffle_concat(X, X[:, :3]), "groups: expected a divisor of the 7 channels of a and b, got 2"),
    "layer's shuffle": (lambda: GroupedConv2d(4, 6, 1, groups=2, shuffle=4), "shuffle: expected a divisor of the 6"),
    "layer's groups": (lambda: ChannelShuffle(0), "groups: expected a positive integer, got 0"),
    "unit's stride": (lambda: ShuffleUnit(24, 24, 2, stride=3), "stride: expected 1 or 2, got 3"),
    "unit's residual": (lambda: ShuffleUnit(24, 48, 2), "out_channels: expected in_channels = 24 with stride 1"),
    "unit's rest": (lambda: ShuffleUnit(24, 24, 2, 2), "out_channels: expected more than in_channels = 24"),
    "unit's groups": (lambda: ShuffleUnit(24, 24, 5), "compress_groups: expected a divisor of the 24 input channels"),
    "unit's kernel": (lambda: ShuffleUnitV2(8, 8, kernel_size=4), "kernel_size: expected a positive odd integer"),
    "unit's halves": (lambda: ShuffleUnitV2(8, 13, 2), "out_channels: expected an even number, got 13"),
    "no block": (lambda: ShuffleUnitV2.from_dense(nn.Conv2d(1, 1, 1)), "block: expected branch1 and branch2 in it"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_a_bad_argument_is_named(case: tuple[Callable[[], object], str]) -> None:
    call, message = case
    with pytest.raises(ValueError, match=message):
        call()


def test_mixed_dtypes_are_refused() -> None:
    with pytest.raises(TypeError, match=r"b: expected the dtype of a, torch\.float32, got torch\.float64"):
        ops.shuffle_concat(X, X.double())


def conv_norm(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(c_out)]


class PlainUnit(nn.Module):
    """ShuffleNet's unit in PyTorch's modules."""

    def __init__(self, c_in: int, c_out: int, groups: int, stride: int, first: int) -> None:
        super().__init__()
        hidden, made = c_out // 4, c_out - c_in if stride == 2 else c_out
        self.squeeze = nn.Sequential(*conv_norm(c_in, hidden, 1, groups=first), nn.ReLU())
        self.mix = nn.ChannelShuffle(groups)
        self.rest = nn.Sequential(*conv_norm(hidden, hidden, 3, stride, hidden), *conv_norm(hidden, made, 1, 1, groups))
        self.pool = nn.AvgPool2d(3, 2, 1) if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.rest(self.mix(self.squeeze(x)))
        return (x + y if self.pool is None else torch.cat([self.pool(x), y], 1)).relu()


class PlainUnitV2(nn.Module):
    """ShuffleNet V2's unit with the modules and names of torchvision's."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        half = c_out // 2
        self.branch1 = nn.Sequential()
        if stride == 2:
            self.branch1 = nn.Sequential(*conv_norm(c_in, c_in, 3, 2, c_in), *conv_norm(c_in, half, 1), nn.ReLU())
        self.branch2 = nn.Sequential(
            *(*conv_norm(c_in if stride == 2 else half, half, 1), nn.ReLU()),
            *conv_norm(half, half, 3, stride, half),
            *(*conv_norm(half, half, 1), nn.ReLU()),
        )

    def forward(self, x: Tensor) -> Tensor:
        passing, x = (self.branch1(x), x) if len(self.branch1) else x.chunk(2, 1)
        return nn.ChannelShuffle(2)(torch.cat((passing, self.branch2(x)), 1))


Pair = tuple[Callable[[], nn.Module], Callable[[], nn.Module], int]
REPLACED: dict[str, Pair] = {
    "grouped": (lambda: nn.Conv2d(6, 12, 3, 2, 1, groups=3), lambda: GroupedConv2d(6, 12, 3, 2, 1, groups=3), 6),
    "grouped and shuffled": (
        lambda: nn.Sequential(nn.Conv2d(6, 12, 1, groups=2, bias=False), nn.ChannelShuffle(2), nn.ReLU()),
        lambda: nn.Sequential(GroupedConv2d(6, 12, 1, groups=2, bias=False, shuffle=2, activation="relu")),
        6,
    ),
    "shuffle": (
        lambda: nn.Sequential(nn.Conv2d(6, 6, 1), nn.ChannelShuffle(3)),
        lambda: nn.Sequential(nn.Conv2d(6, 6, 1), ChannelShuffle(3)),
        6,
    ),
    "V1": (lambda: PlainUnit(24, 24, 3, 1, 3), lambda: ShuffleUnit(24, 24, 3), 24),
    "V1, stride 2, dense first": (
        lambda: PlainUnit(9, 24, 3, 2, 1),
        lambda: ShuffleUnit(9, 24, 3, 2, compress_groups=1),
        9,
    ),
    "V2": (lambda: PlainUnitV2(12, 12, 1), lambda: ShuffleUnitV2(12, 12), 12),
    "V2, stride 2": (lambda: PlainUnitV2(7, 12, 2), lambda: ShuffleUnitV2(7, 12, 2), 7),
}
replaced = pytest.mark.parametrize("case", REPLACED.values(), ids=REPLACED)


@replaced
def test_layers_compute_what_the_module_did_and_load_its_state(case: Pair) -> None:
    make_theirs, make_ours, channels = case
    theirs, ours, x = with_random_norms(make_theirs()), make_ours().eval(), torch.randn(2, channels, 9, 7)
    ours.load_state_dict(theirs.state_dict())
    expected = copy.deepcopy(theirs).double()(x.double())
    assert_close(ours(x), expected)
    saved = io.BytesIO()
    with torch.no_grad():
        torch.save(ours, saved)
        saved.seek(0)
        for layer in (ours, copy.deepcopy(ours), torch.load(saved, weights_only=False)):
            assert_close(layer(x), expected)
            next(layer.parameters()).add_(1)
            assert not torch.allclose(layer(x), expected.float())


@replaced
def test_layers_train_as_the_module_does(case: Pair) -> None:
    make_theirs, make_ours, channels = case
    theirs, ours = make_theirs().double(), make_ours().double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, channels, 9, 7, dtype=torch.float64)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.grad is not None
        assert relative_error(a.grad, b.grad) < 1e-9
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.allclose(a, b)


@replaced
def test_export_is_portable_aten_with_dynamic_batch(case: Pair) -> None:
    _, make_ours, channels = case
    ours, x = with_random_norms(make_ours()), torch.randn(2, channels, 9, 7)
    exported = torch.export.export(ours, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert not [node for node in exported.graph.nodes if "kernelpress" in str(node.target)]
    x = torch.randn(3, channels, 9, 7)
    assert_close(exported.module()(x).detach(), ours.double()(x.double()).detach())


@replaced
def test_without_gradients_the_ops_run_without_graph_breaks(case: Pair) -> None:
    _, make_ours, channels = case
    ours, x = with_random_norms(make_ours()), torch.randn(2, channels, 9, 7)
    with torch.no_grad():
        out, called = run_compiled(ours, x)
        assert_close(out, ours(x))
    assert any("kernelpress" in target for target in called), called
    assert not any("batch_norm" in target for target in called), called


@pytest.mark.parametrize("stride", [1, 2])
def test_from_dense_takes_torchvision_s_block(stride: int) -> None:
    block = with_random_norms(PlainUnitV2(12, 12, stride))
    layer, x = ShuffleUnitV2.from_dense(block), torch.randn(2, 12, 9, 7)
    with torch.no_grad():
        assert_close(layer(x), block.double()(x.double()))
    assert not layer.training
    assert list(layer.state_dict()) == list(ShuffleUnitV2(12, 12, stride).state_dict())


@pytest.mark.parametrize("padding", ["same", "valid", (0, 1)])
def test_from_dense_takes_a_convolution_of_any_padding(padding: Any) -> None:
    module, x = nn.Conv2d(6, 12, (4, 3), padding=padding, groups=3).eval(), torch.randn(2, 6, 8, 9)
    layer = GroupedConv2d.from_dense(module, shuffle=3, activation="relu")
    with torch.no_grad():
        assert_close(layer(x), nn.ChannelShuffle(3)(module.double()(x.double())).relu())
    assert not layer.training
    assert "shuffle=3, activation=relu" in repr(layer)


def test_the_units_call_their_ops_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for name in ("grouped_conv2d", "depthwise_conv2d", "inverted_residual", "shuffle_concat", "separable_conv2d"):
        original = getattr(ops, name)

        def record(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Tensor:
            called.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(ops, name, record)
    with torch.no_grad():
        for unit in (ShuffleUnit(24, 24, 3), ShuffleUnitV2(24, 24), ShuffleUnitV2(24, 24, 2)):
            unit.eval()(torch.randn(1, 24, 6, 6))
    assert called == [
        *("grouped_conv2d", "depthwise_conv2d", "grouped_conv2d"),
        *("inverted_residual", "shuffle_concat"),
        *("separable_conv2d", "inverted_residual", "shuffle_concat"),
    ]


def test_units_without_norms_keep_their_biases() -> None:
    x = torch.randn(1, 24, 6, 6)
    for unit in (ShuffleUnit(24, 24, 3, bias=True, norm_layer=None), ShuffleUnitV2(24, 24, bias=True, norm_layer=None)):
        assert not list(unit.buffers())
        with torch.no_grad():
            assert_close(unit(x), copy.deepcopy(unit).double()(x.double()))
            assert_close(unit(x), copy.deepcopy(unit).requires_grad_().double()(x.double()))


def test_reference_gradients_reach_every_argument() -> None:
    tensors = [
        torch.randn(2, 6, 4, 5),
        torch.randn(12, 2, 3, 3),
        torch.randn(12),
        torch.rand(12),
        torch.randn(2, 12, 2, 3),
    ]
    inputs = [t.double().requires_grad_() for t in tensors]
    options: dict[str, Any] = {"groups": 3, "shuffle": 4, "activation": "silu"}
    out = ops.grouped_conv2d(*inputs, **options)
    expected = torch.autograd.grad(reference.grouped_conv2d(*inputs, **options).square().sum(), inputs)
    for ours, theirs in zip(torch.autograd.grad(out.square().sum(), inputs), expected, strict=True):
        assert relative_error(ours, theirs) < 1e-12


@pytest.mark.parametrize("groups", [1, 4])
def test_a_shuffle_that_moves_nothing_is_a_copy(groups: int) -> None:
    x = torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    shuffled = ops.channel_shuffle(x, groups=groups)
    assert torch.equal(shuffled, x)
    assert shuffled.data_ptr() != x.data_ptr()
