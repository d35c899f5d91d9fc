"""Ghost convolution and ghost layers against the same in plain PyTorch modules."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import (
    MAKERS,
    absolute,
    assert_close,
    assert_matches,
    called_functions,
    channel_slice,
    channels_last,
    exact,
    expected_output,
    run_compiled,
    run_native,
    with_random_norms,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kernelpress import ops
from kernelpress.kernels.reference import ACTIVATIONS, activate
from kernelpress.layers import GhostBottleneck, GhostModule


@st.composite
def ghosts(draw: st.DrawFn) -> dict:
    kernel = draw(st.sampled_from([(1, 1), (1, 1), (3, 3), (2, 5)]))
    padding = draw(st.sampled_from([(0, 0), (kernel[0] // 2, kernel[1] // 2)]))
    primary, multiplier = draw(st.sampled_from([1, 2, 7, 8, 33, 70])), draw(st.sampled_from([1, 1, 2, 3]))
    return {
        "size": tuple(k + draw(st.integers(0, 8)) for k in kernel),
        "batch": draw(st.integers(1, 2)),
        "c_in": draw(st.sampled_from([1, 3, 8, 40])),
        "primary": primary,
        "multiplier": multiplier,
        "kernel": kernel,
        "cheap": draw(st.sampled_from([(1, 1), (3, 3), (5, 3), (7, 7)])),
        "options": {
            "stride": draw(st.sampled_from([(1, 1), (2, 2), (1, 3)])),
            "padding": padding,
            "activation": draw(st.sampled_from(ACTIVATIONS)),
            "cheap_activation": draw(st.sampled_from(ACTIVATIONS)),
            "out_channels": draw(st.one_of(st.none(), st.integers(primary, primary * (1 + multiplier)))),
        },
        "parts": draw(st.tuples(*[st.booleans()] * 3)),
        "make": draw(st.sampled_from(MAKERS)),
    }


def by_hand(
    x: Tensor,
    primary_weight: Tensor,
    primary_bias: Tensor | None,
    cheap_weight: Tensor,
    cheap_bias: Tensor | None,
    residual: Tensor | None,
    options: dict,
) -> Tensor:
    """What the GhostNet paper's code computes, on functions of PyTorch."""
    primary = F.conv2d(x, primary_weight, primary_bias, options["stride"], options["padding"])
    primary = activate(primary, options["activation"])
    cheap = F.conv2d(primary, cheap_weight, cheap_bias, padding="same", groups=len(primary_weight))
    y = torch.cat([primary, activate(cheap, options["cheap_activation"])], 1)
    if options["out_channels"] is not None:
        y = y.narrow(1, 0, options["out_channels"])
    return y if residual is None else y + residual


@settings(max_examples=60)
@given(case=ghosts(), seeds=st.random_module())
def test_ghost_of_any_geometry_is_what_two_convolutions_and_a_concatenation_are(case: dict, seeds: object) -> None:
    options, primary = case["options"], case["primary"]
    cheap = primary * case["multiplier"]
    has_bias, has_cheap_bias, has_residual = case["parts"]
    modules = (
        nn.Conv2d(case["c_in"], primary, case["kernel"], options["stride"], options["padding"], bias=has_bias),
        nn.Conv2d(primary, cheap, case["cheap"], padding="same", groups=primary, bias=has_cheap_bias),
    )
    x = case["make"](case["batch"], case["c_in"], *case["size"])
    tensors = [x, modules[0].weight, modules[0].bias, modules[1].weight, modules[1].bias, None]
    with torch.no_grad():
        if has_residual:
            tensors[5] = channel_slice(*ops.allocate("ghost_conv2d", tensors, options).shape)
        out = ops.ghost_conv2d(*tensors, **options)
        linear = options | {"activation": "identity", "cheap_activation": "identity"}
        expected, terms = by_hand(*exact(tensors), options), by_hand(*exact(absolute(tensors)), linear)
        assert_close(out, expected, terms)
        assert_close(expected_output("ghost_conv2d", tensors, **options), expected, terms)
    assert out.is_contiguous(memory_format=torch.channels_last)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=ghosts(), seeds=st.random_module())
def test_native_ghost_of_any_geometry_writes_its_channels_only(cpu_variant: str, case: dict, seeds: object) -> None:
    primary, cheap = case["primary"], case["primary"] * case["multiplier"]
    has_bias, has_cheap_bias, has_residual = case["parts"]
    tensors = [
        case["make"](case["batch"], case["c_in"], *case["size"]),
        torch.randn(primary, case["c_in"], *case["kernel"]),
        torch.randn(primary) if has_bias else None,
        torch.randn(cheap, 1, *case["cheap"]),
        torch.randn(cheap) if has_cheap_bias else None,
        None,
    ]
    if has_residual:
        tensors[5] = channel_slice(*ops.allocate("ghost_conv2d", tensors, case["options"]).shape)
    outputs = [ops.ghost_conv2d(*tensors, **case["options"], backend="cpu")]
    if case["make"] in (channels_last, channel_slice):
        outputs.append(run_native("ghost_conv2d", tensors, **case["options"]))
    assert_matches("ghost_conv2d", tensors, case["options"], *outputs)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("size", [(112, 111), (7, 7)], ids=str)
def test_native_ghost_runs_by_row_steps_and_by_panels(cpu_variant: str, size: tuple[int, int], kernel: int) -> None:
    primary, cheap = torch.randn(72, 24, kernel, kernel), torch.randn(72, 1, 5, 5)
    options = {"padding": (kernel // 2, kernel // 2), "activation": "relu", "cheap_activation": "silu"}
    for residual in (None, channels_last(2, 144, *size)):
        tensors = (channels_last(2, 24, *size), primary, torch.randn(72), cheap, None, residual)
        outputs = ops.ghost_conv2d(*tensors, **options, backend="cpu"), run_native("ghost_conv2d", tensors, **options)
        assert_matches("ghost_conv2d", tensors, options, *outputs)


def test_flops_count_both_convolutions_and_only_channels_that_are_kept() -> None:
    x, primary, cheap = torch.randn(2, 6, 9, 9), torch.randn(4, 6, 1, 1), torch.randn(8, 1, 5, 3)
    with FlopCounterMode(display=False) as counter:
        ops.ghost_conv2d(x, primary, None, cheap, stride=2, out_channels=11)
    assert counter.get_total_flops() == 2 * 2 * 25 * (6 * 4 + 7 * 15)


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_an_empty_batch_gives_an_empty_output(backend: str) -> None:
    tensors = (torch.empty(0, 4, 8, 8), torch.randn(3, 4, 1, 1), None, torch.randn(3, 1, 3, 3))
    assert ops.ghost_conv2d(*tensors, stride=2, backend=backend).shape == (0, 6, 4, 4)


X, PRIMARY, CHEAP = torch.zeros(2, 4, 5, 5), torch.zeros(3, 4, 1, 1), torch.zeros(6, 1, 3, 3)
BAD: dict[str, tuple[tuple, dict, type[Exception], str]] = {
    "rank of x": ((X[0], PRIMARY, None, CHEAP), {}, ValueError, r"x: expected \[N, C, H, W\]"),
    "primary channels": (
        (X, torch.zeros(3, 5, 1, 1), None, CHEAP),
        {},
        ValueError,
        r"primary_weight: expected .* C_in = 4 channels of x, got \[3, 5, 1, 1\]",
    ),
    "primary bias": ((X, PRIMARY, torch.zeros(4), CHEAP), {}, ValueError, r"primary_bias: expected \[3\]"),
    "cheap channels": (
        (X, PRIMARY, None, torch.zeros(4, 1, 3, 3)),
        {},
        ValueError,
        r"cheap_weight: expected .* with C_primary = 3 channels of primary_weight, got \[4, 1, 3, 3\]",
    ),
    "dense cheap": ((X, PRIMARY, None, torch.zeros(3, 3, 3, 3)), {}, ValueError, "cheap_weight: expected"),
    "even cheap kernel": (
        (X, PRIMARY, None, torch.zeros(3, 1, 3, 4)),
        {},
        ValueError,
        r"cheap_weight: expected an odd DH and DW, which keep the size, got \[3, 1, 3, 4\]",
    ),
    "cheap bias": ((X, PRIMARY, None, CHEAP, torch.zeros(3)), {}, ValueError, r"cheap_bias: expected \[6\]"),
    "residual": (
        (X, PRIMARY, None, CHEAP, None, torch.zeros(2, 9, 5, 5)),
        {"out_channels": 8},
        ValueError,
        r"residual: expected .*\[2, 8, 5, 5\], got \[2, 9, 5, 5\]",
    ),
    "too few channels": ((X, PRIMARY, None, CHEAP), {"out_channels": 2}, ValueError, "out_channels: expected 3 to 9"),
    "too many channels": ((X, PRIMARY, None, CHEAP), {"out_channels": 10}, ValueError, "out_channels: .* got 10"),
    "half a channel": ((X, PRIMARY, None, CHEAP), {"out_channels": 8.5}, TypeError, "out_channels: expected an int"),
    "activation": (
        (X, PRIMARY, None, CHEAP),
        {"cheap_activation": "elu"},
        ValueError,
        "cheap_activation: expected one of",
    ),
    "dtype": ((X, PRIMARY.half(), None, CHEAP), {}, TypeError, "primary_weight: expected the dtype of x"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_a_bad_argument_is_named(case: tuple) -> None:
    tensors, options, error, message = case
    with pytest.raises(error, match=message):
        ops.ghost_conv2d(*tensors, **options)


class PlainGhost(nn.Module):
    """A ghost module under the public names, written from the paper (equations 3 and 4)."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 1, ratio: int = 2, cheap: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.oup = c_out
        few = -(-c_out // ratio)
        more = few * (ratio - 1)
        self.primary_conv = nn.Sequential(
            nn.Conv2d(c_in, few, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(few), nn.ReLU(inplace=True)
        )
        self.cheap_operation = nn.Sequential(
            nn.Conv2d(few, more, cheap, padding=cheap // 2, groups=few, bias=False), nn.BatchNorm2d(more), nn.ReLU()
        )

    def without_activation(self) -> PlainGhost:
        self.primary_conv[2] = self.cheap_operation[2] = nn.Sequential()
        return self

    def forward(self, x: Tensor) -> Tensor:
        few = self.primary_conv(x)
        return torch.cat((few, self.cheap_operation(few)), 1)[:, : self.oup]


class PlainSqueeze(nn.Module):
    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, reduced, 1)
        self.conv_expand = nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.relu(self.conv_reduce(F.adaptive_avg_pool2d(x, 1)))
        return x * F.relu6(self.conv_expand(gate) + 3) / 6


class PlainBottleneck(nn.Module):
    """A ghost bottleneck under the public names (figure 3 of the paper)."""

    def __init__(self, c_in: int, mid: int, c_out: int, kernel: int, stride: int, reduced: int) -> None:
        super().__init__()
        around = (kernel - 1) // 2
        self.ghost1 = PlainGhost(c_in, mid)
        if stride > 1:
            self.conv_dw = nn.Conv2d(mid, mid, kernel, stride, around, groups=mid, bias=False)
            self.bn_dw = nn.BatchNorm2d(mid)
        self.se = PlainSqueeze(mid, reduced) if reduced else nn.Sequential()
        self.ghost2 = PlainGhost(mid, c_out).without_activation()
        self.shortcut = nn.Sequential()
        if stride > 1 or c_in != c_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(c_in, c_in, kernel, stride, around, groups=c_in, bias=False),
                nn.BatchNorm2d(c_in),
                nn.Conv2d(c_in, c_out, 1, bias=False),
                nn.BatchNorm2d(c_out),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.ghost1(x)
        if hasattr(self, "conv_dw"):
            y = self.bn_dw(self.conv_dw(y))
        return self.ghost2(self.se(y)) + self.shortcut(x)


MODULES: dict[str, tuple[nn.Module, nn.Module]] = {
    "1×1": (PlainGhost(6, 8), GhostModule(6, 8)),
    "odd channels": (PlainGhost(6, 9), GhostModule(6, 9)),
    "one channel": (PlainGhost(6, 1), GhostModule(6, 1)),
    "ratio 3, 3×3 stride 2, cheap 5×5": (PlainGhost(6, 10, 3, 3, 5, 2), GhostModule(6, 10, 3, 3, 5, 2)),
    "linear": (PlainGhost(6, 8).without_activation(), GhostModule(6, 8, relu=False)),
    "bottleneck": (PlainBottleneck(8, 12, 8, 3, 1, 0), GhostBottleneck(8, 12, 8)),
    "bottleneck, other channels": (PlainBottleneck(6, 12, 8, 3, 1, 0), GhostBottleneck(6, 12, 8)),
    "bottleneck, stride 2, SE": (PlainBottleneck(6, 30, 9, 5, 2, 8), GhostBottleneck(6, 30, 9, 5, 2, 0.25)),
    "bottleneck, SE": (PlainBottleneck(8, 12, 8, 3, 1, 4), GhostBottleneck(8, 12, 8, se_ratio=0.25)),
}
every_module = pytest.mark.parametrize("pair", MODULES.values(), ids=MODULES)


def fresh(pair: tuple[nn.Module, nn.Module]) -> tuple[nn.Module, nn.Module]:
    """Both with the public module's random weights, loaded from its state dict."""
    theirs, ours = (copy.deepcopy(module) for module in pair)
    with_random_norms(theirs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours.eval()


def input_of(pair: tuple[nn.Module, nn.Module]) -> Tensor:
    return channels_last(2, next(m.in_channels for m in pair[0].modules() if isinstance(m, nn.Conv2d)), 9, 7)


@every_module
def test_public_state_dicts_load_and_give_the_same_result(pair: tuple[nn.Module, nn.Module]) -> None:
    theirs, ours = fresh(pair)
    x = input_of(pair)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    with torch.no_grad():
        expected = theirs.double()(x.double())
        assert_close(ours(x), expected)
        assert_close(ours(x), expected)
        ours.double()
        assert_close(ours(x.double()), expected)


@every_module
def test_layers_train_as_the_public_modules_do(pair: tuple[nn.Module, nn.Module]) -> None:
    theirs, ours = (module.double().train() for module in fresh(pair))
    x = input_of(pair).double()
    expected, out = theirs(x), ours(x)
    assert_close(out, expected)
    expected.square().sum().backward()
    out.square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.grad is not None
        largest = float(b.grad.abs().max())  # terms cancel, and the gradient of hardsigmoid has 1/6 in float
        assert torch.allclose(a.grad, b.grad, rtol=0, atol=1e-7 * largest + 1e-9)
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.allclose(a, b)


@every_module
def test_evaluation_calls_one_op_a_module_and_follows_an_optimiser_step(
    pair: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = fresh(pair)
    x, called = input_of(pair), []
    original = ops.ghost_conv2d
    monkeypatch.setattr(ops, "ghost_conv2d", lambda *args, **kw: called.append(1) or original(*args, **kw))
    with torch.no_grad():
        ours(x)
        assert len(called) == sum(isinstance(module, GhostModule) for module in ours.modules())
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.mul_(1.5)
            b.mul_(1.5)
        assert_close(ours(x), theirs.double()(x.double()))


@every_module
def test_export_is_portable_aten(pair: tuple[nn.Module, nn.Module]) -> None:
    _, ours = fresh(pair)
    x = input_of(pair)
    exported = torch.export.export(ours, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    targets = called_functions(exported.graph)
    assert not any("kernelpress" in target for target in targets), targets
    more = torch.cat([x, x])
    assert_close(exported.module()(more).detach(), ours.double()(more.double()).detach())


def test_torch_compile_calls_the_op() -> None:
    _, ours = fresh(MODULES["1×1"])
    x = channels_last(2, 6, 5, 4)
    with torch.no_grad():
        out, called = run_compiled(ours, x)
        assert_close(out, ours(x))
    assert any("ghost_conv2d" in target for target in called), called


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith("bottleneck")])
def test_from_dense_takes_weights_norms_and_flags(name: str) -> None:
    theirs, _ = fresh(MODULES[name])
    theirs.cheap_operation[1].eps = 0.5
    theirs.cheap_operation[0].weight.requires_grad_(False)
    ours = GhostModule.from_dense(theirs)
    x = input_of(MODULES[name])
    with torch.no_grad():
        assert_close(ours(x), theirs.double()(x.double()))
    assert not ours.training
    assert not ours.cheap_operation[0].weight.requires_grad
    assert ours.primary_conv[0].weight.requires_grad


def test_from_dense_of_other_activations_and_without_norms() -> None:
    theirs = PlainGhost(6, 8)
    theirs.primary_conv = nn.Sequential(nn.Conv2d(6, 4, 1), nn.Hardswish())
    theirs.cheap_operation = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ReLU6())
    ours, x = GhostModule.from_dense(theirs.eval()), channels_last(1, 6, 5, 5)
    with torch.no_grad():
        assert_close(ours(x), theirs.double()(x.double()))


def strided(stride: int = 1, kernel: int = 3, padding: int = 1) -> nn.Module:
    module = PlainGhost(6, 8)
    module.cheap_operation[0] = nn.Conv2d(4, 4, kernel, stride, padding, groups=4, bias=False)
    return module


REFUSED = {
    "ratio": (lambda: GhostModule(4, 8, ratio=1), "ratio: expected an integer of at least 2, got 1"),
    "even cheap kernel": (lambda: GhostModule(4, 8, dw_size=4), "dw_size: expected an odd size, got 4"),
    "even kernel": (lambda: GhostModule(4, 8, kernel_size=2), "kernel_size: expected an odd size, got 2"),
    "activation": (lambda: GhostModule(4, 8, activation="elu"), "activation: expected one of"),
    "bottleneck kernel": (lambda: GhostBottleneck(4, 8, 4, 2), "dw_kernel_size: expected an odd size, got 2"),
    "squeeze": (lambda: GhostBottleneck(4, 8, 4, se_ratio=1.5), "se_ratio: expected a number from 0 to 1, got 1.5"),
    "another module": (lambda: GhostModule.from_dense(nn.Conv2d(4, 4, 1)), "expected one convolution in primary_conv"),
    "cheap stride": (lambda: GhostModule.from_dense(strided(2)), "module: expected a convolution like"),
    "cheap padding": (lambda: GhostModule.from_dense(strided(padding=0)), "module: expected a convolution like"),
    "channels": (lambda: GhostModule.from_dense(PlainGhost(6, 8), 5), "module: expected a convolution like"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_a_bad_layer_is_refused(case: tuple) -> None:
    call, message = case
    with pytest.raises(ValueError, match=message):
        call()
