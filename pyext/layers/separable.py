"""Depthwise-separable blocks computed by one fused op: `DepthwiseSeparableConv2d` and `InvertedResidual`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernelpress import ops
from kernelpress.kernels.reference import activate
from kernelpress.layers.chain import NormLayer, copy_stages, has_bias, load_in_order, norm_layer_of, stages_of
from kernelpress.layers.common import checked_activation, computes_plainly
from kernelpress.layers.dense import PointwiseConv2d
from kernelpress.layers.depthwise import DepthwiseConv2d
from kernelpress.layers.folding import folded, is_foldable, is_hooked
from kernelpress.ops.signature import IntOrPair

__all__ = ["DepthwiseSeparableConv2d", "InvertedResidual"]


class _Block(nn.Module):
    """Convolutions in a row, each with a norm or none, then its activation.

    The convolution `name` stands beside its norm `name_norm`. Where no gradient is wanted and every norm is a BatchNorm
    in evaluation mode, or absent, the subclass computes all of it in one op.
    """

    def __init__(self) -> None:
        super().__init__()
        self._activations: dict[str, str] = {}

    def _follow(self, name: str, norm_layer: NormLayer | None, activation: str) -> None:
        convolution = getattr(self, name)
        norm = None if norm_layer is None else norm_layer(convolution.out_channels).to(convolution.weight)
        self.add_module(f"{name}_norm", norm)
        self._activations[name] = checked_activation(activation)

    def _stages(self) -> list[tuple[Any, nn.Module | None, str]]:
        return [
            (self._modules[name], self._modules[f"{name}_norm"], activation)
            for name, activation in self._activations.items()
        ]

    def _is_one_op(self, x: Tensor, residual: Tensor | None) -> bool:
        if not all(is_foldable(norm) for _, norm, _ in self._stages()):
            return False
        if is_hooked(*(convolution for convolution, _, _ in self._stages())):
            return False
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters()):
            return False
        return not computes_plainly(x, residual)

    def _one_by_one(self, x: Tensor, residual: Tensor | None) -> Tensor:
        stages = self._stages()
        for index, (convolution, norm, activation) in enumerate(stages):
            x = convolution(x)
            if norm is not None:
                x = norm(x)
            if residual is not None and index == len(stages) - 1:
                x = x + residual
            x = activate(x, activation)
        return x

    def _folded(self) -> list[Any]:
        return [tensor for convolution, norm, _ in self._stages() for tensor in folded(convolution, norm)]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        load_in_order(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class DepthwiseSeparableConv2d(_Block):
    """Depthwise convolution, then a 1×1 convolution (MobileNet, arXiv:1704.04861), each with norm and activation.

    Children `depthwise`, `depthwise_norm`, `pointwise`, `pointwise_norm` (norms only with `norm_layer`). A state dict
    of other names, such as that of the `torch.nn.Sequential` it replaces, loads if it has the same tensors in this
    order.

    x: `[N, C_in, H, W]` → `[N, C_out, H_out, W_out]`; residual: of the output's shape, added before the activation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair = 3,
        stride: IntOrPair = 1,
        padding: str | IntOrPair = 0,
        dilation: IntOrPair = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        norm_layer: NormLayer | None = None,
        depthwise_activation: str = "identity",
        activation: str = "identity",
    ) -> None:
        super().__init__()
        self.depthwise = DepthwiseConv2d(
            in_channels, kernel_size, stride, padding, dilation, 1, bias, "zeros", device, dtype
        )
        self._follow("depthwise", norm_layer, depthwise_activation)
        self.pointwise = PointwiseConv2d(in_channels, out_channels, bias, device, dtype)
        self._follow("pointwise", norm_layer, activation)

    @classmethod
    def from_dense(cls, block: nn.Module) -> DepthwiseSeparableConv2d:
        """The layer that computes what a block of depthwise and 1×1 `torch.nn.Conv2d` does, with a copy of its weights.

        `block`: a `torch.nn.Sequential`, nested or not, in which each convolution may be followed by a BatchNorm and an
        activation. Raises: `ValueError` for any other block.
        """
        stages = stages_of(block, ("depthwise", "pointwise"))
        depthwise, pointwise = (stage.convolution for stage in stages)
        layer = cls(
            depthwise.in_channels,
            pointwise.out_channels,
            depthwise.kernel_size,
            depthwise.stride,
            depthwise.padding,
            depthwise.dilation,
            has_bias(stages),
            depthwise.weight.device,
            depthwise.weight.dtype,
            norm_layer=norm_layer_of(stages),
            depthwise_activation=stages[0].activation,
            activation=stages[1].activation,
        )
        layer.training = block.training
        copy_stages(stages, [(convolution, norm) for convolution, norm, _ in layer._stages()])
        return layer

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self._is_one_op(x, residual) or isinstance(self.depthwise.padding, str):
            return self._one_by_one(x, residual)
        depthwise: Any = self.depthwise
        return ops.separable_conv2d(
            *(x, *self._folded(), residual),
            stride=depthwise.stride,
            padding=depthwise.padding,
            dilation=depthwise.dilation,
            depthwise_activation=self._activations["depthwise"],
            activation=self._activations["pointwise"],
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {activation}" for name, activation in self._activations.items())


class InvertedResidual(_Block):
    """Expand 1×1, depthwise, project 1×1 (MobileNet V2, arXiv:1801.04381), each with norm and activation.

    Adds its input where `residual` is true, by default if the stride is 1 and the channels stay. Children `expand`,
    `expand_norm`, `depthwise`, `depthwise_norm`, `project`, `project_norm` (norms only with `norm_layer`). A state dict
    of other names, such as that of a torchvision block, loads if it has the same tensors in this order.

    x: `[N, C_in, H, W]` → `[N, C_out, H_out, W_out]`. `padding` None keeps the size at stride 1, for an odd kernel.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        norm_layer: NormLayer | None = None,
        expand_activation: str = "relu6",
        depthwise_activation: str = "relu6",
        activation: str = "identity",
        residual: bool | None = None,
    ) -> None:
        super().__init__()
        self.residual = stride == 1 and in_channels == out_channels if residual is None else residual
        if self.residual and (stride != 1 or in_channels != out_channels):
            raise ValueError(
                f"residual: expected stride 1 and equal channels, got stride {stride}, {in_channels} → {out_channels}"
            )
        self.expand = PointwiseConv2d(in_channels, hidden_channels, bias, device, dtype)
        self._follow("expand", norm_layer, expand_activation)
        around = dilation * (kernel_size - 1) // 2 if padding is None else padding
        self.depthwise = DepthwiseConv2d(
            hidden_channels, kernel_size, stride, around, dilation, 1, bias, "zeros", device, dtype
        )
        self._follow("depthwise", norm_layer, depthwise_activation)
        self.project = PointwiseConv2d(hidden_channels, out_channels, bias, device, dtype)
        self._follow("project", norm_layer, activation)

    @classmethod
    def from_dense(cls, block: nn.Module, residual: bool | None = None) -> InvertedResidual:
        """The layer that computes what a block of three convolutions does, with a copy of its weights.

        Args:
            block: its modules are convolutions 1×1, depthwise and 1×1, each with an optional BatchNorm and activation:
                a `torch.nn.Sequential`, nested or not, or a torchvision `InvertedResidual`.
            residual: whether the block adds its input; where None, what its `use_res_connect` or `has_residual` says,
                and no for a `torch.nn.Sequential`.

        Raises: `ValueError` for any other block, or one that does not say whether it adds its input.
        """
        stages = stages_of(block, ("pointwise", "depthwise", "pointwise"))
        if residual is None:
            residual = getattr(block, "use_res_connect", getattr(block, "has_residual", None))
            if residual is None and not isinstance(block, nn.Sequential):
                raise ValueError(f"residual: expected True or False, as {type(block).__name__} does not tell, got None")
        expand, depthwise, project = (stage.convolution for stage in stages)
        squares = [depthwise.kernel_size, depthwise.stride, depthwise.padding, depthwise.dilation]
        if any(not isinstance(value, tuple) or value[0] != value[1] for value in squares):
            raise ValueError(f"block: expected a depthwise convolution of square geometry, got {depthwise}")
        kernel_size, stride, padding, dilation = (int(value[0]) for value in squares)
        layer = cls(
            expand.in_channels,
            expand.out_channels,
            project.out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            has_bias(stages),
            expand.weight.device,
            expand.weight.dtype,
            norm_layer=norm_layer_of(stages),
            expand_activation=stages[0].activation,
            depthwise_activation=stages[1].activation,
            activation=stages[2].activation,
            residual=bool(residual),
        )
        layer.training = block.training
        copy_stages(stages, [(convolution, norm) for convolution, norm, _ in layer._stages()])
        return layer

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.residual else None
        if not self._is_one_op(x, residual):
            return self._one_by_one(x, residual)
        depthwise: Any = self.depthwise
        return ops.inverted_residual(
            *(x, *self._folded(), residual),
            stride=depthwise.stride,
            padding=depthwise.padding,
            dilation=depthwise.dilation,
            expand_activation=self._activations["expand"],
            depthwise_activation=self._activations["depthwise"],
            activation=self._activations["project"],
        )

    def extra_repr(self) -> str:
        activations = ", ".join(f"{name}: {activation}" for name, activation in self._activations.items())
        return f"{activations}, residual={self.residual}"
