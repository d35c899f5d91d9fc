"""Every PTX wrapper in a tiny kernel, on the emulator and on a GPU, against plainly computed vectors of 32-bit words.

What nothing but a GPU can show is that the wrappers' text and the emulator have the same reading of an instruction.
Needs torch alone, so that `make gpu` can run it where there is nothing else.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["GOLDEN", "NVCC", "Runner", "compile_for_device", "on_emulator", "on_gpu"]

ROOT = Path(__file__).resolve().parents[1]

Words = NDArray[np.uint32]
Runner = Callable[[str, Words, int], Words]

GENERATOR = np.random.default_rng(7)
SIXTEEN_BITS = {"half": torch.float16, "bfloat16": torch.bfloat16}
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def on_emulator(name: str, words: Words, count: int) -> Words:
    from simt.build import load
    from simt.fixtures import Simt

    emulator = Simt(load("_simt_self"))
    function = ctypes.CDLL(str(emulator.module.__file__)).kernelpress_golden
    given = torch.from_numpy(words.view(np.int32).copy())
    out = torch.empty(count, dtype=torch.int32)
    emulator.register({"in": given, "out": out}, [out])
    emulator.module.configure(0, "random", False)
    code = function(name.encode(), ctypes.c_void_p(given.data_ptr()), ctypes.c_void_p(out.data_ptr()))
    emulator.check()
    assert code == 0
    return out.numpy().view(np.uint32)


def on_gpu(library: Path) -> Runner:
    function = ctypes.CDLL(str(library)).kernelpress_golden

    def run(name: str, words: Words, count: int) -> Words:
        given = torch.from_numpy(words.view(np.int32).copy()).cuda()
        out = torch.full((count,), -1, dtype=torch.int32, device="cuda")
        torch.cuda.synchronize()
        assert function(name.encode(), ctypes.c_void_p(given.data_ptr()), ctypes.c_void_p(out.data_ptr())) == 0
        torch.cuda.synchronize()
        return out.cpu().numpy().view(np.uint32)

    return run


def compile_for_device(folder: Path) -> Path:
    """The kernels for the current CUDA device, as a library in `folder`. Raises `CalledProcessError`."""
    library = folder / "golden.so"
    major, minor = torch.cuda.get_device_capability()
    command = [str(NVCC), "-std=c++17", f"-arch=sm_{major}{minor}", "-Ikernels/cuda", "-Xcompiler=-fPIC", "-shared"]
    subprocess.run([*command, "-o", str(library), "tests/simt/golden.cu"], cwd=ROOT, check=True)
    return library


GOLDEN: dict[str, Callable[[Runner], None]] = {}
"""What is compared, by name."""


def golden(**axes: Sequence[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Enters a comparison into `GOLDEN`, once for every combination of these."""

    def enter(check: Callable[..., None]) -> Callable[..., None]:
        for values in itertools.product(*axes.values()):
            shown = ", ".join(map(str, values))
            given = dict(zip(axes, values, strict=True))
            GOLDEN[f"{check.__name__}[{shown}]" if shown else check.__name__] = functools.partial(check, **given)
        return check

    return enter


def random_words(count: int) -> Words:
    return GENERATOR.integers(0, 2**32, count, dtype=np.uint32)


def bits(values: NDArray[np.generic]) -> Words:
    """The words of an array of any type."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint32)


def bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.int16).numpy().view(np.uint16)


@golden(size=[16, 8, 4])
def cp_async_copies_and_fills_with_zeros(run: Runner, size: int) -> None:
    words = random_words(8 * size)
    expected = words.copy().reshape(32, size // 4)
    expected[::3] = 0
    assert np.array_equal(run(f"cp_async_{size}", words, 8 * size), bits(expected))


@golden()
def cp_async_waits_for_the_oldest_groups(run: Runner) -> None:
    words = random_words(64)
    assert np.array_equal(run("cp_async_groups", words, 64), words)


@golden(suffix=["", "_trans"], count=[4, 2])
def ldmatrix_deals_out_rows(run: Runner, count: int, suffix: str) -> None:
    words = random_words(128)
    matrices = words.view(np.uint16).reshape(4, 8, 8)[:count]
    if suffix:
        matrices = matrices.transpose(0, 2, 1)
    expected = bits(matrices).reshape(count, 32).T
    assert np.array_equal(run(f"ldmatrix_x{count}{suffix}", words, 32 * count), bits(expected))


def fragments(a: Words, b: Words, d: Words) -> Words:
    """The registers of all lanes, from A [16][8 words], B [8][8 words] by columns, and D [16][8]; see ptx.cuh."""
    lanes = np.arange(32)
    group, pair = lanes // 4, lanes % 4
    a_registers = [a[group, pair], a[group + 8, pair], a[group, 4 + pair], a[group + 8, 4 + pair]]
    b_registers = [b[group, pair], b[group, 4 + pair]]
    rows, columns = accumulator_places()
    return np.concatenate(
        [np.stack(a_registers, 1).ravel(), np.stack(b_registers, 1).ravel(), d[rows, columns].ravel()]
    )


def accumulator_places() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column of each lane's four accumulators."""
    lanes, elements = np.arange(32)[:, None], np.arange(4)[None]
    return lanes // 4 + elements // 2 * 8, lanes % 4 * 2 + elements % 2


@golden(kind=["f16", "bf16", "tf32"])
def mma_multiplies_small_integers_exactly(run: Runner, kind: str) -> None:
    depth = 8 if kind == "tf32" else 16
    a, b, d = (GENERATOR.integers(-8, 9, shape).astype(np.float32) for shape in ((16, depth), (8, depth), (16, 8)))
    encode = {"f16": lambda x: x.astype(np.float16), "bf16": bfloat16_bits, "tf32": lambda x: x}[kind]
    words = fragments(bits(encode(a)).reshape(16, 8), bits(encode(b)).reshape(8, 8), bits(d).reshape(16, 8))
    out = run(f"mma_m16n8k{depth}_{kind}", words, 128)
    assert np.array_equal(out.view(np.float32).reshape(32, 4), (a @ b.T + d)[accumulator_places()])


@golden(kind=["f16", "bf16", "tf32"])
def mma_multiplies_random_values_to_float_precision(run: Runner, kind: str) -> None:
    depth = 8 if kind == "tf32" else 16
    tensors = [torch.from_numpy(GENERATOR.standard_normal((rows, depth), dtype=np.float32)) for rows in (16, 8)]
    a, b = ((t.view(torch.int32) & -8192).view(torch.float32) if kind == "tf32" else t for t in tensors)
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}[kind]
    a, b = a.to(dtype), b.to(dtype)
    in_words = [bits(t.view(torch.int32 if kind == "tf32" else torch.int16).numpy()).reshape(-1, 8) for t in (a, b)]
    out = run(f"mma_m16n8k{depth}_{kind}", fragments(*in_words, np.zeros((16, 8), np.uint32)), 128)
    expected = (a.double() @ b.double().T).numpy()[accumulator_places()]
    error = np.abs(out.view(np.float32).reshape(32, 4) - expected).max() / np.abs(expected).max()
    assert error < 5e-6


@golden()
def mma_of_bytes_is_exact_and_wraps(run: Runner) -> None:
    a, b = (GENERATOR.integers(-128, 128, (rows, 32)).astype(np.int8) for rows in (16, 8))
    d = GENERATOR.integers(-(2**31), 2**31, (16, 8))
    d[3, 3] = 2**31 - 1
    words = fragments(bits(a).reshape(16, 8), bits(b).reshape(8, 8), d.astype(np.int32).view(np.uint32))
    expected = (a.astype(np.int64) @ b.T.astype(np.int64) + d).astype(np.uint32)
    assert np.array_equal(run("mma_m16n8k32_s8", words, 128).reshape(32, 4), expected[accumulator_places()])


@golden()
def dp4a_multiplies_signed_bytes(run: Runner) -> None:
    words = random_words(96)
    products = words[:32].view(np.int8).astype(np.int64) * words[32:64].view(np.int8)
    expected = (products.reshape(32, 4).sum(1) + words[64:].view(np.int32)).astype(np.uint32)
    assert np.array_equal(run("dp4a", words, 32), expected)


@golden()
def byte_permute_picks_four_of_eight_bytes(run: Runner) -> None:
    words = random_words(96)
    digits = GENERATOR.integers(0, 8, (32, 4))
    words[64:] = (digits << 4 * np.arange(4)).sum(1)
    sources = np.hstack([words[:32].view(np.uint8).reshape(32, 4), words[32:64].view(np.uint8).reshape(32, 4)])
    chosen = np.take_along_axis(sources, digits, 1)
    expected = [np.ascontiguousarray(chosen), np.ascontiguousarray(sources[:, [0, 5, 2, 7]])]
    assert np.array_equal(run("byte_permute", words, 64), np.concatenate([t.view(np.uint32).ravel() for t in expected]))


@golden()
def tf32_rounds_ties_away_from_zero(run: Runner) -> None:
    values = GENERATOR.standard_normal(32).astype(np.float32)
    words = bits(values)
    words[:6] = [0x3F801000, 0xBF801000, 0x3F800FFF, 0x3F803000, 0x7F800000, 0x80000000]
    expected = np.where(words & 0x7FFFFFFF == 0x7F800000, words, (words + np.uint32(0x1000)) & np.uint32(0xFFFFE000))
    assert np.array_equal(run("to_tf32", words, 32), expected)
    assert expected[0] == 0x3F802000


@golden()
def shuffles_exchange_values_of_every_size(run: Runner) -> None:
    words = random_words(32)
    lanes = np.arange(32)
    down = np.where(lanes + 1 < 32, lanes + 1, lanes)
    pair, four = words[lanes ^ 16], words[down]
    expected = [
        words[lanes ^ 5],
        words[np.where(lanes + 3 < 32, lanes + 3, lanes)],
        words[np.where(lanes >= 3, lanes - 3, lanes)],
        words[::-1],
        words[lanes ^ 1] & 0xFFFF,
        pair ^ np.uint32(3) * ~pair,
        four ^ np.uint32(3) * ~four ^ np.uint32(5) * (four + np.uint32(1)) ^ np.uint32(7) * (four + np.uint32(2)),
    ]
    assert np.array_equal(run("shuffles", words, 224), np.concatenate(expected))


@golden(case=[("equal", [1] * 32, 4), ("of three bits", [7] * 32, 13), ("mixed", [7, 2000] * 16, 3)])
def votes(run: Runner, case: tuple[str, list[int], int]) -> None:
    _, values, expected = case
    assert run("votes", np.array(values, np.uint32), 32).tolist() == [expected] * 32


@golden()
def reductions_reach_every_lane(run: Runner) -> None:
    values = GENERATOR.integers(-1000, 1000, 32).astype(np.int32)
    expected = [
        values.sum(),
        values.max(),
        np.float32(values.sum()).view(np.int32),
        np.float32(values.max()).view(np.int32),
    ]
    assert np.array_equal(
        run("reductions", bits(values), 128).view(np.int32), np.repeat(np.array(expected, np.int32), 32)
    )


@golden()
def vectors_of_16_bytes(run: Runner) -> None:
    words = random_words(128)
    assert np.array_equal(run("vectors", words, 256), np.tile(bits(words.reshape(32, 4)[::-1]), 2))


@golden()
def atomics_return_what_was_there(run: Runner) -> None:
    values = GENERATOR.integers(-100, 100, 32).astype(np.int32)
    out = run("atomics", bits(values), 34)
    assert out[0] == 32
    assert out[1:2].view(np.float32)[0] == values.sum()
    assert out[2:].tolist() == [1] * 32


@golden()
def barriers_show_what_others_wrote(run: Runner) -> None:
    words = random_words(64)
    assert np.array_equal(run("barriers", words, 64), words[::-1][np.arange(64) ^ 1])


def floats() -> NDArray[np.float32]:
    """256 values: ties of both formats, subnormal and too large ones, infinities, NaN, and random ones."""
    special = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        65504.0,
        65519.9,
        65520.0,
        -7e4,
        2.0**-24,
        2.0**-25,
        1.5 * 2.0**-25,
        6.1e-5,
        3e-5,
        1e-8,
    ]
    special += [1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 3e38, 3.4e38, np.inf, -np.inf, np.nan]
    special += [0.5, 1.5, 2.5, -0.5, -2.5, 127.5, 128.5, -128.5, -129.0, 1e9]
    scales = 10.0 ** GENERATOR.uniform(-9, 6, 256 - len(special))
    return np.concatenate([special, GENERATOR.standard_normal(256 - len(special)) * scales]).astype(np.float32)


def same_but_for_nan(out: NDArray[np.uint16], expected: torch.Tensor) -> bool:
    got = torch.from_numpy(out.astype(np.uint16).view(np.int16)).view(expected.dtype)
    nan = expected.isnan()
    return torch.equal(got.isnan(), nan) and torch.equal(got[~nan].view(torch.int16), expected[~nan].view(torch.int16))


@golden(name=SIXTEEN_BITS)
def sixteen_bit_floats_round_to_the_nearest_even(run: Runner, name: str) -> None:
    dtype = SIXTEEN_BITS[name]
    values = floats()
    expected = torch.from_numpy(values).to(dtype)
    assert same_but_for_nan(run(f"{name}_from_float", bits(values), 256).astype(np.uint16), expected)
    assert same_but_for_nan(run(f"pack_{name}", bits(values), 128).view(np.uint16), expected)


@golden(name=SIXTEEN_BITS)
def every_sixteen_bit_float_becomes_its_value(run: Runner, name: str) -> None:
    dtype = SIXTEEN_BITS[name]
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).float()
    out = torch.from_numpy(run(f"{name}_to_float", np.zeros(1, np.uint32), 65536).view(np.float32).copy())
    assert torch.equal(out.isnan(), every.isnan())
    assert torch.equal(out[~every.isnan()].view(torch.int32), every[~every.isnan()].view(torch.int32))


@golden()
def bytes_saturate_and_round_to_the_nearest_even(run: Runner) -> None:
    values = floats()
    expected = np.clip(np.nan_to_num(np.rint(values), nan=0.0, posinf=127, neginf=-128), -128, 127).astype(np.int8)
    assert np.array_equal(run("int8_from_float", bits(values), 256).astype(np.uint8).view(np.int8), expected)
