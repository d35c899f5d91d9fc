"""Layers of real networks as benchmark cases: what each computes, and the least work and traffic it costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kernelpress.bench import networks
from kernelpress.ops.registry import Tensors

__all__ = ["FAMILIES", "FLOAT_BYTES", "Call", "Case", "Stage", "cases", "check_batch"]

FAMILIES = ("dense", "depthwise", "separable")

FLOAT_BYTES = 4

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Stage:
    """One convolution with bias and activation, padded by (kernel − 1) / 2; depthwise where `groups` is not 1."""

    c_in: int
    c_out: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    activation: str = "identity"

    @property
    def padding(self) -> int:
        return (self.kernel - 1) // 2

    @property
    def is_depthwise(self) -> bool:
        return self.groups > 1

    def out_size(self, size: int) -> int:
        """Rows (or columns) of the output for `size` rows of input."""
        return (size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.c_out, self.c_in // self.groups, self.kernel, self.kernel

    @property
    def window(self) -> dict[str, list[int]]:
        """Options of an op with a window."""
        return {"stride": [self.stride] * 2, "padding": [self.padding] * 2}


@dataclass(frozen=True)
class Case:
    """A layer, or a fused chain of layers, at one shape: `op` of its family on `batch` maps of `size` × `size`.

    With `residual`, a tensor of the output's shape is added before the last activation: a chain adds its own input, a
    single layer another tensor.
    """

    family: str
    op: str
    network: str
    size: int
    stages: tuple[Stage, ...]
    residual: bool = False
    batch: int = 1

    @property
    def c_in(self) -> int:
        return self.stages[0].c_in

    @property
    def c_out(self) -> int:
        return self.stages[-1].c_out

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Map size before the first stage and after each one."""
        sizes = [self.size]
        for stage in self.stages:
            sizes.append(stage.out_size(sizes[-1]))
        return tuple(sizes)

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.c_in, self.size, self.size

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.c_out, self.sizes[-1], self.sizes[-1]

    @property
    def residual_is_input(self) -> bool:
        return self.residual and len(self.stages) > 1

    def tiny(self) -> Case:
        """The same in sizes small enough for a dry run."""
        stages = [
            replace(stage, c_in=min(stage.c_in, 24), c_out=min(stage.c_out, 24), groups=min(stage.groups, 24))
            for stage in self.stages
        ]
        return replace(self, size=min(self.size, 8), batch=min(self.batch, 2), stages=tuple(stages))

    @property
    def options(self) -> dict[str, Any]:
        """Those of its op."""
        last = self.stages[-1]
        if len(self.stages) == 1:
            has_window = self.op in ("conv2d", "depthwise_conv2d")
            return {"activation": last.activation} | (last.window if has_window else {})
        depthwise = next(stage for stage in self.stages if stage.is_depthwise)
        activations = {"depthwise_activation": depthwise.activation, "activation": last.activation}
        expand = {"expand_activation": self.stages[0].activation} if self.op == "inverted_residual" else {}
        return {**depthwise.window, **activations, **expand}

    def make(self, device: torch.device, dtype: torch.dtype) -> Tensors:
        """Fresh random tensors of its op, maps in channels_last; weights scaled by their fan-in, so that values keep
        their size along a chain."""

        def draw(*shape: int) -> Tensor:
            t = torch.randn(shape, device=device)
            return t.contiguous(memory_format=torch.channels_last) if self.op != "linear" else t.flatten(1)

        x = draw(*self.x_shape)
        pairs = [
            (
                draw(*stage.weight_shape) * torch.Size(stage.weight_shape[1:]).numel() ** -0.5,
                torch.randn(stage.c_out, device=device),
            )
            for stage in self.stages
        ]
        residual = None if not self.residual else x if self.residual_is_input else draw(*self.y_shape)
        between = [None] if len(self.stages) == 1 else []
        tensors = [x, *(t for pair in pairs for t in pair), *between, residual]
        return [None if t is None else t.to(dtype) for t in tensors]

    def split(
        self, tensors: Sequence[Tensor | None]
    ) -> tuple[Tensor, list[tuple[Stage, Tensor, Tensor]], Tensor | None]:
        """x, each stage with its weight and bias, and the residual, of the tensors of its op."""
        x, *others = tensors
        pairs = zip(self.stages, others[: 2 * len(self.stages) : 2], others[1 : 2 * len(self.stages) : 2], strict=True)
        return x, list(pairs), tensors[-1]  # type: ignore[return-value, arg-type]

    @property
    def flops(self) -> int:
        """Floating-point operations of the convolutions, a multiplication and an addition counted as two."""
        return self.batch * sum(
            2 * size * size * stage.c_out * (stage.c_in // stage.groups) * stage.kernel**2
            for stage, size in zip(self.stages, self.sizes[1:], strict=True)
        )

    @property
    def traffic_bytes(self) -> int:
        """Least bytes to move: input, weights, biases and a residual of its own read once, output written once."""
        weights = sum(stage.c_out * (stage.c_in // stage.groups * stage.kernel**2 + 1) for stage in self.stages)
        x = self.batch * self.c_in * self.size**2
        y = self.batch * self.c_out * self.sizes[-1] ** 2
        residual = y if self.residual and not self.residual_is_input else 0
        return FLOAT_BYTES * (x + weights + y + residual)

    @property
    def label(self) -> str:
        """Shape in one line, as `56×56 64→128 3×3/2 relu`; a chain shows its widest window and first activation."""
        channels = "→".join(str(c) for c in [self.c_in, *(s.c_out for s in self.stages if not s.is_depthwise)])
        if self.op == "linear":
            parts = [channels]
        else:
            kernel = max(stage.kernel for stage in self.stages)
            stride = max(stage.stride for stage in self.stages)
            window = f"{kernel}×{kernel}" + (f"/{stride}" if stride > 1 else "")
            parts = [f"{self.size}×{self.size}", channels, window]
        if (activation := self.stages[0].activation) != "identity":
            parts.append(activation)
        if self.residual:
            parts.append("+res")
        if self.batch != 1:
            parts.append(f"batch {self.batch}")
        return " ".join(parts)


def cases(family: str, *, batch: int = 1) -> tuple[Case, ...]:
    """The layers of dense, depthwise or separable, each shape once.

    Raises `ValueError` for an unknown family, or a batch that is not a positive integer.
    """
    if family not in FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {family!r}")
    check_batch(batch)
    return _BUILDERS[family](batch)


def check_batch(batch: object) -> None:
    """Raises `ValueError` for what is not a positive integer."""
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
        raise ValueError(f"batch: expected a positive integer, got {batch!r}")


def _dense(batch: int) -> tuple[Case, ...]:
    def convolution(network: str, size: int, stage: Stage, residual: bool = False) -> Case:
        op = "pointwise_conv2d" if stage.kernel == 1 else "conv2d"
        return Case("dense", op, network, size, (stage,), residual, batch)

    stems = [
        convolution("MobileNet V1", 224, Stage(3, 32, 3, 2, activation="relu")),
        convolution("ResNet", 224, Stage(3, 64, 7, 2, activation="relu")),
    ]
    blocks = [
        convolution("ResNet-18", size, Stage(c_in, c_out, 3, stride, activation="relu"), residual)
        for size, c_in, c_out, stride, residual in (
            (56, 64, 64, 1, False),
            (56, 64, 64, 1, True),
            (56, 64, 128, 2, False),
            (28, 128, 128, 1, True),
            (28, 128, 256, 2, False),
            (14, 256, 256, 1, True),
            (14, 256, 512, 2, False),
            (7, 512, 512, 1, True),
        )
    ]
    v1 = [
        convolution("MobileNet V1", before // stride, Stage(c_in, c_out, activation="relu"))
        for before, c_in, c_out, stride in networks.MOBILENET_V1_PAIRS
    ]
    v2 = [
        convolution("MobileNet V2", size, Stage(c_in, c_out, activation=activation), residual)
        for size, c_in, c_out, activation, residual in (
            (112, 16, 96, "relu6", False),
            (56, 24, 144, "relu6", False),
            (56, 144, 24, "identity", True),
            (28, 192, 32, "identity", True),
            (14, 96, 576, "relu6", False),
            (14, 576, 96, "identity", True),
            (7, 960, 160, "identity", True),
            (7, 960, 320, "identity", False),
            (7, 320, 1280, "relu6", False),
        )
    ]
    bottlenecks = [
        convolution("ResNet-50", size, Stage(c_in, c_out, activation="relu"), residual)
        for size, c_in, c_out, residual in (
            (56, 256, 64, False),
            (56, 64, 256, True),
            (28, 128, 512, True),
            (14, 1024, 256, False),
            (14, 256, 1024, True),
            (7, 2048, 512, False),
            (7, 512, 2048, True),
        )
    ]
    heads = [
        Case("dense", "linear", network, 1, (Stage(c_in, 1000),), batch=batch)
        for network, c_in in (("MobileNet V1", 1024), ("MobileNet V2", 1280), ("ResNet-50", 2048))
    ]
    return (*stems, *blocks, *v1, *v2, *bottlenecks, *heads)


def _depthwise(batch: int) -> tuple[Case, ...]:
    shapes = (
        *(("MobileNet V1", size, c, 3, stride, "relu") for size, c, _, stride in networks.MOBILENET_V1_PAIRS),
        ("MobileNet V2", 112, 96, 3, 2, "relu6"),
        ("MobileNet V2", 56, 144, 3, 1, "relu6"),
        ("MobileNet V2", 28, 192, 3, 1, "relu6"),
        ("MobileNet V2", 14, 576, 3, 1, "relu6"),
        ("MobileNet V2", 7, 960, 3, 1, "relu6"),
        ("MobileNet V3", 56, 72, 5, 2, "relu"),
        ("MobileNet V3", 28, 120, 5, 1, "relu"),
        ("MobileNet V3", 14, 672, 5, 2, "hardswish"),
        ("MobileNet V3", 7, 960, 5, 1, "hardswish"),
        ("ConvNeXt-T", 56, 96, 7, 1, "identity"),
        ("ConvNeXt-T", 14, 384, 7, 1, "identity"),
    )
    return tuple(
        Case("depthwise", "depthwise_conv2d", network, size, (Stage(c, c, k, stride, c, activation),), batch=batch)
        for network, size, c, k, stride, activation in shapes
    )


def _separable(batch: int) -> tuple[Case, ...]:
    pairs = [
        Case(
            "separable",
            "separable_conv2d",
            "MobileNet V1",
            size,
            (Stage(c_in, c_in, 3, stride, c_in, "relu"), Stage(c_in, c_out, activation="relu")),
            batch=batch,
        )
        for size, c_in, c_out, stride in networks.MOBILENET_V1_PAIRS
    ]
    inverted = [
        Case(
            "separable",
            "inverted_residual",
            "MobileNet V2",
            size,
            (
                Stage(c_in, hidden, activation="relu6"),
                Stage(hidden, hidden, 3, stride, hidden, "relu6"),
                Stage(hidden, c_out),
            ),
            residual=stride == 1 and c_in == c_out,
            batch=batch,
        )
        for size, c_in, hidden, c_out, stride in networks.MOBILENET_V2_BLOCKS
    ]
    return (*pairs, *inverted)


_BUILDERS = {"dense": _dense, "depthwise": _depthwise, "separable": _separable}
