"""MobileNet V1: depthwise separable convolutions in a straight line, thinner and smaller by two multipliers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernelpress.layers import Linear
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

__all__ = ["ARCHITECTURES", "MobileNetV1", "mobilenet_v1"]

_STEM_CHANNELS = 32
_PAIRS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))


class MobileNetV1(nn.Module):
    """Howard et al., MobileNets, arXiv 1704.04861, table 1: a stem and 13 depthwise + pointwise pairs.

    x: [N, in_channels, H, W] → [N, num_classes]. `width_multiplier` (α) multiplies every channel count (rounded to
    multiples of 8), `resolution_multiplier` (ρ) the sides of the images, which are resized bilinearly before the stem
    unless it is 1. With `relu6` all activations are ReLU6 instead of ReLU, as in the authors' and timm's code. With
    `small_input` the stem has stride 1, for images of about 32×32.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        width_multiplier: float = 1.0,
        resolution_multiplier: float = 1.0,
        relu6: bool = False,
        small_input: bool = False,
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_channels=in_channels)
        check_positive(width_multiplier=width_multiplier, resolution_multiplier=resolution_multiplier)
        self.resolution_multiplier = resolution_multiplier
        activation = nn.ReLU6 if relu6 else nn.ReLU
        channels = scaled("width_multiplier", width_multiplier, _STEM_CHANNELS)
        stages: list[nn.Module] = [conv_norm_act(in_channels, channels, 3, 1 if small_input else 2, activation)]
        for base_channels, stride in _PAIRS:
            out_channels = scaled("width_multiplier", width_multiplier, base_channels)
            depthwise = depthwise_norm_act(channels, 3, stride, activation)
            stages.append(nn.Sequential(depthwise, pointwise_norm_act(channels, out_channels, activation)))
            channels = out_channels
        self.features = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        if self.resolution_multiplier != 1:
            sides = [max(1, round(side * self.resolution_multiplier)) for side in x.shape[2:]]
            x = F.interpolate(x, sides, mode="bilinear")
        logits: Tensor = self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
        return logits


def mobilenet_v1(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    width_multiplier: float = 1.0,
    resolution_multiplier: float = 1.0,
    relu6: bool = False,
    small_input: bool = False,
) -> MobileNetV1:
    """MobileNet V1: 4.2 M parameters and 569 MMAC at 224×224."""
    return MobileNetV1(
        num_classes=num_classes,
        in_channels=in_channels,
        width_multiplier=width_multiplier,
        resolution_multiplier=resolution_multiplier,
        relu6=relu6,
        small_input=small_input,
    )


_PAPER = "Howard et al. 2017, arXiv 1704.04861"


def _published(parameters: float, multiply_adds: float, accuracy: float, table: str, **options: float) -> Published:
    return Published(_PAPER, parameters, multiply_adds, table, accuracy, f"{_PAPER}, {table}", options)


_TIMM = KeyMap(
    "timm",
    (
        *numbered((1, 2, 2, 6, 2), "features.{}.", first=1),
        (r"^conv_stem\.", "features.0.0."),
        (r"^bn1\.", "features.0.1."),
        (r"\.conv_dw\.", ".0.0."),
        (r"\.bn1\.", ".0.1."),
        (r"\.conv_pw\.", ".1.0."),
        (r"\.bn2\.", ".1.1."),
    ),
    {"relu6": True},
)

ARCHITECTURES = (
    Architecture(
        "mobilenet_v1",
        mobilenet_v1,
        (
            _published(4.2e6, 569e6, 70.6, "table 6"),
            _published(2.6e6, 325e6, 68.4, "table 6", width_multiplier=0.75),
            _published(1.3e6, 149e6, 63.7, "table 6", width_multiplier=0.5),
            _published(0.5e6, 41e6, 50.6, "table 6", width_multiplier=0.25),
            _published(4.2e6, 418e6, 69.1, "table 7", resolution_multiplier=6 / 7),
            _published(4.2e6, 290e6, 67.2, "table 7", resolution_multiplier=5 / 7),
            _published(4.2e6, 186e6, 64.4, "table 7", resolution_multiplier=4 / 7),
        ),
        (KeyMap("kernelpress"), _TIMM),
    ),
)
