"""The tensor-core GEMM behind `pointwise_conv2d` and `linear`, on the host emulator, against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulating import run_configured
from simt.fixtures import ORDERS, Simt
from support import assert_matches, channel_slice, channels_last, cropped
from torch import Tensor

import kernelpress
from kernelpress import ops
from kernelpress.kernels.reference import ACTIVATIONS
from kernelpress.ops import registry
from kernelpress.ops.backends import cuda
from kernelpress.ops.backends.cudnn import CUDNN

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TILES = ("256x128", "128x128", "128x64", "64x64, ", "128x32", "16x64", "64x64 of any")
PARTS = ("bias", "scale", "residual")

# rows, c_out, c_in: ragged against every tile, one step of K and several, whole 16-byte vectors.
ALIGNED = ((70, 72, 136), (129, 40, 24), (33, 136, 264))


def _tensors(x: Tensor, c_out: int, *parts: str) -> list[Tensor | None]:
    dtype, (n, c_in, *size) = x.dtype, x.shape
    made = {
        "bias": torch.randn(c_out),
        "scale": torch.rand(c_out) + 0.5,
        "residual": channels_last(n, c_out, *size),
        "input_scale": torch.rand(n, c_in),
    }
    tensors = [x, torch.randn(c_out, c_in, 1, 1).to(dtype)]
    return tensors + [made[name].to(dtype) if name in parts else None for name in made]


def _check(tensors: list[Tensor | None], options: dict[str, Any], out: Tensor) -> None:
    """float32 is multiplied in TF32, whose 11 bits are those of float16: its bound holds."""
    if out.dtype == torch.float32:
        rounded = [None if t is None else t.double() for t in tensors]
        expected = registry.operator("pointwise_conv2d").call_reference(rounded, _options(options))
        error = float((out.double() - expected).norm() / expected.norm())
        assert error < 1.5e-3, f"relative error {error:.2e}"
    else:
        assert_matches("pointwise_conv2d", tensors, options, out)


def _options(options: dict[str, Any]) -> Any:
    return registry.operator("pointwise_conv2d").signature.options(**options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", range(len(TILES)), ids=lambda index: TILES[index])
def test_every_tile(emulated_cuda: Simt, index: int, dtype: torch.dtype) -> None:
    rows, c_out, c_in = ALIGNED[(index + DTYPES.index(dtype)) % len(ALIGNED)]
    tensors = _tensors(channels_last(1, c_in, rows, 1).to(dtype), c_out, *PARTS)
    options = {"activation": ACTIVATIONS[index % 8]}
    emulated_cuda.clear_statistics()
    _check(tensors, options, run_configured("pointwise_conv2d", tensors, options, TILES[index]))
    statistics = emulated_cuda.statistics()
    assert statistics["ldmatrix_accesses"] > 0
    assert statistics["ldmatrix_conflicts"] == 0, "the swizzle leaves bank conflicts"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c_in", [1, 3, 6, 58, 100])
def test_channels_that_fill_no_vector(emulated_cuda: Simt, c_in: int, dtype: torch.dtype) -> None:
    x = channels_last(2, c_in, 3, 7).to(dtype)
    tensors = _tensors(x, 5 + c_in % 3, "bias", "residual")
    with kernelpress.use_backend("cuda"):
        _check(tensors, {"activation": "relu6"}, ops.pointwise_conv2d(*tensors, activation="relu6"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [channel_slice, cropped])
def test_slices_of_wider_tensors(emulated_cuda: Simt, make: Any, dtype: torch.dtype) -> None:
    x = make(2, 20, 5, 4).to(dtype)
    if make is channel_slice:  # `to` makes a tensor of its own: the slice once more
        wide = torch.full((2, 28, 5, 4), torch.nan, dtype=dtype).contiguous(memory_format=torch.channels_last)
        wide[:, 8:28] = x
        x = wide[:, 8:28]
        assert x.stride(3) == 28
    tensors = _tensors(x, 16, "scale", "residual")
    with kernelpress.use_backend("cuda"):
        _check(tensors, {"activation": "identity"}, ops.pointwise_conv2d(*tensors))


@pytest.mark.parametrize("c_in", [5, 18, 72])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_input_scale_over_several_images_in_a_tile(emulated_cuda: Simt, dtype: torch.dtype, c_in: int) -> None:
    tensors = _tensors(channels_last(5, c_in, 3, 5).to(dtype), 24, "bias", "input_scale")
    with kernelpress.use_backend("cuda"):
        _check(tensors, {"activation": "hardswish"}, ops.pointwise_conv2d(*tensors, activation="hardswish"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(emulated_cuda: Simt, activation: str) -> None:
    tensors = _tensors(channels_last(1, 16, 5, 3).to(torch.float16), 24, *PARTS)
    with kernelpress.use_backend("cuda"):
        _check(tensors, {"activation": activation}, ops.pointwise_conv2d(*tensors, activation=activation))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 1282), (7, 5, 640)], ids=str)
def test_linear_splits_k_among_blocks(emulated_cuda: Simt, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = torch.randn(*shape).to(dtype), torch.randn(30, shape[-1]).to(dtype)
    bias, residual = torch.randn(30).to(dtype), torch.randn(*shape[:-1], 30).to(dtype)
    emulated_cuda.clear_statistics()
    with kernelpress.use_backend("cuda"):
        out = ops.linear(x, weight, bias, None, residual, activation="gelu")
    assert emulated_cuda.statistics()["blocks"] > 4, "K was not split"
    expected = registry.operator("linear").reference(
        x.double(), weight.double(), bias.double(), None, residual.double(), activation="gelu"
    )
    error = float((out.double() - expected).norm() / expected.norm())
    assert error < {torch.float32: 1.5e-3, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("tile", "c_in"), [(0, 136), (1, 136), (2, 24), (3, 200), (5, 72), (6, 20)])
def test_a_block_takes_tile_after_tile(simt: Simt, tile: int, c_in: int, seed: int) -> None:
    """On two multiprocessors; tiles 0 and 1 store through their stages there, the others beside them."""
    rows, c_out = {0: (700, 72), 1: (500, 136), 5: (200, 72)}.get(tile, (900, 72))
    x, weight = torch.randn(rows, c_in).half(), torch.randn(c_out, c_in).half()
    y = torch.empty(rows, c_out, dtype=torch.float16)
    addresses = [x.data_ptr(), weight.data_ptr(), 0, 0, 0, 0, y.data_ptr(), 0]
    sizes = [1, rows, c_in, c_out, c_in, 0, c_out, 0]
    fields = [*addresses, *sizes, cuda.data_type(x.dtype), ACTIVATIONS.index("relu"), tile]
    simt.run("pointwise_conv2d", [x, weight], fields, seed=seed, order=ORDERS[seed], outputs=[y], device=1)
    expected = (x.double() @ weight.double().T).relu()
    assert float((y.double() - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize("op", ["pointwise_conv2d", "linear"])
def test_an_empty_batch_launches_nothing(emulated_cuda: Simt, op: str) -> None:
    emulated_cuda.clear_statistics()
    size, window = ((), ()) if op == "linear" else ((3, 3), (1, 1))
    out = getattr(ops, op)(torch.empty(0, 8, *size).half(), torch.randn(4, 8, *window).half(), backend="cuda")
    assert out.shape == (0, 4, *size)
    assert emulated_cuda.statistics()["blocks"] == 0


def test_float32_needs_tf32_to_be_allowed(emulated_cuda: Simt, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = channels_last(1, 8, 2, 2), torch.randn(4, 8, 1, 1)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with pytest.raises(RuntimeError, match="allow_tf32 forbids"):
        ops.pointwise_conv2d(x, weight, backend="cuda")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert ops.pointwise_conv2d(x, weight, backend="cuda").shape == (1, 4, 2, 2)


def test_cudnn_tells_why_it_cannot_run() -> None:
    reason = ops.why_not("conv2d", torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3))["cudnn"]
    assert reason is not None
    with pytest.raises(RuntimeError, match="backend 'cudnn' cannot run this call"):
        ops.conv2d(torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3), backend="cudnn")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "with residual"])
def test_cudnn_falls_back_to_operations_where_nothing_fuses(activation: str, with_residual: bool) -> None:
    """On CPU tensors, where torch's fused op refuses as cuDNN does for want of an engine."""
    entry = registry.operator("conv2d")
    tensors = [channels_last(2, 6, 7, 5), torch.randn(9, 6, 3, 3), torch.randn(9), torch.rand(9) + 0.5]
    tensors.append(channels_last(2, 9, 4, 3) if with_residual else None)
    options = {"stride": (2, 2), "padding": (1, 1), "activation": activation}
    problem = registry.problem(entry, registry.specs_of(tensors), entry.signature.options(**options), "cpu")
    run = CUDNN.prepare(problem, tensors)
    for _ in range(2):
        out = run(tensors)
        assert out.stride() == problem.stride
        assert_matches("conv2d", tensors, options, out)
