"""Sparse products on the CPU, over channels_last and over contiguous images, against the float64 reference on every
instruction set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import MAKERS, assert_matches, channels_last, contiguous, run_native
from torch import Tensor

from kernelpress import ops
from kernelpress.kernels.reference import ACTIVATIONS
from kernelpress.ops.calls.steps import native_reason
from kernelpress.ops.sparse_blocks import BlockCsr, conv_matrix
from kernelpress.runtime import native

pytestmark = pytest.mark.skipif(native.cpu() is None, reason=f"no native module: {native.load().absent_because}")

BACKENDS = ("cpu", "planes")
backends = pytest.mark.parametrize("backend", BACKENDS)
many = settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])

BLOCKS = [(1, 1), (4, 1), (16, 1), (2, 3), (8, 4), (16, 16)]


def sparse(weight: Tensor, block: tuple[int, int], density: float) -> tuple[Tensor, Tensor, Tensor]:
    """A weight with this share of its blocks, the first block row empty where there are several."""
    matrix = weight if weight.dim() == 2 else conv_matrix(weight, block[1])
    rows, columns = -(-matrix.shape[0] // block[0]), -(-matrix.shape[1] // block[1])
    mask = torch.rand(rows, columns) < density
    if rows > 1:
        mask[0] = False
    made = BlockCsr.from_dense(matrix, block, mask=mask)
    return made.row_offsets, made.columns, made.blocks


def epilogue(parts: tuple[bool, bool, bool], c_out: int, residual: Any) -> list[Tensor | None]:
    """Bias, scale and residual, those that a case has."""
    made = (lambda: torch.randn(c_out), lambda: torch.rand(c_out) + 0.5, residual)
    return [make() if part else None for part, make in zip(parts, made, strict=True)]


@st.composite
def convolutions(draw: st.DrawFn) -> dict:
    kernel = draw(st.sampled_from([(1, 1), (1, 1), (3, 3), (2, 5), (7, 1)]))
    stride, dilation = (draw(st.tuples(st.integers(1, 3), st.integers(1, 2))) for _ in range(2))
    padding = draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
    pairs = zip(kernel, dilation, padding, strict=True)
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in pairs]
    return {
        "size": tuple(draw(st.integers(low, low + 14)) for low in least),
        "batch": draw(st.integers(0, 3)),
        "c_in": draw(st.sampled_from([1, 2, 7, 16, 33, 70])),
        "c_out": draw(st.sampled_from([1, 3, 8, 17, 30, 48])),
        "block": draw(st.sampled_from(BLOCKS)),
        "density": draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        "parts": draw(st.tuples(st.booleans(), st.booleans(), st.booleans())),
        "make": draw(st.sampled_from(MAKERS)),
        "backend": draw(st.sampled_from(BACKENDS)),
        "options": {
            "kernel_size": kernel,
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "activation": draw(st.sampled_from(ACTIVATIONS)),
        },
    }


@many
@given(case=convolutions(), seeds=st.random_module())
def test_any_convolution_writes_its_output_only(cpu_variant: str, case: dict, seeds: object) -> None:
    x = case["make"](case["batch"], case["c_in"], *case["size"])
    dense = torch.randn(case["c_out"], case["c_in"], *case["options"]["kernel_size"])
    options = {**case["options"], "out_channels": case["c_out"]}
    weight = sparse(dense, case["block"], case["density"])
    shape = ops.allocate("sparse_conv2d", [x, *weight], options).shape
    tensors = [x, *weight, *epilogue(case["parts"], case["c_out"], lambda: case["make"](*shape))]
    outputs = [ops.sparse_conv2d(*tensors, **options, backend=case["backend"])]
    assert outputs[0].is_contiguous(
        memory_format=torch.channels_last if case["backend"] == "cpu" else torch.contiguous_format
    )
    if x.numel() and native_reason("sparse_conv2d", tensors, {**options, "backend": case["backend"]}) is None:
        outputs.append(run_native("sparse_conv2d", tensors, **options, backend=case["backend"]))
    assert_matches("sparse_conv2d", tensors, options, *outputs)


@pytest.mark.parametrize("block", [(1, 1), (4, 1)], ids=str)
@pytest.mark.parametrize(("batch", "size"), [(1, (14, 14)), (2, (7, 7)), (3, (29, 23)), (1, (1, 1))], ids=str)
@backends
def test_many_strips_and_rows_on_several_threads(
    cpu_variant: str, backend: str, batch: int, size: tuple[int, int], block: tuple[int, int]
) -> None:
    make = channels_last if backend == "cpu" else contiguous
    tensors = [make(batch, 130, *size), *sparse(torch.randn(142, 130, 1, 1), block, 0.1)]
    tensors += [torch.randn(142), torch.rand(142) + 0.5, make(batch, 142, *size)]
    options = {"activation": "relu6", "out_channels": 142}
    out = run_native("sparse_conv2d", tensors, **options, backend=backend)
    assert_matches("sparse_conv2d", tensors, options, out)


@backends
def test_uneven_rows_are_shared_evenly_and_all_computed(cpu_variant: str, backend: str) -> None:
    weight = torch.randn(96, 64, 3, 3)
    weight[2:90] = 0
    matrix = conv_matrix(weight, 1)
    made = BlockCsr.from_dense(matrix, 1)
    tensors = [torch.randn(2, 64, 9, 11), made.row_offsets, made.columns, made.blocks]
    options = {"kernel_size": (3, 3), "padding": (1, 1)}
    assert_matches("sparse_conv2d", tensors, options, ops.sparse_conv2d(*tensors, **options, backend=backend))


@many
@given(
    rows=st.sampled_from([(), (1,), (5,), (2, 3), (40,), (0,), (130,)]),
    c_in=st.sampled_from([1, 5, 64, 100]),
    c_out=st.sampled_from([1, 6, 64, 90]),
    block=st.sampled_from(BLOCKS),
    density=st.sampled_from([0.0, 0.2, 1.0]),
    parts=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    activation=st.sampled_from(ACTIVATIONS),
    seeds=st.random_module(),
)
def test_any_linear_layer(
    cpu_variant: str,
    rows: tuple[int, ...],
    c_in: int,
    c_out: int,
    block: tuple[int, int],
    density: float,
    parts: tuple[bool, bool, bool],
    activation: str,
    seeds: object,
) -> None:
    x, weight = torch.randn(*rows, c_in + 3)[..., 1 : 1 + c_in], sparse(torch.randn(c_out, c_in), block, density)
    tensors = [x, *weight, *epilogue(parts, c_out, lambda: torch.randn(*rows, c_out))]
    options = {"activation": activation, "out_features": c_out}
    assert_matches("sparse_matmul", tensors, options, ops.sparse_matmul(*tensors, **options, backend="cpu"))


@backends
def test_a_zero_weight_reads_no_input(backend: str) -> None:
    """Where no block stands, nothing is multiplied: what is not finite reaches outputs that depend on it alone."""
    weight = torch.zeros(6, 5, 1, 1)
    weight[1, 2], weight[4, 0] = 2.0, 3.0
    made = BlockCsr.from_dense(conv_matrix(weight, 1), 1)
    x = torch.ones(1, 5, 4, 6)
    x[0, 2, 1, 3], x[0, 3] = torch.inf, torch.nan
    y = ops.sparse_conv2d(x, made.row_offsets, made.columns, made.blocks, backend=backend)
    assert y.isinf().nonzero().tolist() == [[0, 1, 1, 3]]
    assert not y.isnan().any()


def test_planes_are_given_only_where_they_are_asked_for() -> None:
    weight = sparse(torch.randn(8, 8, 1, 1), (1, 1), 0.5)
    x = torch.randn(2, 8, 5, 6)
    assert ops.why_not("sparse_conv2d", x, *weight)["planes"] is None
    assert ops.sparse_conv2d(x, *weight).is_contiguous(memory_format=torch.channels_last)
    with ops.use_backend("planes"):
        assert ops.sparse_conv2d(x, *weight).is_contiguous()
    torch.library.opcheck(torch.ops.kernelpress.sparse_conv2d.default, (x, *weight), {"backend": "planes"})
