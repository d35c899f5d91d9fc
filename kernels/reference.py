"""What every op of kernelpress means, in plain PyTorch: any float dtype, differentiable, exportable.

Every op ends in the same epilogue, `activation(accumulator * scale + bias + residual)`. Nothing is checked here;
`kernelpress.ops` owns the checks.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "ACTIVATIONS",
    "activate",
    "block_csr_to_dense",
    "channel_shuffle",
    "conv2d",
    "depthwise_conv2d",
    "dequantize",
    "epilogue",
    "ghost_conv2d",
    "global_avg_pool2d",
    "grouped_conv2d",
    "int8_add",
    "int8_conv2d",
    "int8_depthwise_conv2d",
    "int8_epilogue",
    "int8_matmul",
    "inverted_residual",
    "linear",
    "max_pool2d",
    "pointwise_conv2d",
    "quantize",
    "quantize_rows",
    "separable_conv2d",
    "separable_stem",
    "shuffle_concat",
    "sparse_conv2d",
    "sparse_matmul",
]

Pair = tuple[int, ...]

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
}

ACTIVATIONS: tuple[str, ...] = tuple(_FUNCTIONS)
"""Activation names; the position of a name is the integer the native kernels take."""


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply the activation of that name. Raises `ValueError` for an unknown one."""
    try:
        function = _FUNCTIONS[activation]
    except KeyError:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}") from None
    return function(x)


def epilogue(
    accumulator: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "identity",
) -> Tensor:
    """`activation(accumulator * scale + bias + residual)` with `scale` and `bias` per channel of `[N, C, H, W]`."""
    if scale is not None:
        accumulator = accumulator * scale[:, None, None]
    if bias is not None:
        accumulator = accumulator + bias[:, None, None]
    if residual is not None:
        accumulator = accumulator + residual
    return activate(accumulator, activation)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    activation: str = "identity",
) -> Tensor:
    """Convolution of `x: [N, C_in, H, W]` by `weight: [C_out, C_in / groups, KH, KW]` with the epilogue."""
    if scale is None:
        return epilogue(F.conv2d(x, weight, bias, stride, padding, dilation, groups), None, None, residual, activation)
    accumulator = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    return epilogue(accumulator, bias, scale, residual, activation)


def pointwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    input_scale: Tensor | None = None,
    *,
    activation: str = "identity",
) -> Tensor:
    """1×1 convolution of `x · input_scale` (`[N, C_in]`, squeeze-and-excitation) with the epilogue."""
    if input_scale is not None:
        x = x * input_scale[:, :, None, None]
    return conv2d(x, weight, bias, scale, residual, activation=activation)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str = "identity",
) -> Tensor:
    """`x: [..., C_in]` times `weight: [C_out, C_in]` transposed, with the epilogue over the last dimension."""
    if scale is None:
        y = F.linear(x, weight, bias)
    else:
        y = F.linear(x, weight) * scale
        if bias is not None:
            y = y + bias
    if residual is not None:
        y = y + residual
    return activate(y, activation)


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    activation: str = "identity",
) -> Tensor:
    """Each channel of `x: [N, C, H, W]` by its own filters, `weight: [C · multiplier, 1, KH, KW]`, and the epilogue."""
    return conv2d(
        x,
        weight,
        bias,
        scale,
        residual,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=x.shape[1],
        activation=activation,
    )


def separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    depthwise_activation: str = "identity",
    activation: str = "identity",
) -> Tensor:
    """Depthwise convolution, its activation, then a 1×1 convolution with the epilogue (MobileNet, arXiv:1704.04861)."""
    hidden = depthwise_conv2d(
        x,
        depthwise_weight,
        depthwise_bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        activation=depthwise_activation,
    )
    return pointwise_conv2d(hidden, pointwise_weight, pointwise_bias, None, residual, activation=activation)


def inverted_residual(
    x: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    expand_activation: str = "identity",
    depthwise_activation: str = "identity",
    activation: str = "identity",
) -> Tensor:
    """Expand 1×1, depthwise, project 1×1 with the epilogue (MobileNet V2, arXiv:1801.04381)."""
    hidden = pointwise_conv2d(x, expand_weight, expand_bias, activation=expand_activation)
    return separable_conv2d(
        hidden,
        depthwise_weight,
        depthwise_bias,
        project_weight,
        project_bias,
        residual,
        stride=stride,
        padding=padding,
        dilation=dilation,
        depthwise_activation=depthwise_activation,
        activation=activation,
    )


def separable_stem(
    x: Tensor,
    stem_weight: Tensor,
    stem_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None = None,
    *,
    stem_stride: Pair = (1, 1),
    stem_padding: Pair = (0, 0),
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    stem_activation: str = "identity",
    depthwise_activation: str = "identity",
    activation: str = "identity",
) -> Tensor:
    """Dense convolution, depthwise convolution, 1×1 convolution (MobileNet, arXiv:1704.04861, Table 1, first rows)."""
    hidden = conv2d(x, stem_weight, stem_bias, stride=stem_stride, padding=stem_padding, activation=stem_activation)
    return separable_conv2d(
        hidden,
        depthwise_weight,
        depthwise_bias,
        pointwise_weight,
        pointwise_bias,
        stride=stride,
        padding=padding,
        depthwise_activation=depthwise_activation,
        activation=activation,
    )


def global_avg_pool2d(x: Tensor) -> Tensor:
    """Mean over the positions of every channel: `[N, C, H, W]` → `[N, C]`."""
    return x.mean((2, 3))


def max_pool2d(x: Tensor, *, kernel_size: Pair, stride: Pair, padding: Pair = (0, 0)) -> Tensor:
    """Largest value under every window; padding counts as −∞, NaN wins."""
    return F.max_pool2d(x, kernel_size, stride, padding)


def ghost_conv2d(
    x: Tensor,
    primary_weight: Tensor,
    primary_bias: Tensor | None,
    cheap_weight: Tensor,
    cheap_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    activation: str = "identity",
    cheap_activation: str = "identity",
    out_channels: int | None = None,
) -> Tensor:
    """Few channels from a convolution, the others from those by a depthwise one (GhostNet, arXiv:1911.11907, eq. 3).

    `primary_weight: [C_primary, C_in, KH, KW]`; `cheap_weight: [C_primary · multiplier, 1, DH, DW]` with odd sizes, of
    stride 1 and padded to keep the size. The result is `concat(primary, cheap) + residual`, of which the first
    `out_channels` are kept (None: all).
    """
    primary = conv2d(x, primary_weight, primary_bias, stride=stride, padding=padding, activation=activation)
    kernel_h, kernel_w = cheap_weight.shape[2:]
    cheap = depthwise_conv2d(
        primary, cheap_weight, cheap_bias, padding=(kernel_h // 2, kernel_w // 2), activation=cheap_activation
    )
    y = torch.cat([primary, cheap], 1)[:, :out_channels]
    return y if residual is None else y + residual


def channel_shuffle(x: Tensor, *, groups: int) -> Tensor:
    """Channel `i · C / groups + k` of `x: [N, C, H, W]` becomes channel `k · groups + i` (arXiv:1707.01083, Fig. 1)."""
    return x.unflatten(1, (groups, x.shape[1] // groups)).transpose(1, 2).flatten(1, 2)


def shuffle_concat(a: Tensor, b: Tensor, *, groups: int = 2) -> Tensor:
    """`channel_shuffle` of the channels of `a` and then those of `b` (ShuffleNet V2, arXiv:1807.11164, Fig. 3)."""
    return channel_shuffle(torch.cat((a, b), 1), groups=groups)


def grouped_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    shuffle: int = 1,
    activation: str = "identity",
) -> Tensor:
    """`activation(channel_shuffle(conv(x) · scale + bias) + residual)`.

    `scale` and `bias` follow the convolution's channels, those of `weight: [C_out, C_in / groups, KH, KW]`; `residual`
    and the output follow the shuffled ones. `shuffle` is the number of groups of the shuffle, 1 for none.
    """
    y = conv2d(x, weight, bias, scale, stride=stride, padding=padding, dilation=dilation, groups=groups)
    if shuffle != 1:
        y = channel_shuffle(y, groups=shuffle)
    return epilogue(y, residual=residual, activation=activation)


_SMALLEST_SCALE = 2.0**-126
"""The smallest normal float32: its inverse is finite."""


def _single(value: float) -> float:
    """The float32 nearest to a number."""
    number: float = struct.unpack("f", struct.pack("f", value))[0]
    return number


def _fused_multiply_add(a: Tensor, b: Tensor | float, c: Tensor) -> Tensor:
    """`a · b + c` of float32 numbers, rounded to float32 at the end only, as the instruction does."""
    factor = b.double() if isinstance(b, Tensor) else _single(b)
    return (a.double() * factor + c.double()).float()


def _saturated(x: Tensor, inverse_scale: float | Tensor, zero_point: int | Tensor) -> Tensor:
    rounded = torch.round(x * inverse_scale).nan_to_num(0.0) + zero_point
    return rounded.clamp(-128, 127).to(torch.int8)


def quantize(x: Tensor, *, scale: float, zero_point: int = 0) -> Tensor:
    """`clamp(round(x / scale) + zero_point)` as int8, half to even; NaN becomes the zero point.

    It multiplies by `1 / scale` rounded to float32, as PyTorch's `quantized_decomposed.quantize_per_tensor` does.
    """
    return _saturated(x.float(), 1.0 / scale, zero_point)


def quantize_rows(x: Tensor, *, symmetric: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Every row of `x: [..., C]` by its own range: int8 values, `scale: [...]` float32, `zero_point: [...]` int32.

    The range always holds 0. A row with a NaN has a scale that is NaN.
    """
    x = x.float()
    if symmetric:
        scale = (x.abs().amax(-1) * _single(1 / 127)).clamp(min=_SMALLEST_SCALE)
        inverse = 1.0 / scale
        zero_point = torch.zeros_like(scale)
    else:
        low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
        scale = ((high - low) * _single(1 / 255)).clamp(min=_SMALLEST_SCALE)
        inverse = 1.0 / scale
        zero_point = (-128 - torch.round(low * inverse).nan_to_num(0.0)).clamp(-128, 127)
    return _saturated(x, inverse[..., None], zero_point[..., None]), scale, zero_point.to(torch.int32)


def dequantize(x: Tensor, *, scale: float, zero_point: int = 0, output_dtype: torch.dtype = torch.float32) -> Tensor:
    """`(x − zero_point) · scale` of int8 values, in float32, then cast."""
    return ((x.float() - zero_point) * scale).to(output_dtype)


def _int8_output(value: Tensor, output_scale: float | None, zero_point: int, dtype: torch.dtype | None) -> Tensor:
    if output_scale is None:
        return value.to(torch.float32 if dtype is None else dtype)
    return quantize(value, scale=output_scale, zero_point=zero_point)


def int8_epilogue(
    accumulator: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    residual_scale: float = 1.0,
    residual_zero_point: int = 0,
    activation: str = "identity",
    output_scale: float | None = None,
    output_zero_point: int = 0,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """What the int8 kernels do with an exact accumulator, step by step in float32.

    1. The accumulator is rounded to float32, and multiplied by its row's scale where there are such; `scale` is (input
       scale) · (weight scale) rounded to float32.
    2. `value = fma(accumulator, scale, bias)`: one rounding.
    3. A floating residual is added; an int8 one as `fma(residual − residual_zero_point, residual_scale, value)`.
    4. The activation, then a cast, or `quantize` where there is an `output_scale`.

    `scale`, `bias` and `residual` broadcast to the accumulator, an integer in float64 or what step 1 made of it.
    """
    value = _fused_multiply_add(accumulator.float(), scale, torch.zeros_like(scale) if bias is None else bias)
    if residual is not None and residual.dtype == torch.int8:
        value = _fused_multiply_add(residual.float() - residual_zero_point, residual_scale, value)
    elif residual is not None:
        value = value + residual.float()
    return _int8_output(activate(value, activation), output_scale, output_zero_point, output_dtype)


def int8_matmul(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    row_scale: Tensor | None = None,
    row_zero_point: Tensor | None = None,
    *,
    input_scale: float = 1.0,
    input_zero_point: int = 0,
    residual_scale: float = 1.0,
    residual_zero_point: int = 0,
    activation: str = "identity",
    output_scale: float | None = None,
    output_zero_point: int = 0,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """`x: [..., C_in]` times `weight: [C_out, C_in]` transposed, both int8, summed exactly; then `int8_epilogue`.

    Activations are affine per tensor (`input_scale`, `input_zero_point`), or per row (`row_scale`, `row_zero_point`:
    `[...]`); weights are symmetric per output channel (`weight_scale: [C_out]`).
    """
    zero_point: int | Tensor = input_zero_point if row_zero_point is None else row_zero_point[..., None].double()
    accumulator = F.linear(x.double() - zero_point, weight.double())
    return int8_epilogue(
        accumulator if row_scale is None else accumulator.float() * row_scale[..., None],
        weight_scale * input_scale,
        bias,
        residual,
        residual_scale=residual_scale,
        residual_zero_point=residual_zero_point,
        activation=activation,
        output_scale=output_scale,
        output_zero_point=output_zero_point,
        output_dtype=output_dtype,
    )


def int8_conv2d(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    input_scale: float = 1.0,
    input_zero_point: int = 0,
    residual_scale: float = 1.0,
    residual_zero_point: int = 0,
    activation: str = "identity",
    output_scale: float | None = None,
    output_zero_point: int = 0,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Convolution of int8 `x: [N, C_in, H, W]` by int8 `weight: [C_out, C_in / groups, KH, KW]`, summed exactly; then
    `int8_epilogue`. Padding has the value of the zero point, which stands for 0.
    """
    shifted = x.double() - input_zero_point
    accumulator = F.conv2d(shifted, weight.double(), None, stride, padding, dilation, groups)
    return int8_epilogue(
        accumulator,
        (weight_scale * input_scale)[:, None, None],
        None if bias is None else bias[:, None, None],
        residual,
        residual_scale=residual_scale,
        residual_zero_point=residual_zero_point,
        activation=activation,
        output_scale=output_scale,
        output_zero_point=output_zero_point,
        output_dtype=output_dtype,
    )


def int8_depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    input_scale: float = 1.0,
    input_zero_point: int = 0,
    residual_scale: float = 1.0,
    residual_zero_point: int = 0,
    activation: str = "identity",
    output_scale: float | None = None,
    output_zero_point: int = 0,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Each channel of int8 `x: [N, C, H, W]` by its own filters, `weight: [C · multiplier, 1, KH, KW]`; as
    `int8_conv2d` otherwise.
    """
    return int8_conv2d(
        x,
        weight,
        weight_scale,
        bias,
        residual,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=x.shape[1],
        input_scale=input_scale,
        input_zero_point=input_zero_point,
        residual_scale=residual_scale,
        residual_zero_point=residual_zero_point,
        activation=activation,
        output_scale=output_scale,
        output_zero_point=output_zero_point,
        output_dtype=output_dtype,
    )


def int8_add(
    x: Tensor,
    other: Tensor,
    *,
    input_scale: float,
    input_zero_point: int = 0,
    other_scale: float,
    other_zero_point: int = 0,
    activation: str = "identity",
    output_scale: float | None = None,
    output_zero_point: int = 0,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """`activation(x + other)` of int8 tensors: `fma(other − zero point, other_scale, dequantized x)`, then the last
    step of `int8_epilogue`.
    """
    first = dequantize(x, scale=input_scale, zero_point=input_zero_point)
    value = _fused_multiply_add(other.float() - other_zero_point, other_scale, first)
    return _int8_output(activate(value, activation), output_scale, output_zero_point, output_dtype)


def block_csr_to_dense(row_offsets: Tensor, columns: Tensor, blocks: Tensor, shape: Pair) -> Tensor:
    """The matrix `[C_out, C_in]` whose blocks `blocks: [nnz, r, c]` stand row by row at block columns `columns: [nnz]`.

    Block row `i` has the blocks `row_offsets[i] … row_offsets[i + 1] - 1`; what reaches past `shape` is cut off.
    """
    count, r, c = blocks.shape
    rows, block_columns = row_offsets.shape[0] - 1, -(-shape[1] // c)
    at = torch.arange(rows, device=blocks.device)
    row = torch.repeat_interleave(at, row_offsets.diff(), output_size=count)
    dense = blocks.new_zeros(rows * block_columns, r, c).index_add(0, row * block_columns + columns, blocks)
    dense = dense.view(rows, block_columns, r, c).transpose(1, 2).reshape(rows * r, block_columns * c)
    return dense[: shape[0], : shape[1]]


def sparse_matmul(
    x: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    blocks: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    out_features: int | None = None,
    activation: str = "identity",
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """`linear` of `x: [..., C_in]` by the block-CSR weight `[C_out, C_in]`; C_out is `out_features` or all rows.

    int8 `x` and `blocks` are summed exactly and end in `int8_epilogue`, in `output_dtype`.
    """
    rows = (row_offsets.shape[0] - 1) * blocks.shape[1]
    shape = (rows if out_features is None else out_features, x.shape[-1])
    weight = block_csr_to_dense(row_offsets, columns, blocks, shape)
    if blocks.dtype != torch.int8:
        return linear(x, weight, bias, scale, residual, activation=activation)
    assert scale is not None
    accumulator = F.linear(x.double(), weight.double())
    return int8_epilogue(accumulator, scale, bias, residual, activation=activation, output_dtype=output_dtype)


def sparse_conv2d(
    x: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    blocks: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    kernel_size: Pair = (1, 1),
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    out_channels: int | None = None,
    activation: str = "identity",
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """`conv2d` of `x: [N, C_in, H, W]` by the block-CSR weight `[C_out, KH · KW · C]`, C_in rounded up to whole blocks.

    Column `(kh · KW + kw) · C + i` is input channel `i` at kernel position `(kh, kw)`, so no block spans two positions.
    int8 as in `sparse_matmul`.
    """
    r, c = blocks.shape[1:]
    padded = -(-x.shape[1] // c) * c
    c_out = (row_offsets.shape[0] - 1) * r if out_channels is None else out_channels
    matrix = block_csr_to_dense(row_offsets, columns, blocks, (c_out, kernel_size[0] * kernel_size[1] * padded))
    weight = matrix.view(c_out, *kernel_size, padded)[..., : x.shape[1]].permute(0, 3, 1, 2)
    if blocks.dtype != torch.int8:
        return conv2d(
            x, weight, bias, scale, residual, stride=stride, padding=padding, dilation=dilation, activation=activation
        )
    assert scale is not None
    accumulator = F.conv2d(x.double(), weight.double(), None, stride, padding, dilation)
    scale, bias = scale[:, None, None], None if bias is None else bias[:, None, None]
    return int8_epilogue(accumulator, scale, bias, residual, activation=activation, output_dtype=output_dtype)
