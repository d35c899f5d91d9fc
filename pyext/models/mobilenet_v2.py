"""MobileNet V2: inverted residuals with linear bottlenecks, with torchvision's state-dict keys."""

import torch
from torch import Tensor, nn

from kernelpress.layers import Linear, PointwiseConv2d
from kernelpress.models.blocks import (
    check_positive,
    conv_norm_act,
    depthwise_norm_act,
    initialise,
    make_divisible,
    pointwise_norm_act,
)

__all__ = ["InvertedBottleneck", "MobileNetV2", "mobilenet_v2"]

_STEM_CHANNELS = 32
_LAST_CHANNELS = 1280
# expansion, channels, repeats, stride of the first
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class InvertedBottleneck(nn.Module):
    """Expand (1×1), depthwise (3×3), project (1×1, linear), plus the input where shapes allow.

    Source: Sandler et al. 2018, figure 4d. The convolutions stand apart with their BatchNorms, for training;
    emission fuses them.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        stages: list[nn.Module] = []
        if expansion != 1:
            stages.append(pointwise_norm_act(in_channels, hidden, nn.ReLU6))
        stages.append(depthwise_norm_act(hidden, 3, stride, nn.ReLU6))
        stages += [PointwiseConv2d(hidden, out_channels, bias=False), nn.BatchNorm2d(out_channels)]
        self.conv = nn.Sequential(*stages)
        self.has_residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.has_residual else out


class MobileNetV2(nn.Module):
    """Sandler et al., MobileNetV2, CVPR 2018, table 2.

    x: [N, in_channels, H, W] → [N, num_classes]. `width_mult` multiplies every channel count but the last feature
    map's, which never shrinks. With `small_input` the stem and the second stage have stride 1, for images of about
    32×32.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        width_mult: float = 1.0,
        small_input: bool = False,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_channels=in_channels, width_mult=width_mult)
        channels = make_divisible(_STEM_CHANNELS * width_mult)
        stages: list[nn.Module] = [conv_norm_act(in_channels, channels, 3, 1 if small_input else 2, nn.ReLU6)]
        for index, (expansion, base_channels, repeats, first_stride) in enumerate(_STAGES):
            out_channels = make_divisible(base_channels * width_mult)
            for repeat in range(repeats):
                downsamples = repeat == 0 and not (small_input and index == 1)
                stride = first_stride if downsamples else 1
                stages.append(InvertedBottleneck(channels, out_channels, stride, expansion))
                channels = out_channels
        last_channels = make_divisible(_LAST_CHANNELS * max(1.0, width_mult))
        stages.append(pointwise_norm_act(channels, last_channels, nn.ReLU6))
        self.features = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        head = Linear(last_channels, num_classes)
        self.classifier = nn.Sequential(nn.Dropout(dropout), head)
        initialise(self)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
        return logits


def mobilenet_v2(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    width_mult: float = 1.0,
    small_input: bool = False,
    dropout: float = 0.2,
) -> MobileNetV2:
    """MobileNet V2: 3.5 M parameters and 301 MMAC at 224×224 with `width_mult` 1."""
    return MobileNetV2(
        num_classes=num_classes,
        in_channels=in_channels,
        width_mult=width_mult,
        small_input=small_input,
        dropout=dropout,
    )
