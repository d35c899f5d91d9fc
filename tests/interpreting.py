"""Triton kernels without a GPU: the backend "triton" on Triton's interpreter, in tiles of a test's choice.

The interpreter of Triton 3.6 to 3.9 keeps bfloat16 as integers and multiplies them as such in `tl.dot` (and in any
arithmetic that is not of float32, which kernels therefore avoid), and cuts off what it should round to it; each call of
a device function patches the language anew, which takes 5 ms. That of 3.6 rounds `tl.fma` twice, and makes indices of
arrays in a way that NumPy refuses from 2.4 on. All of it is mended here.

Programs run in a random order, as on a GPU, so that two that write the same value differently are seen; and outputs are
NaN, or the largest integer, before they are written.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install triton", allow_module_level=True)

import triton.language as tl
from torch import Tensor

from kernelpress.kernels.triton.launch import Configuration, Device
from kernelpress.ops import registry
from kernelpress.ops.backends import triton
from kernelpress.runtime import triton_private

__all__ = ["H200", "INTERPRETED", "interpreted_triton", "run_triton"]

H200 = Device("H200", 90, 132, 227 * 1024)

INTERPRETED: dict[str, Any] = {
    "device_type": "cpu",
    "reason": lambda index: None,
    "describe": lambda index: H200,
    "launch": lambda run, index: run(),
}
"""Where Triton's kernels run: what is other about the target."""

interpreter: Any = triton_private.interpreter()

_called: set[Any] = set()
_call = interpreter.InterpretedFunction.__call__


def _call_patched(function: Any, *arguments: Any, **keywords: Any) -> Any:
    """A device function. Its kernel patched the language; what only Triton's own library sees stays as the first call
    left it."""
    if function.fn in _called:
        return function.rewrite()(*arguments, **keywords)
    _called.add(function.fn)
    return _call(function, *arguments, **keywords)


def _widened(t: Any) -> Any:
    if t.dtype.scalar != tl.bfloat16:
        return t
    return interpreter.TensorHandle((t.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


_cast = interpreter.InterpreterBuilder.cast_impl


def _cast_to_nearest(builder: Any, source: Any, dtype: Any) -> Any:
    if source.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
        return _cast(builder, source, dtype)
    rounded = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.int16)
    return interpreter.TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)


_dot = interpreter.InterpreterBuilder.create_dot


def _dot_of_widened(builder: Any, a: Any, b: Any, *others: Any) -> Any:
    return _dot(builder, _widened(a), _widened(b), *others)


_fma = interpreter.InterpreterBuilder.create_fma


def _fused(builder: Any, x: Any, y: Any, z: Any) -> Any:
    """x·y + z rounded once: in float64, where the product is exact, the sum is rounded to an odd last bit, from which
    float32 then rounds as from the exact sum."""
    if z.data.dtype != np.float32:
        return _fma(builder, x, y, z)
    product, addend = np.multiply(x.data, y.data, dtype=np.float64), z.data.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        total = product + addend
        back = total - product
        rest = (product - (total - back)) + (addend - back)
        is_even = (total.view(np.int64) & 1) == 0
        off = np.isfinite(total) & (rest != 0) & is_even
        total = np.where(off, np.nextafter(total, np.copysign(np.inf, rest)), total).astype(np.float32)
    return interpreter.TensorHandle(total, z.dtype.scalar)


_patch_tensor = getattr(interpreter, triton_private.PATCH_OF_TENSORS)


def _patch_tensor_and_index(tensor: Any, scope: Any) -> None:
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda t: t.handle.data.item())


_set_grid_dim = interpreter.InterpreterBuilder.set_grid_dim
_set_grid_idx = interpreter.InterpreterBuilder.set_grid_idx


def _draw_order(builder: Any, *sizes: int) -> None:
    builder.order = np.random.permutation(sizes[0])  # noqa: NPY002 - seeded with every test
    _set_grid_dim(builder, *sizes)


def _set_program(builder: Any, x: int, *others: int) -> None:
    _set_grid_idx(builder, int(builder.order[x]), *others)


@contextmanager
def _poisoned_outputs() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def interpreted_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sends the backend "triton" to the interpreter, where it takes CPU tensors."""
    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter is chosen where there is no GPU; tests/test_ops_on_cuda.py runs them")
    monkeypatch.setattr(Any, "__call__", _call_patched)
    monkeypatch.setattr(interpreter, triton_private.PATCH_OF_TENSORS, _patch_tensor_and_index)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", _dot_of_widened)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", _fused)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", _cast_to_nearest)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_dim", _draw_order)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", _set_program)
    with triton.TARGET.changed(**INTERPRETED), _poisoned_outputs():
        yield


def run_triton(
    op: str,
    tensors: Sequence[Tensor | None],
    options: dict[str, Any],
    *tile: int,
    configuration: Any = None,
    allow_tf32: bool = True,
) -> Tensor:
    """The op on the backend "triton" in tiles of these sizes, or in a configuration, or as the heuristic chooses."""
    entry = registry.operator(op)
    kernel = entry.kernel("triton")
    bound, named, _ = entry.signature.bind(tensors, options)
    problem = registry.problem(entry, registry.specs_of(bound), named, "cpu", allow_tf32)
    if tile:
        configuration = Configuration(tile, 4, 2)
    elif configuration is None:
        configuration = triton.configurations(kernel, problem, bound)[0]
    return triton.prepare_with(kernel, problem, bound, configuration)(bound)
