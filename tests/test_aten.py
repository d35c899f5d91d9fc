"""ATen operators as steps of plans: their kernels against torch in float64, on every instruction set, and in plans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emitting import Apply, emit_fused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import (
    MAKERS,
    Maker,
    assert_close,
    channel_slice,
    channels_last,
    with_random_norms,
)
from torch import Tensor, nn

import kernelpress as kp
from kernelpress.kernels.reference import ACTIVATIONS, activate
from kernelpress.ops.calls.aten import aten_call, parts_of
from kernelpress.ops.calls.elementwise import elementwise
from kernelpress.ops.calls.steps import NativeCall
from kernelpress.runtime import native
from kernelpress.runtime.torch_private import pytree

aten = torch.ops.aten

needs_native = pytest.mark.skipif(native.cpu() is None, reason="no native kernels: build them with `make build`")
pytestmark = needs_native


def run(call: NativeCall | None, kernel: str | None = None) -> None:
    assert call is not None
    assert kernel in (None, call.name)
    getattr(native.cpu(), call.name)(*call.arguments)


def poisoned(like: Tensor) -> tuple[Tensor, Callable[[], bool]]:
    """A slice of a wider poisoned tensor in the memory format of `like`, and whether nothing around it was written."""
    wide = torch.full([size + 3 for size in like.shape], torch.nan)
    if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
        wide = wide.contiguous(memory_format=torch.channels_last)
    inside = tuple(slice(1, 1 + size) for size in like.shape)
    around = torch.ones(wide.shape, dtype=torch.bool)
    around[inside] = False
    return wide[inside], lambda: bool(wide[around].isnan().all())


def result_of(target: Any, *args: Any, kwargs: dict[str, Any] | None = None, activation: str = "identity") -> Tensor:
    """What the native calls of an operator write, into poisoned memory that lies as torch's own result does."""
    y = torch.full_like(target(*args, **(kwargs or {})), torch.nan)
    for arguments, out in parts_of(target, args, kwargs or {}, y):
        run(aten_call(target, arguments, kwargs or {}, out, activation))
    return y


def in_float64(target: Any, *args: Any, kwargs: dict[str, Any] | None = None) -> Tensor:
    doubles = pytree.tree_map_only(Tensor, Tensor.double, args)
    result: Tensor = target(*doubles, **(kwargs or {}))
    return result


def strided(shape: tuple[int, ...], data: st.DataObject) -> Tensor:
    """A random tensor of that shape whose dimensions lie in any order, some repeated, some a part of wider ones."""
    order = data.draw(st.permutations(range(len(shape))))
    kept = [data.draw(st.booleans()) for _ in shape]
    sizes = [size if keep else 1 for size, keep in zip(shape, kept, strict=True)]
    wide = torch.randn([sizes[d] + data.draw(st.integers(0, 2)) for d in order])
    t = wide.permute([order.index(d) for d in range(len(shape))])
    return t[tuple(slice(0, size) for size in sizes)]


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.sampled_from([1, 2, 3, 5, 17, 40]), max_size=5).map(tuple),
    present=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    numbers=st.tuples(*[st.sampled_from([0.0, 1.0, -1.0, 0.7])] * 3),
    activation=st.sampled_from(ACTIVATIONS),
    data=st.data(),
    seeds=st.random_module(),
)
def test_elementwise_of_any_strides(
    cpu_variant: str,
    shape: tuple[int, ...],
    present: tuple[bool, bool, bool],
    numbers: tuple[float, float, float],
    activation: str,
    data: st.DataObject,
    seeds: object,
) -> None:
    scale, c_scale, shift = numbers
    a, b, c = (strided(shape, data) if there else None for there in present)
    order = data.draw(st.permutations(range(len(shape))))
    y, is_untouched = poisoned(torch.empty([shape[d] for d in order]))
    y = y.permute([order.index(d) for d in range(len(shape))])
    call = elementwise(y, a, b, c, scale=scale, c_scale=c_scale, shift=shift, activation=activation)
    run(call, "elementwise")
    one, zero = torch.ones(()).double(), torch.zeros(()).double()
    factors = [one if t is None else t.double() for t in (a, b)]
    terms = [scale * factors[0] * factors[1], zero if c is None else c_scale * c.double(), shift * one]
    assert_close(
        y,
        activate(sum(terms), activation).expand(shape),  # type: ignore[arg-type]
        sum(t.abs() for t in terms).expand(shape),  # type: ignore[union-attr]
    )
    assert is_untouched()


def test_more_dimensions_than_the_kernel_has_are_left_to_torch() -> None:
    x = torch.randn(2, 3, 2, 3, 2, 3, 2)
    assert elementwise(torch.empty(x.shape), x) is not None
    mixed = x.permute(6, 5, 4, 3, 2, 1, 0)
    assert elementwise(torch.empty(mixed.shape), mixed) is None


def test_copies_are_exact_to_the_bit(cpu_variant: str) -> None:
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, -3.5] * 5)
    y = result_of(aten.clone.default, x)
    assert torch.equal(y.nan_to_num(7), x.nan_to_num(7))
    assert torch.equal(y.signbit(), x.signbit())


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "identity"])
def test_nan_passes_every_activation(cpu_variant: str, activation: str) -> None:
    x = torch.randn(37)
    x[::5] = torch.nan
    y = torch.empty(37)
    run(elementwise(y, x, activation=activation))
    assert torch.equal(y.isnan(), x.isnan())


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("size", [(1, 5, 3, 7), (2, 33, 9, 8)], ids=str)
def test_arithmetic_of_images(cpu_variant: str, make: Maker, size: tuple[int, ...]) -> None:
    x, other = make(*size), make(*size)
    gate, channel, number = torch.randn(*size[:2], 1, 1), torch.randn(size[1], 1, 1), torch.randn(())
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        *(
            (target, (x, y), {})
            for target in (aten.add.Tensor, aten.mul.Tensor)
            for y in (other, gate, channel, number)
        ),
        *((aten.add.Tensor, (gate, x), {"alpha": 2}), (aten.sub.Tensor, (x, gate), {"alpha": 3})),
        *((aten.add.Tensor, (x, 1.5), {"alpha": 2}), (aten.sub.Tensor, (x, 2), {})),
        *((aten.mul.Tensor, (x, -0.3), {}), (aten.div.Tensor, (x, 6), {})),
    ]
    for target, args, kwargs in calls:
        for activation in ("identity", "relu", "silu"):
            y = result_of(target, *args, kwargs=kwargs, activation=activation)
            expected = in_float64(target, *args, kwargs=kwargs)
            terms = None if target in (aten.mul.Tensor, aten.div.Tensor) else expected.abs() + x.double().abs()
            assert_close(y, activate(expected, activation), terms)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("make", MAKERS)
def test_a_normalisation_by_running_statistics(cpu_variant: str, make: Maker, affine: bool) -> None:
    norm = with_random_norms(nn.BatchNorm2d(21)) if affine else nn.BatchNorm2d(21, affine=False)
    x = make(2, 21, 5, 6)
    args = (x, norm.weight, norm.bias, norm.running_mean, norm.running_var, False, 0.1, 1e-5, True)
    assert_close(
        result_of(aten.batch_norm.default, *args, activation="relu"), in_float64(aten.batch_norm.default, *args).relu()
    )


@pytest.mark.parametrize("make", MAKERS)
def test_moves_of_elements_are_exact(cpu_variant: str, make: Maker) -> None:
    x, other = make(2, 5, 4, 7), make(2, 3, 4, 7)
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        (aten.clone.default, (x,), {"memory_format": torch.contiguous_format}),
        (aten.clone.default, (x,), {"memory_format": torch.channels_last}),
        (aten.clone.default, (x.permute(0, 2, 3, 1),), {"memory_format": torch.contiguous_format}),
        (aten.cat.default, ([x, other, x], 1), {}),
        (aten.cat.default, ([x, x],), {}),
        (aten.cat.default, ([x, x], -1), {}),
        (aten.cat.default, ([x, other],), {"dim": -3}),
        (aten.constant_pad_nd.default, (x, [1, 2]), {}),
        (aten.pad.default, (x, [1, 2, 0, 1]), {}),
        (aten.constant_pad_nd.default, (x, [0, 1, 2, 0, 0, 3], -1.5), {}),
        (aten.reshape.default, (x.permute(0, 3, 1, 2), [2, -1]), {}),
        (aten.flatten.using_ints, (x.permute(0, 3, 1, 2), 1), {}),
    ]
    for target, args, kwargs in calls:
        assert torch.equal(result_of(target, *args, kwargs=kwargs), target(*args, **kwargs))


IN_PLACE = (channels_last, channel_slice)
POOLS: list[tuple[Any, tuple[Any, ...]]] = [
    *((aten.mean.dim, ([2, 3], True)), (aten.mean.dim, ([-1, -2],)), (aten.adaptive_avg_pool2d.default, ([1, 1],))),
    *((aten.adaptive_avg_pool2d.default, ([4, 2],)), (aten.avg_pool2d.default, ([2, 2],))),
    (aten.avg_pool2d.default, ([3, 2], [2, 1], [1, 0])),
    (aten.avg_pool2d.default, ([3, 3], [2, 2], [1, 1], False, False)),
    (aten.avg_pool2d.default, ([3], [2], [1], True, True)),
    (aten.avg_pool2d.default, ([3, 3], [2, 2], [1, 1], True, False)),
    (aten.avg_pool2d.default, ([2, 3], [3, 1], [1, 0], True, True, 5)),
]
MAXIMA: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.max_pool2d.default, ([3, 3], [2, 2], [0, 0], [1, 1], True)),
    (aten.max_pool2d.default, ([3], [1], [1])),
]


@pytest.mark.parametrize("make", IN_PLACE)
@pytest.mark.parametrize("channels", [1, 16, 70, 133])
def test_pools(cpu_variant: str, make: Maker, channels: int) -> None:
    for target, args in POOLS:
        x = make(3, channels, 12, 10)
        terms = in_float64(target, x.abs(), *args)
        assert_close(result_of(target, x, *args), in_float64(target, x, *args), terms)
    for target, args in MAXIMA:
        x = make(3, channels, 12, 10)
        assert torch.equal(result_of(target, x, *args), target(x, *args))


@pytest.mark.parametrize(
    ("kernel", "target", "args"),
    [
        ("avg_pool2d", *POOLS[5]),
        ("max_pool2d", *MAXIMA[0]),
        ("resize2d", aten.upsample_bilinear2d.default, ([5, 11], False)),
    ],
    ids=["average", "largest", "bilinear"],
)
def test_channels_of_a_wider_image_are_written(
    cpu_variant: str, kernel: str, target: Any, args: tuple[Any, ...]
) -> None:
    x = channels_last(2, 37, 9, 8)
    expected = target(x, *args)
    wide = torch.full((2, 44, *expected.shape[2:]), torch.nan).contiguous(memory_format=torch.channels_last)
    run(aten_call(target, (x, *args), {}, wide[:, 3:40]), kernel)
    assert_close(wide[:, 3:40], expected.double(), expected.double().abs())
    assert bool(torch.cat([wide[:, :3], wide[:, 40:]], 1).isnan().all())


@pytest.mark.parametrize("size", [(1, 17, 57, 61), (1, 130, 30, 31), (5, 64, 40, 40)], ids=str)
def test_the_mean_of_a_large_image_is_shared_among_threads(cpu_variant: str, size: tuple[int, ...]) -> None:
    x = channels_last(*size)
    assert_close(
        result_of(aten.mean.dim, x, [2, 3], True), x.double().mean((2, 3), True), x.double().abs().mean((2, 3), True)
    )


@pytest.mark.parametrize("make", IN_PLACE)
def test_images_of_another_size(cpu_variant: str, make: Maker) -> None:
    x = make(2, 21, 5, 7)
    for size in ([10, 14], [3, 4], [5, 9], [1, 1]):
        nearest = aten.upsample_nearest2d.default
        assert torch.equal(result_of(nearest, x, size), nearest(x, size))
        for corners in (True, False):
            expected = in_float64(aten.upsample_bilinear2d.default, x, size, corners)
            terms = in_float64(aten.upsample_bilinear2d.default, x.abs(), size, corners)
            assert_close(result_of(aten.upsample_bilinear2d.default, x, size, corners), expected, terms)
    # Factors that leave a size as it is, or nearly double it, are none to torch.
    for factors in ([2.0, 2.0], [1.7, 0.6], [1.1, 1.05], [1.9, 1.1], [2.1, 1.0], [2.1, 2.1]):
        args = (None, False, factors)
        assert_close(
            result_of(aten.upsample_bilinear2d.vec, x, *args),
            in_float64(aten.upsample_bilinear2d.vec, x, *args),
            in_float64(aten.upsample_bilinear2d.vec, x.abs(), *args),
        )
        args = (None, factors)
        assert torch.equal(result_of(aten.upsample_nearest2d.vec, x, *args), aten.upsample_nearest2d.vec(x, *args))


def test_what_no_kernel_computes_is_refused() -> None:
    x, y = torch.randn(2, 4, 6, 6), torch.empty(2, 4, 6, 6)
    assert aten_call(aten.add.Tensor, (x.double(), x), {}, y.double()) is None
    assert aten_call(aten.add.Tensor, (x, x.int()), {}, y) is None
    assert aten_call(aten.div.Tensor, (x, x), {}, y) is None
    assert aten_call(aten.hardtanh.default, (x, -1, 1), {}, y) is None
    assert aten_call(aten.gelu.default, (x,), {"approximate": "tanh"}, y) is None
    assert aten_call(aten.tanh.default, (x,), {}, y) is None
    assert aten_call(aten.clone.default, (x,), {}, y, "relu") is None
    assert parts_of(aten.pad.default, (x, [1, 1], "reflect"), {}, y) == []
    assert parts_of(aten.pad.default, (x, [1, -1]), {}, y) == []
    assert aten_call(aten.max_pool2d.default, (x, [3, 3], [1, 1], [1, 1]), {}, y) is None  # not channels_last


def test_plans_run_natively_what_no_layer_of_ours_computes() -> None:
    def compute(x: Tensor, a: nn.Module, b: nn.Module, norm: nn.Module) -> Tensor:
        y = a(x)
        gate = torch.sigmoid(b(y.mean((2, 3), keepdim=True)))
        y = F.pad(F.avg_pool2d(norm(y * gate + y).relu(), 3, 2, 1), (0, 1, 1, 0))
        left, right = y.chunk(2, dim=1)
        y = torch.cat([F.silu(left), right + 1, F.max_pool2d(right, 3, 1, 1)], 1)
        y = F.interpolate(F.interpolate(y, scale_factor=2.0), size=(9, 7), mode="bilinear")
        return F.adaptive_avg_pool2d(y, (3, 1)).permute(0, 2, 3, 1).flatten(1)

    norm = with_random_norms(nn.BatchNorm2d(8))
    model = Apply(compute, nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), norm).eval()
    x = torch.randn(2, 3, 13, 11)
    emitted = emit_fused(model, x, "cpu")
    plan = kp.capture(emitted, x)
    assert plan.native_steps == len(plan), plan.steps
    assert "native aten.batch_norm.default + relu" in plan.steps
    for image in (x, torch.randn(2, 3, 13, 11)):
        with torch.no_grad():
            torch.testing.assert_close(plan(image), model(image), rtol=1e-5, atol=1e-5)


def test_an_activation_stays_apart_where_others_read_what_is_before_it() -> None:
    model = Apply(lambda x: (y := x + x * 2, y.relu())).eval()
    x = torch.randn(2, 3, 5, 5)
    plan = kp.capture(emit_fused(model, x, "cpu"), x)
    assert [step for step in plan.steps if "relu" in step] == ["native aten.relu.default"]
    for result, expected in zip(plan(x), model(x), strict=True):
        torch.testing.assert_close(result, expected)


def test_a_normalisation_whose_statistics_are_computed_is_left_to_torch() -> None:
    def compute(x: Tensor) -> Tensor:
        return F.batch_norm(x, x.mean((0, 2, 3)), x.mean((0, 2, 3)) ** 2 + 1)

    x = torch.randn(2, 3, 5, 5)
    emitted = emit_fused(Apply(compute).eval(), x, "cpu")
    plan = kp.capture(emitted, x)
    assert "torch aten.batch_norm.default" in plan.steps
    for image in (x, torch.randn(2, 3, 5, 5) + 1):
        torch.testing.assert_close(plan(image), compute(image))


def test_a_plan_keeps_the_constants_that_its_steps_read() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    x = torch.randn(2, 3, 5, 5)
    emitted = emit_fused(Scaled().eval(), x, "cpu")
    plan = kp.capture(emitted, x)
    assert plan.native_steps == len(plan) == 1
    expected = plan(x)
    for parameter in emitted.parameters():
        parameter.data.fill_(7)
    assert torch.equal(plan(x), expected)
