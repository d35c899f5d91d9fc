"""Squeeze-and-excitation against the float64 reference, on every instruction set, and in emitted networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emitting import (
    FUSED_BACKENDS,
    Apply,
    assert_as_exact_as,
    assert_saving_and_capture_keep,
    emit_fused,
    matched_ops,
    ops_of,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import MAKERS, Maker, assert_matches, channel_slice, channels_last, run_native
from torch import Tensor, nn

import kernelpress as kp
from kernelpress import ops
from kernelpress.kernels.reference import ACTIVATIONS


def weights(channels: int, hidden: int, c_out: int, biased: bool = True) -> tuple[Tensor | None, ...]:
    return (
        *(torch.randn(hidden, channels, 1, 1) / channels**0.5, torch.randn(hidden) if biased else None),
        *(torch.randn(c_out, hidden, 1, 1) / hidden**0.5, torch.randn(c_out) if biased else None),
    )


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 3), st.sampled_from([1, 7, 16, 33, 100]), st.integers(1, 12), st.integers(1, 12)),
    hidden=st.sampled_from([1, 5, 32, 70]),
    c_out=st.sampled_from([1, 16, 45, 100]),
    activations=st.tuples(st.sampled_from(ACTIVATIONS), st.sampled_from(ACTIVATIONS)),
    biased=st.booleans(),
    make=st.sampled_from(MAKERS),
    seeds=st.random_module(),
)
def test_the_kernel_matches_the_reference(
    cpu_variant: str,
    shape: tuple[int, ...],
    hidden: int,
    c_out: int,
    activations: tuple[str, str],
    biased: bool,
    make: Maker,
    seeds: object,
) -> None:
    tensors = (make(*shape), *weights(shape[1], hidden, c_out, biased))
    options = {"reduce_activation": activations[0], "activation": activations[1]}
    outputs = [ops.squeeze_excite(*tensors, **options, backend="cpu")]  # type: ignore[arg-type]
    if make in (channels_last, channel_slice):
        outputs.append(run_native("squeeze_excite", tensors, **options))
    assert_matches("squeeze_excite", tensors, options, *outputs)


def test_a_map_larger_than_the_inner_caches(cpu_variant: str) -> None:
    tensors = (channels_last(1, 96, 57, 61), *weights(96, 24, 96))
    assert_matches("squeeze_excite", tensors, {}, ops.squeeze_excite(*tensors, backend="cpu"))  # type: ignore[arg-type]


def test_weights_of_many_panels_are_shared_among_threads(cpu_variant: str) -> None:
    tensors = (channels_last(2, 300, 7, 7), *weights(300, 260, 300))
    assert_matches("squeeze_excite", tensors, {}, ops.squeeze_excite(*tensors, backend="cpu"))  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_an_empty_batch_gives_an_empty_output(backend: str) -> None:
    reduce, _, expand, _ = weights(6, 2, 5)
    y = ops.squeeze_excite(torch.empty(0, 6, 4, 4), reduce, None, expand, backend=backend)  # type: ignore[arg-type]
    assert y.shape == (0, 5, 1, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(1, 6, 0, 4)}, "x: expected at least one position"),
        ({"x": torch.zeros(1, 5, 4, 4)}, r"reduce_weight: expected \[R, C, 1, 1\] with C = 5 channels of x"),
        ({"expand_weight": torch.zeros(5, 3, 1, 1)}, r"expand_weight: expected \[C_out, R, 1, 1\] with R = 2"),
        ({"reduce_bias": torch.zeros(3)}, r"reduce_bias: expected \[2\]"),
        ({"expand_bias": torch.zeros(3)}, r"expand_bias: expected \[5\]"),
        ({"activation": "tanh"}, "activation: expected one of identity"),
        ({"reduce_activation": "tanh"}, "reduce_activation: expected one of identity"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    good = {
        "x": torch.zeros(1, 6, 4, 4),
        "reduce_weight": torch.zeros(2, 6, 1, 1),
        "reduce_bias": None,
        "expand_weight": torch.zeros(5, 2, 1, 1),
        "expand_bias": None,
    }
    with pytest.raises(ValueError, match=message):
        ops.squeeze_excite(**good | changes)


class SqueezeExcite(nn.Module):
    """As networks have it: the mean by `mean` or by a pool, any two activations."""

    def __init__(self, pool: str = "mean", gate: Any = F.hardsigmoid) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(12, 3, 1), nn.Conv2d(3, 12, 1)
        self.pool, self.gate = pool, gate

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True) if self.pool == "mean" else F.adaptive_avg_pool2d(x, 1)
        return x * self.gate(self.expand(F.relu(self.reduce(mean))))


class Bottleneck(nn.Module):
    """A depthwise convolution, what each channel counts, and the projection."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.excite, self.project = SqueezeExcite(**options), nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.excite(F.hardswish(self.depthwise(x))))


@pytest.mark.usefixtures("every_match_is_exact")
@pytest.mark.parametrize("backend", FUSED_BACKENDS)
@pytest.mark.parametrize("pool", ["mean", "pool"])
@pytest.mark.parametrize("gate", [F.hardsigmoid, torch.sigmoid], ids=["hardsigmoid", "sigmoid"])
def test_the_block_is_one_op_and_scales_the_projections_input(
    backend: str, pool: str, gate: Any, tmp_path: Path
) -> None:
    model, x = Bottleneck(pool=pool, gate=gate).eval(), channels_last(2, 12, 9, 7)
    emitted = emit_fused(model, x, backend)
    assert [op for op in ops_of(emitted) if op != "aten.flatten.using_ints"] == [
        *("depthwise_conv2d", "squeeze_excite", "pointwise_conv2d")
    ]
    assert_as_exact_as(emitted, model, x)
    assert_saving_and_capture_keep(emitted, tmp_path, x)
    if backend == "cpu":
        plan = kp.capture(emitted, x)
        assert plan.native_steps == len(plan) == 3


@pytest.mark.parametrize(
    "compute",
    [
        lambda x, a, b: (lambda y: b(y).sigmoid() + y.sum())(a(x.mean((2, 3), keepdim=True))),
        lambda x, a, b: (lambda m: b(a(m)).sigmoid() * m)(x.mean((2, 3), keepdim=True)),
        lambda x, a, b: b(a(x.mean((1, 2), keepdim=True).expand(2, 12, 1, 7))),
        lambda x, a, b: b(a(F.adaptive_avg_pool2d(x, 2))),
    ],
    ids=["the reduced is read", "the mean is read", "another mean", "more than one pixel"],
)
def test_what_only_resembles_it_is_left_alone(compute: Any) -> None:
    model = Apply(compute, nn.Conv2d(12, 3, 1), nn.Conv2d(3, 12, 1))
    assert "squeeze_excite" not in matched_ops(model, torch.randn(2, 12, 7, 7))
