"""Dynamic quantization of rows: `quantize_rows`, an op of three outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelpress.kernels import reference
from kernelpress.ops.backends import cuda, triton
from kernelpress.ops.calls.dispatch import LIBRARY
from kernelpress.ops.checks import TensorSpec, check_dtype, describe
from kernelpress.ops.int8_checks import FLOATS
from kernelpress.ops.layout import ROWS
from kernelpress.ops.registry import Implementation, Operator, Problem, requested_backend, resolve
from kernelpress.runtime.interception import is_intercepted, is_plain

__all__ = ["quantize_rows"]

Rows = tuple[Tensor, Tensor, Tensor]


class QuantizeRowsOptions(NamedTuple):
    """Keyword arguments of `quantize_rows`."""

    symmetric: bool = False


def _shape(tensors: tuple[TensorSpec | None, ...], options: QuantizeRowsOptions) -> tuple[int, ...]:
    x = tensors[0]
    assert x is not None
    if not x.shape or x.shape[-1] == 0:
        raise ValueError(f"x: expected [..., C] with at least one channel, got {describe(x.shape)}")
    return tuple(x.shape)


def _dtypes(names: Sequence[str], tensors: Sequence[TensorSpec | None], options: Any) -> torch.dtype:
    check_dtype("x", tensors[0], FLOATS)
    return torch.int8


def _by_reference(tensors: Sequence[Any], symmetric: bool) -> Any:
    values, scale, zero_point = reference.quantize_rows(tensors[0], symmetric=symmetric)
    return values.contiguous(), scale.contiguous(), zero_point.contiguous()


def _elsewhere(problem: Problem, device_type: str, reason: Callable[[int], str | None]) -> str | None:
    device = torch.device(problem.device)
    return f"x is on {problem.device}" if device.type != device_type else reason(device.index or 0)


def _into_new(problem: Problem, run: Callable[[Tensor, int, Tensor, Tensor, Tensor], None]) -> Callable[..., Any]:
    """The prepared call that has `run(x, spacing of x, values, scale, zero_point)` fill its outputs."""
    shape, device = problem.shape, torch.device(problem.device)

    def compute(tensors: Sequence[Any]) -> Any:
        x = tensors[0]
        spacing = ROWS.spacing(x.shape, x.stride())
        if spacing is None:
            x, spacing = x.contiguous(), shape[-1]
        values = torch.empty(shape, dtype=torch.int8, device=device)
        scale = torch.empty(shape[:-1], dtype=torch.float32, device=device)
        zero_point = torch.empty(shape[:-1], dtype=torch.int32, device=device)
        if values.numel():
            run(x, spacing, values, scale, zero_point)
        return values, scale, zero_point

    return compute


def _on_cuda(problem: Problem, tensors: Sequence[Any]) -> Callable[..., Any]:
    place, index, symmetric = cuda.target(), torch.device(problem.device).index or 0, problem.options.symmetric

    def run(x: Tensor, spacing: int, values: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        fields = (
            *(x.data_ptr(), values.data_ptr(), scale.data_ptr(), zero_point.data_ptr()),
            *(scale.numel(), values.shape[-1], spacing),
            *(int(symmetric), cuda.data_type(x.dtype), 0, -1),
        )
        place.launch("quantize_rows", (values, x, scale, zero_point), fields, index)

    return _into_new(problem, run)


def _on_triton(problem: Problem, tensors: Sequence[Any]) -> Callable[..., Any]:
    from kernelpress.kernels.triton import int8_quantize as kernels

    place, symmetric = triton.target(), problem.options.symmetric
    index = torch.device(problem.device).index or 0
    configuration = kernels.quantize_rows_configurations(triton.device_of(problem), problem)[0]

    def run(x: Tensor, spacing: int, values: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        with place.guard(index):
            kernels.quantize_rows(values, scale, zero_point, x, symmetric=symmetric, configuration=configuration)

    return _into_new(problem, run)


_OPERATOR = Operator(
    name="quantize_rows",
    schema='(Tensor x, *, bool symmetric=False, str backend="auto") -> (Tensor, Tensor, Tensor)',
    tensors=("x",),
    options=QuantizeRowsOptions,
    out=ROWS,
    shape=_shape,
    reference=reference.quantize_rows,
    macs=lambda shapes, options, shape: 0,
    implementations=(
        Implementation(
            "quantize_rows",
            "cuda",
            lambda: cuda.target().reason(None),
            lambda problem: _elsewhere(problem, cuda.target().device_type, cuda.target().reason),
            _on_cuda,
        ),
        Implementation(
            "quantize_rows",
            "triton",
            lambda: triton.target().reason(None),
            lambda problem: _elsewhere(problem, triton.target().device_type, triton.target().reason),
            _on_triton,
        ),
        Implementation(
            "quantize_rows",
            "reference",
            lambda: None,
            lambda problem: None,
            lambda problem, tensors: lambda tensors: _by_reference(tensors, problem.options.symmetric),
        ),
    ),
    native=None,
    dtypes=_dtypes,
)


def _run(x: Tensor, *, symmetric: bool = False, backend: str = "auto") -> Rows:
    options, requested = QuantizeRowsOptions(symmetric), requested_backend(backend)
    problem, implementation = resolve(_OPERATOR, (TensorSpec.of(x),), options, str(x.device), False, requested)
    outputs: Any = implementation.prepare(problem, (x,))((x,))
    return outputs


def _fake(x: Tensor, *, symmetric: bool = False, backend: str = "auto") -> Rows:
    spec = (TensorSpec.of(x),)
    _dtypes(("x",), spec, None)
    shape = _shape(spec, QuantizeRowsOptions(symmetric))
    vectors = [x.new_empty(shape[:-1], dtype=dtype) for dtype in (torch.float32, torch.int32)]
    return x.new_empty(shape, dtype=torch.int8), vectors[0], vectors[1]


LIBRARY.define(_OPERATOR.name + _OPERATOR.schema, tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl(_OPERATOR.name, _run, "CompositeExplicitAutograd")
LIBRARY.impl(_OPERATOR.name, torch.library.fallthrough_kernel, "Autograd")
torch.library.register_fake("kernelpress::quantize_rows", _fake, lib=LIBRARY)


def quantize_rows(x: Tensor, *, symmetric: bool = False, backend: str = "auto") -> Rows:
    """int8 values of every row of `x` by a scale and a zero point of its own, for `int8_matmul`.

    Args:
        x: `[..., C]`, float32, float16 or bfloat16.
        symmetric: zero points 0 and a range of ±127, instead of the range from the row's least to its largest value
            (0 always among them) on all 256.

    Returns: values `[..., C]` int8, `scale: [...]` float32, `zero_point: [...]` int32, all contiguous. They have no
        gradient. The scale of a row with a NaN is NaN. Errors as of `int8_matmul`.
    """
    if is_intercepted() or not is_plain(x):
        outputs: Rows = torch.ops.kernelpress.quantize_rows(x, symmetric=symmetric, backend=backend)
        return outputs
    return _run(x, symmetric=symmetric, backend=backend)
