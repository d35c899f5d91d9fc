"""The backend `sparse` of `int8_conv2d`: the reference's integers on every instruction set, emitted where zeros pay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emitting import prefer, torch_steps
from support import EXACT_ACTIVATIONS, assert_same, int8, int8_image, residual_for, run_native, slice_of_wider
from torch import Tensor, nn

import kernelpress as kp
from kernelpress import compress, ops
from kernelpress.emit import evaluate
from kernelpress.kernels.reference import ACTIVATIONS
from kernelpress.ops.calls.steps import native_call
from kernelpress.runtime import native

on_every_set = pytest.mark.usefixtures("int8_cpu_variant")
needs_native = pytest.mark.skipif(native.cpu() is None, reason="no native kernels: build them with `make build`")

EXACT = (*EXACT_ACTIVATIONS, "hardswish", "hardsigmoid")

# channels, kernel, stride, padding, dilation, height and width
CONVOLUTIONS: dict[str, tuple[Any, ...]] = {
    "1x1": (20, 70, (1, 1), (1, 1), (0, 0), (1, 1), (7, 9)),
    "1x1 of one cell": (4, 1, (1, 1), (1, 1), (0, 0), (1, 1), (1, 2)),
    "1x1 of many strips": (64, 130, (1, 1), (1, 1), (0, 0), (1, 1), (31, 33)),
    "1x1 of deep strips": (1024, 24, (1, 1), (1, 1), (0, 0), (1, 1), (7, 7)),
    "1x1, stride 2": (16, 33, (1, 1), (2, 2), (0, 0), (1, 1), (8, 11)),
    "1x1, padded": (8, 6, (1, 1), (1, 2), (1, 2), (1, 1), (4, 5)),
    "3x3": (64, 64, (3, 3), (1, 1), (1, 1), (1, 1), (14, 14)),
    "3x3, stride 2": (12, 40, (3, 3), (2, 2), (1, 1), (1, 1), (15, 13)),
    "dilated": (8, 17, (3, 2), (1, 2), (2, 1), (2, 3), (9, 8)),
    "much padding": (4, 4, (3, 3), (1, 1), (4, 5), (1, 1), (2, 1)),
}


def with_zeros(weight: Tensor, density: float) -> Tensor:
    """Of its cells, four input channels of one output channel, about so many are kept; one output channel has none."""
    c_out, c_in, *kernel = weight.shape
    kept = torch.rand(c_out, c_in // 4, 1, *kernel) < density
    kept[-1] = False
    return weight * kept.expand(-1, -1, 4, *(-1 for _ in kernel)).reshape(weight.shape)


@needs_native
@on_every_set
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_are_exact(name: str, number: int) -> None:
    c_in, c_out, kernel, stride, padding, dilation, size = CONVOLUTIONS[name]
    is_int8, activation = number % 2 == 0, ("relu", "hardswish", "relu6", "identity")[number]
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "activation": activation}
    options |= {"input_scale": 0.37, "input_zero_point": (-128, 127, 5, 0)[number]}
    options |= {"output_scale": 37.0, "output_zero_point": -11} if is_int8 else {}
    x, weight = int8_image(2, c_in, *size), with_zeros(int8(c_out, c_in, *kernel), (0.0, 0.1, 0.5, 1.0)[number])
    tensors: list[Any] = [x, weight, torch.rand(c_out) + 0.01, None, None]
    if number >= 1:
        tensors[0] = slice_of_wider(x, 4)
        tensors[3] = torch.randn(c_out) * 100
    if number >= 2:
        tensors[4] = residual_for("int8_conv2d", tensors[:4], options)
        if is_int8:
            options |= {"residual_scale": 1.7, "residual_zero_point": -5}
            tensors[4] = slice_of_wider(tensors[4], 3)
    y = run_native("int8_conv2d", tensors, **options, backend="sparse")
    assert native_call("int8_conv2d", tensors, {**options, "backend": "sparse"}, y).name == "int8_sparse_conv2d"
    assert_same("int8_conv2d", tensors, options, y, EXACT)


@needs_native
@on_every_set
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("c_out", "scale"), [(24, 1e-3), (68, 1.0), (132, 1e30)])
def test_outputs_of_whole_cells_are_exact(activation: str, c_out: int, scale: float) -> None:
    options = {"padding": 1, "activation": activation, "input_scale": 0.37, "input_zero_point": 3}
    options |= {"output_scale": 37.0 * scale, "output_zero_point": 9}
    x, weight = int8_image(2, 20, 13, 11), with_zeros(int8(c_out, 20, 3, 3), 0.3)
    for bias in (None, torch.randn(c_out) * 100 * scale):
        tensors = [x, weight, (torch.rand(c_out) + 0.01) * scale, bias, None]
        if bias is not None:
            tensors[4] = residual_for("int8_conv2d", tensors[:4], options)
            options |= {"residual_scale": 1.7 * scale, "residual_zero_point": -5}
        assert_same("int8_conv2d", tensors, options, ops.int8_conv2d(*tensors, **options, backend="sparse"), EXACT)


@needs_native
def test_values_that_are_no_numbers_become_the_zero_point() -> None:
    tensors = [int8_image(1, 8, 3, 5), int8(4, 8, 1, 1), torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30])]
    options: dict[str, Any] = {"output_scale": 0.5, "output_zero_point": 7}
    assert_same("int8_conv2d", tensors, options, ops.int8_conv2d(*tensors, **options, backend="sparse"))


@needs_native
@on_every_set
@pytest.mark.parametrize("x", [-128, 127])
@pytest.mark.parametrize("weight", [-128, 127])
def test_the_largest_sums_neither_saturate_nor_overflow(x: int, weight: int) -> None:
    tensors = [torch.full((1, 65536, 1, 3), x).to(torch.int8), torch.full((5, 65536, 1, 1), weight).to(torch.int8)]
    y = ops.int8_conv2d(*tensors, torch.ones(5), input_zero_point=-1 - x, backend="sparse")
    assert torch.equal(y, torch.full((1, 5, 1, 3), float((x + 1 + x) * weight * 65536)))


@needs_native
@pytest.mark.parametrize(
    ("x", "weight", "options", "reason"),
    [
        ((1, 6, 4, 4), (5, 6, 1, 1), {}, "multiples of 4 channels, got 6 in pixels 6 apart"),
        ((1, 8, 4, 4), (6, 4, 1, 1), {"groups": 2}, "groups = 1, got 2"),
    ],
)
def test_what_has_no_cells_is_refused(x: Any, weight: Any, options: Any, reason: str) -> None:
    with pytest.raises(RuntimeError, match=reason):
        ops.int8_conv2d(int8_image(*x), int8(*weight), torch.rand(weight[0]), **options, backend="sparse")


@needs_native
def test_slices_that_split_a_cell_are_refused() -> None:
    x = slice_of_wider(int8_image(1, 8, 4, 4), 3)
    with pytest.raises(RuntimeError, match=r"multiples of 4 channels, got 8 in pixels \d+ apart"):
        ops.int8_conv2d(x, int8(5, 8, 1, 1), torch.rand(5), backend="sparse")


def test_empty_batches() -> None:
    y = ops.int8_conv2d(int8_image(0, 4, 6, 6), int8(5, 4, 3, 3), torch.rand(5), backend="sparse")
    assert y.shape == (0, 5, 4, 4)


def quantized(density: float, seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(16, 32, 1), nn.ReLU(), nn.Conv2d(32, 24, 3, padding=1)).eval()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            torch.manual_seed(7)
            layer.weight.copy_(with_zeros(layer.weight, density))
    x = torch.randn(2, 16, 12, 12)
    return compress.quantize(model, x, data=[x], progress=False), x


@needs_native
@pytest.mark.usefixtures("own_cache")
def test_zeros_are_skipped_in_emitted_models_and_plans(tmp_path: Any) -> None:
    model, x = quantized(0.2)
    emitted = kp.emit(model, x, cost=prefer("sparse"), progress=False)
    choices = [place.choice for place in emitted.record.places]
    assert choices.count("int8_conv2d 1×4[sparse]") == 2
    dense = kp.emit(model, x, cost=prefer("cpu"), progress=False)
    assert torch.equal(emitted(x), dense(x))
    plan = kp.capture(emitted, x)
    assert torch.equal(plan(x), dense(x))
    assert torch_steps(emitted, x) == []
    emitted.save(tmp_path / "sparse.pt2")
    assert torch.equal(kp.load(tmp_path / "sparse.pt2")(x), dense(x))


@needs_native
@pytest.mark.usefixtures("own_cache")
def test_times_hold_for_other_scales_and_not_for_other_shares_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []
    race = evaluate.race

    def seen(calls: Any, *args: Any, **kwargs: Any) -> Any:
        timed.extend(calls)
        return race(calls, *args, **kwargs)

    monkeypatch.setattr(evaluate, "race", seen)
    for density, seed, expected in ((0.2, 0, True), (0.2, 0, False), (0.2, 1, False), (0.5, 1, True)):
        timed.clear()
        model, x = quantized(density, seed)
        kp.emit(model, x, progress=False)
        assert any("'sparse'" in name for name in timed) == expected


@needs_native
@pytest.mark.usefixtures("own_cache")
def test_a_dense_weight_is_not_tried() -> None:
    model, x = quantized(1.0)
    emitted = kp.emit(model, x, cost=prefer("sparse"), progress=False)
    labels = [candidate.name for place in emitted.record.places for candidate in place.candidates]
    assert not any("[sparse]" in label for label in labels)
