"""MobileNet V2: inverted residuals with linear bottlenecks, with torchvision's state-dict keys."""

import torch
from torch import Tensor, nn

from kernelpress.layers import Linear, PointwiseConv2d
from kernelpress.models.architecture import Architecture, KeyMap, Published, numbered
from kernelpress.models.blocks import (
    check_images,
    check_positive,
    conv_norm_act,
    depthwise_norm_act,
    initialise,
    pointwise_norm_act,
    scaled,
)

__all__ = ["ARCHITECTURES", "InvertedBottleneck", "MobileNetV2", "mobilenet_v2"]

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
        channels = scaled("width_mult", width_mult, _STEM_CHANNELS)
        stages: list[nn.Module] = [conv_norm_act(in_channels, channels, 3, 1 if small_input else 2, nn.ReLU6)]
        for index, (expansion, base_channels, repeats, first_stride) in enumerate(_STAGES):
            out_channels = scaled("width_mult", width_mult, base_channels)
            for repeat in range(repeats):
                downsamples = repeat == 0 and not (small_input and index == 1)
                stride = first_stride if downsamples else 1
                stages.append(InvertedBottleneck(channels, out_channels, stride, expansion))
                channels = out_channels
        last_channels = scaled("width_mult", max(1.0, width_mult), _LAST_CHANNELS)
        stages.append(pointwise_norm_act(channels, last_channels, nn.ReLU6))
        self.features = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        head = Linear(last_channels, num_classes)
        self.classifier = nn.Sequential(nn.Dropout(dropout), head)
        initialise(self)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
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


_PAPER = "Sandler et al. 2018, arXiv 1801.04381"
_BLOCK = (
    (r"\.conv_pw\.", ".conv.0.0."),
    (r"\.bn1\.", ".conv.0.1."),
    (r"\.conv_dw\.", ".conv.1.0."),
    (r"\.bn2\.", ".conv.1.1."),
    (r"\.conv_pwl\.", ".conv.2."),
    (r"\.bn3\.", ".conv.3."),
)
# The first block does not expand.
_FIRST_BLOCK = (
    (r"^blocks\.0\.0\.conv_dw\.", "features.1.conv.0.0."),
    (r"^blocks\.0\.0\.bn1\.", "features.1.conv.0.1."),
    (r"^blocks\.0\.0\.conv_pw\.", "features.1.conv.1."),
    (r"^blocks\.0\.0\.bn2\.", "features.1.conv.2."),
)
_ENDS = (
    (r"^conv_stem\.", "features.0.0."),
    (r"^bn1\.", "features.0.1."),
    (r"^conv_head\.", "features.18.0."),
    (r"^bn2\.", "features.18.1."),
    (r"^classifier\.", "classifier.1."),
)
_TIMM = KeyMap(
    "timm", (*_ENDS, *_FIRST_BLOCK, *numbered(tuple(r for _, _, r, _ in _STAGES), "features.{}.", 1), *_BLOCK)
)

ARCHITECTURES = (
    Architecture(
        "mobilenet_v2",
        mobilenet_v2,
        (Published(_PAPER, 3_504_872, 301e6, "torchvision", 72.0, f"{_PAPER}, table 4"),),
        (KeyMap("torchvision"), _TIMM),
    ),
)
