"""What all ops share: dispatch, autograd, backends, prepared calls, packing, fake kernels, FLOP formulas."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from typing import Any

import pytest
import torch
from support import assert_close, channels_last, expected_output
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kernelpress import ops
from kernelpress.ops import registry
from kernelpress.ops.calls import packing, prepared
from kernelpress.ops.checks import floating_or_int8, one_floating_dtype
from kernelpress.runtime import native
from kernelpress.runtime.torch_private import neg_view


def example(op: str, dtype: torch.dtype = torch.float32) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Small arguments that use every tensor of the op."""
    tensors, options, _ = _examples(dtype)[op]
    return tensors, options


def _examples(dtype: torch.dtype) -> dict[str, tuple[tuple[Tensor, ...], dict[str, Any], int]]:
    """Of every op such tensors and options, and the multiply-accumulates of the call."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype)

    padded = {"padding": [1, 1]}
    pointwise = (draw(2, 4, 3, 5), draw(6, 4, 1, 1), draw(6), draw(6), draw(2, 6, 3, 5), draw(2, 4))
    return {
        "conv2d": (
            (draw(2, 4, 4, 5), draw(6, 2, 3, 3), draw(6), draw(6), draw(2, 6, 2, 3)),
            {"stride": [2, 2], "groups": 2, "activation": "silu", **padded},
            (2 * 6 * 2 * 3) * 2 * 9,
        ),
        "pointwise_conv2d": (pointwise, {"activation": "sigmoid"}, (2 * 6 * 15) * 4),
        "linear": ((draw(2, 3, 4), draw(5, 4), draw(5), draw(5), draw(2, 3, 5)), {"activation": "gelu"}, (6 * 5) * 4),
        "depthwise_conv2d": (
            (draw(2, 3, 4, 5), draw(6, 1, 3, 2), draw(6), draw(6), draw(2, 6, 4, 6)),
            {"activation": "silu", **padded},
            (2 * 6 * 4 * 6) * 6,
        ),
        "separable_conv2d": (
            (draw(2, 3, 4, 5), draw(3, 1, 3, 3), draw(3), draw(4, 3, 1, 1), draw(4), draw(2, 4, 4, 5)),
            {"depthwise_activation": "silu", **padded},
            (2 * 20 * 3) * (9 + 4),
        ),
        "inverted_residual": (
            (
                *(draw(2, 3, 4, 5), draw(6, 3, 1, 1), draw(6), draw(6, 1, 3, 3), draw(6)),
                *(draw(3, 6, 1, 1), draw(3), draw(2, 3, 4, 5)),
            ),
            {"expand_activation": "sigmoid", "depthwise_activation": "silu", **padded},
            (2 * 20) * (3 * 6 + 6 * 9 + 6 * 3),
        ),
        "separable_stem": (
            (
                *(draw(2, 2, 5, 6), draw(4, 2, 3, 3), draw(4), draw(4, 1, 3, 3), draw(4)),
                *(draw(3, 4, 1, 1), draw(3)),
            ),
            {
                "stem_stride": [2, 2],
                "stem_padding": [1, 1],
                "stem_activation": "sigmoid",
                "depthwise_activation": "silu",
                "padding": [1, 1],
            },
            (2 * 9) * (4 * 2 * 9 + 4 * 9 + 4 * 3),
        ),
        "ghost_conv2d": (
            (
                *(draw(2, 3, 4, 5), draw(4, 3, 3, 2), draw(4), draw(8, 1, 3, 5), draw(8)),
                draw(2, 11, 2, 2),
            ),
            {
                "stride": [2, 2],
                "padding": [1, 0],
                "activation": "silu",
                "cheap_activation": "sigmoid",
                "out_channels": 11,
            },
            (2 * 2 * 2) * (4 * 3 * 6 + 7 * 15),
        ),
        "lowrank_conv2d": (
            (
                *(draw(2, 4, 4, 5), draw(3, 4, 1, 1), draw(2, 3, 3, 3), draw(6, 2, 1, 1), draw(6)),
                draw(2, 6, 2, 3),
            ),
            {"stride": [2, 2], "activation": "silu", **padded},
            2 * (20 * 12 + 6 * (54 + 12)),
        ),
        "lowrank_linear": (
            (draw(2, 3, 4), draw(2, 4), draw(5, 2), draw(5), draw(2, 3, 5)),
            {"activation": "gelu"},
            6 * (8 + 10),
        ),
        "squeeze_excite": (
            (draw(2, 6, 4, 5), draw(3, 6, 1, 1), draw(3), draw(5, 3, 1, 1), draw(5)),
            {"reduce_activation": "silu", "activation": "hardsigmoid"},
            2 * 3 * (6 + 5),
        ),
        "grouped_conv2d": (
            (draw(2, 6, 4, 5), draw(12, 2, 3, 2), draw(12), draw(12), draw(2, 12, 2, 3)),
            {"stride": [2, 2], "groups": 3, "shuffle": 4, "activation": "silu", **padded},
            (2 * 12 * 2 * 3) * 2 * 6,
        ),
        "channel_shuffle": ((draw(2, 12, 4, 5),), {"groups": 3}, 0),
        "shuffle_concat": ((draw(2, 5, 4, 3), draw(2, 7, 4, 3)), {"groups": 3}, 0),
        "global_avg_pool2d": ((draw(2, 3, 4, 5),), {}, 0),
        "max_pool2d": ((draw(2, 3, 5, 6),), {"kernel_size": [3, 2], "stride": [2, 1], "padding": [1, 1]}, 0),
    }


OPS = [op.name for op in registry.operators() if op.dtypes in (one_floating_dtype, floating_or_int8)]
"""Those on tensors of one floating dtype; the int8 and sparse families test their own."""

every_op = pytest.mark.parametrize("op", OPS)


@pytest.mark.slow
@every_op
@pytest.mark.parametrize("with_gradient", [False, True], ids=["no gradient", "gradient"])
def test_torch_opcheck_finds_no_fault(op: str, with_gradient: bool) -> None:
    tensors, options = example(op)
    tensors = tuple(t.requires_grad_(with_gradient) for t in tensors)
    torch.library.opcheck(getattr(torch.ops.kernelpress, op).default, tensors, options)


@pytest.mark.slow
@every_op
def test_opcheck_on_the_fewest_arguments(op: str) -> None:
    tensors, options = example(op)
    overload = getattr(torch.ops.kernelpress, op).default
    fewest = sum(not (a.kwarg_only or a.has_default_value()) for a in overload._schema.arguments)
    options.pop("activation", None)
    torch.library.opcheck(overload, tensors[:fewest], options)


@every_op
def test_gradients_are_those_of_finite_differences(op: str) -> None:
    tensors, options = example(op, torch.float64)
    overload = getattr(torch.ops.kernelpress, op).default
    inputs = tuple(t.requires_grad_() for t in tensors)
    assert torch.autograd.gradcheck(lambda *t: overload(*t, **options), inputs, fast_mode=True)


def test_second_derivatives() -> None:
    tensors, options = example("pointwise_conv2d", torch.float64)
    inputs = tuple(t.requires_grad_() for t in tensors)
    assert torch.autograd.gradgradcheck(lambda *t: ops.pointwise_conv2d(*t, **options), inputs, fast_mode=True)


def test_only_wanted_gradients_are_computed() -> None:
    (x, weight, bias, *_), _ = example("pointwise_conv2d")
    weight.requires_grad_()
    ops.pointwise_conv2d(x, weight, bias).sum().backward()
    assert weight.grad is not None
    assert x.grad is None
    assert bias.grad is None


@every_op
def test_outputs_have_the_promised_layout_and_values_on_every_backend(op: str) -> None:
    tensors, options = example(op)
    canonical = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    expected = expected_output(op, tensors, **canonical)
    for backend, reason in ops.why_not(op, *tensors, **options).items():
        if reason is None:
            promised = ops.allocate(op, tensors, {**options, "backend": backend})
            out = getattr(ops, op)(*tensors, **options, backend=backend)
            assert_close(out, expected)
            assert out.stride() == promised.stride(), backend


@every_op
def test_symbolic_batch_and_sizes_put_no_condition_on_the_batch(op: str) -> None:
    tensors, options = example(op)
    if op == "linear":
        tensors = tensors[:4]
    positions = [position for position in registry.operator(op).activations if position < len(tensors)]

    class Call(torch.nn.Module):
        def forward(self, *activations: Tensor) -> Tensor:
            arguments = list(tensors)
            for position, t in zip(positions, activations, strict=True):
                arguments[position] = t
            return getattr(torch.ops.kernelpress, op)(*arguments, **options)

    batch = torch.export.Dim("batch")
    example_inputs = tuple(tensors[position] for position in positions)
    shapes = (tuple({0: batch} for _ in positions),)
    with torch.no_grad():
        exported = torch.export.export(Call(), example_inputs, dynamic_shapes=shapes)
    again = tuple(torch.cat([t, t, t]) for t in example_inputs)
    assert exported.module()(*again).shape[0] == 3 * len(tensors[0])


@pytest.mark.parametrize("op", ["conv2d", "separable_conv2d", "max_pool2d"])
def test_symbolic_height_and_width(op: str) -> None:
    tensors, options = example(op)
    tensors = tensors[:4] if op == "separable_conv2d" else tensors[:2]

    class Call(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return getattr(torch.ops.kernelpress, op)(x, *tensors[1:], **options)

    sizes = {2: torch.export.Dim("height", min=4), 3: torch.export.Dim("width", min=4)}
    exported = torch.export.export(Call(), (torch.randn(2, tensors[0].shape[1], 16, 18),), dynamic_shapes=(sizes,))
    x = torch.randn(2, tensors[0].shape[1], 9, 7)
    assert torch.equal(exported.module()(x), Call()(x))


@every_op
def test_torch_compile_takes_the_typed_functions(op: str) -> None:
    torch.compiler.reset()  # every op compiles this one lambda: together they pass the limit of recompilations
    tensors, options = example(op)
    compiled = torch.compile(lambda *t: getattr(ops, op)(*t, **options), fullgraph=True, backend="aot_eager")
    assert_close(compiled(*tensors), getattr(ops, op)(*tensors, **options))


@every_op
def test_flops_are_two_per_multiply_accumulate(op: str) -> None:
    tensors, options, macs = _examples(torch.float32)[op]
    with FlopCounterMode(display=False) as counter:
        getattr(ops, op)(*tensors, **options)
    assert counter.get_total_flops() == 2 * macs


def test_flops_equal_those_of_pytorch_convolutions() -> None:
    x, weight = torch.randn(2, 4, 9, 9), torch.randn(8, 4, 3, 3)
    with FlopCounterMode(display=False) as theirs:
        torch.nn.functional.conv2d(x, weight, stride=2)
    with FlopCounterMode(display=False) as ours:
        ops.conv2d(x, weight, stride=2)
    assert ours.get_total_flops() == theirs.get_total_flops()


def test_a_forced_backend_that_cannot_run_says_why() -> None:
    tensors, options = example("inverted_residual")
    with ops.use_backend("onednn"), pytest.raises(RuntimeError, match=r"no implementation of it \(there is: .*cpu"):
        ops.inverted_residual(*tensors, **options)
    x, weight = (t.double() for t in example("pointwise_conv2d")[0][:2])
    with ops.use_backend("onednn"), pytest.raises(RuntimeError, match=r"float32 only, got torch\.float64"):
        ops.pointwise_conv2d(x, weight)


def test_use_backend_nests_yields_to_the_argument_and_ends() -> None:
    x, weight = channels_last(1, 4, 3, 3), torch.randn(6, 4, 1, 1)
    assert registry.requested_backend("auto") == "auto"
    with ops.use_backend("reference"):
        assert registry.requested_backend("auto") == "reference"
        assert registry.requested_backend("onednn") == "onednn"
        with ops.use_backend("auto"):
            assert registry.requested_backend("auto") == "auto"
        assert torch.equal(ops.pointwise_conv2d(x, weight), torch.nn.functional.conv2d(x, weight))
    assert registry.requested_backend("auto") == "auto"
    known = ", ".join(ops.BACKENDS)
    with pytest.raises(ValueError, match=f"backend: expected one of auto, {known}, got 'tensorrt'"):  # noqa: SIM117
        with ops.use_backend("tensorrt"):
            pass


def test_use_backend_holds_in_its_own_thread_only() -> None:
    seen = []
    with ops.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(registry.requested_backend("auto")))
        thread.start()
        thread.join()
    assert seen == ["auto"]


@pytest.mark.slow
def test_the_environment_forces_a_backend_and_refuses_unknown_ones() -> None:
    code = """
import importlib, os
from kernelpress.ops import registry
print(registry.requested_backend("auto"), registry.requested_backend("cpu"))
os.environ["KERNELPRESS_BACKEND"] = "fastest"
try:
    importlib.reload(registry)
except ValueError as error:
    print(error)
"""
    environment = os.environ | {"KERNELPRESS_BACKEND": "reference"}
    lines = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert lines.stdout.splitlines() == [
        "reference cpu",
        f"KERNELPRESS_BACKEND: expected one of auto, {', '.join(ops.BACKENDS)}, got 'fastest'",
    ]


def test_why_not_and_availability_list_every_backend_in_order() -> None:
    x, weight = torch.randn(1, 4, 5, 5), torch.randn(4, 1, 3, 3)
    reasons = ops.why_not("conv2d", x, weight, groups=4)
    assert [name for name in ops.BACKENDS if name in reasons] == list(reasons)
    assert {"cpu", "onednn", "reference"} <= set(reasons)
    assert "depthwise_conv2d" in (reasons["cpu"] or "")
    assert reasons["reference"] is None
    assert set(ops.availability()) == {operator.name for operator in registry.operators()}
    with pytest.raises(ValueError, match="op: expected one of conv2d"):
        ops.why_not("conv3d", x, weight)


def test_an_automatic_choice_falls_to_the_next_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = native.NativeCpu(None, "not built", "none")
    monkeypatch.setattr(native, "load", lambda: absent)
    prepared.clear()
    try:
        x, weight = channels_last(1, 4, 3, 3), torch.randn(6, 4, 1, 1)
        assert ops.why_not("pointwise_conv2d", x, weight)["cpu"] == "the native module is absent: not built"
        assert_close(ops.pointwise_conv2d(x, weight), expected_output("pointwise_conv2d", (x, weight)))
        with pytest.raises(RuntimeError, match="the native module is absent: not built"):
            ops.pointwise_conv2d(x, weight, backend="cpu")
    finally:
        prepared.clear()


@pytest.mark.parametrize("backend", ["cpu", "onednn"])
@pytest.mark.parametrize("op", ["conv2d", "pointwise_conv2d", "depthwise_conv2d"])
def test_a_changed_weight_is_packed_anew(op: str, backend: str) -> None:
    x, scale = channels_last(1, 8, 4, 4), torch.rand(8) + 0.5
    weight = torch.nn.Parameter(torch.randn(8, 1 if op == "depthwise_conv2d" else 8, 1, 1))

    def check() -> None:
        out = getattr(ops, op)(x, weight, None, scale, backend=backend)
        assert_close(out, expected_output(op, (x, weight, None, scale)))

    with torch.no_grad():
        check()
        weight.mul_(2)
        check()
        scale.add_(1)
        check()
        weight.data = torch.randn_like(weight)
        check()
        weight.grad = torch.ones_like(weight)
        torch.optim.SGD([weight], lr=0.5).step()
        check()


def test_a_weight_sliced_through_data_at_the_same_address_is_packed_anew() -> None:
    x, weight = channels_last(1, 8, 4, 4), torch.nn.Parameter(torch.randn(16, 8, 1, 1), requires_grad=False)
    for c_out in (16, 5):
        weight.data = weight.data[:c_out]
        assert_close(ops.pointwise_conv2d(x, weight), expected_output("pointwise_conv2d", (x, weight)))
    weight.data = weight.data[:, :6]
    assert_close(ops.pointwise_conv2d(x[:, :6], weight), expected_output("pointwise_conv2d", (x[:, :6], weight)))


def test_the_packed_weight_dies_with_its_weight() -> None:
    if native.cpu() is None:
        pytest.skip(f"no native module: {native.load().absent_because}")
    prepared.clear()
    weight = torch.randn(6, 4, 1, 1)
    ops.pointwise_conv2d(channels_last(1, 4, 3, 3), weight, backend="cpu")
    packed = weakref.ref(packing.panels(weight, None))
    gc.collect()
    assert packed() is not None
    del weight
    gc.collect()
    assert packed() is None


def test_the_same_weight_serves_every_instruction_set() -> None:
    module = native.cpu()
    if module is None:
        pytest.skip(f"no native module: {native.load().absent_because}")
    x, weight, before = channels_last(1, 20, 4, 4), torch.randn(40, 20, 1, 1), module.variant()
    try:
        for variant in module.variants() * 2:
            module.select(variant)
            out = ops.pointwise_conv2d(x, weight, backend="cpu")
            assert_close(out, expected_output("pointwise_conv2d", (x, weight)))
    finally:
        module.select(before)


def test_inference_tensors_work() -> None:
    with torch.inference_mode():
        x, weight = channels_last(1, 4, 3, 3), torch.randn(6, 4, 1, 1)
        first = ops.pointwise_conv2d(x, weight)
        assert_close(first, expected_output("pointwise_conv2d", (x, weight)))
        assert torch.equal(ops.pointwise_conv2d(x, weight), first)


def test_threads_may_share_weights() -> None:
    x, weights = channels_last(1, 16, 6, 6), [torch.randn(16, 16, 1, 1) for _ in range(20)]
    expected = [expected_output("pointwise_conv2d", (x, weight)) for weight in weights]
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5):
                for weight, wanted in zip(weights, expected, strict=True):
                    assert_close(ops.pointwise_conv2d(x, weight), wanted)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_calls_of_other_dtype_or_shape_are_checked_after_a_good_one() -> None:
    x, weight = channels_last(1, 4, 3, 3), torch.randn(6, 4, 1, 1)
    ops.pointwise_conv2d(x, weight)
    with pytest.raises(TypeError, match="weight: expected the dtype of x"):
        ops.pointwise_conv2d(x.double(), weight)
    with pytest.raises(ValueError, match="weight: expected"):
        ops.pointwise_conv2d(channels_last(1, 5, 3, 3), weight)


def test_tensors_with_a_negative_bit_are_resolved() -> None:
    x = neg_view(channels_last(1, 4, 3, 3))
    weight, bias = neg_view(torch.randn(6, 4, 1, 1)), neg_view(torch.randn(6))
    resolved = tuple(t.resolve_neg().clone() for t in (x, weight, bias))
    assert_close(ops.pointwise_conv2d(x, weight, bias), expected_output("pointwise_conv2d", resolved))


def test_pairs_may_be_lists() -> None:
    x, weight = torch.randn(3, 2, 4, 5, 5), torch.randn(6, 4, 3, 3)
    with ops.use_backend("reference"):
        assert ops.conv2d(x[0], weight, padding=[1, 1]).shape == (2, 6, 5, 5)
        assert ops.conv2d(x[0], weight, padding=[1, 1], stride=(2, 1)).shape == (2, 6, 3, 5)


def test_tensors_of_different_devices_are_refused() -> None:
    x, weight = torch.empty(1, 4, 3, 3, device="meta"), torch.randn(6, 4, 1, 1)
    with pytest.raises(ValueError, match="weight: expected the device of x, meta, got cpu"):
        ops.pointwise_conv2d(x, weight)


def test_sizes_past_the_32_bit_range_are_shaped_in_64_bits() -> None:
    x = torch.empty(1, 1, 1, 1, device="meta").expand(2, 8, 40000, 40000)
    out = ops.pointwise_conv2d(x, torch.empty(3, 8, 1, 1, device="meta"))
    assert out.shape == (2, 3, 40000, 40000)
    assert out.numel() > 2**31
    big = torch.zeros(1).expand(2, 8, 40000, 40000)
    reasons = ops.why_not("pointwise_conv2d", big, torch.zeros(3, 8, 1, 1))
    assert "2³¹" in (reasons["onednn"] or "")
