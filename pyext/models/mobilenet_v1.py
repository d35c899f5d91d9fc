"""MobileNet V1: depthwise separable convolutions in a straight line, scaled by the width multiplier `alpha`."""

import torch
from torch import Tensor, nn

from kernelpress.layers import Linear
from kernelpress.models.blocks import (
    check_positive,
    conv_norm_act,
    depthwise_norm_act,
    initialise,
    make_divisible,
    pointwise_norm_act,
)

__all__ = ["MobileNetV1", "mobilenet_v1"]

_STEM_CHANNELS = 32
_PAIRS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))


class MobileNetV1(nn.Module):
    """Howard et al., MobileNets, arXiv 1704.04861, table 1: a stem and 13 depthwise + pointwise pairs.

    x: [N, in_channels, H, W] → [N, num_classes]. `alpha` multiplies every channel count (rounded to multiples of 8);
    with `small_input` the stem has stride 1, for images of about 32×32.
    """

    def __init__(
        self, *, num_classes: int = 1000, in_channels: int = 3, alpha: float = 1.0, small_input: bool = False
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_channels=in_channels, alpha=alpha)
        channels = make_divisible(_STEM_CHANNELS * alpha)
        stages: list[nn.Module] = [conv_norm_act(in_channels, channels, 3, 1 if small_input else 2, nn.ReLU)]
        for base_channels, stride in _PAIRS:
            out_channels = make_divisible(base_channels * alpha)
            depthwise = depthwise_norm_act(channels, 3, stride, nn.ReLU)
            stages.append(nn.Sequential(depthwise, pointwise_norm_act(channels, out_channels, nn.ReLU)))
            channels = out_channels
        self.features = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
        return logits


def mobilenet_v1(
    *, num_classes: int = 1000, in_channels: int = 3, alpha: float = 1.0, small_input: bool = False
) -> MobileNetV1:
    """MobileNet V1: 4.2 M parameters and 569 MMAC at 224×224 with `alpha` 1."""
    return MobileNetV1(num_classes=num_classes, in_channels=in_channels, alpha=alpha, small_input=small_input)
