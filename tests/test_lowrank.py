"""Ops and layers of low rank against the same in plain PyTorch modules, and what emission makes of such chains."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emitting import (
    Apply,
    assert_as_exact_as,
    assert_saving_and_capture_keep,
    emit_fused,
    emit_onto,
    matched_ops,
    matches,
    ops_of,
)
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
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kernelpress import compress, ops
from kernelpress.emit.fuse import lowrank
from kernelpress.kernels.reference import ACTIVATIONS, activate
from kernelpress.layers import LowRankConv2d, LowRankLinear


@st.composite
def tuckers(draw: st.DrawFn) -> dict:
    kernel = draw(st.sampled_from([(3, 3), (3, 3), (1, 1), (5, 5), (2, 5)]))
    is_small = draw(st.booleans())
    dilation = (1, 1) if is_small else draw(st.sampled_from([(1, 1), (2, 1)]))
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    return {
        "size": tuple(n + draw(st.integers(0, 14)) for n in reach),
        "batch": draw(st.integers(1, 2)),
        "channels": tuple(draw(st.sampled_from([1, 2, 7, 16, 33, 70])) for _ in range(4)),
        "kernel": kernel,
        "options": {
            "stride": draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 3)])),
            "padding": draw(st.sampled_from([(0, 0), (kernel[0] // 2, kernel[1] // 2), (4, 1)])),
            "dilation": dilation,
            "activation": draw(st.sampled_from(ACTIVATIONS)),
        },
        "parts": draw(st.tuples(st.booleans(), st.booleans())),
        "make": draw(st.sampled_from(MAKERS)),
    }


def tucker_tensors(case: dict) -> list[Tensor | None]:
    """Those of the op."""
    c_in, inner, outer, c_out = case["channels"]
    has_bias, has_residual = case["parts"]
    tensors = [
        case["make"](case["batch"], c_in, *case["size"]),
        torch.randn(inner, c_in, 1, 1),
        torch.randn(outer, inner, *case["kernel"]),
        torch.randn(c_out, outer, 1, 1),
        torch.randn(c_out) if has_bias else None,
        None,
    ]
    if has_residual:
        tensors[5] = channel_slice(*ops.allocate("lowrank_conv2d", tensors, case["options"]).shape)
    return tensors


def three_convolutions(
    x: Tensor, first: Tensor, core: Tensor, last: Tensor, bias: Tensor | None, residual: Tensor | None, options: dict
) -> Tensor:
    window = (options["stride"], options["padding"], options["dilation"])
    y = F.conv2d(F.conv2d(F.conv2d(x, first), core, None, *window), last, bias)
    return activate(y if residual is None else y + residual, options["activation"])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=tuckers(), seeds=st.random_module())
def test_tucker_of_any_geometry_is_what_three_convolutions_are(cpu_variant: str, case: dict, seeds: object) -> None:
    tensors, options = tucker_tensors(case), case["options"]
    out = ops.lowrank_conv2d(*tensors, **options)
    linear = options | {"activation": "identity"}
    expected = three_convolutions(*exact(tensors), options)
    terms = three_convolutions(*exact(absolute(tensors)), linear)
    assert_close(out, expected, terms)
    assert_close(expected_output("lowrank_conv2d", tensors, **options), expected, terms)
    assert out.is_contiguous(memory_format=torch.channels_last)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(*[st.sampled_from([1, 2, 7, 33, 70])] * 4),
    activation=st.sampled_from(ACTIVATIONS),
    parts=st.tuples(*[st.booleans()] * 3),
    seeds=st.random_module(),
)
def test_two_products_of_any_size(
    cpu_variant: str, sizes: tuple[int, ...], activation: str, parts: tuple[bool, ...], seeds: object
) -> None:
    rows, c_in, rank, c_out = sizes
    has_bias, has_residual, is_slice = parts
    x = torch.randn(2, rows, c_in + 3)[..., 2:-1] if is_slice else torch.randn(rows, c_in)
    residual = torch.randn(*x.shape[:-1], c_out) if has_residual else None
    bias = torch.randn(c_out) if has_bias else None
    tensors = [x, torch.randn(rank, c_in), torch.randn(c_out, rank), bias, residual]
    out = ops.lowrank_linear(*tensors, activation=activation)
    assert_matches("lowrank_linear", tensors, {"activation": activation}, out)
    hidden = F.linear(F.linear(x.double(), tensors[1].double()), tensors[2].double())
    full = sum(t.double() for t in (hidden, bias, residual) if t is not None)
    expected = activate(full, activation)
    assert_close(expected_output("lowrank_linear", tensors, activation=activation), expected)


def test_flops_count_each_product() -> None:
    x, first, core, last = (
        torch.randn(2, 6, 9, 9),
        torch.randn(4, 6, 1, 1),
        torch.randn(5, 4, 3, 3),
        torch.randn(7, 5, 1, 1),
    )
    with FlopCounterMode(display=False) as counter:
        ops.lowrank_conv2d(x, first, core, last, stride=2, padding=1)
        ops.lowrank_linear(torch.randn(3, 6), torch.randn(2, 6), torch.randn(5, 2))
    assert counter.get_total_flops() == 2 * (2 * (81 * 24 + 25 * (180 + 35)) + 3 * (12 + 10))


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_an_empty_batch_gives_an_empty_output(backend: str) -> None:
    weights = torch.randn(3, 4, 1, 1), torch.randn(2, 3, 3, 3), torch.randn(6, 2, 1, 1)
    assert ops.lowrank_conv2d(torch.empty(0, 4, 8, 8), *weights, stride=2, backend=backend).shape == (0, 6, 3, 3)
    factors = torch.randn(3, 4), torch.randn(6, 3)
    assert ops.lowrank_linear(torch.empty(0, 5, 4), *factors, backend=backend).shape == (0, 5, 6)


X, FIRST, CORE, LAST = (
    torch.zeros(2, 4, 5, 5),
    torch.zeros(3, 4, 1, 1),
    torch.zeros(2, 3, 3, 3),
    torch.zeros(6, 2, 1, 1),
)
BAD: dict[str, tuple[str, tuple, str]] = {
    "rank of x": ("lowrank_conv2d", (X[0], FIRST, CORE, LAST), r"x: expected \[N, C, H, W\]"),
    "first channels": (
        *("lowrank_conv2d", (X, torch.zeros(3, 5, 1, 1), CORE, LAST)),
        r"first_weight: expected \[R_in, C_in, 1, 1\] with C_in = 4 channels of x, got \[3, 5, 1, 1\]",
    ),
    "first kernel": ("lowrank_conv2d", (X, torch.zeros(3, 4, 3, 3), CORE, LAST), "first_weight: expected"),
    "rank 0": ("lowrank_conv2d", (X, FIRST[:0], CORE, LAST), r"first_weight: .* got \[0, 4, 1, 1\]"),
    "core channels": (
        *("lowrank_conv2d", (X, FIRST, torch.zeros(2, 4, 3, 3), LAST)),
        r"core_weight: expected .* R_in = 3 channels of first_weight, got \[2, 4, 3, 3\]",
    ),
    "last channels": (
        *("lowrank_conv2d", (X, FIRST, CORE, torch.zeros(6, 3, 1, 1))),
        r"last_weight: expected .* R_out = 2 channels of core_weight, got \[6, 3, 1, 1\]",
    ),
    "bias": ("lowrank_conv2d", (X, FIRST, CORE, LAST, torch.zeros(5)), r"bias: expected \[6\]"),
    "residual": (
        *("lowrank_conv2d", (X, FIRST, CORE, LAST, None, torch.zeros(2, 6, 5, 5))),
        r"residual: expected .*\[2, 6, 3, 3\], got \[2, 6, 5, 5\]",
    ),
    "no channels": ("lowrank_linear", (torch.zeros(()), FIRST, LAST), r"x: expected \[..., C_in\]"),
    "first factor": (
        *("lowrank_linear", (torch.zeros(2, 4), torch.zeros(3, 5), torch.zeros(6, 3))),
        r"first_weight: expected \[R, C_in\] with C_in = 4 channels of x, got \[3, 5\]",
    ),
    "factor of rank 0": (
        *("lowrank_linear", (torch.zeros(2, 4), torch.zeros(0, 4), torch.zeros(6, 0))),
        r"first_weight: .* got \[0, 4\]",
    ),
    "last factor": (
        *("lowrank_linear", (torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(6, 2))),
        r"last_weight: expected \[C_out, R\] with R = 3 rows of first_weight, got \[6, 2\]",
    ),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_a_bad_argument_is_named(case: tuple) -> None:
    op, tensors, message = case
    with pytest.raises(ValueError, match=message):
        getattr(ops, op)(*tensors)


def decomposed(module: nn.Module, x: Tensor, method: str, rank: Any) -> nn.Sequential:
    """The chain that the pass puts in a layer's place."""
    model = nn.Sequential(module, nn.Identity())
    return compress.decompose(model, x, method=method, rank=rank, only_cheaper=False)[0].eval()


def image() -> Tensor:
    return channels_last(2, 8, 11, 9)


CONVOLUTION = nn.Conv2d(8, 12, 3, 2, 1)
CHAINS: dict[str, tuple[nn.Sequential, type[nn.Module], Tensor]] = {
    "tucker2": (decomposed(CONVOLUTION, image(), "tucker2", (5, 6)), LowRankConv2d, image()),
    "tucker2 with dilation": (
        *(decomposed(nn.Conv2d(8, 12, 3, dilation=(2, 1), bias=False), image(), "tucker2", 4), LowRankConv2d, image()),
    ),
    "cp": (decomposed(CONVOLUTION, image(), "cp", 9), LowRankConv2d, image()),
    "cp, 5×3 of two strides": (
        *(decomposed(nn.Conv2d(8, 12, (5, 3), (1, 2), (2, 0)), image(), "cp", 9), LowRankConv2d, image()),
    ),
    "linear": (decomposed(nn.Linear(8, 12), torch.randn(3, 8), "svd", 5), LowRankLinear, torch.randn(3, 4, 8)),
}
every_chain = pytest.mark.parametrize("name", CHAINS)


def fresh(name: str, **options: Any) -> tuple[nn.Sequential, Any, Tensor]:
    chain, kind, x = CHAINS[name]
    chain = copy.deepcopy(chain)
    return chain, kind.from_dense(chain, **options), x


@every_chain
@pytest.mark.parametrize("activation", ["identity", "hardswish"])
def test_a_layer_takes_the_place_of_a_chain(name: str, activation: str) -> None:
    chain, layer, x = fresh(name, activation=activation)
    assert not layer.training
    assert [p.requires_grad for p in layer.parameters()] == [p.requires_grad for p in chain.parameters()]
    with torch.no_grad():
        expected = chain.double()(x.double())
        residual = torch.randn(expected.shape)
        for _ in range(2):
            assert_close(layer(x), activate(expected, activation))
            assert_close(layer(x, residual), activate(expected + residual.double(), activation))


@every_chain
def test_a_layer_loads_the_state_dict_of_a_chain_and_trains_as_it_does(name: str) -> None:
    chain, layer, x = fresh(name)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    layer.load_state_dict(chain.state_dict())
    layer.load_state_dict(layer.state_dict())
    assert next(iter(layer.state_dict())) == "first.weight"
    chain, layer, x = chain.double().train(), layer.double().train(), x.double()
    chain(x).square().sum().backward()
    layer(x).square().sum().backward()
    for ours, theirs in zip(layer.parameters(), chain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@every_chain
def test_evaluation_calls_one_op_with_the_present_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chain, layer, x = fresh(name)
    called: list[str] = []
    for op in ("lowrank_conv2d", "lowrank_linear", "inverted_residual"):
        original = getattr(ops, op)
        monkeypatch.setattr(ops, op, lambda *args, op=op, to=original, **kw: called.append(op) or to(*args, **kw))
    with torch.no_grad():
        layer(x)
        of_images = "inverted_residual" if name.startswith("cp") else "lowrank_conv2d"
        assert called == [of_images if x.dim() == 4 else "lowrank_linear"]
        for ours, theirs in zip(layer.parameters(), chain.parameters(), strict=True):
            ours.mul_(1.5)
            theirs.mul_(1.5)
        assert_close(layer(x), chain.double()(x.double()))
        copied = copy.deepcopy(layer)
        assert torch.equal(copied(x), layer(x))


@every_chain
def test_export_is_portable_aten_and_compilation_calls_the_op(name: str) -> None:
    _, layer, x = fresh(name)
    exported = torch.export.export(layer, (x,))
    assert not any("kernelpress" in target for target in called_functions(exported.graph))
    layer.requires_grad_(requires_grad=False)
    out, called = run_compiled(layer, x)
    assert_close(out, layer(x))
    assert any("lowrank" in target or "inverted" in target for target in called)


def test_ranks_are_those_at_which_a_layer_exists() -> None:
    layer = LowRankConv2d(6, 8, 3, (4, 5), padding=1)
    assert layer(torch.randn(1, 6, 7, 7)).shape == (1, 8, 7, 7)
    assert LowRankConv2d(6, 8, (3, 5), 4, method="cp").columns.weight.shape == (4, 1, 1, 5)
    assert LowRankConv2d(2, 50, 3, (2, 18)).core.out_channels == 18


BAD_LAYERS: dict[str, tuple[Any, str]] = {
    "rank 0": (lambda: LowRankConv2d(6, 8, 3, 0), "rank: expected an integer from 1 to 6, got 0"),
    "rank above": (lambda: LowRankConv2d(6, 8, 3, (6, 9)), r"rank: expected an integer from 1 to 8, got \(6, 9\)"),
    "half a rank": (lambda: LowRankConv2d(6, 8, 3, 2.5), "rank: expected an integer from 1 to 6, got 2.5"),
    "three ranks": (lambda: LowRankConv2d(6, 8, 3, (1, 2, 3)), r"rank: expected 2 of them for 'tucker2'"),
    "two ranks of CP": (lambda: LowRankConv2d(6, 8, 3, (1, 2), method="cp"), "rank: expected 1 of them for 'cp'"),
    "rank of CP": (lambda: LowRankConv2d(6, 8, 3, 55, method="cp"), "rank: expected an integer from 1 to 54, got 55"),
    "method": (lambda: LowRankConv2d(6, 8, 3, 2, method="tt"), "method: expected one of 'tucker2', 'cp', got 'tt'"),
    "activation": (lambda: LowRankConv2d(6, 8, 3, 2, activation="elu"), "activation: expected one of"),
    "linear rank": (lambda: LowRankLinear(6, 8, 7), "rank: expected an integer from 1 to 6, got 7"),
    "another module": (lambda: LowRankConv2d.from_dense(nn.Conv2d(4, 4, 3)), "expected torch.nn.Sequential"),
    "two layers": (
        *(lambda: LowRankConv2d.from_dense(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))),),
        "chain: expected 3 or 4 layers torch.nn.Conv2d",
    ),
    "an early bias": (
        *(lambda: LowRankLinear.from_dense(nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 4))),),
        "chain: expected a bias in the last layer alone",
    ),
    "sizes that do not chain": (
        *(lambda: LowRankLinear.from_dense(nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(3, 4))),),
        "chain: expected 2 channels of .* to go into the next layer",
    ),
    "an end of 3×3": (
        *(lambda: LowRankConv2d.from_dense(nn.Sequential(*[nn.Conv2d(4, 4, 3, bias=False) for _ in range(3)])),),
        "chain: expected 1×1 convolutions at both ends",
    ),
    "a core in groups": (
        *(lambda: LowRankConv2d.from_dense(tucker_chain(groups=2)),),
        "chain: expected a layer like",
    ),
    "a reflecting core": (
        *(lambda: LowRankConv2d.from_dense(tucker_chain(padding=1, padding_mode="reflect")),),
        "chain: expected a layer like",
    ),
}


def tucker_chain(channels: int = 8, rank: int = 4, **core: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, rank, 1, bias=False),
        nn.Conv2d(rank, rank, 3, bias=False, **core),
        nn.Conv2d(rank, channels, 1),
    )


@pytest.mark.parametrize("case", BAD_LAYERS.values(), ids=BAD_LAYERS)
def test_a_bad_layer_is_refused(case: tuple) -> None:
    make, message = case
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def cp_chain(*, stride: int = 1, dilation: int = 1, bias: bool = False, turned: bool = False) -> nn.Sequential:
    """Over 8 channels, through 6."""
    down = nn.Conv2d(6, 6, (3, 1), (stride, 1), (dilation, 0), (dilation, 1), 6, bias)
    over = nn.Conv2d(6, 6, (1, 5), (1, stride), (0, 2), 1, 6, bias=False)
    middle = (over, down) if turned else (down, over)
    return nn.Sequential(nn.Conv2d(8, 6, 1, bias=False), *middle, nn.Conv2d(6, 8, 1), nn.ReLU()).eval()


LINKS: dict[str, tuple[nn.Module, Tensor]] = {
    "lowrank_conv2d": (
        nn.Sequential(*tucker_chain(padding=1, stride=2), nn.Hardswish()).eval(),
        torch.randn(2, 8, 9, 8),
    ),
    "lowrank_linear": (nn.Sequential(nn.Linear(8, 3, bias=False), nn.Linear(3, 9), nn.ReLU()), torch.randn(2, 8)),
}


@pytest.mark.usefixtures("own_cache", "every_match_is_exact")
class TestEmission:
    @pytest.mark.parametrize("backend", ["reference", "cpu"])
    @pytest.mark.parametrize("options", [{}, {"stride": 2, "turned": True}, {"dilation": 2}], ids=str)
    def test_a_cp_chain_is_one_layer_over_whole_kernels(self, backend: str, options: dict, tmp_path: Path) -> None:
        model, x = cp_chain(**options), torch.randn(2, 8, 13, 11)
        emitted = emit_fused(model, x, backend)
        assert ops_of(emitted) == ["inverted_residual"]
        assert_as_exact_as(emitted, model, torch.randn(3, 8, 13, 11))
        assert_saving_and_capture_keep(emitted, tmp_path, x)

    @pytest.mark.parametrize(
        "model",
        [
            cp_chain(bias=True),
            nn.Sequential(nn.Conv2d(6, 6, (3, 1), groups=6, bias=False), nn.ReLU(), nn.Conv2d(6, 6, (1, 3), groups=6)),
            nn.Sequential(nn.Conv2d(6, 6, (3, 1), 2, groups=6, bias=False), nn.Conv2d(6, 6, (1, 3), groups=6)),
            nn.Sequential(nn.Conv2d(6, 6, (3, 1), groups=6, bias=False), nn.Conv2d(6, 6, (3, 1), groups=6)),
            nn.Sequential(nn.Conv2d(6, 12, (3, 1), groups=6, bias=False), nn.Conv2d(12, 12, (1, 3), groups=12)),
            Apply(lambda x, a, b: b(y := a(x)) + y.mean(), *cp_chain()[1:3]),
        ],
        ids=["bias between", "activation between", "columns lost", "rows twice", "multiplier", "read again"],
    )
    def test_what_is_almost_a_whole_kernel_stays_in_parts(self, model: nn.Module) -> None:
        channels = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d)).in_channels
        x = torch.randn(2, channels, 9, 8)
        found = [match for match in matches(model, x) if match.op == "depthwise_conv2d"]
        sizes = {tuple(match.arguments["weight"].meta["val"].shape[2:]) for match in found}
        assert all(1 in size for size in sizes), sizes
        assert_as_exact_as(emit_fused(model.eval(), x), model, x)

    @pytest.mark.parametrize("op", LINKS)
    def test_on_the_cpu_other_chains_stay_layers_one_after_the_other(self, op: str) -> None:
        model, x = LINKS[op]
        assert op not in matched_ops(model, x)

    @pytest.mark.parametrize("op", LINKS)
    def test_elsewhere_they_are_one_layer(self, op: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(lowrank, "_is_on_cpu", lambda node: False)
        model, x = LINKS[op]
        emitted = emit_onto(model, x, op)
        assert ops_of(emitted) == [op]
        assert_as_exact_as(emitted, model, torch.cat([x, x]))
        assert_saving_and_capture_keep(emitted, tmp_path, x)

    def test_a_factor_with_a_bias_or_an_activation_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lowrank, "_is_on_cpu", lambda node: False)
        x = torch.randn(2, 8)
        for first in (nn.Linear(8, 3), nn.Sequential(nn.Linear(8, 3, bias=False), nn.ReLU())):
            assert "lowrank_linear" not in matched_ops(nn.Sequential(first, nn.Linear(3, 9)), x)
