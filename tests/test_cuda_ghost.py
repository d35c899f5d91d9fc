"""The CUDA kernels of the ghost family on the host emulator, against the float64 reference."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from simt.fixtures import ORDERS, Simt
from support import expected_output, relative_error
from torch import Tensor

import kernelpress
from kernelpress import ops
from kernelpress.kernels.reference import ACTIVATIONS
from kernelpress.ops import registry
from kernelpress.ops.backends import cuda
from kernelpress.ops.backends.kernel import spacings

ERROR = {torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""float32 is multiplied in TF32."""

DTYPES = tuple(ERROR)
TILES = 9
HEURISTIC, TWO_KERNELS = -1, TILES - 1


def random_slice(shape: tuple[int, ...], dtype: torch.dtype, before: int = 0, after: int = 0) -> Tensor:
    """Random channels of a wider channels_last tensor whose other channels are NaN."""
    n, c, h, w = shape
    wide = torch.full((n, before + c + after, h, w), torch.nan, dtype=dtype).contiguous(
        memory_format=torch.channels_last
    )
    wide[:, before : before + c] = torch.randn(n, c, h, w)
    return wide[:, before : before + c]


def draw(
    dtype: torch.dtype,
    size: tuple[int, int],
    channels: tuple[int, int],
    *,
    batch: int = 1,
    kernel: tuple[int, int] = (1, 1),
    cheap: tuple[int, int] = (3, 3),
    multiplier: int = 1,
    has_bias: bool = True,
    has_residual: bool = True,
    around: tuple[int, int] = (0, 0),
    **options: Any,
) -> tuple[list[Tensor | None], dict[str, Any]]:
    """Tensors and options of a call with `channels` = (C_in, C_primary), weights scaled by their fan-in."""
    c_in, primary = channels
    fan_in = c_in * kernel[0] * kernel[1]
    tensors: list[Tensor | None] = [
        random_slice((batch, c_in, *size), dtype, *around),
        (torch.randn(primary, c_in, *kernel) * fan_in**-0.5).to(dtype),
        torch.randn(primary).to(dtype) if has_bias else None,
        (torch.randn(primary * multiplier, 1, *cheap) * 0.4).to(dtype),
        torch.randn(primary * multiplier).to(dtype) if has_bias else None,
        None,
    ]
    if has_residual:
        tensors[5] = random_slice(tuple(ops.allocate("ghost_conv2d", tensors, options).shape), dtype, *around)
    return tensors, options


def run(
    simt: Simt,
    tensors: list[Tensor | None],
    options: dict[str, Any],
    configuration: int = HEURISTIC,
    *,
    seed: int = 0,
    order: str = "random",
    around: tuple[int, int] = (0, 0),
) -> Tensor:
    """One launch, into channels of a wider tensor."""
    operator = registry.operator("ghost_conv2d")
    kernel, given = operator.kernel("cuda"), operator.signature.bind((), options)[1]
    problem = registry.problem(operator, registry.specs_of(tensors), given, "cpu")
    x = tensors[0]
    assert x is not None
    out = random_slice(problem.shape, x.dtype, *around).fill_(torch.nan)
    y_stride = problem.shape[1] + sum(around)
    operands = kernel.operands(given, *tensors)
    fields = [
        *[0 if t is None else t.data_ptr() for t in (*operands, out)],
        *kernel.sizes(problem, {**spacings(kernel, problem), "y": y_stride}),
        *(cuda.data_type(x.dtype), ACTIVATIONS.index(given.activation), configuration),
    ]
    simt.run("ghost_conv2d", operands, fields, seed=seed, order=order, outputs=[out])
    return out


def assert_right(out: Tensor, tensors: list[Tensor | None], options: dict[str, Any]) -> None:
    pairs = {
        name: (value, value) for name, value in options.items() if isinstance(value, int) and name != "out_channels"
    }
    expected = expected_output("ghost_conv2d", tensors, **(options | pairs))
    assert out.shape == expected.shape
    assert relative_error(out, expected) <= ERROR[out.dtype]


# Each tile on more than one tile of pixels and slice of channels, with a rest in every direction.
SIZES = [(5, 9), (8, 9), (8, 18), (9, 17), (15, 17), (15, 18), (15, 30), (16, 29), (9, 10)]


@pytest.mark.parametrize(("configuration", "dtype"), list(itertools.product(range(TILES), DTYPES)), ids=str)
def test_every_configuration_at_ragged_sizes(simt: Simt, configuration: int, dtype: torch.dtype) -> None:
    case = configuration * len(DTYPES) + DTYPES.index(dtype)
    primary = (36, 36, 20, 36, 36, 68, 20, 36, 68)[configuration]
    tensors, options = draw(
        dtype,
        SIZES[configuration],
        (24 if case % 2 else 40, primary),
        batch=2 if configuration < 3 else 1,
        has_bias=case % 3 != 1,
        has_residual=case % 2 == 0,
        activation=ACTIVATIONS[case % len(ACTIVATIONS)],
        cheap_activation=ACTIVATIONS[(case + 3) % len(ACTIVATIONS)],
    )
    out = run(simt, tensors, options, configuration, seed=case, order=ORDERS[case % 3])
    assert_right(out, tensors, options)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (7, 1), (7, 7), (4, 8)], ids=str)
def test_small_images_in_any_order_of_threads(simt: Simt, size: tuple[int, int], order: str) -> None:
    tensors, options = draw(torch.bfloat16, size, (16, 12), batch=3, activation="relu", cheap_activation="relu")
    for seed, configuration in enumerate((0, 1, 3)):
        assert_right(run(simt, tensors, options, configuration, seed=seed, order=order), tensors, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_convolutions_and_slices_of_wider_tensors(simt: Simt, dtype: torch.dtype) -> None:
    tensors, options = draw(dtype, (13, 20), (16, 24), stride=(2, 3), around=(8, 16), cheap_activation="relu")
    for seed, configuration in enumerate((HEURISTIC, 2, 5, TWO_KERNELS)):
        out = run(simt, tensors, options, configuration, seed=seed, order=ORDERS[seed % 3], around=(4, 8))
        assert_right(out, tensors, options)


RAGGED: dict[str, dict[str, Any]] = {
    "odd channels": {"size": (5, 7), "channels": (13, 9), "cheap_activation": "relu"},
    "one channel": {"size": (4, 3), "channels": (1, 1)},
    "odd slices": {"size": (6, 5), "channels": (16, 12), "around": (3, 2)},
    "3x3 of stride 2": {"size": (9, 8), "channels": (8, 16), "kernel": (3, 3), "stride": 2, "padding": 1},
    "3x3, odd channels": {
        "size": (6, 6),
        "channels": (3, 7),
        "kernel": (3, 3),
        "padding": (1, 2),
        "activation": "relu",
    },
    "5x5 cheap": {"size": (8, 6), "channels": (16, 16), "cheap": (5, 5)},
    "3x5 cheap": {"size": (6, 9), "channels": (16, 8), "cheap": (3, 5), "batch": 2},
    "two filters a channel": {"size": (5, 6), "channels": (16, 8), "multiplier": 2, "activation": "hardswish"},
    "one of two filters": {"size": (5, 6), "channels": (16, 6), "multiplier": 2, "out_channels": 14},
    "cut off": {"size": (5, 6), "channels": (16, 8), "out_channels": 15, "activation": "relu"},
    "no cheap channel": {"size": (5, 6), "channels": (16, 8), "out_channels": 8},
    "padded 1x1": {"size": (5, 6), "channels": (16, 8), "padding": 1},
}


@pytest.mark.parametrize("has_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("name", RAGGED)
def test_what_one_kernel_does_not_take_runs_on_two(simt: Simt, name: str, has_residual: bool) -> None:
    case = list(RAGGED).index(name)
    dtype = DTYPES[case % 3]
    tensors, options = draw(dtype, has_residual=has_residual, **RAGGED[name])
    out = run(simt, tensors, options, case % TILES, seed=case, order=ORDERS[case % 3])
    assert_right(out, tensors, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_op_runs_on_the_kernels(emulated_cuda: Simt, dtype: torch.dtype) -> None:
    tensors, options = draw(dtype, (7, 7), (16, 12), batch=2, activation="relu", cheap_activation="relu")
    with kernelpress.use_backend("cuda"):
        assert_right(ops.ghost_conv2d(*tensors, **options), tensors, options)
        contiguous = [None if t is None else t.contiguous() for t in tensors]
        out = ops.ghost_conv2d(*contiguous, **options)
    assert_right(out, tensors, options)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_an_empty_batch_launches_nothing(emulated_cuda: Simt) -> None:
    tensors, options = draw(torch.float16, (7, 7), (16, 12), batch=0, has_residual=False)
    assert ops.ghost_conv2d(*tensors, **options, backend="cuda").shape == (0, 24, 7, 7)


def test_reading_and_writing_shared_memory_meets_few_banks_twice(simt: Simt) -> None:
    tensors, options = draw(torch.float16, (14, 16), (64, 32), has_residual=False)
    simt.clear_statistics()
    run(simt, tensors, options, 4)
    statistics = simt.statistics()
    assert statistics["ldmatrix_accesses"] > 0
    assert statistics["ldmatrix_conflicts"] == 0


def test_why_not_names_tf32_and_filters_cut_apart(emulated_cuda: Simt, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, _ = draw(torch.float32, (5, 5), (8, 4), multiplier=2, has_residual=False)
    reason = ops.why_not("ghost_conv2d", *tensors, out_channels=11)["cuda"]
    assert reason is not None
    assert "keeps all 2 filters of a primary channel or none, got 7" in reason
    assert ops.why_not("ghost_conv2d", *tensors, out_channels=10)["cuda"] is None
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    reason = ops.why_not("ghost_conv2d", *tensors)["cuda"]
    assert reason is not None
    assert "allow_tf32" in reason
