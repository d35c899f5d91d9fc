"""Checks of op arguments, shared by the families. They run on symbolic sizes too, and put no condition on the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelpress.kernels.reference import ACTIVATIONS
from kernelpress.runtime.torch_private import check_value

__all__ = [
    "TensorSpec",
    "check_activation",
    "check_depthwise_weight",
    "check_dtype",
    "check_epilogue",
    "check_grouped_weight",
    "check_groups",
    "check_image",
    "check_input",
    "check_pair",
    "check_same_shape",
    "check_vector",
    "check_weight",
    "conv_output_size",
    "convolved",
    "describe",
    "floating_or_int8",
    "one_floating_dtype",
]


class TensorSpec(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, t: Tensor) -> TensorSpec:
        """The spec of a tensor."""
        return cls(t.shape, t.stride(), t.dtype)


def describe(shape: Sequence[int]) -> str:
    """`[1, 3, 224, 224]`."""
    return "[" + ", ".join(map(str, shape)) + "]"


def one_floating_dtype(names: Sequence[str], tensors: Sequence[TensorSpec | None], options: Any) -> torch.dtype:
    """All tensors, and the output, of one floating dtype, the first one's. Raises `TypeError`."""
    first = tensors[0]
    assert first is not None
    if not first.dtype.is_floating_point:
        raise TypeError(f"{names[0]}: expected a floating dtype, got {first.dtype}")
    for name, t in zip(names, tensors, strict=True):
        if t is not None and t.dtype != first.dtype:
            raise TypeError(f"{name}: expected the dtype of {names[0]}, {first.dtype}, got {t.dtype}")
    return first.dtype


def floating_or_int8(names: Sequence[str], tensors: Sequence[TensorSpec | None], options: Any) -> torch.dtype:
    """As `one_floating_dtype`, or all int8, of one scale and zero point. Raises `TypeError`."""
    dtypes = {t.dtype for t in tensors if t is not None}
    if dtypes == {torch.int8}:
        return torch.int8
    if torch.int8 in dtypes or not tensors[0].dtype.is_floating_point:  # type: ignore[union-attr]
        raise TypeError(f"{names[0]}: expected a floating dtype or torch.int8 of all tensors, got {tensors[0].dtype}")  # type: ignore[union-attr]
    return one_floating_dtype(names, tensors, options)


def check_dtype(name: str, t: TensorSpec | None, allowed: Sequence[torch.dtype]) -> None:
    """Absent, or of one of the dtypes. Raises `TypeError`."""
    if t is not None and t.dtype not in allowed:
        raise TypeError(f"{name}: expected {' or '.join(map(str, allowed))}, got {t.dtype}")


def check_input(x: TensorSpec) -> None:
    """`x: [N, C, H, W]` with at least one channel. Raises `ValueError`."""
    if len(x.shape) != 4:
        raise ValueError(f"x: expected [N, C, H, W], got {describe(x.shape)}")
    if x.shape[1] == 0:
        raise ValueError(f"x: expected at least one channel, got {describe(x.shape)}")


def check_image(x: TensorSpec) -> None:
    """As `check_input`, with at least one position. Raises `ValueError`."""
    check_input(x)
    if any(isinstance(size, int) and size == 0 for size in x.shape[2:]):
        raise ValueError(f"x: expected at least one position, got {describe(x.shape)}")


def check_pair(name: str, value: Sequence[int], least: int) -> None:
    """Two integers, both at least `least`. Raises `ValueError`, or `TypeError` for other numbers."""
    if not all(isinstance(size, (int, torch.SymInt)) for size in value):
        raise TypeError(f"{name}: expected two integers of at least {least}, got {describe(value)}")
    if len(value) != 2 or value[0] < least or value[1] < least:
        raise ValueError(f"{name}: expected two integers of at least {least}, got {describe(value)}")


def check_activation(name: str, activation: str) -> None:
    """A known activation. Raises `ValueError`."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name}: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def check_weight(name: str, weight: TensorSpec, form: str, expected: Sequence[int | None], because: str) -> None:
    """A weight whose sizes are those of `expected` (None: any size but 0). Raises `ValueError`."""
    shape = weight.shape
    if len(shape) != len(expected) or any(
        size == 0 if want is None else size != want for size, want in zip(shape, expected, strict=True)
    ):
        raise ValueError(f"{name}: expected {form} with {because}, got {describe(shape)}")


def check_depthwise_weight(name: str, weight: TensorSpec, channels: int) -> None:
    """`[C · multiplier, 1, KH, KW]` for `C` channels. Raises `ValueError`."""
    because = f"C = {channels} channels of x"
    check_weight(name, weight, "[C · multiplier, 1, KH, KW]", (None, 1, None, None), because)
    if weight.shape[0] % channels != 0:
        raise ValueError(f"{name}: expected [C · multiplier, 1, KH, KW] with {because}, got {describe(weight.shape)}")


def check_vector(name: str, vector: TensorSpec | None, size: int) -> None:
    """Absent, or one value per output channel. Raises `ValueError`."""
    if vector is not None and (len(vector.shape) != 1 or vector.shape[0] != size):
        raise ValueError(f"{name}: expected [{size}], one value per output channel, got {describe(vector.shape)}")


def check_same_shape(name: str, t: TensorSpec | None, shape: Sequence[int]) -> None:
    """Absent, or of the output's shape. Raises `ValueError`."""
    if t is not None and (len(t.shape) != len(shape) or any(a != b for a, b in zip(t.shape, shape, strict=True))):
        raise ValueError(f"{name}: expected the shape of the output, {describe(shape)}, got {describe(t.shape)}")


def check_groups(name: str, groups: int, channels: int, whose: str) -> None:
    """A divisor of the channels. Raises `ValueError`."""
    if not groups >= 1 or channels % groups != 0:
        raise ValueError(f"{name}: expected a divisor of the {channels} channels of {whose}, got {groups}")


def check_grouped_weight(x: TensorSpec, weight: TensorSpec, groups: int) -> None:
    """`groups` of the channels of x, and `[C_out, C_in / groups, KH, KW]`. Raises `ValueError`."""
    channels = x.shape[1]
    check_groups("groups", groups, channels, "x")
    because = f"{channels} channels of x in {groups} groups"
    check_weight("weight", weight, "[C_out, C_in / groups, KH, KW]", (None, channels // groups, None, None), because)
    if weight.shape[0] % groups != 0:
        raise ValueError(f"weight: expected C_out divisible by groups = {groups}, got {describe(weight.shape)}")


def check_epilogue(
    options: Any,
    shape: tuple[int, ...],
    channels: int,
    bias: TensorSpec | None,
    scale: TensorSpec | None = None,
    residual: TensorSpec | None = None,
) -> tuple[int, ...]:
    """What ends most ops: a known activation, vectors of `channels`, a residual of the output's `shape`, which it
    returns. Raises `ValueError`.
    """
    check_activation("activation", options.activation)
    check_vector("bias", bias, channels)
    check_vector("scale", scale, channels)
    check_same_shape("residual", residual, shape)
    return shape


def convolved(x: TensorSpec, weight: TensorSpec, options: Any) -> tuple[int, ...]:
    """The output's shape of a convolution with `stride`, `padding` and `dilation` among its options. Raises as
    `conv_output_size`.
    """
    size = conv_output_size(x, weight.shape[2:], options.stride, options.padding, options.dilation)
    return (x.shape[0], weight.shape[0], *size)


def conv_output_size(
    x: TensorSpec, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """Height and width of a convolution's or a pool's output. Raises `ValueError` where the kernel does not fit."""
    check_pair("stride", stride, 1)
    check_pair("padding", padding, 0)
    check_pair("dilation", dilation, 1)
    sizes = []
    for axis, name in enumerate(("height", "width")):
        size = x.shape[2 + axis]
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        slack = size + 2 * padding[axis] - reach
        message = (
            f"x: expected a {name} of at least {reach - 2 * padding[axis]} (kernel {kernel[axis]}, "
            f"dilation {dilation[axis]}, padding {padding[axis]}), got {describe(x.shape)}"
        )
        if isinstance(slack, int):
            if slack < 0 or size == 0:
                raise ValueError(message)
        else:
            check_value(slack >= 0, lambda message=message: message)
        sizes.append(slack // stride[axis] + 1)
    return sizes[0], sizes[1]
