"""int8 layers: `Int8Linear` and `Int8Conv2d`, whose weights are symmetric per output channel."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kernelpress import ops
from kernelpress.kernels import reference
from kernelpress.layers.common import check_padding_mode, check_type, checked_activation
from kernelpress.ops.int8_checks import check_scale, check_zero_point
from kernelpress.ops.int8_checks import output_dtype as dtype_of_output
from kernelpress.ops.signature import IntOrPair, pair

__all__ = ["Int8Conv2d", "Int8Linear"]


class _Int8Layer(nn.Module):
    """What both layers hold: `weight` int8, `weight_scale` and `bias` float32, all buffers; scales of the activations.

    Scales and zero points are constants of the graph that `torch.export` makes, and no part of the state dict.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        shape: tuple[int, ...],
        bias: bool,
        device: torch.device | str | None,
        *,
        input_scale: float | None,
        input_zero_point: int,
        residual_scale: float,
        residual_zero_point: int,
        activation: str,
        output_scale: float | None,
        output_zero_point: int,
        output_dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        for name, scale in (("input", input_scale), ("residual", residual_scale), ("output", output_scale)):
            if scale is not None:
                check_scale(f"{name}_scale", scale)
        check_zero_point("input_zero_point", input_zero_point)
        check_zero_point("residual_zero_point", residual_zero_point)
        check_zero_point("output_zero_point", output_zero_point)
        self.input_scale, self.input_zero_point = input_scale, input_zero_point
        self.residual_scale, self.residual_zero_point = residual_scale, residual_zero_point
        self.activation = checked_activation(activation)
        self.output_scale, self.output_zero_point, self.output_dtype = output_scale, output_zero_point, output_dtype
        dtype_of_output(self)
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.ones(shape[0], device=device))
        self.register_buffer("bias", torch.zeros(shape[0], device=device) if bias else None)

    def _quantized(self, x: Tensor) -> Tensor:
        if x.dtype == torch.int8:
            return x
        assert self.input_scale is not None
        return ops.quantize(x, scale=self.input_scale, zero_point=self.input_zero_point)

    def _options(self) -> dict[str, Any]:
        return {
            "activation": self.activation,
            "residual_scale": self.residual_scale,
            "residual_zero_point": self.residual_zero_point,
            "output_scale": self.output_scale,
            "output_zero_point": self.output_zero_point,
            "output_dtype": self.output_dtype,
        }

    def _quantization_repr(self) -> str:
        return (
            f"input_scale={self.input_scale}, input_zero_point={self.input_zero_point}, "
            f"output_scale={self.output_scale}, output_zero_point={self.output_zero_point}, "
            f"bias={self.bias is not None}, activation={self.activation}"
        )


L = TypeVar("L", bound=_Int8Layer)


def _copy_quantized(source: nn.Linear | nn.Conv2d, target: L) -> L:
    """Quantize the weight per output channel, symmetric, to ±127; copy the bias."""
    with torch.no_grad():
        values, scale, _ = reference.quantize_rows(source.weight.flatten(1), symmetric=True)
        target.weight.copy_(values.view_as(source.weight))
        target.weight_scale.copy_(scale)
        if target.bias is not None:
            assert source.bias is not None
            target.bias.copy_(source.bias)
    return target.train(source.training)


class Int8Linear(_Int8Layer):
    """Linear layer on int8 values: `activation((x − zero_point) · weightᵀ · scale + bias + residual)`.

    `x: [..., C_in]` is int8 of `input_scale` and `input_zero_point`, or floating and then quantized to them first; with
    `input_scale=None`, a floating `x` is quantized row by row (dynamically). The output is int8 with an `output_scale`,
    else `output_dtype` (float32 where None). It is for inference: it has no parameters.

    x: `[..., C_in]` → `[..., C_out]`; residual: of the output's shape and dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        *,
        input_scale: float | None = 1.0,
        input_zero_point: int = 0,
        residual_scale: float = 1.0,
        residual_zero_point: int = 0,
        activation: str = "identity",
        output_scale: float | None = None,
        output_zero_point: int = 0,
        output_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            (out_features, in_features),
            bias,
            device,
            input_scale=input_scale,
            input_zero_point=input_zero_point,
            residual_scale=residual_scale,
            residual_zero_point=residual_zero_point,
            activation=activation,
            output_scale=output_scale,
            output_zero_point=output_zero_point,
            output_dtype=output_dtype,
        )
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def from_float(
        cls, module: nn.Linear, input_scale: float | None = None, zero_point: int = 0, **options: Any
    ) -> Int8Linear:
        """The layer that computes `activation(module(x))` with quantized weights, on their device.

        Args:
            input_scale, zero_point: of the activations, as calibration found them; None: quantized row by row.
            options: further keyword arguments of the constructor.
        """
        check_type(module, nn.Linear)
        layer = cls(
            module.in_features,
            module.out_features,
            module.bias is not None,
            module.weight.device,
            input_scale=input_scale,
            input_zero_point=zero_point,
            **options,
        )
        return _copy_quantized(module, layer)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        weights = (self.weight, self.weight_scale, self.bias, residual)
        if self.input_scale is None:
            if x.dtype == torch.int8:
                raise TypeError("x: expected a floating dtype where input_scale is None, got torch.int8")
            values, row_scale, row_zero_point = ops.quantize_rows(x)
            return ops.int8_matmul(values, *weights, row_scale, row_zero_point, **self._options())
        return ops.int8_matmul(
            self._quantized(x),
            *weights,
            input_scale=self.input_scale,
            input_zero_point=self.input_zero_point,
            **self._options(),
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._quantization_repr()}"


class Int8Conv2d(_Int8Layer):
    """2-D convolution on int8 values; padding stands for 0.

    `x` is int8 of `input_scale` and `input_zero_point`, or floating and then quantized to them first. The output is
    int8 with an `output_scale`, else `output_dtype` (float32 where None). It is for inference: it has no parameters.

    x: `[N, C_in, H, W]` → `[N, C_out, H_out, W_out]`; residual: of the output's shape and dtype.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: str | IntOrPair = 0,
        dilation: IntOrPair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        *,
        input_scale: float = 1.0,
        input_zero_point: int = 0,
        residual_scale: float = 1.0,
        residual_zero_point: int = 0,
        activation: str = "identity",
        output_scale: float | None = None,
        output_zero_point: int = 0,
        output_dtype: torch.dtype | None = None,
    ) -> None:
        check_padding_mode(padding_mode)
        if groups < 1 or in_channels % groups != 0:
            raise ValueError(f"groups: expected a divisor of in_channels = {in_channels}, got {groups}")
        if out_channels % groups != 0:
            raise ValueError(f"out_channels: expected a multiple of groups = {groups}, got {out_channels}")
        kernel = pair(kernel_size)
        super().__init__(
            (out_channels, in_channels // groups, *kernel),
            bias,
            device,
            input_scale=input_scale,
            input_zero_point=input_zero_point,
            residual_scale=residual_scale,
            residual_zero_point=residual_zero_point,
            activation=activation,
            output_scale=output_scale,
            output_zero_point=output_zero_point,
            output_dtype=output_dtype,
        )
        self.in_channels, self.out_channels, self.groups, self.kernel_size = in_channels, out_channels, groups, kernel
        self.stride, self.dilation = pair(stride), pair(dilation)
        self.padding = _symmetric_padding(padding, kernel, self.dilation, self.stride)

    @classmethod
    def from_float(cls, module: nn.Conv2d, input_scale: float, zero_point: int = 0, **options: Any) -> Int8Conv2d:
        """The layer that computes `activation(module(x))` with quantized weights, on their device.

        Args:
            input_scale, zero_point: of the activations, as calibration found them.
            options: further keyword arguments of the constructor.

        Raises: `ValueError` where `module` pads unevenly.
        """
        check_type(module, nn.Conv2d)
        layer = cls(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
            module.bias is not None,
            module.padding_mode,
            module.weight.device,
            input_scale=input_scale,
            input_zero_point=zero_point,
            **options,
        )
        return _copy_quantized(module, layer)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        is_depthwise = 1 < self.groups == self.in_channels
        assert self.input_scale is not None
        return (ops.int8_depthwise_conv2d if is_depthwise else partial(ops.int8_conv2d, groups=self.groups))(
            self._quantized(x),
            self.weight,
            self.weight_scale,
            self.bias,
            residual,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            input_scale=self.input_scale,
            input_zero_point=self.input_zero_point,
            **self._options(),
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, {self._quantization_repr()}"
        )


def _symmetric_padding(
    padding: str | IntOrPair, kernel: tuple[int, ...], dilation: tuple[int, ...], stride: tuple[int, ...]
) -> tuple[int, ...]:
    if not isinstance(padding, str):
        return pair(padding)
    if padding == "valid":
        return (0, 0)
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if padding != "same" or stride != (1, 1) or any(size % 2 for size in total):
        raise ValueError(
            "padding: expected pixels, 'valid', or 'same' where stride is 1 and dilation · (kernel_size - 1) is even, "
            f"got {padding!r} with kernel_size {kernel}, dilation {dilation}, stride {stride}"
        )
    return (total[0] // 2, total[1] // 2)
