"""Pooling: `global_avg_pool2d` and `max_pool2d`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kernelpress.kernels import reference
from kernelpress.ops.backends.cpu import cpu_implementation
from kernelpress.ops.backends.reference import reference_implementation
from kernelpress.ops.calls.dispatch import call, publish
from kernelpress.ops.checks import TensorSpec, check_input, check_pair, conv_output_size, describe
from kernelpress.ops.layout import DENSE, PIXELS
from kernelpress.ops.registry import NativeKernel, Operator, Problem
from kernelpress.ops.signature import IntOrPair

__all__ = ["global_avg_pool2d", "max_pool2d"]

Specs = tuple[TensorSpec | None, ...]


class GlobalPoolOptions(NamedTuple):
    """Keyword arguments of `global_avg_pool2d`: none."""


class MaxPoolOptions(NamedTuple):
    """Keyword arguments of `max_pool2d`."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] = (0, 0)


def _global_shape(tensors: Specs, options: GlobalPoolOptions) -> tuple[int, ...]:
    x = tensors[0]
    assert x is not None
    check_input(x)
    if any(isinstance(size, int) and size == 0 for size in x.shape[2:]):
        raise ValueError(f"x: expected at least one position, got {describe(x.shape)}")
    return (x.shape[0], x.shape[1])


def _global_sizes(problem: Problem, spacings: tuple[int, ...], y_spacing: int) -> tuple[int, ...]:
    x = problem.tensors[0]
    assert x is not None
    batch, channels, height, width = x.shape
    return (batch, height * width, channels, spacings[0])


_GLOBAL_KERNEL = NativeKernel(
    name="global_avg_pool2d",
    layouts=(PIXELS,),
    supports=lambda problem: None,
    operands=lambda tensors, options: (tensors[0],),
    sizes=_global_sizes,
)

_GLOBAL = publish(
    Operator(
        name="global_avg_pool2d",
        schema='(Tensor x, *, str backend="auto") -> Tensor',
        tensors=("x",),
        options=GlobalPoolOptions,
        out=DENSE,
        shape=_global_shape,
        reference=reference.global_avg_pool2d,
        macs=lambda shapes, options, shape: 0,
        implementations=(
            cpu_implementation("global_avg_pool2d", _GLOBAL_KERNEL),
            reference_implementation("global_avg_pool2d", reference.global_avg_pool2d),
        ),
        native=_GLOBAL_KERNEL,
    )
)


def global_avg_pool2d(x: Tensor, *, backend: str = "auto") -> Tensor:
    """Mean over the positions of every channel: `x: [N, C, H, W]` → `[N, C]`. Errors as of `conv2d`."""
    return call(_GLOBAL, (x,), (), backend)


def _max_shape(tensors: Specs, options: MaxPoolOptions) -> tuple[int, ...]:
    x = tensors[0]
    assert x is not None
    check_input(x)
    kernel, padding = options.kernel_size, options.padding
    check_pair("kernel_size", kernel, 1)
    size = conv_output_size(x, kernel, options.stride, padding, (1, 1))
    if 2 * padding[0] > kernel[0] or 2 * padding[1] > kernel[1]:
        raise ValueError(f"padding: expected at most half of kernel_size {describe(kernel)}, got {describe(padding)}")
    return (x.shape[0], x.shape[1], *size)


def _max_sizes(problem: Problem, spacings: tuple[int, ...], y_spacing: int) -> tuple[int, ...]:
    x = problem.tensors[0]
    assert x is not None
    options = problem.options
    batch, channels, in_h, in_w = x.shape
    return (
        *(batch, in_h, in_w, channels, *problem.shape[2:], spacings[0], y_spacing),
        *options.kernel_size,
        *options.stride,
        *options.padding,
    )


_MAX_KERNEL = NativeKernel(
    name="max_pool2d",
    layouts=(PIXELS,),
    supports=lambda problem: None,
    operands=lambda tensors, options: (tensors[0],),
    sizes=_max_sizes,
)

_MAX = publish(
    Operator(
        name="max_pool2d",
        schema=(
            "(Tensor x, *, SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding=[0,0], "
            'str backend="auto") -> Tensor'
        ),
        tensors=("x",),
        options=MaxPoolOptions,
        out=PIXELS,
        shape=_max_shape,
        reference=reference.max_pool2d,
        macs=lambda shapes, options, shape: 0,
        implementations=(
            cpu_implementation("max_pool2d", _MAX_KERNEL),
            reference_implementation("max_pool2d", reference.max_pool2d),
        ),
        native=_MAX_KERNEL,
    )
)


def max_pool2d(
    x: Tensor,
    *,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    backend: str = "auto",
) -> Tensor:
    """Largest value under every window; padding counts as −∞, NaN wins.

    Args:
        x: `[N, C, H, W]`; channels_last, or a channel slice of it, is read without a copy.
        kernel_size, padding: pixels, one integer or (height, width); the padding at most half of the kernel.
        stride: `kernel_size` where None.

    Returns: `[N, C, H_out, W_out]`, channels_last. Errors as of `conv2d`.
    """
    step = kernel_size if stride is None else stride
    return call(_MAX, (x,), (kernel_size, step, padding), backend)
