"""Winograd's convolution against the float64 reference, on every instruction set; and where emission takes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from emitting import Apply, assert_saving_and_capture_keep, emit_fused, prefer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import (
    MAKERS,
    assert_matches,
    channel_slice,
    channels_last,
    expected_output,
    relative_error,
    run_native,
)
from torch import nn

import kernelpress as kp
from kernelpress import ops
from kernelpress.kernels.reference import ACTIVATIONS
from kernelpress.measure.memory import weight_bytes
from kernelpress.ops import registry
from kernelpress.ops.calls.steps import native_call
from kernelpress.runtime import native

pytestmark = pytest.mark.skipif(native.cpu() is None, reason=f"no native module: {native.load().absent_because}")

WINOGRAD = ("winograd4", "winograd2")
backends = pytest.mark.parametrize("backend", WINOGRAD)

many = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def convolutions(draw: st.DrawFn) -> dict:
    padding = draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
    least = [max(1, 3 - 2 * p) for p in padding]
    return {
        "size": tuple(draw(st.integers(low, low + 12)) for low in least),
        "batch": draw(st.integers(1, 3)),
        "c_in": draw(st.sampled_from([1, 3, 5, 16, 17, 33, 64])),
        "c_out": draw(st.sampled_from([1, 3, 8, 16, 31, 32, 33, 70])),
        "padding": padding,
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "parts": draw(st.tuples(st.booleans(), st.booleans(), st.booleans())),
        "make": draw(st.sampled_from(MAKERS)),
        "backend": draw(st.sampled_from(WINOGRAD)),
    }


@many
@given(case=convolutions(), seeds=st.random_module())
def test_any_geometry_writes_its_channels_only(cpu_variant: str, case: dict, seeds: object) -> None:
    x, weight = case["make"](case["batch"], case["c_in"], *case["size"]), torch.randn(case["c_out"], case["c_in"], 3, 3)
    options = {name: case[name] for name in ("padding", "activation")}
    given = (torch.randn(case["c_out"]), torch.rand(case["c_out"]) + 0.5, None)
    tensors = [x, weight, *(t if part else None for t, part in zip(given, case["parts"], strict=True))]
    if case["parts"][2]:
        tensors[4] = channel_slice(*ops.allocate("conv2d", tensors, options).shape)
    outputs = [ops.conv2d(*tensors, **options, backend=case["backend"])]
    if case["make"] in (channels_last, channel_slice):
        outputs.append(run_native("conv2d", tensors, **options, backend=case["backend"]))
    assert_matches("conv2d", tensors, options, *outputs)


@pytest.mark.parametrize(
    ("batch", "c_in", "c_out", "size"), [(2, 20, 70, (41, 75)), (1, 200, 100, (17, 30)), (9, 96, 33, (7, 7))], ids=str
)
@backends
def test_many_blocks_of_tiles_and_panels(
    cpu_variant: str, backend: str, batch: int, c_in: int, c_out: int, size: tuple[int, int]
) -> None:
    x, weight = channels_last(batch, c_in, *size), torch.randn(c_out, c_in, 3, 3)
    tensors = [x, weight, torch.randn(c_out), None, channels_last(batch, c_out, *size)]
    options = {"padding": (1, 1), "activation": "relu"}
    out = run_native("conv2d", tensors, **options, backend=backend)
    assert_matches("conv2d", tensors, options, out)
    assert native_call("conv2d", tensors, {**options, "backend": backend}, out).name == "winograd_conv2d"


def test_small_tiles_of_integers_are_exact(cpu_variant: str) -> None:
    x, weight = torch.randint(-9, 10, (2, 40, 11, 13)).float(), torch.randint(-9, 10, (35, 40, 3, 3)).float()
    out = ops.conv2d(x, weight, padding=1, backend="winograd2")
    assert torch.equal(out.double(), expected_output("conv2d", (x, weight), padding=(1, 1)))


def test_large_tiles_lose_less_than_three_times_what_the_direct_kernel_does() -> None:
    x, weight = channels_last(1, 256, 28, 28), torch.randn(64, 256, 3, 3)
    expected = expected_output("conv2d", (x, weight), padding=(1, 1))
    direct, four, two = (
        relative_error(ops.conv2d(x, weight, padding=1, backend=backend), expected) for backend in ("cpu", *WINOGRAD)
    )
    assert four < 3 * direct
    assert two < direct


@backends
def test_no_images_give_no_images(backend: str) -> None:
    assert ops.conv2d(torch.randn(0, 4, 9, 9), torch.randn(6, 4, 3, 3), padding=1, backend=backend).shape == (
        0,
        6,
        9,
        9,
    )


@backends
def test_a_prepared_call_sees_the_present_weights(backend: str) -> None:
    x, weight = channels_last(1, 16, 8, 8), torch.randn(8, 16, 3, 3)
    for _ in range(3):
        out = ops.conv2d(x, weight, padding=1, backend=backend)
        assert_matches("conv2d", [x, weight], {"padding": (1, 1)}, out)
        weight.mul_(-1.5)


@backends
def test_what_it_cannot_compute_is_refused(backend: str) -> None:
    x, weight = torch.randn(1, 4, 9, 9), torch.randn(4, 4, 3, 3)
    for options, reason in (
        ({"stride": 2}, "has stride 1, got"),
        ({"dilation": 2}, "has dilation 1, got"),
        ({"groups": 4}, "has groups = 1, got 4"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            ops.conv2d(x, weight[:, : 4 // options.get("groups", 1)], **options, backend=backend)
    with pytest.raises(RuntimeError, match=r"has a 3×3 kernel, got \(1, 3\)"):
        ops.conv2d(x, weight[:, :, :1], backend=backend)
    with pytest.raises(RuntimeError, match=r"takes torch\.float32"):
        ops.conv2d(x.double(), weight.double(), backend=backend)


def test_an_automatic_choice_never_takes_it() -> None:
    reasons = ops.why_not("conv2d", torch.randn(1, 64, 56, 56), torch.randn(64, 64, 3, 3), padding=1)
    assert all(reasons[backend] is None for backend in ("cpu", *WINOGRAD))
    assert next(backend for backend, reason in reasons.items() if reason is None) not in WINOGRAD


@backends
def test_nan_and_infinity_stay_within_the_tiles_that_read_them(cpu_variant: str, backend: str) -> None:
    tile = int(backend[-1])
    x, weight = channels_last(1, 5, 24, 24), torch.randn(7, 5, 3, 3)
    x[0, 1, 2, 2], x[0, 3, 20, 13] = torch.nan, torch.inf
    out, exact = (ops.conv2d(x, weight, padding=1, backend=name) for name in (backend, "cpu"))
    may_spread = torch.zeros(24, 24, dtype=torch.bool)
    for row, column in ((2, 2), (20, 13)):
        top, left = ((row - 1) // tile * tile, (column - 1) // tile * tile)
        may_spread[top : (row + 1) // tile * tile + tile, left : (column + 1) // tile * tile + tile] = True
    assert not out[:, :, may_spread].isfinite().all()
    assert out[0, :, exact[0, 0].isfinite().logical_not()].isfinite().logical_not().all()
    assert relative_error(out[:, :, ~may_spread], exact[:, :, ~may_spread]) < 2e-6


@backends
def test_inputs_below_the_limit_overflow_nowhere(cpu_variant: str, backend: str) -> None:
    weight = torch.randn(8, 12, 3, 3)
    limit = registry.operator("conv2d").kernel(backend).input_limit
    assert limit is not None
    largest = limit(None, None, weight, None, None, None)
    x = (torch.randint(0, 2, (64, 12, 8, 8)) * 2.0 - 1) * largest
    assert ops.conv2d(x, weight, padding=1, backend=backend).isfinite().all()
    beyond = ops.conv2d(x * 1e4, weight, padding=1, backend=backend)
    assert not beyond.isfinite().all(), "the limit is far from what can overflow"


def block(channels: int = 16) -> nn.Module:
    """A residual block, whose second convolution takes everything into its epilogue."""
    layers = (nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1))
    return Apply(lambda x, a, b: torch.relu(b(torch.relu(a(x))) + x), *layers).eval()


@backends
def test_emitted_models_save_and_capture_it(backend: str, tmp_path: Path) -> None:
    model, x = block(), channels_last(2, 16, 13, 10)
    emitted = emit_fused(model, x, backend)
    assert [place.choice for place in emitted.record.places] == [f"conv2d[{backend}]"] * 2
    assert f"conv2d[{backend}]" in emitted.summary()
    plan = kp.capture(emitted, x)
    assert plan.native_steps == len(plan)
    torch.testing.assert_close(plan(x), model(x), rtol=1e-4, atol=1e-5)
    assert_saving_and_capture_keep(emitted, tmp_path, x)


def test_the_memory_of_transformed_weights_counts() -> None:
    model, x = nn.Conv2d(32, 64, 3).eval(), channels_last(1, 32, 9, 9)
    plain = weight_bytes(model)
    emitted = emit_fused(model, x, "winograd4")
    kp.capture(emitted, x)
    assert weight_bytes(emitted) == plain + 4 * model.weight.nbytes + model.bias.nbytes
    assert weight_bytes(model) == plain, "candidates left what they packed from the model's own weights"


def refusals(emitted: kp.emit.EmittedModel) -> dict[str, str | None]:
    (place,) = emitted.record.places
    return {candidate.name: candidate.refusal for candidate in place.candidates}


def test_emission_refuses_it_beyond_the_tolerance() -> None:
    model, x = nn.Conv2d(64, 8, 3).eval(), torch.randn(1, 64, 12, 12)
    strict = kp.emit(model, x, cost=prefer("winograd4"), progress=False, tolerance=1e-8)
    assert all("is above the tolerance 1.0e-08" in str(refusals(strict)[f"conv2d[{name}]"]) for name in WINOGRAD)
    usual = emit_fused(model, x, "winograd4")
    assert usual.record.places[0].choice == "conv2d[winograd4]"


def test_emission_refuses_it_where_sums_might_overflow() -> None:
    model, x = nn.Conv2d(8, 8, 3).eval(), torch.randn(1, 8, 12, 12)
    with torch.no_grad():
        model.weight.mul_(1e33)
    emitted = kp.emit(model, x, cost=prefer("winograd4"), progress=False)
    assert all("sums might overflow" in str(refusals(emitted)[f"conv2d[{name}]"]) for name in WINOGRAD)
    x[0, 0, 0, 0] = torch.nan
    emitted = kp.emit(nn.Conv2d(8, 8, 3).eval(), x, cost=prefer("winograd4"), progress=False)
    assert all("sums might overflow" in str(refusals(emitted)[f"conv2d[{name}]"]) for name in WINOGRAD)


def test_emission_leaves_it_out_where_nan_and_infinity_must_stay_in_place() -> None:
    model, x = nn.Conv2d(8, 8, 3).eval(), torch.randn(1, 8, 12, 12)
    emitted = kp.emit(model, x, cost=prefer("winograd4"), progress=False, exact_nonfinite=True)
    assert not any(name in refusals(emitted) for name in ("conv2d[winograd4]", "conv2d[winograd2]"))
    assert "conv2d[cpu]" in refusals(emitted)
