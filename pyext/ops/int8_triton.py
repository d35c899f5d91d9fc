"""How the int8 ops become launches of Triton kernels: the operands of the CUDA kernels, and the values of padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernelpress.ops import int8_cuda
from kernelpress.ops.backends.triton import TritonKernel
from kernelpress.ops.calls import packing
from kernelpress.ops.registry import Problem, Tensors

__all__ = ["ADD", "CONV2D", "DEPTHWISE", "DEQUANTIZE", "MATMUL", "QUANTIZE"]

_WINDOW = ("stride", "padding", "dilation")
_EPILOGUE = ("activation", "residual_scale", "residual_zero_point", "output_zero_point")
_INT8 = (torch.int8,)


def _matmul_options(problem: Problem) -> dict[str, Any]:
    return _chosen(problem, *_EPILOGUE)


def _conv_options(problem: Problem) -> dict[str, Any]:
    weight = problem.tensors[1]
    assert weight is not None
    return {"kernel": tuple(weight.shape[2:]), **_chosen(problem, *_WINDOW, *_EPILOGUE)}


def _depthwise_options(problem: Problem) -> dict[str, Any]:
    return _chosen(problem, *_WINDOW, "input_zero_point", *_EPILOGUE)


def _chosen(problem: Problem, *names: str) -> dict[str, Any]:
    options = problem.options
    scale = 1.0 if options.output_scale is None else options.output_scale
    return {"output_scale": scale, **{name: getattr(options, name) for name in names}}


def _conv_operands(tensors: Tensors, options: Any) -> tuple[Tensor | None, ...]:
    weight, zero_point = tensors[1], options.input_zero_point
    assert weight is not None

    def padding(weight: Tensor) -> Tensor:
        return weight.new_full((weight.shape[3] * weight.shape[1],), zero_point)

    x, rows, *others = int8_cuda.CONV2D.operands(tensors, options)
    return (x, rows, packing.packed(weight, None, ("int8 padding", zero_point), padding), *others)


MATMUL = TritonKernel(
    family="int8",
    name="int8_matmul",
    layouts=int8_cuda.MATMUL.layouts,
    operands=int8_cuda.MATMUL.operands,
    supports=int8_cuda.MATMUL.supports,
    dtypes=_INT8,
    options=_matmul_options,
)

CONV2D = TritonKernel(
    family="int8",
    name="int8_conv2d",
    layouts=int8_cuda.CONV2D.layouts,
    operands=_conv_operands,
    dtypes=_INT8,
    options=_conv_options,
)

DEPTHWISE = TritonKernel(
    family="int8_depthwise",
    name="int8_depthwise_conv2d",
    layouts=int8_cuda.DEPTHWISE.layouts,
    operands=int8_cuda.DEPTHWISE.operands,
    dtypes=_INT8,
    options=_depthwise_options,
)

QUANTIZE = TritonKernel(
    family="int8_quantize",
    name="quantize",
    layouts=int8_cuda.QUANTIZE.layouts,
    operands=int8_cuda.QUANTIZE.operands,
)

DEQUANTIZE = TritonKernel(
    family="int8_quantize",
    name="dequantize",
    layouts=int8_cuda.DEQUANTIZE.layouts,
    operands=int8_cuda.DEQUANTIZE.operands,
    dtypes=_INT8,
)

ADD = TritonKernel(
    family="int8_quantize",
    name="int8_add",
    layouts=int8_cuda.ADD.layouts,
    operands=int8_cuda.ADD.operands,
    dtypes=_INT8,
)
